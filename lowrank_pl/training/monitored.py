"""What callbacks watch, checked before the run has learned: Lightning itself finds a missing metric after an epoch."""

from __future__ import annotations

import math
from collections.abc import Collection

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder

__all__ = ["METRICS", "check_callbacks", "check_monitored", "check_validation"]

VALIDATED = ("val/perplexity", "val/excess")


METRICS = ("keep/expected", "keep/target", "keep/overshoot", "learning/gradient norm", "step", *VALIDATED)
"""The metrics of every run, besides the losses, whose names depend on the mask method."""


def check_callbacks(trainer: Trainer, names: Collection[str] = METRICS) -> None:
    """Refuse callbacks that can't work, before anything is built.

    Args:
        trainer: The Trainer.
        names: The metrics that are measured, besides the losses.

    Raises:
        ValueError: A callback searches the learning rate, or watches a metric that is not measured.
    """
    if any(isinstance(callback, LearningRateFinder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "LearningRateFinder changes the attribute lr of a module, which is not trained with it: leave it out, "
            "and try some rates with --model.optimizer.init_args.lr, or --model.settings.lr of `lowrank heal`"
        )
    check_monitored(trainer, names, but="loss/")


def check_monitored(trainer: Trainer, names: Collection[str], *, below: str = "", but: str | None = None) -> None:
    """Refuse callbacks that watch a metric that is not measured.

    Args:
        trainer: The Trainer.
        names: The metrics that are measured.
        below: Look only at metrics whose names begin so.
        but: Ignore metrics whose names begin so.

    Raises:
        ValueError: A callback, such as ``EarlyStopping``, watches another metric.
    """
    for name, monitor in _monitored(trainer):
        if monitor.startswith(below) and not (but and monitor.startswith(but)) and monitor not in names:
            raise ValueError(f"{name} watches {monitor!r}, which is not measured: name one of {', '.join(names)}")


def check_validation(trainer: Trainer, names: Collection[str] = VALIDATED) -> None:
    """Refuse callbacks that watch a score of a validation that never comes; called when learning begins.

    Args:
        trainer: The Trainer.
        names: The metrics that validations measure.

    Raises:
        ValueError: A callback watches such a score.
    """
    watched = [(name, monitor) for name, monitor in _monitored(trainer) if monitor in names]
    if not watched:
        return
    name, monitor = watched[0]
    if not sum(trainer.num_val_batches):
        raise ValueError(
            f"{name} watches {monitor!r}, but nothing is validated: set --data.validation.sequences and "
            "--trainer.limit_val_batches above 0, or leave it out"
        )
    if trainer.val_check_batch is None:
        # Validations come by the clock.
        return
    accumulated = trainer.accumulate_grad_batches
    epochs = 1 if trainer.check_val_every_n_epoch is None else trainer.check_val_every_n_epoch
    steps = (epochs - 1) * math.ceil(trainer.num_training_batches / accumulated)
    first, last = steps + math.ceil(trainer.val_check_batch / accumulated), trainer.estimated_stepping_batches
    if first > last:
        raise ValueError(
            f"{name} watches {monitor!r}, but the first validation would come with step {first} and learning ends with "
            f"step {last}: lower --trainer.val_check_interval, or leave it out"
        )


def _monitored(trainer: Trainer) -> list[tuple[str, str]]:
    """Return the class and the metric of every callback that needs one; none where a user's callback may log more."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if not all(type(callback).__module__.startswith(("lightning.", "lowrank_pl.")) for callback in callbacks):
        return []
    return [
        (type(callback).__name__, callback.monitor)
        for callback in callbacks
        if isinstance(getattr(callback, "monitor", None), str) and getattr(callback, "strict", True)
    ]
