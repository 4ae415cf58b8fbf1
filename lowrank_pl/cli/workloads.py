"""The work of ``fit``, ``heal``, ``compare`` and ``decompose`` from their options, for ``--dry_run``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lowrank_pl.calibration.hidden_states import Cache
from lowrank_pl.costs.machine import Machine
from lowrank_pl.costs.model_sizes import model_sizes
from lowrank_pl.costs.workload import Healed, Learner, Preparation, Refits, Roundings, Scoring, Step, Workload
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.base import Allocator
from lowrank_pl.methods.quantize.settings import ByteBudget
from lowrank_pl.methods.recipes import Recipe
from lowrank_pl.methods.refit.settings import Refit
from lowrank_pl.models.base import loads_in_parts
from lowrank_pl.plans.plan import ModulePlan
from lowrank_pl.text.sequences import Calibration

if TYPE_CHECKING:
    from lowrank_pl.training.data import CalibrationData
    from lowrank_pl.training.finish_run import FinishRun
    from lowrank_pl.training.heal import Healer
    from lowrank_pl.training.module import RankLearner

__all__ = ["compare_workload", "decompose_workload", "fit_workload", "heal_workload"]


def fit_workload(
    learner: RankLearner, data: CalibrationData, trainer: Mapping[str, Any], finish: FinishRun, machine: Machine
) -> Workload:
    """Return the work of ``lowrank fit``.

    Args:
        learner: The learner, of which nothing is built yet.
        data: The texts, of which nothing is read yet.
        trainer: Arguments of the Trainer.
        finish: The end of the run.
        machine: The processes that learn.
    """
    length = data.learning.length
    of_epoch = data.batches_of_epoch(
        data.learning.sequences, processes=machine.processes, limit=trainer["limit_train_batches"]
    )
    accumulated = trainer["accumulate_grad_batches"] or 1
    steps = _steps(trainer, of_epoch=-(-of_epoch // accumulated))
    validations = _validations(trainer, batches=steps * accumulated, of_epoch=of_epoch)
    start = learner.start_from if isinstance(learner.start_from, Allocator) else None
    allocators = [*map(make_allocator, finish.baselines), *([] if start is None else [start])]
    shared = machine.sharded and loads_in_parts(learner.base.name)
    validated = data.validation.sequences
    if finish.score.text is None:
        scored, score_length = validated * length, length
    else:
        scored, score_length = (finish.score.sequences or 0) * finish.score.length, finish.score.length
    return Workload(
        keeps=(learner.keep,),
        preparation=Preparation(
            calibration=data.statistics,
            decompositions=(learner.decomposition,),
            weight_gradients=any(one.needs_gradients for one in allocators),
            prunings=() if learner.prune is None else (learner.prune,),
            by_block=shared and learner.decomposition.block_by_block and not (start is not None and start.needs_model),
        ),
        learners=[
            Learner(
                "learning",
                learner.mask_method,
                Step(
                    length, data.batch_size, accumulated,
                    teacher=learner.data_terms.needs_teacher,
                    inactive_gate_stride=learner.compute.inactive_gate_stride,
                    gradient_checkpointing=learner.compute.gradient_checkpointing,
                ),
                steps,
                storage=learner.constraints.storage,
                validated=validated * validations,
            )
        ],
        refits=_refits([finish.refit] if finish.refit else [], most=data.learning.sequences),
        roundings=Roundings(int(finish.rounding is not None)),
        scoring=Scoring(
            # The table has a row for each.
            models=1 + len(finish.baselines)
            + sum(part is not None for part in (learner.prune, finish.refit, finish.rounding)),
            tokens=scored,
            length=score_length,
            from_main_memory=finish.streamed,
        ),
        exports=True,
        reads_shares=shared,
    )  # fmt: skip


def heal_workload(healer: Healer, data: CalibrationData, trainer: Mapping[str, Any], machine: Machine) -> Workload:
    """Return the work of ``lowrank heal``.

    Args:
        healer: What is trained, of which nothing is loaded yet.
        data: The texts, of which nothing is read yet.
        trainer: Arguments of the Trainer.
        machine: The processes that train.

    Raises:
        ValueError: The token budget does not reach for one step.
    """
    start, settings = healer.start, healer.settings
    step = Step(
        data.learning.length, data.batch_size, trainer["accumulate_grad_batches"] or 1,
        teacher=True, gradient_checkpointing=healer.gradient_checkpointing,
    )  # fmt: skip
    of_epoch = data.batches_of_epoch(
        data.learning.sequences, processes=machine.processes, limit=trainer["limit_train_batches"]
    )
    batch_tokens = data.batch_size * step.length * machine.processes
    steps = settings.steps(batch_tokens, accumulated=step.batches, epoch=of_epoch)
    # One before the training, and one after it.
    validations = 2 + _validations(trainer, batches=steps * step.batches, of_epoch=of_epoch)
    if start.plan is None:
        pruned = model_sizes(start.base, length=step.length)
        layers = {target.name: ModulePlan(target.shape) for target in pruned.modules}
    else:
        layers = dict(start.plan.modules)
    adapts = settings.train == "lora"
    return Workload(
        keeps=(start.plan.keep_targeted if start.plan is not None else 1.0,),
        preparation=Preparation(Calibration(length=step.length), ()),
        healed=Healed(
            layers, step, steps, settings.lora.rank if adapts else None, settings.lora.targets if adapts else None,
            data.validation.sequences * validations,
        ),
        # An adapter lies beside the folder that it is for.
        exports=not (adapts and start.is_folder),
    )  # fmt: skip


def compare_workload(
    recipes: Mapping[str, Recipe],
    *,
    keeps: Sequence[float],
    calibration: Calibration,
    texts: Sequence[str],
    score_length: int,
    score_sequences: Mapping[str, int],
) -> Workload:
    """Return the work of ``lowrank compare``.

    Args:
        recipes: The methods by name.
        keeps: Fractions to keep.
        calibration: The sequences for statistics; masks learn from sequences of the same length.
        texts: Names of the texts to score.
        score_length: Tokens of a sequence to score.
        score_sequences: How many sequences of each text, by its name; a text that is not named is scored whole.
    """
    known = all(name in score_sequences for name in texts)
    refits = [recipe.refit for recipe in recipes.values() if recipe.refit is not None]
    ranked = [recipe for recipe in recipes.values() if not recipe.only_prunes]
    return Workload(
        keeps=keeps,
        preparation=Preparation(
            calibration=calibration,
            decompositions=tuple(dict.fromkeys(one.decomposition for one in ranked if not one.shared_experts)),
            shared=tuple(dict.fromkeys(one.decomposition for one in ranked if one.shared_experts)),
            weight_gradients=any(recipe.needs_weight_gradients for recipe in ranked),
            prunings=tuple(dict.fromkeys(recipe.prune for recipe in recipes.values() if recipe.prune is not None)),
            dropping=any(recipe.drop_experts for recipe in ranked),
        ),
        learners=[
            Learner(
                f"learning {name}",
                learning.mask,
                Step(
                    calibration.length, learning.batch_size,
                    teacher=learning.data_terms.needs_teacher,
                    inactive_gate_stride=learning.inactive_gate_stride,
                ),
                learning.steps,
                storage=recipe.storage,
            )
            for name, recipe in recipes.items()
            if (learning := recipe.learning) is not None
        ],
        refits=_refits([refit for refit in refits for _ in keeps]),
        roundings=_roundings(list(recipes.values()), len(keeps)),
        scoring=Scoring(
            models=1 + sum(1 if recipe.dense else len(keeps) for recipe in recipes.values()),
            tokens=sum(score_sequences[name] * score_length for name in texts) if known else 0,
            length=score_length,
        ),
    )  # fmt: skip


def decompose_workload(
    base: str,
    decomposition: Decomposition,
    calibration: Calibration,
    *,
    memory: int | None = None,
    gradient_checkpointing: bool = False,
    dropping: bool = False,
    cache: Cache | None = None,
) -> Workload:
    """Return the work of ``lowrank decompose``, which loads one decoder block at a time where the base allows that.

    Args:
        base: Name of the base.
        decomposition: How weights are decomposed.
        calibration: The sequences for statistics.
        memory: Bytes that statistics may take at a time; by default most of what is free.
        gradient_checkpointing: Whether passes for gradients compute activations again.
        dropping: Whether it is measured what dropping experts costs.
        cache: Where hidden states wait between blocks; by default in main memory, unless that is short.
    """
    by_block = decomposition.block_by_block and loads_in_parts(base)
    return Workload(
        preparation=Preparation(
            calibration, (decomposition,), memory=memory, gradient_checkpointing=gradient_checkpointing,
            by_block=by_block, dropping=dropping, cache=cache,
        )
    )  # fmt: skip


def _refits(refits: Sequence[Refit], most: int | None = None) -> Refits:
    """Return the work of ``refits``, on ``most`` sequences if so many are all."""
    longest = max((refit.sequences for refit in refits), default=0)
    joint = sum(refit.joint.passes for refit in refits if refit.joint is not None)
    return Refits(len(refits), longest if most is None else min(longest, most), joint)


def _roundings(recipes: Sequence[Recipe], sizes: int) -> Roundings:
    """Return the work of rounding the plans of ``recipes`` at so many ``sizes``."""
    count = sum(1 if recipe.dense else sizes for recipe in recipes if recipe.rounding is not None or recipe.in_bytes)
    tried_bits = max((len(ByteBudget(keep=1.0, **one.settings).grids) for one in recipes if one.in_bytes), default=0)
    return Roundings(count, tried_bits)


def _steps(trainer: Mapping[str, Any], *, of_epoch: int) -> int:
    """Return the optimizer steps until the first limit that ends learning."""
    most, epochs = trainer["max_steps"] or -1, trainer["max_epochs"]
    steps: int = of_epoch * max(1, epochs or 1)
    if most > 0:
        # Without a number of epochs, or with none above 0, only the steps end learning.
        return min(most, steps) if epochs and epochs > 0 else most
    return steps


def _validations(trainer: Mapping[str, Any], *, batches: int, of_epoch: int) -> int:
    """Return how often the Trainer validates over ``batches``; 0 where the clock decides."""
    if trainer["limit_val_batches"] == 0:
        return 0
    interval, epochs = trainer["val_check_interval"], trainer["check_val_every_n_epoch"]
    if isinstance(interval, (str, dict, timedelta)):
        # By the clock: how long the batches take is not known.
        return 0
    # A whole number counts batches, a fraction is one of an epoch.
    every: int = interval if isinstance(interval, int) else int(of_epoch * (interval or 1.0)) or 1
    if epochs is None:
        return batches // every
    # Counted anew in every epoch; steps do not go across its end.
    accumulated = trainer["accumulate_grad_batches"] or 1
    whole, rest = divmod(batches, -(-of_epoch // accumulated) * accumulated)
    validated: int = whole // epochs * (of_epoch // every)
    return validated + (rest // every if (whole + 1) % epochs == 0 else 0)
