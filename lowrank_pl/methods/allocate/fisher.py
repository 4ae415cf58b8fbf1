"""Fisher: the exact Lagrangian allocation of the loss that the two-sided decomposition predicts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lowrank_pl.factors.settings import Kind
from lowrank_pl.methods.allocate.base import Allocator, Problem
from lowrank_pl.plans.convex_hull import predicted_scores
from lowrank_pl.plans.expert_dropping import choose_dropped
from lowrank_pl.plans.plan import RankPlan

__all__ = ["Fisher"]


@dataclass(frozen=True)
class Fisher(Allocator):
    """The ranks that minimise the predicted rise of the loss at the budget (ours, on K-FAC, arXiv 1503.05671).

    With two-sided factors, ``sum(sigma[k:] ** 2) / 2`` is K-FAC's estimate of the loss, in nats a token, when a module
    is truncated at rank ``k``. Minimising the sum of these losses plus ``lambda`` times the parameters, over every rank
    and dense, leads to the lower convex hull of each module's (parameters, loss) points. A component's score is the
    slope at which it leaves the hull, so that one pass over all scores solves the problem for every ``lambda`` at once.

    Where experts may be dropped, that is one more size of an expert (``lowrank_pl.plans.expert_dropping``).
    """

    name: ClassVar[str] = "fisher"
    paper: ClassVar[str | None] = None
    default_kind: ClassVar[Kind] = "two_sided"
    kinds: ClassVar[tuple[str, ...]] = ("two_sided",)
    takes_embeddings: ClassVar[bool] = True
    takes_shared: ClassVar[bool] = True
    drops_experts: ClassVar[bool] = True

    def plan(self, problem: Problem) -> RankPlan:
        """Return the plan of the highest-scored components, of all experts that it does not drop, at the budget."""
        if not problem.budget.drop_experts:
            return super().plan(problem)
        self.check(problem)
        found = choose_dropped(problem.budget, problem.sigma, problem.expert_losses)
        rest = replace(problem.budget, dropped=found.modules)
        return rest.select(predicted_scores(rest, problem.sigma), method=self.name, notes=found.sentences())

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return for every component the predicted nats a parameter at which it is dropped."""
        return predicted_scores(problem.budget, problem.sigma)
