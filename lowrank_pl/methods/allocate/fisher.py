"""Exact Lagrangian allocation of the loss that the two-sided decomposition predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowrank_pl.factors.settings import Kind
from lowrank_pl.methods.allocate.base import Allocator, Problem
from lowrank_pl.plans.convex_hull import predicted_scores

__all__ = ["Fisher"]


@dataclass(frozen=True)
class Fisher(Allocator):
    """The ranks that minimise the predicted rise of the loss at the budget.

    With two-sided factors, ``sum(sigma[k:] ** 2) / 2`` is K-FAC's estimate of what truncating a module at rank ``k``
    costs in nats a token. Minimising its sum plus ``lambda`` times the parameters, every rank and dense enumerated,
    gives each module the lower convex hull of its (parameters, loss) points; a component's score is the slope at which
    it leaves the hull, so one pass over all scores solves the problem for every ``lambda`` at once.
    """

    name: ClassVar[str] = "fisher"
    default_kind: ClassVar[Kind] = "two_sided"
    kinds: ClassVar[tuple[str, ...]] = ("two_sided",)

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return for every component the predicted nats a parameter at which it is given up."""
        return predicted_scores(problem.budget, problem.factors.sigma)
