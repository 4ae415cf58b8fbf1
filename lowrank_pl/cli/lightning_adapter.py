"""What this package needs of Lightning and finds only under private names, in one place."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from torch.distributed.constants import default_pg_timeout

__all__ = ["HookedCLI", "lengthen_timeout"]


class HookedCLI(LightningCLI):
    """LightningCLI with public names for three of its private steps, as of Lightning 2.6."""

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

    def _parse_ckpt_path(self) -> None:
        # LightningCLI's own would take settings from the checkpoint.
        self.check_checkpoint(self.config[self.config.subcommand].get("ckpt_path"))

    def _run_subcommand(self, subcommand: str) -> None:
        if self.runs():
            super()._run_subcommand(subcommand)


def lengthen_timeout(trainer: Trainer, timeout: timedelta) -> None:
    """Let processes wait ``timeout`` for each other, unless the user chose how long.

    Lightning takes a timeout only where a strategy is named, and ``auto`` names none.
    """
    if getattr(trainer.strategy, "_timeout", None) == default_pg_timeout:
        trainer.strategy._timeout = timeout  # type: ignore[attr-defined]
