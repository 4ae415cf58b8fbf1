"""From two factors to pivots and coefficients: which rows or columns to keep, and how exact that is. Pure functions.

What is special: all is computed in float64 from an orthonormal basis of the left factor's columns, so that it does not
matter how far the components' sizes lie apart or whether some depend on others. Not covered: folding the permutation
into the layers before or after. One of an MLP's three gathers could go that way, and all three take under 2 % of its
decoding step on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.models.hf_layers import Side

__all__ = ["LIMIT", "Pivoted", "pivot"]

LIMIT = 16.0
"""How many times the error of factored storage or of rounding the dense matrix, the larger one, is accepted.

Measured: at most 3.6 for the maps of SmolLM2-135M at keep 0.3 and 0.8 and for random, spread, repeated and nearly
dependent rows up to 576 x 1536; it grows with the root of the rank, to 5.3 for a random 4096 x 4096 map.
"""


TOLERANCE = 1.05


SWAPS = 1000


PROBES = 32


@dataclass(frozen=True)
class Pivoted:
    """A map in pivoted form, in the parts and the type that ``PivotedLinear`` holds, and how exact it is.

    Args:
        side: Whether pivots are rows (``out``) or columns (``in``).
        pivots: ``[rank]`` ascending indices, int32.
        weight: ``[out - rank, rank]`` coefficients of the other rows, or ``[out, rank]`` pivot columns.
        right: ``[rank, in]`` pivot rows, or ``[rank, in - rank]`` coefficients of the other columns.
        growth: Largest coefficient, by magnitude.
        error: Relative root mean square error of the stored form.
        plain: That of the factors cast to the type, or of the dense matrix so cast, whichever is larger.
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

    The side with fewer rows or columns is taken, rows where there are as many: its permutation is shorter, and with
    fewer coefficients errors were half as large wherever the sizes differ. Only if that side is not accurate the
    other one is tried too, and the better one returned.

    Pivots start from an LU decomposition of the basis with partial pivoting; then the largest coefficient is swapped
    in until none is above 1.05. Each swap enlarges the pivots' volume by that coefficient, so it ends. The coefficients
    are rounded first and the kept rows fitted to them by least squares (a system whose singular values are at least
    1), which takes a sixth off the error.

    Args:
        left: ``[out, rank]``.
        right: ``[rank, in]``.
        dtype: The type to be stored.

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
        raise ValueError("the factors hold NaN or infinity: they can't be stored pivoted")
    sides: tuple[Side, Side] = ("out", "in") if shape[0] <= shape[1] else ("in", "out")
    first = _of_side(left, right, sides[0], dtype)
    if first.is_accurate:
        return first
    second = _of_side(left, right, sides[1], dtype)
    return second if second.is_accurate or second.error < first.error else first


def _of_side(left: Tensor, right: Tensor, side: Side, dtype: torch.dtype) -> Pivoted:
    """Return the form with pivots on ``side``; columns are rows of the transposed map."""
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
    # Anew, because the swaps' errors add up.
    return pivots, others, torch.linalg.solve(basis[pivots], basis[others], left=False)


def _fit(left: Tensor, right: Tensor, pivots: Tensor, others: Tensor, coefficients: Tensor) -> Tensor:
    """Return the rows ``[k, n]`` that stand for the pivots best when ``coefficients`` make all others of them."""
    moment = coefficients.mT @ coefficients
    moment.diagonal().add_(1)
    goal = left[pivots] + coefficients.mT @ left[others]
    return torch.cholesky_solve(goal, torch.linalg.cholesky(moment)) @ right


def _errors(
    left: Tensor, right: Tensor, pivots: Tensor, others: Tensor, coefficients: Tensor, rows: Tensor
) -> tuple[float, float]:
    """Return the relative errors of the pivoted and of plain storage in ``rows``' type, estimated on random inputs."""
    dtype = rows.dtype
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(right.shape[1], PROBES, generator=generator, dtype=torch.float64).to(right.device)
    exact = left @ (right @ inputs)
    size = exact.norm().item()
    kept = rows.double() @ inputs
    misses = (kept - exact[pivots]).norm().item(), (coefficients.double() @ kept - exact[others]).norm().item()
    factored = (left.to(dtype).double() @ (right.to(dtype).double() @ inputs) - exact).norm().item()
    # Rounding numbers of all mantissas is off by a fifth of the type's epsilon, as a root mean square. In float64 the
    # sums of products here are off by more.
    rounding = max(torch.finfo(dtype).eps / 5, len(rows) * torch.finfo(torch.float64).eps) * size
    return (math.hypot(*misses) / size, max(factored, rounding) / size) if size else (0.0, 0.0)
