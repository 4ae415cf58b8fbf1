"""What learning, refitting, scoring and exporting need: formulas of shapes, each beside the code that it is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from lowrank_pl.costs.anatomy import Anatomy
from lowrank_pl.costs.estimate import Phase, WorkKind
from lowrank_pl.costs.factor_phases import factor_bytes
from lowrank_pl.costs.workload import Learner, Machine, Workload
from lowrank_pl.models.offload import STREAMED_BATCH_SIZE
from lowrank_pl.plans.storage import Storage

__all__ = ["export_phase", "learning_phase", "refit_phase", "scoring_phase", "waits"]

_LOGITS = 12
"""Bytes a logit in a step: its logarithm in float32, and the gradients by it and by the logit."""


_MASK = 16
"""Bytes a component: at most one number that learns, its gradient, and two moments of AdamW, in float32."""


_REFIT_PASSES = 4
"""A refit runs over all its sequences about so often (``refit``)."""


_REFIT_MOMENTS = 14
"""Squares of an input's width in float64 at a time: sums of fitted and held-back sequences, both, and their means."""


_HIDDEN = 4
"""Hidden states of the dense and the compressed model, and what the two streams of a block are fed (``ModelPair``)."""


@dataclass(frozen=True)
class _Layers:
    """Components of all masked layers.

    Args:
        factors: Numbers in both factors.
        largest: Numbers in the factors and the dense weight of the largest layer.
        lit: Numbers in the parts of the factors that every token goes through.
        inner: Components that every token goes through.
        components: All of them.
    """

    factors: int
    largest: int
    lit: int
    inner: int
    components: int


def learning_phase(model: Anatomy, learner: Learner, work: Workload, machine: Machine, program: float) -> Phase:
    """Return what the learning runs of ``learner`` take, one after the other, for all fractions to keep.

    Args:
        model: The base.
        learner: Who learns.
        work: What else the run does.
        machine: Where.
        program: Bytes of Python and its libraries.
    """
    layers = [_layers(model, learner, keep) for keep in work.keeps]
    widest = max(layers, key=lambda one: one.inner)
    batch = learner.batch_size * learner.length
    spread = machine.processes if machine.sharded else 1
    device: dict[str, float] = {
        "dense weights": model.bytes / spread,
        "factors": widest.factors * model.itemsize / spread,
        "masks and optimizer": _MASK * widest.components,
        "activations": batch * _activations(model, learner, widest),
        "logits": batch * model.vocabulary * (_LOGITS + (4 + model.itemsize if learner.teacher else 0)),
    }
    host: dict[str, float] = {"Python and libraries": program}
    if machine.sharded:
        # The layer that computes, and the next one, which is fetched meanwhile.
        device["layers gathered"] = 2 * widest.largest * model.itemsize
        device["embeddings and head gathered"] = model.outside * model.itemsize
    if not machine.unified:
        # Of the factors each process reads its share.
        host["dense weights before they are sharded"] = model.bytes if machine.sharded and not work.shared else 0.0
    per_step = learner.sequences * learner.length
    done = sum(_multiply_adds(model, learner, one) for one in layers)
    validated = learner.validated * learner.length * len(layers)
    work_done: dict[WorkKind, float] = {
        "forward": learner.steps * per_step * done + 2 * validated * model.multiply_adds / machine.processes
    }
    tokens = len(layers) * learner.steps * per_step * machine.processes + 2 * validated
    passes = 1 + learner.teacher + 1 + learner.recomputed
    sent = 0.0
    if machine.sharded:
        whole = (model.parameters + widest.factors) * model.itemsize
        sent = len(layers) * learner.steps * passes * whole * (1 - 1 / machine.processes)
    # A store's file is read whole, for its checksum, however few components are taken of it.
    read = factor_bytes(target.shape for target in model.modules) * len(layers)
    # Checkpoints hold masks and optimizer: the last one and the best.
    disk = {"checkpoints": 2.0 * 3 / 4 * _MASK * widest.components * len(layers)}
    return Phase(learner.name, device, host, disk=disk, tokens=tokens, work=work_done, read=read, sent=sent)


def _layers(model: Anatomy, learner: Learner, keep: float) -> _Layers:
    sides = [(target, sum(target.shape)) for target in model.modules]
    stored = {target: learner.stored(target.shape, model.itemsize) for target, _ in sides}
    lit = {target: learner.lit(target.shape, model.itemsize, keep) for target, _ in sides}
    factors = {target: stored[target] * side for target, side in sides}
    return _Layers(
        factors=sum(factors.values()),
        largest=max(factors[target] + target.shape[0] * target.shape[1] for target, _ in sides),
        lit=sum(lit[target] * side for target, side in sides),
        inner=sum(lit.values()),
        components=sum(stored.values()),
    )


def _activations(model: Anatomy, learner: Learner, layers: _Layers) -> float:
    """Return the bytes a token that the backward pass needs."""
    kept = model.kept + layers.inner * model.itemsize
    if learner.recomputed:
        return len(model.blocks) * model.hidden * model.itemsize + kept / len(model.blocks)
    return kept


def _multiply_adds(model: Anatomy, learner: Learner, layers: _Layers) -> float:
    """Return those of a token of a step: forward and to the inputs, and what the gates that are off are worth."""
    dense = model.multiply_adds
    masked = dense - model.targeted + layers.lit
    rest = (layers.factors - layers.lit) / learner.inactive_gate_stride
    return (2 + learner.recomputed) * masked + rest + dense * learner.teacher


def refit_phase(model: Anatomy, work: Workload, machine: Machine, program: float) -> Phase:
    """Return what refits take; arguments as in ``learning_phase``."""
    tokens = work.refitted * work.length
    widest = max(target.shape[1] for target in model.modules)
    outputs = max((target.shape[0] for target in model.modules if target.shape[1] == widest), default=0)
    kept = [max(sum(rank * sum(shape) for shape, rank in _ranks(model, keep)) for keep in work.keeps)]
    device = {
        "dense weights": model.bytes,
        "moments of a pair of inputs": 8.0 * (_REFIT_MOMENTS * widest**2 + 6 * widest * outputs + 4 * outputs**2),
        "activations": 4.0 * work.length * widest * model.itemsize,
    }
    host = {
        "Python and libraries": program,
        "hidden states": float(_HIDDEN * tokens * model.hidden * model.itemsize),
        "inputs of a block's maps": float(tokens * _inputs_of_a_block(model) * model.itemsize),
    }
    # Where tokens weigh for each map what they do for it alone, maps that share an input have moments of their own.
    own = [target.shape[1] for target in model.modules]
    squares = sum(width**2 for width in (own if work.weighs_tokens else model.input_widths.values()))
    done: dict[WorkKind, float] = {
        "forward": work.refits * _REFIT_PASSES * tokens * model.multiply_adds,
        "float32": work.refits * tokens * 3.0 * squares,
        # Three weighings a decomposition: without text held back, with it, and as the plan has it.
        "svd": work.refits * 3.0 * sum(m * n * min(m, n) for m, n in (target.shape for target in model.modules)),
    }
    disk = {"refitted factors": 4.0 * work.refits * kept[0]}
    tokens = work.refits * tokens * _REFIT_PASSES
    return Phase("refit", device, host, disk=disk, tokens=tokens, work=done)


def _inputs_of_a_block(model: Anatomy) -> int:
    """Return how many numbers a token has in all that the maps of the widest block are fed."""
    widths: Counter[int] = Counter()
    for target in {target.group: target for target in model.modules}.values():
        widths[target.block] += target.shape[1]
    return max(widths.values())


def waits(model: Anatomy, work: Workload, machine: Machine) -> bool:
    """Return whether models wait in main memory while they are scored and exported; arguments as in the phases."""
    return machine.lacks_room(model.bytes) if work.waiting is None else work.waiting


def scoring_phase(model: Anatomy, work: Workload, machine: Machine, program: float) -> Phase:
    """Return what scoring the models takes, dense and compressed; arguments as in ``learning_phase``."""
    models = work.models + work.exports
    streamed = waits(model, work, machine)
    tokens = work.score_length * (STREAMED_BATCH_SIZE if streamed else 1)
    logits = float(tokens * model.vocabulary)
    held = {
        "dense weights": model.bytes,
        # The dense modules wait beside the compressed ones.
        "compressed modules": max(work.keeps) * model.targeted * model.itemsize,
    }
    device = {
        **({"weights of a layer": float(model.largest * model.itemsize)} if streamed else held),
        "activations": 4.0 * tokens * model.hidden * model.itemsize,
        # A piece of them at a time is taken to float32, and its logarithms beside it.
        "logits": logits * model.itemsize + 2 * 4 * min(logits, 2.0**24),
    }
    done: dict[WorkKind, float] = {"forward": models * work.scored * model.multiply_adds}
    # Beside a fresh process that scores from main memory waits what the export has, and no dense model.
    beside = _fresh(model, work, machine, program) if work.exports and not streamed else {}
    if beside:
        beside["its logits"] = device["logits"]
    host = {"Python and libraries": program, **(held if streamed else {})}
    return Phase("scoring", device, host, beside, tokens=models * work.scored, work=done)


def export_phase(model: Anatomy, work: Workload, machine: Machine, program: float) -> Phase:
    """Return what the export takes, its reload in a fresh process included; arguments as in ``learning_phase``."""
    size = _small(model, work)
    held = {"compressed model": size}
    streamed = waits(model, work, machine)
    host = {"Python and libraries": program, **(held if streamed else {})}
    beside = _fresh(model, work, machine, program)
    return Phase("export", {} if streamed else held, host, beside, {"model": size}, read=size)


def _small(model: Anatomy, work: Workload) -> float:
    """Return the bytes of the largest of the compressed models."""
    return (model.parameters - (1 - max(work.keeps)) * model.targeted) * model.itemsize


def _fresh(model: Anatomy, work: Workload, machine: Machine, program: float) -> dict[str, float]:
    """Return the main memory of a fresh process that loads the export."""
    size = _small(model, work)
    # On a CPU the pages of the file count as long as tensors are copied from them.
    in_memory = machine.unified or waits(model, work, machine)
    loaded = {"model of a fresh process": size} if in_memory else {}
    return {"Python and libraries of a fresh process": program, **loaded, "its file, mapped": size}


def _ranks(model: Anatomy, keep: float) -> Iterator[tuple[tuple[int, int], int]]:
    prices = Storage("auto", model.itemsize)
    for target in model.modules:
        yield target.shape, int(prices.rank_at(target.shape, keep))
