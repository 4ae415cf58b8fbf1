"""Which weight of a given rank makes up best for what earlier compression did to a map's inputs. Pure functions.

What is special: the regression starts from the dense weight, so that damping and a lack of text lead back to it and not
to zero; and all that is tried is judged at full rank on moments of held-back text, which takes products only, so that
one decomposition a map is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lowrank_pl.factors.decomposition import Factors, SquareRoot, damped_root
from lowrank_pl.methods.refit.moments import PairMoments

__all__ = ["NOTHING", "Choice", "Problem", "choose", "refitted"]


@dataclass(frozen=True)
class Choice:
    """How far a refit goes.

    Args:
        drift: What part is made up for of the error that comes with changed inputs.
        stream: What part is made up for of the error of the stream that the output is added to.
        damping: Ridge of the regression, relative to each input's own second moment.
    """

    drift: float = 0.0
    stream: float = 0.0
    damping: float = 0.0


NOTHING = Choice()
"""The dense weight, cut to rank on the compressed model's inputs."""


class Problem:
    """One map to refit, in coordinates of the output in which all errors count the same.

    With ``R`` the root of the outputs' second moment of gradients, ``R' W`` stands for ``W``. Where there are more
    outputs than inputs, ``R' W = basis @ rows`` with orthonormal columns: what a refit can reach lies in their span, if
    there is no stream to make up for.

    Args:
        weight: ``[out, in]``.
        outputs: ``R``; None for the identity.
        has_stream: Whether the error of the stream that the output is added to is to be made up for as well.
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
        """Return ``E[f t']``, ``[rows, in]``, for the errors ``f`` of the dense weight: its own, the stream's."""
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
            held: Mean moments, with those that errors need.
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
    """Return for each problem the refit that has the least error on held-back text at full rank.

    With the damping given, the error is a quadratic of what part of the errors is made up for: once its few numbers are
    known, every pair of blends can be tried.

    Args:
        problems: Maps that share an input.
        fit: Mean moments to regress on.
        held: Mean moments of held-back text, with those that errors need.
        blends: The parts to try, from 0 to 1; 0 is tried in any case.
        dampings: The dampings to try.
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
                # Of equals the first, so that a resumed run chooses alike.
                if change < best[place][0]:
                    best[place] = (change, Choice(blend[0], blend[1] if len(blend) > 1 else 0.0, damping))
    return [choice for _, choice in best]


def _changes(
    steps: Sequence[Tensor], lacking: Tensor, inputs: Tensor, parts: Sequence[float]
) -> list[tuple[float, tuple[float, ...]]]:
    """Return by how much the error changes when the weight does by ``sum(a * step)``, for every choice of the ``a``."""
    linear = [(lacking * step).sum().item() for step in steps]
    moved = [step @ inputs for step in steps]
    square = [[(one * two).sum().item() for two in steps] for one in moved]

    def change(blend: tuple[float, ...]) -> float:
        curved = sum(one * two * square[i][j] for i, one in enumerate(blend) for j, two in enumerate(blend))
        return curved - 2 * sum(part * slope for part, slope in zip(blend, linear, strict=True))

    return [(change(blend), blend) for blend in product(parts, repeat=len(steps))]


def refitted(problem: Problem, fit: PairMoments, choice: Choice, rank: int, *, damping: float) -> Factors:
    """Return the factors ``[out, rank]`` and ``[rank, in]`` of the refit, float64.

    The regression ``W + (drift W E[d t'] + stream E[e t']) (E[t t'] + ridge)^-1`` is cut to ``rank`` with the least
    error on the inputs ``t``, as SVD-LLM (arXiv 2403.07378) cuts the dense weight on the dense model's inputs.

    Args:
        problem: The map.
        fit: Mean moments.
        choice: How far to go.
        rank: Components to keep.
        damping: Added to the second moment that the cut goes by, relative to the mean of its diagonal.
    """
    target = problem.rows
    blends = [choice.drift, choice.stream]
    if any(blends):
        root = damped_root(fit.inputs, choice.damping)
        for lacking, blend in zip(problem.lacking(fit), blends, strict=False):
            target = target + blend * _regress(lacking, root)
    # Its eigenvalues are the squares of the singular values of the target times the inputs' root.
    gram = target @ fit.inputs @ target.mT + damping * fit.inputs.diagonal().mean() * (target @ target.mT)
    squares, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    sigma, vectors = squares.flip(0)[:rank].clamp_min(0).sqrt(), vectors.flip(1)[:, :rank]
    # Half of each value goes to either side, as in ``decompose``; those that rounding has lost need only divide well.
    half = sigma.clamp_min(max(sigma[0].item() * 1e-8, torch.finfo(torch.float64).tiny)).sqrt()
    left = vectors if problem.basis is None else problem.basis @ vectors
    if problem.outputs is not None:
        left = problem.outputs.solve_right(left.mT).mT
    return Factors(left * half, (vectors.mT @ target) / half[:, None], sigma)


def _regress(lacking: Tensor, root: Tensor) -> Tensor:
    """Return ``lacking @ inverse(root @ root.T)``."""
    return torch.cholesky_solve(lacking.mT, root).mT
