"""Ctrl-C while ranks are learned: taken up between two batches, where nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["StopBetweenBatches", "explain_interruption"]


@contextmanager
def explain_interruption(trainer: Trainer, advice: Callable[[], str]) -> Iterator[None]:
    """Turn the silent exit by which Lightning ends an interrupted fit into a ``KeyboardInterrupt`` with advice.

    Args:
        trainer: Whose fit runs inside the block.
        advice: Says how to go on.

    Raises:
        KeyboardInterrupt: The fit was interrupted.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt(advice()) from None
    finally:
        # Lightning leaves Ctrl-C ignored.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


class StopBetweenBatches(Callback):
    """Lets the first Ctrl-C end learning before the next batch; a second one ends it at once.

    Raised anywhere, as Python does, the interrupt can fall into the queue of TensorBoard's writer thread. Closing that
    writer then waits for ever (once in forty runs), and Lightning ignores Ctrl-C by then.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to hold interrupts back."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop if that was asked for."""
        self._stop_if_asked(trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop if that was asked for."""
        self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let interrupts through again; stop if one was held back."""
        self._let_through()
        self._stop_if_asked(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let interrupts through again, unless this is one: Lightning ignores others while it shuts down."""
        if not isinstance(exception, KeyboardInterrupt):
            self._let_through()

    def _note(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def _stop_if_asked(self, trainer: Trainer) -> None:
        # Of several processes the first stops, and its launcher the others: each for itself would leave some of them
        # waiting for gradients that never come.
        if self._asked and trainer.is_global_zero:
            raise KeyboardInterrupt

    def _let_through(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
