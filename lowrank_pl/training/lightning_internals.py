"""All access to parts of Lightning that have no public interface, so that a new version breaks one module at most."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "HookedCLI",
    "RunCheckpoint",
    "attached_trainer",
    "batches_done",
    "end_after",
    "extend_timeout",
    "is_last_step",
    "leaves_gradients_to_us",
]


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


def end_after(trainer: Trainer, steps: int) -> None:
    """Let the run end after ``steps`` optimizer steps, however many epochs they take.

    The Trainer takes its end only as an argument, which is given before text and processes are known.
    """
    trainer.fit_loop.epoch_loop.max_steps = steps
    trainer.fit_loop.max_epochs = -1


def is_last_step(trainer: Trainer) -> bool:
    """Tell, at the end of a batch, whether learning ends with it."""
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.should_stop or trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` that also saves the last step, unless ``save_last`` is off.

    The checkpoint is written before the last validation and before callbacks at the end of an epoch, any of which may
    fail. Lightning's own first one may come later than the end of a short run.
    """

    @property
    def state_key(self) -> str:
        """Lightning's own key, so that checkpoints of earlier versions go on."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save at the steps that the settings name, and at the last one."""
        super().on_train_batch_end(trainer, pl_module, *args)
        if is_last_step(trainer):
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, if a callback ended the run only after it."""
        self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class HookedCLI(LightningCLI):
    """LightningCLI with public names for some of its private steps, as of Lightning 2.6."""

    def setting(self, name: str, *, made: bool = False) -> Any:
        """Return the setting ``name`` of the subcommand: as given or, with ``made``, the object made of it."""
        return self._get(self.config_init if made else self.config, name)

    def check_checkpoint(self, path: str | None) -> None:
        """Look at the checkpoint that learning goes on from, before anything is loaded.

        Args:
            path: What ``--ckpt_path`` says.
        """

    def runs(self) -> bool:
        """Return whether the subcommand is run once everything for it is made."""
        return True

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        # Lightning refuses enable_checkpointing=False beside the callback that the CLI itself adds.
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        # LightningCLI's own would take settings from the checkpoint.
        self.check_checkpoint(self.config[self.config.subcommand].get("ckpt_path"))

    def _run_subcommand(self, subcommand: str) -> None:
        if self.runs():
            super()._run_subcommand(subcommand)
