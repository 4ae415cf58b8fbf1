"""Settings of rounding and of budgets in bytes, importable without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_pl.utils.checks import check_counts, checked_settings
from lowrank_pl.utils.formatting import memory_size

if TYPE_CHECKING:
    from lowrank_pl.models.hf_quantized import Grid

__all__ = ["ByteBudget", "Rounding", "grid_of"]

_GROUP = 32
"""Columns that share a scale below 8 bits, by default."""


@dataclass(frozen=True)
class Rounding:
    """How the matrices of a plan are rounded.

    Args:
        bits: Bits of a number of the targeted layers, factored or dense, 2 to 8.
        group: Columns that share a scale: a multiple of 8. By default 32, and whole rows at 8 bits.
        embeddings: Bits of the embeddings and the head; None leaves them as they are.
        compensate: Round with error compensation in the metric that the factors were made with (GPTQ, arXiv
            2210.17323). Otherwise every number is rounded to the nearest one.

    Raises:
        ValueError: Bits or a group that are impossible.
    """

    bits: int = 4
    group: int | None = None
    embeddings: int | None = 8
    compensate: bool = True

    def __post_init__(self) -> None:
        for bits, group in ((self.bits, self.group), (8 if self.embeddings is None else self.embeddings, None)):
            # What is surely possible is not checked: that would import torch for the default of a command.
            if group is not None or bits not in range(2, 9):
                grid_of(bits, group)

    @property
    def grid(self) -> Grid:
        """The numbers that targeted layers are rounded to."""
        return grid_of(self.bits, self.group)


@dataclass(frozen=True)
class ByteBudget:
    """A budget in bytes, in which every module gets a rank and bits.

    Args:
        keep: Fraction of the dense model's bytes to keep, above 0 and at most 1.
        size: Bytes of the whole model on disk instead: a number, or a text such as ``60MB``.
        bits: Bits that a matrix may have; it may also stay as it is.
        group: Columns that share a scale below 8 bits, a multiple of 8.
        embeddings: Whether embeddings and head may be rounded too.
        sequences: Calibration sequences on which the loss by rounded embeddings is measured.

    Raises:
        ValueError: Not exactly one of ``keep`` and ``size``, one that is out of range, impossible bits, or a value of
            another type.
    """

    keep: float | None = None
    size: str | None = None
    bits: Sequence[int] | int = (3, 4, 5, 6, 8)
    group: int = _GROUP
    embeddings: bool = True
    sequences: int = 4

    def __post_init__(self) -> None:
        for name, value in checked_settings(ByteBudget, vars(self)).items():
            object.__setattr__(self, name, value)
        if (self.keep is None) == (self.size is None):
            raise ValueError(
                f"a budget in bytes with keep {self.keep} and size {self.size}: expected one of them, such as keep "
                "0.3 or size 60MB"
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}: expected the fraction of bytes to keep, above 0 and at most 1")
        if self.size is not None:
            memory_size(self.size)
        if not self.bits:
            raise ValueError(f"bits is {self.bits!r}: expected one or more whole numbers from 2 to 8")
        if isinstance(self.bits, int):
            object.__setattr__(self, "bits", (self.bits,))
        check_counts({"sequences": self.sequences})
        self.grids  # noqa: B018 - it checks

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The numbers that a matrix may be rounded to."""
        every = {self.bits} if isinstance(self.bits, int) else set(self.bits)
        return tuple(grid_of(bits, None if bits == 8 else self.group) for bits in sorted(every))

    def limit(self, dense_bytes: int) -> int:
        """Return the bytes that a model of ``dense_bytes`` may have."""
        if self.size is not None:
            return memory_size(self.size)
        assert self.keep is not None
        return int(self.keep * dense_bytes)


def grid_of(bits: int, group: int | None = None) -> Grid:
    """Return the numbers with so many bits, with the default group if none is given.

    Raises:
        ValueError: Bits or a group that are impossible.
    """
    from lowrank_pl.models.hf_quantized import Grid

    return Grid(bits, group if group is not None or bits == 8 else _GROUP)
