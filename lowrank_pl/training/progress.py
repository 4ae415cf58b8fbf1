"""The progress bar of learning: one for the whole run, with the remaining time."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

__all__ = ["LearningBar"]


class LearningBar(ProgressBar):
    """Shows the optimizer steps of the whole run, not of an epoch, and a short bar for each validation."""

    def __init__(self) -> None:
        super().__init__()
        self._silent = False
        self._learning: Any = None
        self._validating: Any = None

    def disable(self) -> None:
        """Show nothing from now on."""
        self._silent = True

    def enable(self) -> None:
        """Show bars from now on."""
        self._silent = False

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the values at the end of the bar: logged values without the logger's version."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar; after a resume, at the checkpoint's step."""
        steps = trainer.estimated_stepping_batches
        total = None if math.isinf(steps) else int(steps)
        done = trainer.global_step
        self._learning = tqdm(total=total, initial=done, desc="learn", unit="step", disable=self._silent)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Move the bar to the present step."""
        self._learning.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        self._learning.update(trainer.global_step - self._learning.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar and leave it on the screen."""
        self._learning.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bars, so that the next message starts on a new line."""
        for bar in (self._validating, self._learning):
            if bar is not None:
                bar.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a bar of validation batches."""
        batches = sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
        self._validating = tqdm(total=batches, desc="validate", unit="batch", disable=self._silent, leave=False)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Advance the bar by one batch."""
        self._validating.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar and show the new score."""
        self._validating.close()
        if self._learning is not None:
            self._learning.set_postfix(self.get_metrics(trainer, pl_module))
