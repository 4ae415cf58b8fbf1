"""LightningCLI with public names for the private steps that this package changes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningCLI

__all__ = ["HookedCLI"]


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
