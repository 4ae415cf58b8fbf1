"""What loading, pruning, statistics and decompositions need: formulas of shapes that follow the code they predict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from lowrank_pl.calibration.embedding_moments import EmbeddingMoments
from lowrank_pl.calibration.gradients import GradientMoments, WeightFisher, WeightGradients
from lowrank_pl.calibration.hidden_states import cache_for
from lowrank_pl.calibration.input_moments import InputMoments
from lowrank_pl.calibration.measures import Measure, Passes
from lowrank_pl.calibration.statistics import SHARE
from lowrank_pl.calibration.weighted_moments import TokenNorms, WeightedMoments
from lowrank_pl.costs.estimate import Phase, WorkKind
from lowrank_pl.costs.workload import Run
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.prune.settings import STEPS, LLMPruner, WidthPruning
from lowrank_pl.models.names import expert_number
from lowrank_pl.models.targets import HEAD

__all__ = [
    "decomposition_phase",
    "factor_bytes",
    "load_phase",
    "norms_phase",
    "pruning_phases",
    "share_phase",
    "statistics_phases",
]

_SAVING = 4
"""Copies of a store's file in memory while it is written: the tensors in float32, the file, and the file again while
its checksum is put in."""

_ROOTS = 4
"""Matrices of float64 while a square root is taken: the moment, it and its transpose averaged, the root."""

_SVD_WORK = 5
"""Workspace of LAPACK's divide and conquer, in squares of the smaller side; the polar iteration takes no more."""

_EIGENVALUES = 0.1
"""Time of eigenvalues alone, relative to a whole singular value decomposition of as large a matrix."""

_BAND = 1 / 8
"""Rows of a symmetric matrix that are one product (``SymmetricSum``), relative to all."""

_READS = 3
"""How often weights that are never whole in memory are read: for their fingerprint, a trial, and the block-wise pass.
Gradients read them once more, on the way back."""

_TALL = 16384
"""Rows of embeddings that are in float64 at a time (``decompose_rows``)."""

_UNREAD = Passes(torch.empty(0, 2, device="meta"))
"""Sequences for sums whose sizes do not depend on any."""

_PACKED = 0.75
"""Bytes a number in a GGUF file of four to five bits, with the numbers that are not packed."""


@dataclass(frozen=True)
class _Sums:
    """What passes over the calibration text add up.

    Args:
        name: Name of the phase.
        sizes: Bytes of the sums, by entry of the store.
        stored: Bytes on disk, by entry of the store.
        blocks: The block of each entry.
        multiply_adds: Multiply-adds a token of all sums.
        product: Bytes of the largest product of a batch.
        moment: Bytes that an entry takes on the device while it is stored.
    """

    name: str
    sizes: Mapping[str, float]
    stored: Mapping[str, float]
    blocks: Mapping[str, int]
    multiply_adds: float = 0.0
    product: float = 0.0
    moment: float = 0.0

    @classmethod
    def of(cls, name: str, kind: type[Measure], run: Run) -> _Sums:
        """Return sums of one ``kind`` of statistic that are stored as they are, and cost no products."""
        calibration = run.work.preparation.calibration
        # Some kinds ask for the number of tokens; the tokens themselves have no values.
        passes = Passes(torch.empty(calibration.sequences, calibration.length, device="meta"))
        entries = {kind.key(target): target for target in run.model.modules}
        sizes = {entry: float(kind.bytes_of(target, passes)) for entry, target in entries.items()}
        return cls(name, sizes, sizes, {entry: target.block for entry, target in entries.items()})

    @property
    def total(self) -> float:
        """Bytes of all sums."""
        return sum(self.sizes.values())

    def held(self, by_block: bool) -> float:
        """Return the bytes of all sums, or those of the block that has most."""
        if not by_block:
            return self.total
        groups = groupby(self.sizes, key=lambda entry: self.blocks[entry])
        return max(sum(self.sizes[entry] for entry in entries) for _, entries in groups)

    def beside(self, measuring: Mapping[str, float]) -> dict[str, float]:
        """Return what stands beside the sums: what ``measuring`` needs, or an entry that is stored, if that is more."""
        found = {**measuring, "products of a batch": self.product}
        return found if sum(found.values()) >= self.moment else {"a moment while it is stored": self.moment}


def _second_moments(
    name: str, kind: type[Measure], run: Run, sides: Callable[[tuple[int, int]], Sequence[int]]
) -> _Sums:
    """Return sums of second moments of the ``sides`` ``(out, in)`` of each target (``SymmetricSum``)."""
    found = _Sums.of(name, kind, run)
    shapes = {kind.key(target): target.shape for target in run.model.modules}
    shares = {kind.key(target): run.model.share(target) for target in run.model.modules}
    widest = max(max(sides(shape)) for shape in shapes.values())
    return replace(
        found,
        # Half of each matrix is summed, in float64; all of it is stored, in float32.
        stored={entry: 4.0 * sum(side**2 for side in sides(shape)) for entry, shape in shapes.items()},
        multiply_adds=sum(size * shares[entry] for entry, size in found.sizes.items()) / 8,
        product=4.0 * _BAND * widest**2,
        # Before it is stored there are the whole matrix in float64 and its mean.
        moment=2 * 8.0 * widest**2,
    )


def load_phase(run: Run) -> Phase:
    """Return what loading the whole base needs."""
    model, machine = run.model, run.machine
    host = _program(run)
    if model.packed:
        # The file's tensors stand beside the model that takes them, then that model beside its copy without packing.
        host["the same in float32, unpacked"] = 4.0 * model.parameters
        host["packed file"] = _PACKED * model.parameters
    if not machine.on_cpu:
        # A model is made on the CPU as a whole, then moved, or sharded once its masked layers are in.
        host["dense weights before they move"] = float(model.bytes)
    device = {} if machine.sharded else {"dense weights": float(model.bytes)}
    return Phase("load", device, host, work={"disk": (_PACKED if model.packed else model.itemsize) * model.parameters})


def share_phase(run: Run) -> Phase:
    """Return what reading a process's share of the base needs."""
    share = run.model.bytes / run.machine.processes
    # The rows of a matrix are copied from the pages of its file, which are then released.
    pages = run.model.largest * run.model.itemsize / run.machine.processes
    return Phase(
        "load shares", {"dense weights": share}, {**_program(run), "its file, mapped": pages}, work={"disk": share}
    )


def statistics_phases(run: Run) -> list[Phase]:
    """Return what the statistics need: moments of inputs and of output gradients, and weight gradients."""
    preparation = run.work.preparation
    needs = {need for settings in preparation.all_decompositions for need in settings.needs}
    phases = []
    if "inputs" in needs:
        phases.append(_input_moments(run))
    if "output_gradients" in needs:
        sums = _second_moments("output gradients", GradientMoments, run, lambda shape: shape[:1])
        phases.append(_gradients(run, sums))
    if preparation.weighs_tokens:
        phases.append(_gradients(run, _second_moments("weighted moments", WeightedMoments, run, lambda shape: shape)))
    if preparation.weight_gradients:
        phases.append(_gradients(run, _weight_gradients("weight gradients", WeightGradients, run)))
    if "weight_fisher" in needs:
        phases.append(_gradients(run, _weight_gradients("weight fisher", WeightFisher, run)))
    if preparation.dropping and any(target.experts for target in run.model.modules):
        phases.append(_gradients(run, _dropped_losses(run)))
    if run.model.embeddings:
        phases += _embedding_moments(run)
    return phases


def _dropped_losses(run: Run) -> _Sums:
    """Return the sums that say what dropping experts costs: a number for every two of a block, and two for each."""
    places = {target.experts: target.block for target in run.model.modules if target.experts}
    named = {(target.experts, expert_number(target.name)) for target in run.model.modules if target.experts}
    counts = Counter(experts for experts, _ in named)
    sizes = {experts: 8.0 * (counts[experts] ** 2 + 2 * counts[experts]) for experts in places}
    return _Sums("losses of dropped experts", sizes, sizes, places)


def _embedding_moments(run: Run) -> list[Phase]:
    """Return what a pass of its own needs that measures embeddings and head, for each kind that needs one."""
    model, preparation = run.model, run.work.preparation
    kinds = {settings.kind for settings in preparation.all_decompositions}
    places = {place.name: place for target in model.embeddings for place in target.places}
    phases = []
    if "two_sided" in kinds:
        sizes = {name: float(EmbeddingMoments.bytes_of(place, _UNREAD)) for name, place in places.items()}
        stored = {name: 4.0 * place.shape[1] ** 2 + 8.0 * place.shape[0] for name, place in places.items()}
        sums = _Sums("embedding moments", sizes, stored, dict.fromkeys(places, 0))
        widest = max(place.shape[1] for place in places.values())
        adds = sum(place.shape[1] ** 2 for place in places.values()) / 2
        phases.append(_gradients(run, replace(sums, multiply_adds=adds, moment=2 * 8.0 * widest**2)))
    heads = {name: place for name, place in places.items() if place.kind == HEAD}
    if "whitened" in kinds and heads:
        sizes = {name: 4.0 * place.shape[1] ** 2 for name, place in heads.items()}
        sums = _Sums("moments of the head's inputs", sizes, sizes, dict.fromkeys(heads, 0), sum(sizes.values()) / 8)
        logits = float(preparation.calibration.length * model.vocabulary * model.itemsize)
        device, host = _placed(run, {**_weights(run), f"sums of {sums.name}": sums.total, "logits": logits})
        phases.append(_measuring(run, sums, device, host, passes=1, read=0.0))
    return phases


def _weight_gradients(name: str, kind: type[Measure], run: Run) -> _Sums:
    """Return sums for which the gradient of every weight is computed."""
    # The gradient of a batch in float32, then in float64, and its squares.
    product = 20.0 * max(m * n for m, n in (target.shape for target in run.model.modules))
    return replace(_Sums.of(name, kind, run), multiply_adds=run.model.targeted_for_a_token, product=product)


def pruning_phases(run: Run) -> list[Phase]:
    """Return what making pruned bases needs, at most."""
    prunings = run.work.preparation.prunings
    # The dense base is measured for it, whatever is measured on the pruned base.
    dense = replace(run.work.preparation, decompositions=(), shared=(), by_block=False)
    whole = replace(run, work=replace(run.work, preparation=dense))
    phases = []
    if by_structure := [settings for settings in prunings if isinstance(settings, LLMPruner)]:
        phases += _llm_pruner(whole, by_structure)
    if in_width := [settings for settings in prunings if isinstance(settings, WidthPruning)]:
        phases += _width_pruning(whole, in_width)
    return phases


def _llm_pruner(run: Run, prunings: Sequence[LLMPruner]) -> list[Phase]:
    """Return what LLM-Pruner needs, of which the first process prunes."""
    times = sum(len(run.work.keeps) if settings.keep is None else 1 for settings in prunings)
    size = float(run.model.bytes)
    # A product of weights and gradients in float64, with both of its factors.
    widest = max(target.shape[0] * target.shape[1] for target in run.model.modules)
    device, host = _placed(run, {**_weights(run), "a product of weights and gradients": 24.0 * widest})
    pruned = Phase(
        "heads and neurons",
        device,
        {**host, "a file being written": size},
        {"reload of what was written": size},
        {"bases pruned by llm_pruner": times * size},
        {"float64": float(times * run.model.targeted)},
        waiting=run.program,
    )
    return [_gradients(run, _weight_gradients("weight gradients before pruning", WeightGradients, run)), pruned]


def _width_pruning(whole: Run, prunings: Sequence[WidthPruning]) -> list[Phase]:
    """Return what pruning MLPs in width needs.

    The first process multiplies out every weighted linear layer of an MLP at every width that is tried.
    """
    model = whole.model
    times = sum(len(whole.work.keeps) if settings.share is None else 1 for settings in prunings)
    shares = (1.0, *STEPS) if any(settings.share is None for settings in prunings) else (1.0,)
    products, spectra, most = 0.0, 0.0, 0.0
    for target in model.modules:
        short, long = sorted(target.shape)
        for share in shares if short < long else (1.0,):
            wide = share * long
            products += short * wide * (short + wide + short)
            spectra += min(short, wide) ** 3
        products += 2 * long**3
        most = max(most, 8.0 * (_ROOTS * long**2 + 6 * short * long))
    size = float(model.bytes)
    device, host = _placed(whole, {**_weights(whole), "weighted layers of an MLP": 3 * most})
    widths = Phase(
        "widths of MLPs",
        device,
        {**host, "a file being written": size},
        {"reload of what was written": size},
        {"pruned bases": times * size},
        {"float64": times * products, "svd": times * _EIGENVALUES * spectra},
        waiting=whole.program,
    )
    moments = _second_moments("weighted moments before pruning", WeightedMoments, whole, lambda shape: shape)
    return [_gradients(whole, moments), widths]


def norms_phase(run: Run) -> Phase:
    """Return what measuring the norms of gradients needs, by which a refit weighs its tokens."""
    preparation = run.work.preparation
    text = replace(preparation.calibration, sequences=run.work.refits.sequences)
    # The whole model is loaded for the refit itself.
    run = replace(run, work=replace(run.work, preparation=replace(preparation, calibration=text, by_block=False)))
    return _gradients(run, _Sums.of("gradient norms", TokenNorms, run))


def _input_moments(run: Run) -> Phase:
    model, preparation = run.model, run.work.preparation
    length = preparation.calibration.length
    sums = _second_moments("moments of inputs", InputMoments, run, lambda shape: shape[1:])
    by_block = _block_by_block(run, sums)
    widest = max(model.input_widths.values())
    device, host = _placed(run, {
        **_weights(run),
        "second moments of inputs": sums.held(by_block),
        **sums.beside({
            "activations": 4.0 * length * widest * model.itemsize,
            "logits": float(length * model.vocabulary * model.itemsize),
        }),
    })  # fmt: skip
    host["a file being written"] = _SAVING * max(sums.stored.values())
    states = {"hidden states": _hidden_states(run)} if by_block else {}
    read = float(_READS * model.bytes) if preparation.by_block else 0.0
    return _with_states(run, _measuring(run, sums, device, host, passes=1, read=read), states)


def _gradients(run: Run, sums: _Sums) -> Phase:
    """Return what passes with a backward pass need, which measure ``sums``."""
    model, preparation = run.model, run.work.preparation
    by_block = _block_by_block(run, sums)
    held, parts = sums.held(by_block), 1
    states: dict[str, float] = {}
    passes, read = 3 if preparation.gradient_checkpointing else 2, 0.0
    if by_block:
        held, parts = _part_of_a_block(run, sums)
        measuring = _one_block(run, held)
        state = _hidden_states(run)
        states = {"hidden states before every block": len(model.blocks) * state, "gradients by a hidden state": state}
        # The way forward and, block by block, once more. Where inputs are measured too, factors that are made of a
        # base's files have the hidden states from there.
        forward = not (
            preparation.by_block and any("inputs" in settings.needs for settings in preparation.all_decompositions)
        )
        passes, read = 2 * parts + forward, float((_READS * forward + 1) * model.bytes * preparation.by_block)
    else:
        measuring = _whole_pass(run)
    device, host = _placed(run, {**_weights(run), f"sums of {sums.name}": held, **sums.beside(measuring)})
    host["a file being written"] = _SAVING * max(sums.stored.values())
    return _with_states(run, _measuring(run, sums, device, host, passes=passes, read=read), states)


def _part_of_a_block(run: Run, sums: _Sums) -> tuple[float, int]:
    """Return the bytes of the sums of a block that are held at a time, and in how many passes they are measured.

    Only a mixture's block is divided (``Statistics``). On a GPU of unknown memory the bytes are the least, and how many
    passes there are is not known.
    """
    whole = sums.held(by_block=True)
    if not run.model.shares:
        return whole, 1
    preparation, machine = run.work.preparation, run.machine
    least = max(sums.sizes.values())
    if preparation.memory is not None:
        room = float(preparation.memory)
    elif machine.memory is not None:
        room = SHARE * (machine.memory - sum(_weights(run).values()))
    else:
        return least, 1
    held = min(whole, max(room, least))
    return held, math.ceil(whole / held)


def _measuring(
    run: Run, sums: _Sums, device: Mapping[str, float], host: Mapping[str, float], *, passes: int, read: float
) -> Phase:
    """Return the phase that measures ``sums`` in so many ``passes`` through the model, forward or backward."""
    # Everything is measured twice where the compressed model is measured as well.
    times = 1 + any(settings.at_keep is not None for settings in run.work.preparation.all_decompositions)
    tokens = run.work.preparation.tokens * times / run.machine.processes
    work: dict[WorkKind, float] = {
        "model": passes * tokens * run.model.multiply_adds, "float32": tokens * sums.multiply_adds, "disk": read,
    }  # fmt: skip
    return Phase(sums.name, device, host, disk={sums.name: times * sum(sums.stored.values())}, work=work)


def _whole_pass(run: Run) -> dict[str, float]:
    """Return what a backward pass through the whole model keeps of a sequence."""
    model, length = run.model, run.work.preparation.calibration.length
    kept = model.activations
    per_token = kept.kept_with_outputs
    outputs = sum(model.share(target) * target.shape[0] for target in model.modules) * float(model.itemsize)
    if run.work.preparation.gradient_checkpointing:
        # Each block's input and what is watched stay; all activations are there of one block at a time.
        per_token = len(model.blocks) * model.hidden * model.itemsize + kept.kept_with_outputs / len(model.blocks)
        per_token += kept.watched
    # At the end of the forward pass all activations are there, and the logits four times in float32: themselves, their
    # logarithms, and the gradients by both. At the end of the backward pass there are the gradients by all outputs.
    forward = length * (per_token + 16 * model.vocabulary)
    backward = length * (kept.watched + outputs + 4 * model.vocabulary)
    if forward >= backward:
        return {"activations": length * per_token, "logits": 16.0 * length * model.vocabulary}
    return {
        "activations": length * kept.watched,
        "gradients by outputs": length * outputs,
        "logits": 4.0 * length * model.vocabulary,
    }


def _one_block(run: Run, sums: float) -> dict[str, float]:
    """Return what backward passes through one block or the head alone keep of a sequence, beside a block's ``sums``."""
    model, length = run.model, run.work.preparation.calibration.length
    activations = length * model.activations.kept_with_outputs / len(model.blocks)
    # The head comes before any block has sums: only the part of its logits beyond these adds to the peak.
    more = 16.0 * length * model.vocabulary - sums - activations
    return {"activations": activations, **({"logits, beyond that": more} if more > 0 else {})}


def _block_by_block(run: Run, sums: _Sums) -> bool:
    """Return whether passes go through one block at a time, which ``Statistics`` decides by the size of ``sums``."""
    preparation, machine = run.work.preparation, run.machine
    if preparation.by_block:
        return True
    if preparation.memory is not None:
        return sums.total > preparation.memory
    if machine.sharded:
        return False
    if machine.memory is None:
        # A GPU of unknown memory is counted at the least that the run can do with.
        return not machine.on_cpu
    return sums.total > SHARE * (machine.memory - run.model.bytes)


def _hidden_states(run: Run) -> float:
    """Return the bytes of the hidden states of a process's sequences at one block."""
    return run.work.preparation.tokens * run.model.hidden * run.model.itemsize / run.machine.processes


def _with_states(run: Run, phase: Phase, states: Mapping[str, float]) -> Phase:
    """Return the phase with hidden states of a process where they wait: in main memory, or on disk (``cache_for``)."""
    preparation, machine = run.work.preparation, run.machine
    # A base that is loaded whole has no choice. How much memory is free elsewhere is not known.
    cache = preparation.cache if preparation.by_block else None
    if cache is None and machine.here:
        cache = cache_for(sum(states.values()))
    if cache == "disk":
        return replace(phase, scratch={what: size * machine.processes for what, size in states.items()})
    return replace(phase, host={**phase.host, **states})


def decomposition_phase(run: Run) -> Phase:
    """Return what square roots and singular value decompositions need."""
    model, preparation = run.model, run.work.preparation
    weighs = preparation.weighs_tokens
    both = weighs or any("output_gradients" in settings.needs for settings in preparation.all_decompositions)
    some = any(settings.needs for settings in preparation.all_decompositions)
    # Layers that share an input share a root of it, unless tokens weigh differently for each layer.
    inputs = [target.shape[1] for target in model.modules] if weighs else list(model.input_widths.values())
    kinds = [(model.matrices, _times(preparation.decompositions))] if preparation.decompositions else []
    if preparation.shared:
        kinds.append((model.stacked, _times(preparation.shared)))
    times = sum(count for _, count in kinds)
    most, products, svd, roots, stored, file = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for matrices, count in kinds:
        for matrix in matrices:
            # Of several layers, each has a root of its own outputs.
            (m, n), k, own = matrix.shape, min(matrix.shape), matrix.shape[0] // matrix.layers
            root_bytes = 8.0 * ((n**2 if some else 0) + (m * own if both else 0))
            widest = max(n if some else 0, own if both else 0)
            # The weight, the weighted one, the copy that is worked in, and the parts twice, unweighted ones as well.
            parts = 8.0 * (3 * m * n + 2 * k * (m + n) + _SVD_WORK * k * k)
            most = max(most, root_bytes + parts, root_bytes + 8.0 * (_ROOTS - 1) * widest**2)
            products += count * ((m * n + k * n) * n * some + (m * n + k * m) * own * both)
            roots += count * (m * own**2 / 3 * both)
            svd += count * m * n * k
        shapes = [matrix.shape for matrix in matrices] + [embedding.shape for embedding in model.embeddings]
        stored += count * factor_bytes(shapes)
        file = max(file, *(factor_bytes([shape]) for shape in shapes))
    if some:
        roots += times * sum(width**3 / 3 for width in inputs)
    moments = 4.0 * some * sum(width**2 for width in inputs)
    moments += 4.0 * both * sum(target.shape[0] ** 2 for target in model.modules)
    for embedding in model.embeddings:
        rows, width = embedding.shape
        # The left factor in float32, some rows in float64, and the small matrices of the eigenvectors.
        most = max(most, 4.0 * rows * width + 24.0 * min(rows, _TALL) * width + 8.0 * _ROOTS * width**2)
        products += times * 2 * rows * width**2
        svd += times * width**3
    # Moments of experts are read once more for their mean over a block, which stays while the block is decomposed.
    of_experts = {
        target: some * target.shape[1] ** 2 + both * target.shape[0] ** 2 for target in model.modules if target.experts
    }
    moments += 4.0 * sum(of_experts.values())
    means: Counter[int] = Counter()
    for target, size in of_experts.items():
        if target == target.of_expert(0):
            means[target.block] += 8 * size
    # Where processes share the layers out, each reads its own once more.
    again = model.targeted * model.itemsize if preparation.by_block and run.machine.processes > 1 else 0.0
    work: dict[WorkKind, float] = {
        "float64": products + roots, "svd": svd, "disk": times * moments + again,
    }  # fmt: skip
    at_once = {"roots and decomposition of a module": most}
    if means:
        at_once["means of a block's experts"] = float(max(means.values()))
    device, host = _placed(run, {**_weights(run), **at_once})
    host["a file being written"] = _SAVING * file
    return Phase(
        "decomposition", device, host,
        disk={"factors": stored},
        work={kind: amount / run.machine.processes for kind, amount in work.items()},
    )  # fmt: skip


def _times(decompositions: Sequence[Decomposition]) -> int:
    """Return how often all factors are made: each kind makes them anew.

    A kind that measures in the compressed model makes those before it as well.
    """
    return sum(1 if settings.at_keep is None else 2 for settings in decompositions)


def factor_bytes(shapes: Iterable[tuple[int, int]]) -> float:
    """Return the bytes of a store of all components of layers of ``shapes``: float32, singular values in float64.

    >>> factor_bytes([(2, 3)])
    56.0
    """
    return float(sum(min(shape) * (4 * sum(shape) + 8) for shape in shapes))


def _weights(run: Run) -> dict[str, float]:
    model = run.model
    if not run.work.preparation.by_block:
        return {"dense weights": float(model.bytes)}
    return {
        "weights of a block": float(max(model.blocks) * model.itemsize),
        "weights around": float(model.outside * model.itemsize),
    }


def _program(run: Run) -> dict[str, float]:
    return {"Python and libraries": run.program}


def _placed(run: Run, device: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return what lies on the device and in main memory: a base to be sharded is on the CPU until it is sharded."""
    if run.machine.sharded and not run.work.preparation.by_block:
        return {}, {**_program(run), **device}
    return device, _program(run)
