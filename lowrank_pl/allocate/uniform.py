"""The uniform allocation: every module keeps the same fraction of its parameters."""

from __future__ import annotations

from lowrank_pl.budget import Budget
from lowrank_pl.factor_store import FactorStore
from lowrank_pl.plan import RankPlan

__all__ = ["uniform"]


def uniform(store: FactorStore, budget: Budget) -> RankPlan:
    """Return the plan in which every module keeps the same fraction (SVD-LLM, arXiv 2403.07378).

    Args:
        store: Unused: the shapes in ``budget`` say everything that this allocator looks at.
        budget: How much to keep, and of what.
    """
    wishes = {name: m * n / (m + n) for name, (m, n) in budget.shapes.items()}
    return budget.fit({name: budget.keep * wish for name, wish in wishes.items()}, method="uniform")
