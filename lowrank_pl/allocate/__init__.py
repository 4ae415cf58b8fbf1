"""Closed-form allocators: one function a file, ``(store, budget) -> RankPlan``, named in ``ALLOCATORS``."""

from __future__ import annotations

from collections.abc import Callable

from lowrank_pl.allocate.uniform import uniform
from lowrank_pl.budget import Budget
from lowrank_pl.factor_store import FactorStore
from lowrank_pl.plan import RankPlan

__all__ = ["ALLOCATORS", "Allocator", "allocator", "uniform"]

Allocator = Callable[[FactorStore, Budget], RankPlan]

ALLOCATORS: dict[str, Allocator] = {"uniform": uniform}


def allocator(name: str) -> Allocator:
    """Return the allocator called ``name``.

    Raises:
        ValueError: There is none; the message lists those that exist.
    """
    if name not in ALLOCATORS:
        raise ValueError(f"no allocator is called {name!r}: expected one of {', '.join(ALLOCATORS)}")
    return ALLOCATORS[name]
