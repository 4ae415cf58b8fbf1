"""How a run ends early: Ctrl-C, handled between two batches, and the end of another of its processes."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer

from lowrank_pl.utils.distributed import LostProcessError

__all__ = ["StopBetweenBatches", "explain_interruption", "explain_kill"]


_kill_all = _ChildProcessObserver._terminate_all


@contextmanager
def explain_interruption(trainer: Trainer, advice: Callable[[], str]) -> Iterator[None]:
    """Replace the silent exit of Lightning's interrupted fit by a ``KeyboardInterrupt`` with advice.

    Args:
        trainer: The Trainer whose fit runs inside the block.
        advice: Returns a text on how to continue.

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
        # Lightning sets Ctrl-C to be ignored and does not restore it.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def explain_kill(advice: Callable[[], str], grace: float = 10.0) -> None:
    """Make Lightning print advice before it kills this process because another one has ended.

    Every five seconds a thread of Lightning looks whether the processes that it started still run. After the bad end of
    one it kills the others and this process, without a word. Errors of Gloo's collectives are explained by
    ``explain_lost_process``, but perhaps an instant too late; NCCL's wait for their timeout.

    Args:
        advice: Returns what the user can do, for the message.
        grace: How many seconds this process has to end by itself, with its own error and its files in order.
    """

    def terminate_all(observer: _ChildProcessObserver) -> None:
        for process in observer._child_processes:
            process.kill()
        threading.main_thread().join(grace)
        codes = [str(process.returncode) for process in observer._child_processes if process.returncode]
        lost = LostProcessError(f"exit code {', '.join(codes)}", advice())
        print(f"lowrank: error: {lost}", file=sys.stderr, flush=True)
        _kill_all(observer)

    # There is no hook. It stays after the run: the kill may come while its error is on the way to the user.
    _ChildProcessObserver._terminate_all = terminate_all  # type: ignore[assignment, method-assign]


class StopBetweenBatches(Callback):
    """Ends learning before the next batch after a first Ctrl-C, and at once after a second one.

    Python raises the interrupt at any line, also inside the queue of TensorBoard's writer thread. Closing the writer
    then hangs (once in forty runs), and at that point Lightning ignores Ctrl-C.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._requested = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to delay interrupts, with those of an earlier run forgotten."""
        self._requested = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop if Ctrl-C was pressed."""
        self._stop_if_requested(trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop if Ctrl-C was pressed."""
        self._stop_if_requested(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop delaying interrupts; raise a delayed one."""
        self._restore_handler()
        self._stop_if_requested(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop delaying interrupts, unless this is one: Lightning ignores Ctrl-C while it shuts down."""
        if not isinstance(exception, KeyboardInterrupt):
            self._restore_handler()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True

    def _stop_if_requested(self, trainer: Trainer) -> None:
        # Only the first process stops, and its launcher then ends the others. If each stopped for itself, some would
        # wait for gradients that never come.
        if self._requested and trainer.is_global_zero:
            raise KeyboardInterrupt

    def _restore_handler(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
