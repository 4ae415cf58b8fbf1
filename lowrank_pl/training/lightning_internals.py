"""All access to parts of Lightning that have no public interface, so that a new version breaks one module at most."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel

__all__ = ["attached_trainer", "batches_done", "extend_timeout", "leaves_gradients_to_us"]


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


def leaves_gradients_to_us(strategy: Strategy) -> bool:
    """Tell whether this package has to average the gradients of ``strategy``, and let DDP average none then.

    FSDP2 shards the frozen model only and ignores the masks. DDP would average them in another order
    (``lowrank_pl.training.sharding.average_gradients``); a hook of the user for DDP's messages stays.
    """
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.world_size > 1
    model = strategy.model
    if not isinstance(strategy, DDPStrategy) or not isinstance(model, DistributedDataParallel):
        return False
    if strategy._ddp_comm_hook is not None:
        return False
    model.register_comm_hook(None, noop_hook)
    return strategy.world_size > 1
