"""What the commands do, from their options: the work that ``--dry_run`` is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from lowrank_pl.allocate import allocator
from lowrank_pl.machine import total_memory
from lowrank_pl.probe import MEMORY
from lowrank_pl.recipes import Recipe
from lowrank_pl.shared_base import can_be_shared
from lowrank_pl.workload import Learner, Machine, Workload

__all__ = ["DryRun", "compare_workload", "fit_workload", "machine_of"]

DryRun = bool | Literal["h100"]
"""Whether to make one; with speeds measured here, or with those assumed for a machine that is not at hand."""


def machine_of(
    device: str, devices: Any = 1, nodes: int = 1, *, speeds: DryRun = True, sharded: bool = False
) -> Machine:
    """Return what a run is spread over, as its options say.

    Args:
        device: ``cpu``, ``cuda``, ``gpu`` or ``auto``, with or without a number. With speeds that are assumed it is a
            GPU in any case.
        devices: How many, or which, as Lightning takes them.
        nodes: Machines.
        speeds: As in ``dry_run``.
        sharded: Whether frozen weights are spread over all.

    Raises:
        ValueError: No number of devices.
    """
    there = torch.cuda.device_count()
    on_gpu = speeds is not True or device.startswith(("cuda", "gpu")) or (device == "auto" and there > 0)
    if on_gpu and speeds is True and not there:
        raise ValueError(
            f"device {device!r} can't be measured here, where there is no GPU: give --dry_run h100 for speeds that are "
            "assumed, or cpu"
        )
    if devices in ("auto", -1, "-1"):
        count = max(1, there) if on_gpu and speeds is True else 1
    elif isinstance(devices, str) and not devices.strip().isdecimal():
        count = len([one for one in devices.strip("[] ").split(",") if one.strip()])
    else:
        count = len(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else int(devices)
    memory: float | None = total_memory()
    if on_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory if speeds is True else MEMORY[str(speeds)]
    return Machine("cuda" if on_gpu else "cpu", count * nodes, sharded, memory)


def compare_workload(
    recipes: Mapping[str, Recipe],
    *,
    keeps: Sequence[float],
    windows: int,
    length: int,
    score_length: int,
    score_windows: Mapping[str, int],
    texts: Sequence[str],
) -> Workload:
    """Return what ``lowrank compare`` does.

    Args:
        recipes: The methods by name.
        keeps: Fractions to keep.
        windows: Windows for statistics.
        length: Tokens of each, and of those that are learned from.
        score_length: Tokens of a window to score.
        score_windows: How many of each text, by its name; all of a text that it leaves out.
        texts: Names of the texts to score.
    """
    known = all(name in score_windows for name in texts)
    refits = [recipe.refit for recipe in recipes.values() if recipe.refit is not None]
    learners = [
        Learner(
            f"learning {name}", found.mask, found.steps, length, storage=recipe.storage, windows=found.batch_size,
            batch_size=found.batch_size, teacher=found.data_terms.needs_teacher, rest_every=found.rest_every,
        )
        for name, recipe in recipes.items()
        if (found := recipe.learning) is not None
    ]  # fmt: skip
    return Workload(
        keeps=keeps,
        windows=windows,
        length=length,
        decompositions=tuple(dict.fromkeys(recipe.decomposition for recipe in recipes.values())),
        weight_gradients=any(
            allocator(recipe.allocator, **recipe.settings).needs_gradients for recipe in recipes.values()
        ),
        narrowings=tuple(dict.fromkeys(recipe.narrow for recipe in recipes.values() if recipe.narrow is not None)),
        learners=learners,
        refitted=max((refit.windows for refit in refits), default=0),
        refits=len(refits) * len(keeps),
        scored=sum(score_windows[name] * score_length for name in texts) if known else 0,
        score_length=score_length,
        models=1 + len(recipes) * len(keeps),
    )


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
    length, batch = data["length"], data["batch_size"]
    of_epoch = max(1, data["windows"] // (batch * machine.processes))
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
    starts = learner.start if hasattr(learner.start, "needs_gradients") else None
    shared = machine.sharded and can_be_shared(learner.base)
    validated = data["validation_windows"]
    scored = validated * length
    if finish.score_text is not None:
        scored = (finish.score_windows or 0) * finish.score_length
    return Workload(
        keeps=(learner.keep,),
        windows=data["windows"] if data["statistics_windows"] is None else data["statistics_windows"],
        length=data["statistics_length"] or length,
        decompositions=(learner.decomposition,),
        weight_gradients=bool(starts and starts.needs_gradients),
        narrowings=() if learner.narrow is None else (learner.narrow,),
        streamed=shared and learner.decomposition.block_by_block and not (starts and starts.needs_model),
        shared=shared,
        learners=[
            Learner(
                "learning", learner.mask_method, steps, length, storage=learner.storage, windows=batch * gathered,
                batch_size=batch, validated=validated * validations, teacher=learner.data_terms.needs_teacher,
                rest_every=learner.rest_every, recomputed=learner.gradient_checkpointing,
            )
        ],
        refitted=min(finish.refit.windows, data["windows"]) if finish.refit else 0,
        refits=int(finish.refit is not None),
        scored=scored,
        score_length=length if finish.score_text is None else finish.score_length,
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
