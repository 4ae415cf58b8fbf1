"""The thin singular value decomposition by the fastest driver of a device that loses no digits. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["DRIVERS", "polar_svd", "thin_svd"]

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
