"""The weight of a given rank that best compensates the errors of a linear layer's inputs. Pure functions.

The regression starts from the dense weight, so strong damping or little text leads back to that weight and not to zero.
Candidates are compared at full rank on moments of held-back text. The comparison takes matrix products only, so one
decomposition per layer is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lowrank_pl.factors.decomposition import Factors, SquareRoot, damped_root
from lowrank_pl.methods.refit.moments import PairMoments

__all__ = ["NOTHING", "Choice", "Problem", "choose", "refitted", "refitted_left"]

_RIDGE = 1e-10
"""Ridge of a left factor, relative to the second moment of each of its inputs: components may be nearly dependent."""


@dataclass(frozen=True)
class Choice:
    """Strength of a refit.

    Args:
        drift: Compensated fraction of the error due to changed inputs.
        stream: Compensated fraction of the error of the stream that the output is added to.
        damping: Ridge of the regression, relative to each input's own second moment.
    """

    drift: float = 0.0
    stream: float = 0.0
    damping: float = 0.0


NOTHING = Choice()
"""No compensation: the dense weight, truncated to rank on the compressed model's inputs."""


class Problem:
    """One linear layer to refit, in output coordinates in which all errors have the same weight.

    ``R`` is the root of the second moment of the outputs' gradients, and ``R' W`` replaces ``W``. A layer with more
    outputs than inputs and without a stream is stored as ``R' W = basis @ rows`` with orthonormal columns: every
    refitted weight lies in their span.

    Args:
        weight: ``[out, in]``.
        outputs: ``R``; None for the identity.
        has_stream: Whether the error of the stream that the output is added to is compensated as well.
    """

    def __init__(self, weight: Tensor, *, outputs: SquareRoot | None = None, has_stream: bool = False) -> None:
        self.outputs, self.has_stream = outputs, has_stream
        self.rows = self.weighted(weight.double())
        self.basis: Tensor | None = None
        if not has_stream and self.rows.shape[0] > self.rows.shape[1]:
            self.basis, self.rows = torch.linalg.qr(self.rows)

    def weighted(self, outputs: Tensor) -> Tensor:
        """Return ``R' @ outputs`` for ``outputs`` ``[out, n]``."""
        return outputs if self.outputs is None else self.outputs.multiply_right(outputs.mT).mT

    def lacking(self, moments: PairMoments) -> list[Tensor]:
        """Return ``E[f t']`` ``[rows, in]`` for each error ``f`` of the dense weight: its own, then the stream's."""
        own = self.rows @ moments.cross
        if not self.has_stream:
            return [own]
        assert moments.stream is not None
        return [own, self.weighted(moments.stream)]

    def unavoidable(self, held: PairMoments) -> float:
        """Return ``E|R' (W d + e)|^2``, the error of the dense weight on the compressed model's inputs."""
        assert held.drift is not None
        total = (self.rows @ held.drift * self.rows).sum().item()
        if self.has_stream:
            assert held.stream_drift is not None
            assert held.stream_second is not None
            total += 2 * (self.weighted(held.stream_drift) * self.rows).sum().item()
            total += self.weighted(self.weighted(held.stream_second).mT).diagonal().sum().item()
        return max(total, 0.0)

    def errors(self, candidates: Sequence[Factors], held: PairMoments) -> list[float]:
        """Return ``E|R' (W (t + d) + e - W' t)|^2`` for every ``W' = left @ right`` of ``candidates``.

        Args:
            candidates: Left and right factors.
            held: Mean moments, including those that only errors need.
        """
        rows, lacking = self.rows, sum(self.lacking(held), torch.zeros_like(self.rows))
        if self.basis is not None:
            rows, lacking = self.basis @ rows, self.basis @ lacking
        found, least = [], self.unavoidable(held)
        for factors in candidates:
            change = rows - self.weighted(factors.left.to(rows)) @ factors.right.to(rows)
            found.append(least + (change * (2 * lacking + change @ held.inputs)).sum().item())
        return found


def choose(
    problems: Sequence[Problem],
    fit: PairMoments,
    held: PairMoments,
    *,
    blends: Sequence[float],
    dampings: Sequence[float],
) -> list[Choice]:
    """Return for each problem the refit with the least error on held-back text, at full rank.

    At a given damping, the error is a quadratic function of the compensated fractions. Its few coefficients are
    computed once, and then every pair of fractions is tried.

    Args:
        problems: Linear layers that share an input.
        fit: Mean moments for the regression.
        held: Mean moments of held-back text, including those that only errors need.
        blends: Fractions to try, from 0 to 1; 0 is always tried.
        dampings: Dampings to try.
    """
    best = [(0.0, NOTHING)] * len(problems)
    parts = sorted({0.0, *blends})
    to_fit = [problem.lacking(fit) for problem in problems]
    to_test = [sum(problem.lacking(held), torch.zeros_like(problem.rows)) for problem in problems]
    for damping in dampings:
        root = damped_root(fit.inputs, damping)
        for place, (fitting, testing) in enumerate(zip(to_fit, to_test, strict=True)):
            steps = [_regress(lacking, root) for lacking in fitting]
            for change, blend in _changes(steps, testing, held.inputs, parts):
                # Of equal errors the first, so that a resumed run makes the same choice.
                if change < best[place][0]:
                    best[place] = (change, Choice(blend[0], blend[1] if len(blend) > 1 else 0.0, damping))
    return [choice for _, choice in best]


def _changes(
    steps: Sequence[Tensor], lacking: Tensor, inputs: Tensor, parts: Sequence[float]
) -> list[tuple[float, tuple[float, ...]]]:
    """Return the change of the error if the weight changes by ``sum(a * step)``, for every choice of ``a``."""
    linear = [(lacking * step).sum().item() for step in steps]
    moved = [step @ inputs for step in steps]
    square = [[(one * two).sum().item() for two in steps] for one in moved]

    def change(blend: tuple[float, ...]) -> float:
        curved = sum(one * two * square[i][j] for i, one in enumerate(blend) for j, two in enumerate(blend))
        return curved - 2 * sum(part * slope for part, slope in zip(blend, linear, strict=True))

    return [(change(blend), blend) for blend in product(parts, repeat=len(steps))]


def refitted(problem: Problem, fit: PairMoments, choice: Choice, rank: int, *, damping: float) -> Factors:
    """Return the factors ``[out, rank]`` and ``[rank, in]`` of the refit, float64.

    The regression ``W + (drift W E[d t'] + stream E[e t']) (E[t t'] + ridge)^-1`` is truncated to ``rank`` with the
    least error on the inputs ``t``. SVD-LLM (arXiv 2403.07378) truncates the dense weight in the same way on the dense
    model's inputs.

    Args:
        problem: The linear layer.
        fit: Mean moments.
        choice: Strength of the refit.
        rank: Number of components to keep.
        damping: Added to the diagonal of the second moment used for truncation, relative to the diagonal's mean.
    """
    target = _regressed(problem, fit, choice)
    # Its eigenvalues are the squares of the singular values of the target times the inputs' root.
    gram = target @ fit.inputs @ target.mT + damping * fit.inputs.diagonal().mean() * (target @ target.mT)
    squares, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    sigma, vectors = squares.flip(0)[:rank].clamp_min(0).sqrt(), vectors.flip(1)[:, :rank]
    # Each factor gets the square root of the values, as in ``decompose``. The bound only avoids division by a value
    # that has been lost in rounding.
    half = sigma.clamp_min(max(sigma[0].item() * 1e-8, torch.finfo(torch.float64).tiny)).sqrt()
    left = vectors if problem.basis is None else problem.basis @ vectors
    if problem.outputs is not None:
        left = problem.outputs.solve_right(left.mT).mT
    return Factors(left * half, (vectors.mT @ target) / half[:, None], sigma)


def refitted_left(problem: Problem, fit: PairMoments, choice: Choice, right: Tensor, *, damping: float) -> Tensor:
    """Return the left factor ``[out, rank]`` of the refit whose right factor is given, as layers share one, float64.

    It is the regression of ``refitted`` with the least error on the inputs ``t`` among all multiples of ``right``.

    Args:
        problem: The linear layer.
        fit: Mean moments.
        choice: Strength of the refit.
        right: ``[rank, in]``.
        damping: As for ``refitted``.
    """
    right = right.to(fit.inputs)
    seen = right @ fit.inputs + damping * fit.inputs.diagonal().mean() * right
    left = _regress(_regressed(problem, fit, choice) @ seen.mT, damped_root(seen @ right.mT, _RIDGE))
    left = left if problem.basis is None else problem.basis @ left
    return left if problem.outputs is None else problem.outputs.solve_right(left.mT).mT


def _regressed(problem: Problem, fit: PairMoments, choice: Choice) -> Tensor:
    """Return ``W + (drift W E[d t'] + stream E[e t']) (E[t t'] + ridge)^-1`` in the coordinates of the problem."""
    target = problem.rows
    blends = [choice.drift, choice.stream]
    if any(blends):
        root = damped_root(fit.inputs, choice.damping)
        for lacking, blend in zip(problem.lacking(fit), blends, strict=False):
            target = target + blend * _regress(lacking, root)
    return target


def _regress(lacking: Tensor, root: Tensor) -> Tensor:
    """Return ``lacking @ inverse(root @ root.T)``."""
    return torch.cholesky_solve(lacking.mT, root).mT
