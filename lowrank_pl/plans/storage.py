"""How a low-rank map is stored, and what a rank costs then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["INDEX_BYTES", "Form", "Storage", "StorageChoice"]

Shape = tuple[int, int]

Form = Literal["factored", "pivoted"]
"""Two factors, or independent rows (or columns) and the coefficients of all others."""

StorageChoice = Literal["factored", "pivoted", "auto"]
"""One form for all modules, or whichever is smaller for each."""

INDEX_BYTES = 4
"""Bytes of the index that says where a pivot stands."""


@dataclass(frozen=True)
class Storage:
    """What ranks cost under a choice of form.

    A map of shape ``(m, n)`` at rank ``k`` takes ``k (m + n)`` numbers as two factors. Any such map has ``k``
    independent rows, of which the others are combinations: pivoted storage keeps these rows and the coefficients,
    ``k (m + n - k)`` numbers and ``k`` indices (PIFA, arXiv 2501.19090). Indices are counted as the numbers whose room
    they take, so that a kept fraction of parameters is one of bytes too.

    Args:
        choice: ``factored``, ``pivoted``, or ``auto`` for whichever is smaller.
        bytes_per_parameter: Bytes of one stored number.

    Raises:
        ValueError: Another choice.

    Example:
        >>> plain, pivoted = Storage("factored"), Storage("pivoted")
        >>> plain.cost((10, 20), 3), pivoted.cost((10, 20), 3)
        (90, 84)
        >>> plain.break_even((10, 20)), pivoted.break_even((10, 20))
        (6, 9)
    """

    choice: StorageChoice = "auto"
    bytes_per_parameter: int = 4

    def __post_init__(self) -> None:
        if self.choice not in get_args(StorageChoice):
            raise ValueError(f"storage is {self.choice!r}: expected one of {', '.join(get_args(StorageChoice))}")

    @property
    def per_index(self) -> float:
        """Numbers whose room an index takes."""
        return INDEX_BYTES / self.bytes_per_parameter

    def form(self, shape: Shape, rank: int) -> Form:
        """Return the form in which a map of ``shape`` ``(out, in)`` is stored at ``rank``."""
        if self.choice != "auto":
            return self.choice
        return "pivoted" if self.cost(shape, rank) < rank * sum(shape) else "factored"

    def cost(self, shape: Shape, rank: int) -> int:
        """Return the numbers that ``rank`` components of a map of ``shape`` take, indices included."""
        return int(self.costs(shape, np.array(rank)))

    def costs(self, shape: Shape, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what each of ``ranks`` takes, as ``cost`` does."""
        factored = ranks * sum(shape)
        if self.choice == "factored":
            return factored
        pivoted = factored - ranks**2 + -(-ranks * INDEX_BYTES // self.bytes_per_parameter)
        return pivoted if self.choice == "pivoted" else np.minimum(pivoted, factored)

    def break_even(self, shape: Shape) -> int:
        """Return the largest rank that takes less than the dense weight; 0 if there is none."""
        m, n = shape
        if self.choice == "factored":
            return (m * n - 1) // (m + n)
        smaller = np.flatnonzero(self.costs(shape, np.arange(min(shape))) < m * n)
        return int(smaller[-1])

    def ratio(self, shape: Shape, rank: Tensor) -> Tensor:
        """Return the numbers of ``rank`` components over the dense weight's, for real ranks, differentiable.

        Under ``auto`` it is that of pivoted storage, from which the smaller one differs at ranks of 1 and 2 only.

        Args:
            shape: ``(out, in)``.
            rank: Real numbers from 0 to ``min(out, in)``, of any shape.
        """
        m, n = shape
        if self.choice == "factored":
            return rank * ((m + n) / (m * n))
        return rank * (m + n + self.per_index - rank) / (m * n)

    def ratios(self, shape: Shape) -> Tensor:
        """Return ``ratio`` at every whole rank from 1 on, ``[min(out, in)]``, float64."""
        return self.ratio(shape, torch.arange(1, min(shape) + 1, dtype=torch.float64))

    def rank_at(self, shape: Shape, ratio: float) -> float:
        """Return the real rank that takes ``ratio`` of the dense weight's numbers, at most ``min(out, in)``.

        >>> Storage("factored").rank_at((20, 20), 0.5)
        5.0
        >>> import torch
        >>> storage = Storage("pivoted")
        >>> rank = storage.rank_at((20, 20), 0.5)
        >>> round(rank, 2), round(storage.ratio((20, 20), torch.tensor(rank)).item(), 4)
        (5.66, 0.5)
        """
        m, n = shape
        if self.choice == "factored":
            return min(ratio * m * n / (m + n), min(shape))
        # The smaller root of k (m + n + per_index - k) = ratio m n, written without a difference of near numbers.
        half = (m + n + self.per_index) / 2
        under = half * half - ratio * m * n
        return float(min(shape)) if under < 0 else min(ratio * m * n / (half + math.sqrt(under)), float(min(shape)))
