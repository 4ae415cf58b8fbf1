"""The uniform allocation: every module keeps the same fraction of its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowrank_pl.methods.allocate.base import Allocator, Problem
from lowrank_pl.plans.component_order import requested_keep_scores

__all__ = ["Uniform"]


@dataclass(frozen=True)
class Uniform(Allocator):
    """Every module keeps the same fraction of its parameters (SVD-LLM, arXiv 2403.07378)."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str | None] = "2403.07378"
    takes_embeddings: ClassVar[bool] = True
    takes_shared: ClassVar[bool] = True

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return scores by which every module shrinks from break-even at the same rate."""
        budget = problem.budget
        return {name: requested_keep_scores(budget.costs_of(name), shape, 1.0) for name, shape in budget.shapes.items()}
