"""Closed-form allocators: one method a file; ``ALLOCATORS`` names them."""

from __future__ import annotations

import inspect
import pkgutil
from typing import Any

from lowrank_pl.methods.allocate.base import Allocator, Problem, factors_of_plan
from lowrank_pl.methods.allocate.drank import DRank
from lowrank_pl.methods.allocate.energy import Energy
from lowrank_pl.methods.allocate.fisher import Fisher
from lowrank_pl.methods.allocate.strs import STRS
from lowrank_pl.methods.allocate.svdllm_v2 import SVDLLMv2
from lowrank_pl.methods.allocate.uniform import Uniform
from lowrank_pl.methods.allocate.zs_svd import ZSSVD
from lowrank_pl.utils.checks import checked_settings

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


"""The allocators of this package, by the name that commands and plans give them."""


def make_allocator(name: str, **settings: Any) -> Allocator:
    """Return the allocator called ``name`` with its ``settings``.

    Args:
        name: A name of ``ALLOCATORS``, or ``MODULE:CLASS`` for an allocator of another package.
        settings: Arguments of its constructor.

    Raises:
        ValueError: No such allocator or setting, where the message lists the existing ones; or a value of another type.

    >>> make_allocator("uniform").name
    'uniform'
    """
    kind: Any = _import_allocator(name) if ":" in name else ALLOCATORS.get(name)
    if kind is None:
        renamed = [f"it is called {kind.name} now; " for kind in ALLOCATORS.values() if name in kind.former_names]
        raise ValueError(
            f"no allocator is called {name!r}: {''.join(renamed)}expected one of {', '.join(ALLOCATORS)}, "
            "or MODULE:CLASS"
        )
    known = list(inspect.signature(kind).parameters)
    for setting in settings:
        if setting not in known:
            has = f"one of {', '.join(known)}" if known else "none, it has no settings"
            raise ValueError(f"the allocator {name} has no setting {setting!r}: expected {has}")
    made: Allocator = kind(**checked_settings(kind, settings))
    return made


def _import_allocator(path: str) -> type[Allocator]:
    """Return the class at ``MODULE:CLASS``."""
    try:
        kind = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the allocator {path!r} can't be imported ({error}): expected MODULE:CLASS of a module that Python finds, "
            "such as one in an installed package or in a folder of PYTHONPATH"
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, Allocator)):
        raise ValueError(
            f"{path!r} is no allocator: expected a class derived from lowrank_pl.methods.allocate.Allocator"
        )
    return kind
