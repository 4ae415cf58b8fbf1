"""All access to parts of Lightning that have no public interface, so that a new version breaks one module at most."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch.distributed.constants import default_pg_timeout

__all__ = ["attached_trainer", "batches_done", "extend_timeout"]


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return the Trainer of ``module``; None if it has none.

    ``LightningModule.trainer`` raises without a Trainer, and Lightning has no public way to ask first.
    """
    try:
        return module.trainer
    except RuntimeError:
        return None


def batches_done(trainer: Trainer) -> tuple[int, int]:
    """Return how many batches were trained on in the whole run, and how many were fetched in this epoch.

    Only the progress of the epoch loop counts batches. ``Trainer.global_step`` counts optimizer steps, which differ
    from batches under gradient accumulation.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return int(progress.total.processed), int(progress.current.ready)


def extend_timeout(strategy: Strategy, timeout: timedelta) -> None:
    """Set how long processes of ``strategy`` wait for each other, unless the user has set it.

    Lightning takes the timeout only as an argument of the strategy's class. With ``--trainer.strategy auto`` Lightning
    makes the strategy itself, so the value has to be set afterwards. Strategies of one process have no timeout.
    """
    if getattr(strategy, "_timeout", None) == default_pg_timeout:
        strategy._timeout = timeout  # type: ignore[attr-defined]
