"""What learning, healing, refits, scores and the export need: formulas of shapes that follow the code they predict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from lowrank_pl.costs.estimate import Phase, WorkKind
from lowrank_pl.costs.factor_phases import factor_bytes
from lowrank_pl.costs.model_sizes import ModelSizes
from lowrank_pl.costs.workload import Healed, Learner, Run, Step
from lowrank_pl.models.offload import STREAMED_BATCH_SIZE
from lowrank_pl.plans.plan import ModulePlan
from lowrank_pl.plans.storage import Storage

__all__ = ["export_phase", "healing_phases", "learning_phase", "refit_phase", "rounding_phase", "scoring_phase"]

_LOGITS = 12
"""Bytes a logit in a step: its logarithm in float32, and the gradients by it and by the logit."""

_MASK = 16
"""Bytes a component: at most one number that learns, its gradient, and two moments of AdamW, in float32."""

_TRAINED = 16
"""Bytes a trained number: itself, its gradient, and two moments of AdamW, in float32."""

_REFIT_PASSES = 4
"""About how often a refit runs over all its sequences (``refit``)."""

_EXPERT_PASSES = 2
"""Passes of the dense model beside those that compare the layers of experts: gate and up, then down (``ModelPair``)."""

_JOINT_PASS = 4
"""Forward passes that cost as much as one of a joint refit: forward with the change along a direction, and back."""

_JOINT_BLOCKS = 8
"""Numbers a parameter of a block in a joint refit: its weights, and factors, gradients and directions of its solver."""

_JOINT_TOKENS = 4_096
"""About how many tokens a pass of a joint refit has on a GPU."""

_REFIT_MOMENTS = 14
"""Squares of an input's width in float64 at a time: sums of fitted and held-back sequences, both, and their means."""

_HIDDEN = 4
"""Hidden states of the dense and the compressed model, and what the two streams of a block are fed (``ModelPair``).

A mixture has one more: where the dense model runs a block again."""


@dataclass(frozen=True)
class _Layers:
    """All masked layers of a model.

    Args:
        factors: Numbers in both factors.
        largest: Numbers in the factors and the dense weight of the largest layer.
        multiplied: Numbers in both factors of the layers that a token sees.
        active: Numbers in the parts of the factors that a token is multiplied by.
        active_components: Components that a token is multiplied by.
        components: All components.
    """

    factors: int
    largest: int
    multiplied: float
    active: float
    active_components: float
    components: int

    @classmethod
    def of(cls, model: ModelSizes, learner: Learner, keep: float) -> _Layers:
        """Return the masked layers of ``learner`` at the start of learning towards ``keep``."""
        sides = {target: sum(target.shape) for target in model.modules}
        stored = {target: learner.stored(target.shape, model.itemsize) for target in sides}
        active = {target: learner.active(target.shape, model.itemsize, keep) for target in sides}
        factors = {target: stored[target] * side for target, side in sides.items()}
        return cls(
            factors=sum(factors.values()),
            largest=max(factors[target] + target.shape[0] * target.shape[1] for target in sides),
            multiplied=sum(model.share(target) * size for target, size in factors.items()),
            active=sum(model.share(target) * active[target] * side for target, side in sides.items()),
            active_components=sum(model.share(target) * components for target, components in active.items()),
            components=sum(stored.values()),
        )


def learning_phase(run: Run, learner: Learner) -> Phase:
    """Return what the learning runs of ``learner`` need, one after the other, for all fractions to keep."""
    model, machine, step = run.model, run.machine, learner.step
    layers = [_Layers.of(model, learner, keep) for keep in run.work.keeps]
    widest = max(layers, key=lambda one: one.active_components)
    batch = step.batch_size * step.length
    spread = machine.processes if machine.sharded else 1
    device: dict[str, float] = {
        "dense weights": model.bytes / spread,
        "factors": widest.factors * model.itemsize / spread,
        "masks and optimizer": float(_MASK * widest.components),
        "activations": batch * _activations(model, step, widest.active_components),
        "logits": float(batch * model.vocabulary * (_LOGITS + (4 + model.itemsize if step.teacher else 0))),
    }
    host: dict[str, float] = {"Python and libraries": run.program}
    if machine.sharded:
        # The layer that computes, and the next one, which is fetched meanwhile.
        device["layers gathered"] = float(2 * widest.largest * model.itemsize)
        device["embeddings and head gathered"] = float(model.outside * model.itemsize)
        if not machine.on_cpu and not run.work.reads_shares:
            host["dense weights before they are sharded"] = float(model.bytes)
    validated = learner.validated * step.length * len(layers)
    work: dict[WorkKind, float] = {
        "model": learner.steps * step.tokens * sum(_multiply_adds(model, learner, one) for one in layers)
        + 2 * validated * model.multiply_adds / machine.processes,
        # A store's file is read whole, for its checksum, however few components are taken of it.
        "disk": factor_bytes(target.shape for target in model.modules) * len(layers),
    }
    # Checkpoints hold masks and optimizer: the last one and the best.
    disk = {"checkpoints": 2.0 * 3 / 4 * _MASK * widest.components * len(layers)}
    return Phase(learner.name, device, host, disk=disk, work=work)


def _activations(model: ModelSizes, step: Step, components: float) -> float:
    """Return the bytes a token that the backward pass of a step needs, with so many components between factors."""
    kept = model.activations.kept + components * model.itemsize
    if step.gradient_checkpointing:
        return len(model.blocks) * model.hidden * model.itemsize + kept / len(model.blocks)
    return kept


def _multiply_adds(model: ModelSizes, learner: Learner, layers: _Layers) -> float:
    """Return those of a token of a step: forward, back to the inputs, and the gradients of inactive gates."""
    dense, step = model.multiply_adds, learner.step
    masked = dense - model.targeted_for_a_token + layers.active
    inactive = (layers.multiplied - layers.active) / step.inactive_gate_stride
    return (2 + step.gradient_checkpointing) * masked + inactive + dense * step.teacher


def healing_phases(run: Run) -> list[Phase]:
    """Return what the training of a compressed model needs: both models, which share what is equal, and the steps."""
    model, healed = run.model, run.work.healed
    assert healed is not None
    step, itemsize = healed.step, model.itemsize
    dense = {target.name: target for target in model.modules}
    own = {
        name: layer
        for name, layer in healed.layers.items()
        if layer.rank is not None or (name in dense and layer.shape != dense[name].shape)
    }
    trained, adapter = _trained(own, model, healed), healed.adapter_rank
    numbers = sum(trained.values())
    stored = sum(layer.numbers(itemsize) for name, layer in own.items() if adapter or name not in trained)
    components = sum(model.share(dense[name]) * (layer.rank or 0) for name, layer in own.items() if name in dense)
    components += sum(model.share(dense[name]) * adapter for name in trained) if adapter else 0
    # Those of a token.
    of_trained = sum(model.share(dense[name]) * size for name, size in trained.items())
    of_student = (of_trained if adapter else 0) + model.multiply_adds
    for name in own.keys() & dense.keys():
        rows, columns = dense[name].shape
        of_student += model.share(dense[name]) * (own[name].parameters - rows * columns)
    batch = step.batch_size * step.length
    device = {
        "dense weights": float(model.bytes),
        "compressed layers": float(stored * itemsize),
        "what is trained, and optimizer": _TRAINED * numbers,
        "activations": batch * _activations(model, step, components),
        "logits": float(batch * model.vocabulary * (_LOGITS + 4 + itemsize)),
    }
    # Forward, back to the inputs and to what is trained; the dense model beside it, as in the validations.
    steps = (2 + step.gradient_checkpointing) * of_student + of_trained + model.multiply_adds
    validated = healed.validated * step.length / run.machine.processes
    work: dict[WorkKind, float] = {
        "model": healed.steps * step.tokens * steps + validated * (of_student + model.multiply_adds)
    }
    program = {"Python and libraries": run.program}
    return [
        # The compressed model is loaded whole before it shares what is equal.
        Phase(
            "load the compressed model", {"dense weights": float(model.bytes)},
            {**program, "its base": float(model.bytes)}, work={"disk": float(model.bytes)},
        ),
        Phase("healing", device, program, disk={"checkpoints": 2.0 * 3 / 4 * _TRAINED * numbers}, work=work),
    ]  # fmt: skip


def _trained(own: Mapping[str, ModulePlan], model: ModelSizes, healed: Healed) -> dict[str, float]:
    """Return the trained numbers of each layer: its own, or those of an adapter on it.

    Args:
        own: The layers that the dense model does not have.
        model: Sizes of the dense model.
        healed: The training.
    """
    shapes = {target.name: target.shape for target in model.modules}
    if healed.adapter_rank is None:
        return {name: float(layer.parameters) for name, layer in own.items() if layer.rank and name in shapes}
    ends = None if healed.adapted is None else tuple(healed.adapted)
    shapes |= {name: layer.shape for name, layer in own.items() if name in shapes}
    return {
        name: float(healed.adapter_rank * sum(shape))
        for name, shape in shapes.items()
        if ends is None or name.endswith(ends)
    }


_ROUNDED_COPIES = 8
"""Copies of the largest matrix in float32 while it is rounded: numbers, scales, zero points, errors and codes."""


def refit_phase(run: Run) -> Phase:
    """Return what refits need."""
    model, refits, length = run.model, run.work.refits, run.work.preparation.calibration.length
    tokens = refits.sequences * length
    widest = max(target.shape[1] for target in model.modules)
    outputs = max((target.shape[0] for target in model.modules if target.shape[1] == widest), default=0)
    device = {
        "dense weights": float(model.bytes),
        "moments of a pair of inputs": 8.0 * (_REFIT_MOMENTS * widest**2 + 6 * widest * outputs + 4 * outputs**2),
        "activations": 4.0 * length * widest * model.itemsize,
    }
    if model.shares:
        inputs = length * _inputs_of_a_block(model, experts=True)
        device["inputs of a batch's experts, in both models"] = 2.0 * inputs * model.itemsize
    if refits.joint_passes:
        # In float32, with what the backward pass needs; a forward derivative doubles it.
        kept = 2 * 4 * model.activations.kept / model.itemsize / len(model.blocks)
        device["a block in float32, and steps"] = float(_JOINT_BLOCKS * 4 * max(model.blocks))
        device["a block's activations in float32"] = max(length, _JOINT_TOKENS) * kept
    host = {
        "Python and libraries": run.program,
        "hidden states": float((_HIDDEN + bool(model.shares)) * tokens * model.hidden * model.itemsize),
        "inputs of a block's layers": float(tokens * _inputs_of_a_block(model, experts=False) * model.itemsize),
    }
    # Where tokens weigh differently for each layer, layers that share an input have moments of their own.
    groups = {target.group: target for target in model.modules}.values()
    measured = model.modules if run.work.preparation.weighs_tokens else groups
    work: dict[WorkKind, float] = {
        "model": (
            refits.count * (_REFIT_PASSES + _EXPERT_PASSES * bool(model.shares)) + refits.joint_passes * _JOINT_PASS
        )
        * float(tokens * model.multiply_adds),
        "float32": refits.count * tokens * 3.0 * sum(model.share(target) * target.shape[1] ** 2 for target in measured),
        # Three weighings a decomposition: without text held back, with it, and as the plan has it.
        "svd": refits.count * 3.0 * sum(m * n * min(m, n) for m, n in (target.shape for target in model.modules)),
    }
    storage = Storage("auto", model.itemsize)
    kept = max(
        sum(int(storage.rank_at(target.shape, keep)) * sum(target.shape) for target in model.modules)
        for keep in run.work.keeps
    )
    return Phase(
        "refit", device, host, disk={"refitted factors": 4.0 * refits.count * kept}, work=work, waiting=run.program
    )


def _inputs_of_a_block(model: ModelSizes, *, experts: bool) -> float:
    """Return how many numbers a token has in all inputs of the widest block's layers: of experts, or of all others."""
    widths: defaultdict[int, float] = defaultdict(float)
    for target in {target.group: target for target in model.modules}.values():
        if bool(target.experts) == experts:
            widths[target.block] += model.share(target) * target.shape[1]
    return max(widths.values(), default=0.0)


def rounding_phase(run: Run) -> Phase:
    """Return what rounding to a few bits needs."""
    model, roundings = run.model, run.work.roundings
    shapes = [target.shape for target in model.modules]
    largest = max((m * n for m, n in shapes), default=0)
    widest = max((max(shape) for shape in shapes), default=0)
    device = {
        "dense weights": float(model.bytes),
        "a matrix and its errors": 4.0 * _ROUNDED_COPIES * largest,
        "roots of moments": 8.0 * 4 * widest**2,
    }
    times = roundings.count + roundings.tried_bits
    work: dict[WorkKind, float] = {
        "float32": float(times * sum(2 * m * n * (m + n) for m, n in shapes)),
        "float64": float((roundings.count + bool(roundings.tried_bits)) * sum(m**3 + n**3 for m, n in shapes)),
    }
    stored = float(sum(m * n for m, n in shapes))
    return Phase(
        "rounding", device, {"Python and libraries": run.program},
        disk={"rounded matrices": roundings.count * stored}, work=work, waiting=run.program,
    )  # fmt: skip


def scoring_phase(run: Run) -> Phase:
    """Return what scoring the models needs, dense and compressed."""
    model, scoring = run.model, run.work.scoring
    from_main_memory = run.scores_from_main_memory
    tokens = scoring.length * (STREAMED_BATCH_SIZE if from_main_memory else 1)
    logits = float(tokens * model.vocabulary)
    held = {
        "dense weights": float(model.bytes),
        # The dense modules wait beside the compressed ones.
        "compressed modules": max(run.work.keeps) * model.targeted * model.itemsize,
    }
    device = {
        **({"weights of a layer": float(model.largest * model.itemsize)} if from_main_memory else held),
        "activations": 4.0 * tokens * model.hidden * model.itemsize,
        # A piece of the logits at a time is taken to float32, with its logarithms.
        "logits": logits * model.itemsize + 2 * 4 * min(logits, 2.0**24),
    }
    # A fresh process that scores from main memory stands beside what the export holds, and beside no dense model.
    fresh = {**_fresh(run), "its logits": device["logits"]} if run.work.exports and not from_main_memory else {}
    models = scoring.models + run.work.exports
    return Phase(
        "scoring",
        device,
        {"Python and libraries": run.program, **(held if from_main_memory else {})},
        fresh,
        work={"model": float(models * scoring.tokens * model.multiply_adds)},
        waiting=run.program,
    )


def export_phase(run: Run) -> Phase:
    """Return what the export needs, its reload in a fresh process included."""
    size = _largest_export(run)
    held = {"compressed model": size}
    host = {"Python and libraries": run.program, **(held if run.scores_from_main_memory else {})}
    device = {} if run.scores_from_main_memory else held
    return Phase("export", device, host, _fresh(run), {"model": size}, {"disk": size}, waiting=run.program)


def _largest_export(run: Run) -> float:
    """Return the bytes of the largest of the compressed models."""
    return (run.model.parameters - (1 - max(run.work.keeps)) * run.model.targeted) * run.model.itemsize


def _fresh(run: Run) -> dict[str, float]:
    """Return the main memory of a fresh process that loads the export."""
    size = _largest_export(run)
    # On a CPU the pages of the file count as long as tensors are copied from them.
    in_memory = run.machine.on_cpu or run.scores_from_main_memory
    loaded = {"model of a fresh process": size} if in_memory else {}
    return {"Python and libraries of a fresh process": run.program, **loaded, "its file, mapped": size}
