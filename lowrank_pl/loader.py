"""Batches of token windows whose order can be taken up anywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lowrank_pl.files import sha256_of
from lowrank_pl.windows import windows_fingerprint

__all__ = ["Place", "WindowLoader"]

Place = tuple[int, int]
"""An epoch, and the number of its batches that are done."""

_log = logging.getLogger(__name__)


class WindowLoader:
    """Batches of windows in an order that follows from ``(seed, epoch)``, so that it can be taken up anywhere.

    Where to begin is asked of ``place`` when the first batch of an epoch is fetched. With a Trainer that is its own
    count of the batches that were trained on, which its checkpoints hold: neither batches fetched ahead nor the number
    of workers can shift it. It is no ``DataLoader``, so that Lightning leaves the order and the shares of the processes
    alone.

    Args:
        windows: int64 ``[windows, length]``.
        batch_size: Windows in a batch of one process.
        seed: Seed of the order; None keeps the order of the text.
        rank: Which process this is; batch ``i`` of all processes together is one slice of the order.
        world_size: How many processes there are.
        drop_tail: Leave out the windows that do not fill a batch of every process. Otherwise the last batch is smaller,
            and only what can't be shared out equally is left out.
        num_workers: Processes that fetch batches ahead; the windows are in memory, so 0 is usually best.
        place: Returns the epoch and the number of batches of it that are done; by default epochs are counted here.

    Raises:
        ValueError: There are too few windows for one batch of every process.

    >>> loader = WindowLoader(torch.arange(10).view(5, 2), batch_size=2, seed=None)
    >>> [batch.tolist() for batch in loader]
    [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    """

    def __init__(
        self,
        windows: Tensor,
        *,
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        drop_tail: bool = True,
        num_workers: int = 0,
        place: Callable[[], Place] | None = None,
    ) -> None:
        unit = world_size * batch_size if drop_tail else world_size
        self._used = len(windows) // unit * unit
        if self._used == 0:
            raise ValueError(
                f"{len(windows)} windows of text are fewer than one batch of {batch_size} for each of {world_size} "
                "processes: give more text or a smaller batch size"
            )
        if rank == 0 and self._used < len(windows):
            others = "" if seed is None else ", others in each epoch"
            left = len(windows) - self._used
            _log.warning("%d of %d windows are left out%s: %d are taken at a time", left, len(windows), others, unit)
        epochs = count()
        self._place = place or (lambda: (next(epochs), 0))
        self._windows = windows
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_workers = num_workers
        self._fingerprint = windows_fingerprint(windows)

    def __len__(self) -> int:
        """Return the number of batches of this process in an epoch."""
        return -(-self._used // (self._world_size * self._batch_size))

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches int64 ``[batch, length]`` that are left of the epoch.

        This is a generator so that the place is asked for at the first batch: Lightning makes the iterator while it
        restores a checkpoint, when its counters are not settled yet.
        """
        epoch, done = self._place()
        loader = DataLoader(
            cast(Dataset[Tensor], self._windows),
            batch_sampler=self.batches(epoch)[done:],
            num_workers=self._num_workers,
            generator=torch.Generator(),  # otherwise every epoch takes a number from the global random state
        )
        yield from loader

    def batches(self, epoch: int) -> list[list[int]]:
        """Return which windows are in each batch of this process in ``epoch``."""
        size, world = self._batch_size, self._world_size
        order = self._order(epoch)[: self._used]
        steps = [order[begin : begin + size * world] for begin in range(0, len(order), size * world)]
        return [step[self._rank * len(step) // world : (self._rank + 1) * len(step) // world] for step in steps]

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on; the place in it is in the Trainer's own state."""
        return {
            "windows": self._fingerprint,
            "seed": self._seed,
            "batch_size": self._batch_size,
            "world_size": self._world_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with the data of the run that wrote the checkpoint.

        Raises:
            ValueError: It had other windows or another seed, so that its place in the epoch has no meaning here.
        """
        mine = self.state_dict()
        other = [key for key, value in mine.items() if state_dict.get(key) != value]
        listed = ", ".join(f"{key} {state_dict.get(key)} there and {mine[key]} here" for key in other)
        if "windows" in other or "seed" in other:
            raise ValueError(
                f"the checkpoint was written while learning from other data ({listed}), its place in the epoch can't "
                "be taken up: give that run's text, tokenizer, length, windows, shuffle and seed, or start a new run"
            )
        if other:
            _log.warning("this epoch goes on with other batches than the checkpoint's run would have had: %s", listed)

    def _order(self, epoch: int) -> list[int]:
        if self._seed is None:
            return list(range(len(self._windows)))
        generator = torch.Generator().manual_seed(int(sha256_of(str(self._seed), str(epoch))[:15], 16))
        return cast(list[int], torch.randperm(len(self._windows), generator=generator).tolist())
