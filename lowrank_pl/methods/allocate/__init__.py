"""Closed-form allocators: one a file, named in ``ALLOCATORS``."""

from __future__ import annotations

import dataclasses
from typing import Any

from lowrank_pl.methods.allocate.base import Allocator, Problem, factors_of_plan
from lowrank_pl.methods.allocate.drank import DRank
from lowrank_pl.methods.allocate.energy import Energy
from lowrank_pl.methods.allocate.fisher import Fisher
from lowrank_pl.methods.allocate.strs import STRS
from lowrank_pl.methods.allocate.svdllm_v2 import SVDLLMv2
from lowrank_pl.methods.allocate.uniform import Uniform
from lowrank_pl.methods.allocate.zs_svd import ZSSVD

__all__ = [
    "ALLOCATORS",
    "STRS",
    "ZSSVD",
    "Allocator",
    "DRank",
    "Energy",
    "Fisher",
    "Problem",
    "SVDLLMv2",
    "Uniform",
    "factors_of_plan",
    "make_allocator",
]

ALLOCATORS: dict[str, type[Allocator]] = {
    kind.name: kind for kind in (Uniform, Energy, DRank, SVDLLMv2, STRS, ZSSVD, Fisher)
}


def make_allocator(name: str, **settings: Any) -> Allocator:
    """Return the allocator called ``name`` with its ``settings``.

    Raises:
        ValueError: There is none, or it has no such setting; the message lists those that exist.

    >>> make_allocator("uniform").name
    'uniform'
    """
    if name not in ALLOCATORS:
        raise ValueError(f"no allocator is called {name!r}: expected one of {', '.join(ALLOCATORS)}")
    kind: Any = ALLOCATORS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for setting in settings:
        if setting not in known:
            has = f"one of {', '.join(known)}" if known else "none, it has no settings"
            raise ValueError(f"the allocator {name} has no setting {setting!r}: expected {has}")
    made: Allocator = kind(**settings)
    return made
