"""From two factors to pivots and coefficients: which rows or columns to keep, and how exact that is. Pure functions.

Everything is computed in float64 from an orthonormal basis of the left factor's columns. The result then depends
neither on the range of the components' sizes nor on whether some components depend on others.

The permutation is not folded into the layers before or after. That could save one of an MLP's three gathers, and all
three together take less than 2 % of its decoding step on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.models.hf_layers import Side

__all__ = ["LIMIT", "Pivoted", "pivot"]

LIMIT = 16.0
"""Largest accepted error, in units of the error of factored storage or of rounding the dense matrix, if that is larger.

Measured: at most 3.6 for the linear layers of SmolLM2-135M at keep 0.3 and 0.8, and for random, spread, repeated and
nearly dependent rows up to 576 x 1536. It grows with the root of the rank, to 5.3 for a random 4096 x 4096 matrix.
"""

TOLERANCE = 1.05
"""Largest coefficient, by magnitude, that swaps of pivots leave."""

SWAPS = 1000
"""Swaps at most."""

PROBES = 32
"""Random inputs on which errors are estimated."""


@dataclass(frozen=True)
class Pivoted:
    """A weight in pivoted form, in the parts and the type that ``PivotedLinear`` holds, and how exact it is.

    Args:
        side: Whether pivots are rows (``out``) or columns (``in``).
        pivots: ``[rank]`` ascending indices, int32.
        weight: ``[out - rank, rank]`` coefficients of the other rows, or ``[out, rank]`` pivot columns.
        right: ``[rank, in]`` pivot rows, or ``[rank, in - rank]`` coefficients of the other columns.
        growth: Largest coefficient, by magnitude.
        error: Relative root mean square error of the stored form.
        plain: Relative root mean square error of the factors cast to the type, or of the dense matrix cast to it,
            whichever is larger.
    """

    side: Side
    pivots: Tensor
    weight: Tensor
    right: Tensor
    growth: float
    error: float
    plain: float

    @property
    def is_accurate(self) -> bool:
        """Whether the error is finite and at most ``LIMIT`` times the plain one, if that is finite."""
        return math.isfinite(self.error) and not self.error > LIMIT * self.plain


def pivot(left: Tensor, right: Tensor, *, dtype: torch.dtype) -> Pivoted:
    """Return ``left @ right`` in pivoted form, rounded to ``dtype``.

    Pivots are on the shorter side, rows where both are as long: its permutation is shorter, and with fewer coefficients
    errors were half as large wherever the lengths differ. If the result is not accurate, the other side is tried too
    and the better result is returned.

    Pivots start from an LU decomposition of the basis with partial pivoting. Then the largest coefficient is swapped in
    until none is above ``TOLERANCE``. Each swap enlarges the volume of the pivots by that coefficient, so the swaps
    end. The coefficients are rounded first and the kept rows are fitted to them by least squares (the system's singular
    values are at least 1), which takes a sixth off the error.

    Args:
        left: ``[out, rank]``.
        right: ``[rank, in]``.
        dtype: The type to store.

    Raises:
        ValueError: The rank is not below both sizes, or a value is NaN or infinite.

    Example:
        >>> found = pivot(torch.tensor([[1.0], [4.0], [2.0]]), torch.tensor([[1.0, 1.0, 3.0]]), dtype=torch.float32)
        >>> found.side, found.pivots.tolist(), found.weight.tolist(), found.right.tolist()
        ('out', [1], [[0.25], [0.5]], [[4.0, 4.0, 12.0]])
    """
    rank, shape = left.shape[1], (left.shape[0], right.shape[1])
    if not 1 <= rank < min(shape):
        raise ValueError(f"rank {rank} of shape {shape} can't be stored pivoted: expected 1 to {min(shape) - 1}")
    left, right = left.detach().double(), right.detach().double()
    if not (left.isfinite().all() and right.isfinite().all()):
        raise ValueError("the factors hold NaN or infinity and can't be stored pivoted: make them again")
    sides: tuple[Side, Side] = ("out", "in") if shape[0] <= shape[1] else ("in", "out")
    first = _of_side(left, right, sides[0], dtype)
    if first.is_accurate:
        return first
    second = _of_side(left, right, sides[1], dtype)
    return second if second.is_accurate or second.error < first.error else first


def _of_side(left: Tensor, right: Tensor, side: Side, dtype: torch.dtype) -> Pivoted:
    """Return the form with pivots on ``side``; columns are rows of the transposed weight."""
    if side == "in":
        left, right = right.mT, left.mT
    pivots, others, coefficients = _choose(torch.linalg.qr(left).Q)
    growth = coefficients.abs().max().item()
    coefficients = coefficients.to(dtype)
    rows = _fit(left, right, pivots, others, coefficients.double()).to(dtype)
    error, plain = _errors(left, right, pivots, others, coefficients, rows)
    weight, kept = (coefficients, rows) if side == "out" else (rows.mT, coefficients.mT)
    return Pivoted(side, pivots.int(), weight.contiguous(), kept.contiguous(), growth, error, plain)


def _choose(basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return pivots and other rows of an orthonormal ``basis`` ``[m, k]``, and the coefficients ``[m - k, k]``."""
    rank = basis.shape[1]
    packed, exchanges = torch.linalg.lu_factor(basis)
    rows = list(range(len(basis)))
    for at, exchange in enumerate(exchanges.tolist()):
        rows[at], rows[exchange - 1] = rows[exchange - 1], rows[at]
    coefficients = torch.linalg.solve_triangular(
        packed[:rank], packed[rank:], upper=False, left=False, unitriangular=True
    )
    for _ in range(SWAPS):
        other, place = divmod(int(coefficients.abs().argmax()), rank)
        largest = coefficients[other, place].item()
        if abs(largest) <= TOLERANCE:
            break
        column, row = coefficients[:, place].clone(), coefficients[other].clone()
        column[other] += 1
        row[place] -= 1
        coefficients.addr_(column, row, alpha=-1 / largest)
        rows[place], rows[rank + other] = rows[rank + other], rows[place]
    pivots, others = (torch.tensor(sorted(part), device=basis.device) for part in (rows[:rank], rows[rank:]))
    # Solved again, because the errors of swaps add up.
    return pivots, others, torch.linalg.solve(basis[pivots], basis[others], left=False)


def _fit(left: Tensor, right: Tensor, pivots: Tensor, others: Tensor, coefficients: Tensor) -> Tensor:
    """Return the rows ``[k, n]`` for the pivots that fit best when ``coefficients`` make all other rows from them."""
    moment = coefficients.mT @ coefficients
    moment.diagonal().add_(1)
    goal = left[pivots] + coefficients.mT @ left[others]
    return torch.cholesky_solve(goal, torch.linalg.cholesky(moment)) @ right


def _errors(
    left: Tensor, right: Tensor, pivots: Tensor, others: Tensor, coefficients: Tensor, rows: Tensor
) -> tuple[float, float]:
    """Return the relative errors of pivoted and plain storage in the type of ``rows``, estimated on random inputs."""
    dtype = rows.dtype
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(right.shape[1], PROBES, generator=generator, dtype=torch.float64).to(right.device)
    exact = left @ (right @ inputs)
    size = exact.norm().item()
    kept = rows.double() @ inputs
    misses = (kept - exact[pivots]).norm().item(), (coefficients.double() @ kept - exact[others]).norm().item()
    factored = (left.to(dtype).double() @ (right.to(dtype).double() @ inputs) - exact).norm().item()
    # The root mean square error of rounding is a fifth of the type's epsilon. In float64 the sums of products here have
    # larger errors.
    rounding = max(torch.finfo(dtype).eps / 5, len(rows) * torch.finfo(torch.float64).eps) * size
    return (math.hypot(*misses) / size, max(factored, rounding) / size) if size else (0.0, 0.0)
