"""Square roots of second moments, and singular value decompositions weighted by them. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "DRIVERS",
    "Factors",
    "SquareRoot",
    "StackedRoots",
    "any_zero",
    "damped_root",
    "decompose",
    "decompose_rows",
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
"""Six or seven are enough for every matrix of float64; one that has not converged then holds NaN."""

_CHOLESKY_FROM = 100.0
"""Weights below which a step by Cholesky is as accurate as one by QR (Nakatsukasa and Higham 2013)."""


def thin_svd(matrix: Tensor) -> Parts:
    """Return ``U [m, k]``, ``S [k]`` descending and ``V' [k, n]`` of ``matrix`` ``[m, n]``, ``k = min(m, n)``.

    The driver is the fastest one whose errors are a few roundings of the largest value: LAPACK's divide and conquer on
    a CPU, :func:`polar_svd` on a GPU. ``lowrank bench svd`` measures all drivers.

    Args:
        matrix: Finite, float64.

    Example:
        >>> left, sigma, right = thin_svd(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
        >>> sigma.tolist()
        [3.0, 1.0]
    """
    return DRIVERS["polar" if matrix.device.type == "cuda" else "lapack"](matrix)


def polar_svd(matrix: Tensor) -> Parts:
    """Return the thin decomposition, computed from the polar one, ``matrix = W H``, and the eigenvalues of ``H``.

    The method is that of Nakatsukasa and Higham (SIAM J. Sci. Comput. 35, 2013), with the iteration of Nakatsukasa, Bai
    and Gygi (SIAM J. Matrix Anal. Appl. 31, 2010) for the polar factor. It is backward stable, since no product of the
    matrix with itself is decomposed, and it consists of products and factorisations that a GPU is fast at.

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
        # The coefficients of the rational function of its degree that brings all values between `least` and 1 nearest
        # to 1: Halley's iteration with new coefficients at every step.
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
"""Drivers by name. The last two are cuSOLVER's and need CUDA tensors; on these ``lapack`` is torch's own choice."""

_DEAD = 1e-9
"""Damping of features that are always 0, relative to the mean of all."""

_LEAST_SCALE = 1e-8
"""Least scale of a feature, relative to the largest: a factor is divided by it, and stored in float32."""


@dataclass(frozen=True)
class SquareRoot:
    """A matrix ``root`` with ``root @ root.T`` equal to a damped second moment.

    Args:
        root: ``[n, n]``, float64; lower triangular when ``kind`` is ``"cholesky"``, ``[n]`` when it is ``"diagonal"``.
        kind: ``"cholesky"``, ``"eigen"`` where Cholesky failed, or ``"diagonal"``.
        damping: The number that was added to the diagonal.
        zero: Whether the moment is zero. It prefers no direction, so its root is the identity, but errors cost nothing.
    """

    root: Tensor
    kind: Literal["cholesky", "eigen", "diagonal"]
    damping: float
    zero: bool = False

    def of_features(self, features: Tensor) -> SquareRoot:
        """Return a root ``[k, n]`` of the moment of ``k`` features; ``kind`` must not be ``"diagonal"``."""
        return replace(self, root=self.root[features])

    def moment(self) -> Tensor:
        """Return the damped second moment ``[n, n]``, float64."""
        return self.root.square().diag() if self.kind == "diagonal" else self.root @ self.root.mT

    def multiply_right(self, rows: Tensor) -> Tensor:
        """Return ``rows @ root`` for ``rows`` ``[k, n]``."""
        return rows * self.root if self.kind == "diagonal" else rows @ self.root

    def multiply_left(self, columns: Tensor) -> Tensor:
        """Return ``root @ columns`` for ``columns`` ``[n, k]``."""
        return self.root[:, None] * columns if self.kind == "diagonal" else self.root @ columns

    def solve_right(self, rows: Tensor) -> Tensor:
        """Return ``rows @ inverse(root)`` for ``rows`` ``[k, n]``."""
        if self.kind == "cholesky":
            solved: Tensor = torch.linalg.solve_triangular(self.root, rows, upper=False, left=False)
            return solved
        if self.kind == "diagonal":
            return rows / self.root
        # root = Q diag(s) with Q orthonormal, so dividing each column by its squared norm s^2 and transposing inverts
        # it.
        return rows @ (self.root / self.root.square().sum(0)).mT


@dataclass(frozen=True)
class StackedRoots:
    """The root that weights the outputs of several layers, of which each has its own: a block-diagonal matrix.

    Args:
        roots: The root of each layer's outputs; None for the identity.
        scales: Factor of each root, above 0.
        size: Outputs of each layer.
    """

    roots: tuple[SquareRoot | None, ...]
    scales: tuple[float, ...]
    size: int

    @property
    def zero(self) -> bool:
        """Whether errors cost nothing in any of the layers."""
        return all(root is not None and root.zero for root in self.roots)

    def multiply_right(self, rows: Tensor) -> Tensor:
        """Return ``rows @ root`` for ``rows`` ``[k, layers * size]``."""
        parts = zip(rows.split(self.size, 1), self.roots, self.scales, strict=True)  # type: ignore[no-untyped-call]
        return torch.cat(
            [scale * (part if root is None else root.multiply_right(part)) for part, root, scale in parts], 1
        )

    def solve_right(self, rows: Tensor) -> Tensor:
        """Return ``rows @ inverse(root)`` for ``rows`` ``[k, layers * size]``."""
        parts = zip(rows.split(self.size, 1), self.roots, self.scales, strict=True)  # type: ignore[no-untyped-call]
        return torch.cat([(part if root is None else root.solve_right(part)) / scale for part, root, scale in parts], 1)


def any_zero(*roots: SquareRoot | StackedRoots | None) -> bool:
    """Return whether the moment of one of ``roots`` is zero, so that no error of the layer costs anything."""
    return any(root is not None and root.zero for root in roots)


@dataclass(frozen=True)
class Factors:
    """Components of a weight in order of importance.

    ``left @ right`` is the whole weight, ``left[:, :k] @ right[:k]`` its approximation of rank ``k``.

    Args:
        left: ``[out, rank]``.
        right: ``[rank, in]``.
        sigma: ``[rank]`` singular values of the whitened weight, descending.
    """

    left: Tensor
    right: Tensor
    sigma: Tensor


def square_root(second_moment: Tensor, *, damping: float = 1e-6) -> SquareRoot:
    """Return a square root of ``second_moment``; there is one for all finite input.

    The moment is symmetrised, and ``damping * mean(diagonal)`` is added to its diagonal. Where Cholesky in float64
    fails, an eigen-decomposition takes over, whose eigenvalues are clamped to the damping.

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
        raise ValueError("the second moment holds NaN or infinity: delete its file and measure again")
    moment = (moment + moment.mT) / 2
    scale = moment.diagonal().mean().item()
    if scale <= 0:
        return SquareRoot(torch.eye(len(moment)).to(moment), "cholesky", 1.0, zero=True)
    added = damping * scale
    moment.diagonal().add_(added)
    root, info = torch.linalg.cholesky_ex(moment)
    if info.item() == 0 and torch.isfinite(root).all() and root.diagonal().min() > 0:
        return SquareRoot(root, "cholesky", added)
    values, vectors = torch.linalg.eigh(moment)
    floor = max(added, torch.finfo(torch.float64).eps * values[-1].item())
    return SquareRoot(vectors * values.clamp_min(floor).sqrt(), "eigen", added)


def damped_root(second_moment: Tensor, damping: float) -> Tensor:
    """Return a lower triangular root ``[n, n]`` of ``second_moment`` with ``damping`` times its own diagonal added.

    This is the ridge of a regression, relative to each feature. Features that are always 0 get a tiny ridge.

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
    """Return the diagonal square root that weights each feature by its scale.

    Args:
        scales: ``[n]``, the diagonal of the root, at least 0.
        damping: Added to the scales, relative to their mean. A scale below 1e-8 of the largest is raised to that, so
            that factors are finite.

    Raises:
        ValueError: A value is NaN, infinite or negative.

    Example:
        >>> diagonal_root(torch.tensor([1.0, 3.0]), damping=0.0).root.tolist()
        [1.0, 3.0]
    """
    root = scales.double()
    if not torch.isfinite(root).all() or (root < 0).any():
        raise ValueError("the scales hold NaN, infinity or negative numbers: delete their file and measure again")
    scale = root.mean().item()
    if scale <= 0:
        return SquareRoot(torch.ones_like(root), "diagonal", 1.0, zero=True)
    added = damping * scale
    return SquareRoot((root + added).clamp_min(_LEAST_SCALE * root.max().item()), "diagonal", added)


def decompose(
    weight: Tensor, *, inputs: SquareRoot | None = None, outputs: SquareRoot | StackedRoots | None = None
) -> Factors:
    """Return the exact singular components of ``weight``, weighted on the side of its inputs, of its outputs, or both.

    With ``L = inputs.root``, ``R = outputs.root`` and ``U S V' = R' @ weight @ L``, truncating at rank ``k`` gives the
    weight with the least ``|R' (weight - truncated) L|^2``, which is exactly ``sum(sigma[k:] ** 2)``. With the second
    moment of the inputs alone this is the mean squared error of the outputs (SVD-LLM, arXiv 2403.07378). With the
    second moment of the output gradients as well it is twice the K-FAC estimate of the rise of the loss in nats. With
    neither the result is the plain SVD. Where a moment is zero, so are the singular values: the components are those of
    the weight with the identity in its place, and cost nothing to drop.

    Args:
        weight: ``[out, in]``.
        inputs: Square root ``[in, in]`` of the second moment of the inputs, or of another weighting of them.
        outputs: Square root ``[out, out]`` of the second moment of the output gradients, or of another weighting; of
            several layers' weights, one below the other, the roots of each.

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
    return Factors(left * half, half[:, None] * right, torch.zeros_like(sigma) if any_zero(inputs, outputs) else sigma)


_ROWS = 16384
"""Rows of a tall matrix that are in float64 at a time."""


def decompose_rows(weight: Tensor, *, rows: Tensor | None = None, columns: SquareRoot | None = None) -> Factors:
    """Return the components of a tall ``weight``, such as embeddings, each of whose rows has a weight.

    With ``w = rows`` and ``L = columns.root``, truncating at rank ``k`` gives the least ``sum_v w_v |(weight -
    truncated)_v L|^2``, which is ``sum(sigma[k:] ** 2)``. It is ``decompose`` with the diagonal root ``w ** 0.5`` on
    the side of the outputs, by the eigenvectors of the small matrix ``L' weight' diag(w) weight L``: neither the
    weighted matrix nor its decomposition is ever in memory. Singular values below ``1e-8`` of the largest are noise.

    Args:
        weight: ``[rows, columns]``.
        rows: Weights ``[rows]`` of squared errors, at least 0; all 1 by default.
        columns: Square root ``[columns, columns]`` of what weights the columns.

    Returns:
        Factors, ``min(rows, columns)`` components: ``left`` and ``right`` in float32, the singular values in float64.

    Raises:
        ValueError: ``weight`` holds NaN or infinity.

    Example:
        >>> decompose_rows(torch.diag(torch.tensor([1.0, 3.0])), rows=torch.tensor([16.0, 1.0])).sigma.tolist()
        [4.0, 3.0]
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity: the checkpoint is damaged")
    size = weight.shape[1]
    moment = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), _ROWS):
        part = weight[start : start + _ROWS].double()
        moment += part.mT @ (part if rows is None else part * rows[start : start + _ROWS, None].to(part))
    if columns is not None:
        moment = columns.multiply_right(columns.multiply_right(moment).mT)
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    # With fewer rows than columns, the other eigenvalues are noise.
    count = min(weight.shape)
    sigma, vectors = values.flip(0)[:count].clamp_min(0).sqrt(), vectors.flip(1)[:, :count]
    # The half of a singular value that both factors get; noise must not be divided by.
    half = sigma.clamp_min(max(sigma[0].item(), torch.finfo(torch.float64).tiny) * 1e-12).sqrt()
    # The best matrix of rank k is ``weight L V V' inverse(L)``, in which the weights of rows cancel out.
    turn = vectors if columns is None else columns.multiply_left(vectors)
    right = vectors.mT if columns is None else columns.solve_right(vectors.mT.contiguous())
    left = weight.new_empty((len(weight), count), dtype=torch.float32)
    for start in range(0, len(weight), _ROWS):
        left[start : start + _ROWS] = (weight[start : start + _ROWS].double() @ (turn / half)).float()
    return Factors(left, (half[:, None] * right).float(), torch.zeros_like(sigma) if any_zero(columns) else sigma)


def truncate(factors: Factors, components: int | Tensor) -> Factors:
    """Return the first ``components`` components, or those with the given indices, contiguous in memory."""
    pick = slice(components) if isinstance(components, int) else components
    return Factors(
        factors.left[:, pick].contiguous(), factors.right[pick].contiguous(), factors.sigma[pick].contiguous()
    )
