"""A process that dies in the middle of a run, as the kernel's out-of-memory killer would have it."""

from __future__ import annotations

import os
import signal

from lightning.pytorch import Callback


class Killed(Callback):
    """Kills process ``rank`` before the first batch after ``step`` steps."""

    def __init__(self, rank: int = 1, step: int = 3) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer, pl_module, *args):
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), signal.SIGKILL)
