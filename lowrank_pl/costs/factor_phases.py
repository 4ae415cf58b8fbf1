"""What loading, statistics and decomposition need: formulas of shapes, each beside the code that it is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby

from lowrank_pl.calibration.statistics import SHARE
from lowrank_pl.costs.anatomy import Anatomy
from lowrank_pl.costs.estimate import Phase, WorkKind
from lowrank_pl.costs.workload import Machine, Workload
from lowrank_pl.methods.prune.base import STEPS

__all__ = [
    "decomposition_phase",
    "factor_bytes",
    "load_phase",
    "narrowing_phases",
    "norms_phase",
    "share_phase",
    "statistics_phases",
]

_SAVING = 4
"""Copies of a store's file in memory while it is written: the tensors in float32, the file, and the file again while
its checksum is put in."""


_ROOTS = 4
"""Matrices of float64 while a square root is taken: the moment, it and its transpose averaged, the root."""


_SVD_WORK = 5
"""What LAPACK's divide and conquer works in, in squares of the smaller side; the polar iteration takes no more."""


_EIGENVALUES = 0.1
"""What eigenvalues alone take, of a whole singular value decomposition of as large a matrix."""


_READS = 3
"""How often weights that are never whole in memory are read: for their fingerprint, a trial, and the walk itself; for
gradients once more, on the way back."""


_PACKED = 0.75
"""Bytes a number in a GGUF, of four to five bits, with the room for those that are not packed."""


def load_phase(model: Anatomy, machine: Machine, program: float) -> Phase:
    """Return what loading the whole base takes.

    Args:
        model: The base.
        machine: Where.
        program: Bytes of Python and its libraries.
    """
    host: dict[str, float] = {"Python and libraries": program}
    device: dict[str, float] = {"dense weights": model.bytes}
    if model.unpacked:
        # First its tensors beside the model that takes them, then that model beside its copy without a quantisation.
        host["the same in float32, unpacked"] = 4.0 * model.parameters
        host["packed file"] = _PACKED * model.parameters
    if not machine.unified:
        # A model is made on the CPU as a whole, then moved, or sharded when its masked layers are in.
        host["dense weights before they move"] = model.bytes
    if machine.sharded:
        device = {}
    return Phase("load", device, host, read=(_PACKED if model.unpacked else model.itemsize) * model.parameters)


def share_phase(model: Anatomy, machine: Machine, program: float) -> Phase:
    """Return what reading a process's share of the base takes; arguments as in ``load_phase``."""
    share = model.bytes / machine.processes
    # The rows of a matrix are copied from the pages of its file, which are let go then.
    pages = model.largest * model.itemsize / machine.processes
    host = {"Python and libraries": program, "its file, mapped": pages}
    return Phase("load shares", {"dense weights": share}, host, read=share)


def statistics_phases(model: Anatomy, work: Workload, machine: Machine, program: float) -> list[Phase]:
    """Return what measuring takes: moments of inputs, of output gradients, and weight gradients, as far as needed.

    Arguments as in the other functions here, and ``work``, what the run does.
    """
    needs = {need for settings in work.decompositions for need in settings.needs}
    rows, columns = (max(target.shape[side] for target in model.modules) for side in (0, 1))
    phases = []
    if "inputs" in needs:
        phases.append(_input_moments(model, work, machine, program))
    if "output_gradients" in needs:
        sums = {target.name: 8.0 * target.shape[0] ** 2 for target in model.modules}
        gram = float(sum(target.shape[0] ** 2 for target in model.modules))
        phases.append(_gradients(
            "output gradients", model, work, machine, program, sums=sums, gram=gram, product=rows**2, on_disk=0.5
        ))  # fmt: skip
    if work.weighs_tokens:
        phases.append(_weighted_moments("weighted moments", model, work, machine, program))
    if "weight_gradients" in needs or work.weight_gradients:
        sums = {target.name: 4.0 * target.shape[0] * target.shape[1] for target in model.modules}
        gram = float(model.targeted)
        phases.append(_gradients(
            "weight gradients", model, work, machine, program, sums=sums, gram=gram, product=rows * columns, on_disk=1.0
        ))  # fmt: skip
    return phases


def _weighted_moments(name: str, model: Anatomy, work: Workload, machine: Machine, program: float) -> Phase:
    sums = {target.name: 8.0 * _squares(target.shape) for target in model.modules}
    gram = float(sum(_squares(target.shape) for target in model.modules))
    widest = max(max(target.shape) for target in model.modules)
    return _gradients(name, model, work, machine, program, sums=sums, gram=gram, product=widest**2, on_disk=0.5)


def narrowing_phases(model: Anatomy, work: Workload, machine: Machine, program: float) -> list[Phase]:
    """Return what making bases with narrower MLPs takes, at most; arguments as in ``statistics_phases``.

    Each weighted map of an MLP is multiplied out at every width that is tried, by one process.
    """
    # The dense base is measured for it, whatever is measured on the narrowed one.
    plain = replace(work, decompositions=(), streamed=False)
    times = sum(len(work.keeps) if settings.share is None else 1 for settings in work.prunings)
    shares = (1.0, *STEPS) if any(settings.share is None for settings in work.prunings) else (1.0,)
    double, spectra, most = 0.0, 0.0, 0.0
    for target in model.modules:
        short, long = sorted(target.shape)
        for share in shares if short < long else (1.0,):
            wide = share * long
            double += short * wide * (short + wide + short)
            spectra += min(short, wide) ** 3
        double += 2 * long**3
        most = max(most, 8.0 * (_ROOTS * long**2 + 6 * short * long))
    done: dict[WorkKind, float] = {
        "double": machine.processes * times * double, "svd": machine.processes * times * _EIGENVALUES * spectra,
    }  # fmt: skip
    device = {**_weights(model, plain), "weighted maps of an MLP": 3 * most}
    host = {"Python and libraries": program, "a file being written": float(model.bytes)}
    beside = {"reload of what was written": float(model.bytes)}
    disk = {"narrowed bases": times * float(model.bytes)}
    widths = _placed("widths of MLPs", device, host, machine, plain, disk, 0, done)
    return [
        _weighted_moments("weighted moments, all features", model, plain, machine, program),
        replace(widths, beside=beside),
    ]


def norms_phase(model: Anatomy, work: Workload, machine: Machine, program: float) -> Phase:
    """Return what measuring the gradients takes that a refit weighs its tokens by; arguments as above."""
    sums = {target.name: 4.0 * work.refitted * work.length for target in model.modules}
    # The whole model is there for the refit itself.
    work = replace(work, sequences=work.refitted, streamed=False)
    return _gradients("gradient norms", model, work, machine, program, sums=sums, gram=0.0, product=0, on_disk=1.0)


def _input_moments(model: Anatomy, work: Workload, machine: Machine, program: float) -> Phase:
    widths = model.input_widths
    blocks = {target.group: target.block for target in model.modules}
    sums = {group: 8.0 * width**2 for group, width in widths.items()}
    by_block = _block_by_block(sums, model, work, machine)
    widest = max(widths.values())
    device = {
        **_weights(model, work),
        "second moments of inputs": _of_a_block(sums, blocks) if by_block else sum(sums.values()),
        # The product of a batch, and the look whether it is finite.
        "products of a batch": 3 * 4.0 * widest**2,
        "activations": 4 * work.length * widest * model.itemsize,
        "logits": work.length * model.vocabulary * model.itemsize,
    }
    squares = sum(width**2 for width in widths.values())
    tokens = work.sequences * work.length * _again(work)
    done: dict[WorkKind, float] = {"forward": tokens * model.multiply_adds, "float32": float(tokens * squares)}
    disk = {"moments of inputs": _again(work) * sum(4.0 * width * (width + 1) for width in widths.values())}
    host = {"Python and libraries": program, "a file being written": _SAVING * 4.0 * widest**2}
    if by_block:
        host["hidden states"] = work.sequences * work.length * model.hidden * model.itemsize / machine.processes
    read = _READS * model.bytes if work.streamed else 0.0
    return _placed("moments of inputs", device, host, machine, work, disk, tokens, done, read=read)


def _gradients(
    name: str,
    model: Anatomy,
    work: Workload,
    machine: Machine,
    program: float,
    *,
    sums: Mapping[str, float],
    gram: float,
    product: int,
    on_disk: float,
) -> Phase:
    """Return what passes with a backward pass take.

    Args:
        name: Of the phase.
        model: As in the others.
        work: Likewise.
        machine: Likewise.
        program: Likewise.
        sums: Bytes of what is summed, by module.
        gram: Multiply-adds a token of these sums.
        product: Numbers of the largest product of a batch.
        on_disk: How much of the bytes of the sums goes to disk; float64 is stored as float32.
    """
    tokens = work.sequences * work.length * _again(work)
    total = sum(sums.values())
    host = {"Python and libraries": program, "a file being written": _SAVING * on_disk * max(sums.values())}
    device = {**_weights(model, work), f"sums of {name}": total, "products of a batch": 2 * 4.0 * product}
    disk = {name: _again(work) * on_disk * total}
    forward, passes, read = 1, 3 if work.recomputed else 2, 0.0
    if _block_by_block(sums, model, work, machine):
        device[f"sums of {name}"] = _of_a_block(sums, {target.name: target.block for target in model.modules})
        device |= _alone(model, work, device[f"sums of {name}"])
        state = work.sequences * work.length * model.hidden * model.itemsize / machine.processes
        host |= {"hidden states before every block": len(model.blocks) * state, "gradients by a hidden state": state}
        # The way there and, block by block, once more. Where inputs are measured too, factors that are made of a base's
        # files have the former there.
        there = not (work.streamed and any("inputs" in settings.needs for settings in work.decompositions))
        forward, passes, read = 1 + there, 2 + there, (_READS * there + 1) * model.bytes * work.streamed
    else:
        device |= _at_once(model, work)
    done: dict[WorkKind, float] = {"forward": passes * tokens * model.multiply_adds, "float32": tokens * gram}
    return _placed(name, device, host, machine, work, disk, forward * tokens, done, read=read)


def _at_once(model: Anatomy, work: Workload) -> dict[str, float]:
    """Return what a pass backward through the whole model keeps of a sequence."""
    per_token = model.kept_with_outputs
    found = sum(target.shape[0] for target in model.modules) * float(model.itemsize)
    if work.recomputed:
        # What stays is each block's input and what is watched; one block at a time has all of it.
        per_token = len(model.blocks) * model.hidden * model.itemsize + model.kept_with_outputs / len(model.blocks)
        per_token += model.watched
    # At the end of the forward pass all activations are there, and the logits four times in float32: themselves, their
    # logarithms, and the gradients by both. At the end of the backward pass there are the gradients by all outputs.
    forward = work.length * (per_token + 16 * model.vocabulary)
    backward = work.length * (model.watched + found + 4 * model.vocabulary)
    if forward >= backward:
        return {"activations": work.length * per_token, "logits": 16.0 * work.length * model.vocabulary}
    return {
        "activations": work.length * model.watched,
        "gradients by outputs": work.length * found,
        "logits": 4.0 * work.length * model.vocabulary,
    }


def _alone(model: Anatomy, work: Workload, sums: float) -> dict[str, float]:
    """Return what passes backward through one block or the head alone keep of a sequence, beside a block's ``sums``."""
    activations = work.length * model.kept_with_outputs / len(model.blocks)
    # The head has its turn before any block has sums: what its logits take beyond these is all that counts.
    more = 16.0 * work.length * model.vocabulary - sums - activations
    return {"activations": activations, **({"logits, beyond that": more} if more > 0 else {})}


def _block_by_block(sums: Mapping[str, float], model: Anatomy, work: Workload, machine: Machine) -> bool:
    """Return whether passes are made through one block at a time: what these ``sums`` need decides (``Statistics``)."""
    total = sum(sums.values())
    if work.streamed or work.memory is not None:
        return work.streamed or total > (work.memory or 0)
    return machine.memory is not None and not machine.sharded and total > SHARE * (machine.memory - model.bytes)


def _of_a_block(sums: Mapping[str, float], blocks: Mapping[str, int]) -> float:
    """Return the bytes of the sums of the block that has most."""
    return max(sum(sums[name] for name in names) for _, names in groupby(sums, key=lambda name: blocks[name]))


def decomposition_phase(model: Anatomy, work: Workload, machine: Machine, program: float) -> Phase:
    """Return what square roots and singular value decompositions take; arguments as in ``statistics_phases``."""
    both = work.weighs_tokens or any("output_gradients" in settings.needs for settings in work.decompositions)
    some = any(settings.needs for settings in work.decompositions)
    # Maps that share an input share a root of it, unless tokens weigh for each what they do for it alone.
    inputs = [target.shape[1] for target in model.modules] if work.weighs_tokens else list(model.input_widths.values())
    # Each kind makes all factors anew, and one that measures in the compressed model makes those before it as well.
    times = sum(1 if settings.at_keep is None else 2 for settings in work.decompositions)
    most, double, svd, root_work = 0.0, 0.0, 0.0, 0.0
    for target in model.modules:
        (m, n), k = target.shape, min(target.shape)
        roots = 8.0 * ((n**2 if some else 0) + (m**2 if both else 0))
        widest = max(n if some else 0, m if both else 0)
        # The weight, the weighted one, the copy that is worked in, and the parts twice: as they come and unweighted.
        parts = 8.0 * (3 * m * n + 2 * k * (m + n) + _SVD_WORK * k * k)
        most = max(most, roots + parts, roots + 8.0 * (_ROOTS - 1) * widest**2)
        double += (m * n + k * n) * n * some + (m * n + k * m) * m * both
        root_work += m**3 / 3 * both
        svd += m * n * k
    if some:
        root_work += sum(width**3 / 3 for width in inputs)
    moments = 4.0 * some * sum(width**2 for width in inputs)
    moments += 4.0 * both * sum(target.shape[0] ** 2 for target in model.modules)
    largest = max(factor_bytes([target.shape]) for target in model.modules)
    done: dict[WorkKind, float] = {"double": times * (double + root_work), "svd": times * svd}
    device = {**_weights(model, work), "roots and decomposition of a module": most}
    host = {"Python and libraries": program, "a file being written": _SAVING * largest}
    disk = {"factors": times * factor_bytes(target.shape for target in model.modules)}
    # Where processes share the maps out, each reads its own once more.
    again = model.targeted * model.itemsize if work.streamed and machine.processes > 1 else 0.0
    read = (times * moments + again) / machine.processes
    return _placed("decomposition", device, host, machine, work, disk, 0, done, read=read)


def factor_bytes(shapes: Iterable[tuple[int, int]]) -> float:
    """Return the bytes of a store of all components of maps of ``shapes``: float32, singular values in float64.

    >>> factor_bytes([(2, 3)])
    56.0
    """
    return float(sum(min(shape) * (4 * sum(shape) + 8) for shape in shapes))


def _squares(shape: tuple[int, int]) -> int:
    return sum(side**2 for side in shape)


def _weights(model: Anatomy, work: Workload) -> dict[str, float]:
    if not work.streamed:
        return {"dense weights": model.bytes}
    return {"weights of a block": max(model.blocks) * model.itemsize, "weights around": model.outside * model.itemsize}


def _again(work: Workload) -> int:
    """Return how often everything is measured: twice where the compressed model is measured as well."""
    return 1 + any(settings.at_keep is not None for settings in work.decompositions)


def _placed(
    name: str,
    device: dict[str, float],
    host: dict[str, float],
    machine: Machine,
    work: Workload,
    disk: Mapping[str, float],
    tokens: int,
    done: Mapping[WorkKind, float],
    read: float = 0.0,
) -> Phase:
    """Return the phase of one of the processes, which share the work; a base to be sharded is on the CPU until then."""
    done = {kind: amount / machine.processes for kind, amount in done.items()}
    if machine.sharded and not work.streamed:
        device, host = {}, {**host, **device}
    return Phase(name, device, host, disk=disk, tokens=tokens, work=done, read=read)
