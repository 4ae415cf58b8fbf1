"""Square roots of second moments and the truncated decompositions that they whiten. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "DRIVERS",
    "Factors",
    "SquareRoot",
    "damped_root",
    "decompose",
    "diagonal_root",
    "polar_svd",
    "square_root",
    "thin_svd",
    "truncate",
]

Parts = tuple[Tensor, Tensor, Tensor]


_SMALLEST = 1e-16
"""Smallest singular value, relative to the largest, that the polar iteration is sure to bring to 1."""


_ITERATIONS = 12
"""Six or seven are enough for every matrix of float64; what has not settled then holds no number."""


_CHOLESKY_FROM = 100.0
"""Weights below which a step by Cholesky is as accurate as one by QR (Nakatsukasa and Higham 2013)."""


def thin_svd(matrix: Tensor) -> Parts:
    """Return ``U [m, k]``, ``S [k]`` descending and ``V' [k, n]`` of ``matrix`` ``[m, n]``, ``k = min(m, n)``.

    The driver is the one that was fastest on such a device among those whose errors are a few roundings of the largest
    value: LAPACK's divide and conquer on a CPU; on a GPU :func:`polar_svd` (`lowrank bench svd` measures them all).

    Args:
        matrix: Finite, float64.

    Example:
        >>> left, sigma, right = thin_svd(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
        >>> sigma.tolist()
        [3.0, 1.0]
    """
    return DRIVERS["polar" if matrix.device.type == "cuda" else "lapack"](matrix)


def polar_svd(matrix: Tensor) -> Parts:
    """Return the thin decomposition from the polar one, ``matrix = W H``, and the eigenvalues of ``H``.

    The polar factor comes from the iteration of Nakatsukasa, Bai and Gygi (SIAM J. Matrix Anal. Appl. 31, 2010), the
    whole from Nakatsukasa and Higham (SIAM J. Sci. Comput. 35, 2013): backward stable, as no product of the matrix with
    itself is decomposed, and made of products and factorisations that a GPU is fast at.

    Args:
        matrix: ``[m, n]``, finite, float64.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, sigma, right = polar_svd(matrix.mT)
        return right.mT, sigma, left.mT
    basis, square = torch.linalg.qr(matrix) if matrix.shape[0] > matrix.shape[1] else (None, matrix)
    turn = _polar_factor(square)
    hermitian: Tensor = turn.mT @ square
    values, vectors = torch.linalg.eigh((hermitian + hermitian.mT) / 2)
    sigma, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    left = turn @ vectors
    return (left if basis is None else basis @ left), sigma, vectors.mT.contiguous()


def _polar_factor(matrix: Tensor) -> Tensor:
    """Return the nearest orthogonal matrix of a square one."""
    size = matrix.norm()
    if size == 0:
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    found: Tensor = matrix / size
    least = _SMALLEST
    for _ in range(_ITERATIONS):
        # The weights of a rational function that brings all values between `least` and 1 as near to 1 as one of its
        # degree can (Halley's iteration, weighted anew at every step).
        reach = least**2
        inner = (4 * (1 - reach) / reach**2) ** (1 / 3)
        first = math.sqrt(1 + inner) + math.sqrt(8 - 4 * inner + 8 * (2 - reach) / (reach * math.sqrt(1 + inner))) / 2
        second = (first - 1) ** 2 / 4
        third = first + second - 1
        found = _step(found, first, second, third)
        least = min(least * (first + second * reach) / (1 + third * reach), 1.0)
        if 1 - least < 1e-15:
            break
    return found


def _step(found: Tensor, first: float, second: float, third: float) -> Tensor:
    size = len(found)
    if third > _CHOLESKY_FROM:
        above = torch.linalg.qr(torch.cat([math.sqrt(third) * found, torch.eye(size).to(found)])).Q
        product: Tensor = above[:size] @ above[size:].mT
        return (second / third) * found + (first - second / third) / math.sqrt(third) * product
    moment = third * (found.mT @ found)
    moment.diagonal().add_(1)
    solved: Tensor = torch.cholesky_solve(found.mT, torch.linalg.cholesky(moment)).mT
    return found * (second / third) + solved * (first - second / third)


def _torch_driver(name: str | None) -> Callable[[Tensor], Parts]:
    def decompose(matrix: Tensor) -> Parts:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False, driver=name)
        return left, sigma, right

    return decompose


DRIVERS: dict[str, Callable[[Tensor], Parts]] = {
    "lapack": _torch_driver(None),
    "polar": polar_svd,
    "gesvd": _torch_driver("gesvd"),
    "gesvdj": _torch_driver("gesvdj"),
}
"""By name; the last two are cuSOLVER's and work on CUDA tensors only, where ``lapack`` is torch's own choice."""


_DEAD = 1e-9
"""Damping of features that are always 0, relative to the mean of all."""


@dataclass(frozen=True)
class SquareRoot:
    """A matrix ``root`` with ``root @ root.T`` equal to a damped second moment.

    Args:
        root: ``[n, n]``, float64; lower triangular when ``kind`` is ``"cholesky"``, ``[n]`` when it is ``"diagonal"``.
        kind: ``"cholesky"``, ``"eigen"`` where Cholesky refused, or ``"diagonal"``.
        damping: What was added to the diagonal, absolute.
    """

    root: Tensor
    kind: Literal["cholesky", "eigen", "diagonal"]
    damping: float

    def multiply_right(self, rows: Tensor) -> Tensor:
        """Return ``rows @ root`` for ``rows`` ``[k, n]``."""
        return rows * self.root if self.kind == "diagonal" else rows @ self.root

    def solve_right(self, rows: Tensor) -> Tensor:
        """Return ``rows @ inverse(root)`` for ``rows`` ``[k, n]``."""
        if self.kind == "cholesky":
            solved: Tensor = torch.linalg.solve_triangular(self.root, rows, upper=False, left=False)
            return solved
        if self.kind == "diagonal":
            return rows / self.root
        # root = Q diag(s) with Q orthonormal: dividing each column by its squared norm s^2 and transposing inverts it.
        return rows @ (self.root / self.root.square().sum(0)).mT


@dataclass(frozen=True)
class Factors:
    """Components of a weight in order of importance; keeping the first ``k`` truncates it to rank ``k``.

    ``left @ right`` is the whole weight, ``left[:, :k] @ right[:k]`` its rank-``k`` approximation.

    Args:
        left: ``[out, rank]``.
        right: ``[rank, in]``.
        sigma: ``[rank]`` singular values of the whitened weight, descending.
    """

    left: Tensor
    right: Tensor
    sigma: Tensor


def square_root(second_moment: Tensor, *, damping: float = 1e-6) -> SquareRoot:
    """Return a square root of ``second_moment`` that never fails on finite input.

    The moment is symmetrised and damped by ``damping * mean(diagonal)``; Cholesky in float64 is tried first, and where
    it refuses an eigen-decomposition with its eigenvalues clamped to the damping takes over.

    Args:
        second_moment: ``[n, n]``, symmetric up to rounding, positive semi-definite up to rounding.
        damping: Relative to the mean of the diagonal.

    Raises:
        ValueError: A value is NaN or infinite.

    Example:
        >>> root = square_root(torch.tensor([[4.0, 0.0], [0.0, 9.0]]), damping=0.0)
        >>> root.kind, root.root.diagonal().tolist()
        ('cholesky', [2.0, 3.0])
    """
    moment = second_moment.double()
    if not torch.isfinite(moment).all():
        raise ValueError("the second moment holds NaN or infinity: the inputs that it was summed from did too")
    moment = (moment + moment.mT) / 2
    scale = moment.diagonal().mean().item()
    # Inputs that are all zero tell nothing about directions: any root will do, and the identity is the neutral one.
    added = damping * scale if scale > 0 else 1.0
    moment.diagonal().add_(added)
    root, info = torch.linalg.cholesky_ex(moment)
    if info.item() == 0 and torch.isfinite(root).all() and root.diagonal().min() > 0:
        return SquareRoot(root, "cholesky", added)
    values, vectors = torch.linalg.eigh(moment)
    floor = max(added, torch.finfo(torch.float64).eps * values[-1].item())
    return SquareRoot(vectors * values.clamp_min(floor).sqrt(), "eigen", added)


def damped_root(second_moment: Tensor, damping: float) -> Tensor:
    """Return a lower triangular root ``[n, n]`` of ``second_moment`` with ``damping`` times its own diagonal added.

    A ridge on a regression: each feature is damped by what it is itself, and those that are always 0 by next to
    nothing.

    Args:
        second_moment: ``[n, n]``, finite, symmetric up to rounding.
        damping: Relative to each feature's own second moment.

    Example:
        >>> damped_root(torch.tensor([[2.0, 0.0], [0.0, 8.0]]), 1.0).diagonal().round(decimals=3).tolist()
        [2.0, 4.0]
    """
    damped = (second_moment + second_moment.mT) / 2
    diagonal = damped.diagonal()
    mean = diagonal.mean().item() or 1.0
    diagonal += damping * diagonal + _DEAD * mean
    root: Tensor = torch.linalg.cholesky(damped)
    return root


def diagonal_root(scales: Tensor, *, damping: float = 1e-6) -> SquareRoot:
    """Return the square root that weighs each feature by itself, from its positive ``scales`` ``[n]``.

    Args:
        scales: ``[n]``, the root's diagonal, of at least 0.
        damping: Added to the scales, relative to their mean, so that features that are always 0 can be divided by.

    Raises:
        ValueError: A value is NaN, infinite or negative.

    Example:
        >>> diagonal_root(torch.tensor([1.0, 3.0]), damping=0.0).root.tolist()
        [1.0, 3.0]
    """
    root = scales.double()
    if not torch.isfinite(root).all() or (root < 0).any():
        raise ValueError("the scales hold NaN, infinity or negative numbers: what they were summed from did too")
    scale = root.mean().item()
    added = damping * scale if scale > 0 else 1.0
    return SquareRoot((root + added).clamp_min(torch.finfo(torch.float64).tiny), "diagonal", added)


def decompose(weight: Tensor, *, inputs: SquareRoot | None = None, outputs: SquareRoot | None = None) -> Factors:
    """Return the exact singular components of ``weight``, weighted on the side of its inputs, of its outputs, or both.

    With ``L = inputs.root``, ``R = outputs.root`` and ``U S V' = R' @ weight @ L``, truncating at rank ``k`` gives the
    weight with the least ``|R' (weight - truncated) L|^2``, which is then ``sum(sigma[k:] ** 2)`` exactly. With the
    inputs' second moment alone that is the mean squared error of the outputs (SVD-LLM, arXiv 2403.07378); with the
    output gradients' second moment as well, twice the K-FAC estimate of the rise of the loss in nats. With neither
    this is the plain SVD.

    Args:
        weight: ``[out, in]``.
        inputs: Square root ``[in, in]`` of the second moment of the inputs, or of what is to stand for it.
        outputs: Square root ``[out, out]`` of the second moment of the output gradients, likewise.

    Returns:
        Factors in float64, ``min(out, in)`` components, the singular values split evenly over both sides.

    Raises:
        ValueError: ``weight`` holds NaN or infinity.

    Example:
        >>> factors = decompose(torch.diag(torch.tensor([1.0, 3.0])))
        >>> factors.sigma.tolist()
        [3.0, 1.0]
    """
    matrix = weight.double()
    if not torch.isfinite(matrix).all():
        raise ValueError("the weight holds NaN or infinity: the checkpoint is damaged")
    if outputs is not None:
        matrix = outputs.multiply_right(matrix.mT).mT
    if inputs is not None:
        matrix = inputs.multiply_right(matrix)
    left, sigma, right = thin_svd(matrix)
    half = sigma.sqrt()
    if outputs is not None:
        left = outputs.solve_right(left.mT).mT
    if inputs is not None:
        right = inputs.solve_right(right)
    return Factors(left * half, half[:, None] * right, sigma)


def truncate(factors: Factors, components: int | Tensor) -> Factors:
    """Return the first ``components`` components, or those with the given indices, contiguous in memory."""
    pick = slice(components) if isinstance(components, int) else components
    return Factors(
        factors.left[:, pick].contiguous(), factors.right[pick].contiguous(), factors.sigma[pick].contiguous()
    )
