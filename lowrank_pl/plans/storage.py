"""The two forms in which a low-rank layer is stored, and the cost of a rank in each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_pl.plans.constraints import Form, StorageChoice
from lowrank_pl.utils.checks import check_choices

__all__ = ["INDEX_BYTES", "Form", "Storage", "StorageChoice"]

Shape = tuple[int, int]


INDEX_BYTES = 4
"""Bytes of a pivot's index."""


@dataclass(frozen=True)
class Storage:
    """The cost of ranks under a choice of form.

    A weight of shape ``(m, n)`` and rank ``k`` takes ``k (m + n)`` numbers as two factors. ``k`` of its rows are
    independent, and the other rows are combinations of these: pivoted storage keeps the ``k`` rows and the
    coefficients, ``k (m + n - k)`` numbers and ``k`` indices (PIFA, arXiv 2501.19090). An index counts as the numbers
    that would take as many bytes, so that a kept fraction of parameters is also a kept fraction of bytes.

    Args:
        choice: ``factored``, ``pivoted``, or ``auto`` for the smaller of both.
        bytes_per_parameter: Bytes of one stored number.

    Raises:
        ValueError: ``choice`` is none of these.

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
        check_choices({"storage": (self.choice, StorageChoice)})

    @property
    def per_index(self) -> float:
        """How many numbers take as many bytes as an index."""
        return INDEX_BYTES / self.bytes_per_parameter

    def form(self, shape: Shape, rank: int) -> Form:
        """Return the form in which a weight of ``shape`` ``(out, in)`` is stored at ``rank``."""
        if self.choice != "auto":
            return self.choice
        return "pivoted" if self.cost(shape, rank) < rank * sum(shape) else "factored"

    def cost(self, shape: Shape, rank: int) -> int:
        """Return the numbers stored for a weight of ``shape`` at ``rank``, indices included."""
        return int(self.costs(shape, np.array(rank)))

    def costs(self, shape: Shape, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ``cost`` of each of ``ranks``."""
        factored = ranks * sum(shape)
        if self.choice == "factored":
            return factored
        pivoted = factored - ranks**2 + -(-ranks * INDEX_BYTES // self.bytes_per_parameter)
        return pivoted if self.choice == "pivoted" else np.minimum(pivoted, factored)

    def break_even(self, shape: Shape) -> int:
        """Return the largest rank that costs less than the dense weight; 0 if there is none."""
        m, n = shape
        if self.choice == "factored":
            return (m * n - 1) // (m + n)
        smaller = np.flatnonzero(self.costs(shape, np.arange(min(shape))) < m * n)
        return int(smaller[-1])

    def ratio(self, shape: Shape, rank: Tensor) -> Tensor:
        """Return the cost of ``rank`` relative to the dense weight, for real ranks and differentiable.

        For ``auto``, this is the cost of pivoted storage, which is the smaller form from rank 3 on.

        Args:
            shape: ``(out, in)``.
            rank: Real numbers from 0 to ``min(out, in)``, of any shape.
        """
        m, n = shape
        if self.choice == "factored":
            return rank * ((m + n) / (m * n))
        return rank * (m + n + self.per_index - rank) / (m * n)

    def ratios(self, shape: Shape) -> Tensor:
        """Return the ``ratio`` of every whole rank from 1 on, float64 ``[min(out, in)]``."""
        return self.ratio(shape, torch.arange(1, min(shape) + 1, dtype=torch.float64))

    def rank_at(self, shape: Shape, ratio: float) -> float:
        """Return the real rank whose cost is ``ratio`` of the dense weight's, at most ``min(out, in)``.

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
        # The smaller root of k (m + n + per_index - k) = ratio m n, without subtracting nearly equal numbers.
        half = (m + n + self.per_index) / 2
        under = half * half - ratio * m * n
        return float(min(shape)) if under < 0 else min(ratio * m * n / (half + math.sqrt(under)), float(min(shape)))
