"""Square roots of second moments and the truncated decompositions that they whiten. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Factors", "SquareRoot", "decompose", "square_root", "truncate"]


@dataclass(frozen=True)
class SquareRoot:
    """A matrix ``root`` with ``root @ root.T`` equal to a damped second moment.

    Args:
        root: ``[n, n]``, float64; lower triangular when ``kind`` is ``"cholesky"``.
        kind: ``"cholesky"``, or ``"eigen"`` where Cholesky refused.
        damping: What was added to the diagonal, absolute.
    """

    root: Tensor
    kind: Literal["cholesky", "eigen"]
    damping: float

    def solve_right(self, rows: Tensor) -> Tensor:
        """Return ``rows @ inverse(root)`` for ``rows`` ``[k, n]``."""
        if self.kind == "cholesky":
            solved: Tensor = torch.linalg.solve_triangular(self.root, rows, upper=False, left=False)
            return solved
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


def decompose(weight: Tensor, *, whitening: SquareRoot | None = None) -> Factors:
    """Return the exact singular components of ``weight``, whitened by the inputs' second moment when given.

    With ``L = whitening.root`` and ``U S V' = weight @ L``, truncating at rank ``k`` gives the weight with the least
    mean squared error of the outputs, which is then ``sum(sigma[k:] ** 2)`` exactly (SVD-LLM, arXiv 2403.07378).
    Without it this is the plain SVD.

    Args:
        weight: ``[out, in]``.
        whitening: Square root of the second moment ``[in, in]`` of the inputs.

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
    if whitening is not None:
        matrix = matrix @ whitening.root
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    half = sigma.sqrt()
    if whitening is not None:
        right = whitening.solve_right(right)
    return Factors(left * half, half[:, None] * right, sigma)


def truncate(factors: Factors, components: int | Tensor) -> Factors:
    """Return the first ``components`` components, or those with the given indices, contiguous in memory."""
    pick = slice(components) if isinstance(components, int) else components
    return Factors(
        factors.left[:, pick].contiguous(), factors.right[pick].contiguous(), factors.sigma[pick].contiguous()
    )
