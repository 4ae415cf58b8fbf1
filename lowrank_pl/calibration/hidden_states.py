"""Hidden states of all sequences between decoder blocks: in memory, or memory-mapped on disk."""

from __future__ import annotations

import logging
import math
import tempfile
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_pl.utils.environment import available_memory
from lowrank_pl.utils.files import cache_root

__all__ = ["Cache", "HiddenStates", "cache_for"]

_log = logging.getLogger(__name__)

Cache = Literal["ram", "disk"]
"""Where hidden states are kept between blocks."""


def cache_for(size: float) -> Cache:
    """Return where to keep hidden states of ``size`` bytes: in main memory, or on disk where memory is short."""
    free = available_memory()
    return "ram" if free is None or size < free / 2 else "disk"


class HiddenStates:
    """Hidden states of all sequences after one block. The states after the next block can overwrite them one by one.

    Args:
        sequences: How many sequences.
        cache: ``ram``, or ``disk`` for a file in the cache folder that disappears with the process.
        device: The device whose memory ``ram`` uses.

    Example:
        >>> states = HiddenStates(3, cache="ram")
        >>> states.write(2, torch.ones(1, 4, 8))
        >>> states.read(2, 1).shape
        torch.Size([1, 4, 8])
    """

    def __init__(self, sequences: int, *, cache: Cache = "ram", device: torch.device | str = "cpu") -> None:
        self.sequences, self.cache, self.device = sequences, cache, device
        self._values: Tensor | None = None
        self._rest: tuple[Any, ...] | None = None

    def write(self, first: int, output: Any) -> None:
        """Keep the output of a block for the sequences from number ``first`` on.

        Args:
            first: Number of the first sequence.
            output: ``[sequences, length, hidden]``, or a tuple that begins with it and has no other tensor.

        Raises:
            OSError: The disk is full.
        """
        hidden = output if isinstance(output, Tensor) else output[0]
        self._rest = None if isinstance(output, Tensor) else tuple(output[1:])
        if self._values is None:
            self._values = self._room(hidden)
        self._values[first : first + len(hidden)] = hidden

    def read(self, first: int, count: int) -> Any:
        """Return the output of a block for ``count`` sequences from number ``first`` on, without a copy."""
        assert self._values is not None
        hidden = self._values[first : first + count]
        return hidden if self._rest is None else (hidden, *self._rest)

    @property
    def bytes(self) -> int:
        """Bytes of the hidden states; 0 before the first were written."""
        return 0 if self._values is None else self._values.nbytes

    def _room(self, like: Tensor) -> Tensor:
        shape = (self.sequences, *like.shape[1:])
        size = math.prod(shape)
        _log.debug("hidden states of all sequences: %.2f GB (%s)", size * like.element_size() / 1e9, self.cache)
        if self.cache == "ram":
            return torch.empty(shape, dtype=like.dtype, device=self.device)
        folder = cache_root()
        folder.mkdir(parents=True, exist_ok=True)
        # The file loses its name when this returns, so a killed run leaves nothing behind. Its pages stay mapped.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".hidden.", suffix=".tmp") as file:
            # Written to its full size now: if the disk filled up later, the process would end without an error message.
            row = bytes(like[0].numel() * like.element_size())
            for _ in range(self.sequences):
                file.write(row)
            file.flush()
            return torch.from_file(file.name, shared=True, size=size, dtype=like.dtype).view(shape)
