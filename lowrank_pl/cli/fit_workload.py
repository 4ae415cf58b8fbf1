"""What the commands do, from their options: the work that ``--dry_run`` is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_pl.costs.workload import Learner, Machine, Workload
from lowrank_pl.methods.allocate.base import Allocator
from lowrank_pl.models.base import loads_in_parts

__all__ = ["fit_workload"]


def fit_workload(
    learner: Any, data: Mapping[str, Any], trainer: Mapping[str, Any], finish: Any, machine: Machine
) -> Workload:
    """Return what ``lowrank fit`` does.

    Args:
        learner: The ``RankLearner``, nothing of which is built.
        data: Arguments of ``CalibrationData``.
        trainer: Arguments of the Trainer.
        finish: The ``FinishRun``.
        machine: What learning is spread over.
    """
    learning, statistics, batch = data["learning"], data["statistics"], data["batch_size"]
    length = learning["length"]
    of_epoch = max(1, learning["sequences"] // (batch * machine.processes))
    gathered = trainer["accumulate_grad_batches"] or 1
    limit = trainer["limit_train_batches"]
    if limit is not None:
        of_epoch = max(1, min(of_epoch, limit) if isinstance(limit, int) else int(of_epoch * limit))
    most, epochs = trainer["max_steps"] or -1, trainer["max_epochs"]
    steps = -(-of_epoch // gathered) * max(1, epochs or 1)
    if most > 0:
        # The first limit that is reached ends learning; no number of epochs is none then.
        steps = min(most, steps) if epochs and epochs > 0 else most
    validations = _validations(trainer, batches=steps * gathered, of_epoch=of_epoch)
    starts = learner.start_from if isinstance(learner.start_from, Allocator) else None
    shared = machine.sharded and loads_in_parts(learner.base.name)
    validated = data["validation"]["sequences"]
    scored = validated * length
    if finish.score.text is not None:
        scored = (finish.score.sequences or 0) * finish.score.length
    return Workload(
        keeps=(learner.keep,),
        sequences=statistics["sequences"] or learning["sequences"],
        length=statistics["length"] or length,
        decompositions=(learner.decomposition,),
        weight_gradients=bool(starts and starts.needs_gradients),
        prunings=() if learner.prune is None else (learner.prune,),
        streamed=shared and learner.decomposition.block_by_block and not (starts and starts.needs_model),
        shared=shared,
        learners=[
            Learner(
                "learning", learner.mask_method, steps, length, storage=learner.constraints.storage, sequences=batch * gathered,
                batch_size=batch, validated=validated * validations, teacher=learner.data_terms.needs_teacher,
                inactive_gate_stride=learner.compute.inactive_gate_stride,
                recomputed=learner.compute.gradient_checkpointing,
            )
        ],
        refitted=min(finish.refit.sequences, learning["sequences"]) if finish.refit else 0,
        refits=int(finish.refit is not None),
        scored=scored,
        score_length=length if finish.score.text is None else finish.score.length,
        models=1 + len(finish.baselines) + int(finish.refit is not None),
        exports=True,
        waiting=finish.streamed,
    )  # fmt: skip


def _validations(trainer: Mapping[str, Any], *, batches: int, of_epoch: int) -> int:
    """Return how often the Trainer validates over ``batches``."""
    if trainer["limit_val_batches"] == 0:
        return 0
    interval = trainer["val_check_interval"]
    # A whole number counts batches, a fraction is one of an epoch.
    every = interval if isinstance(interval, int) else int(of_epoch * (interval or 1.0)) or 1
    return batches // every
