"""Where masks start: the same ratio everywhere, a plan in a file, or a plan that an allocator draws on the spot."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.base import Allocator
from lowrank_pl.methods.masks.base import MaskMethod
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan

__all__ = ["Start", "read_start", "start_of"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What each module's mask starts from.

    Args:
        ratios: The fraction of parameters by module name.
        kept: Component indices of the modules that a plan has fewer of than dense costs.
    """

    ratios: Mapping[str, float]
    kept: Mapping[str, Tensor] = field(default_factory=dict)


def read_start(start: str | Path | None) -> RankPlan | Allocator | None:
    """Return the plan in the file ``start``, or the allocator of this name.

    Args:
        start: A path, or a word without a dot or slash that names an allocator unless a file is called so.

    Raises:
        ValueError: There is neither, or no plan in the file.

    >>> read_start("uniform").name
    'uniform'
    """
    if start is None:
        return None
    word = isinstance(start, str) and not Path(start).suffix and Path(start).name == start
    if not word or Path(start).exists():
        return RankPlan.load(start)
    try:
        return make_allocator(str(start))
    except ValueError as error:
        raise ValueError(f"start is {str(start)!r}, which is no file, and {error}, or the path of a plan") from None


def start_of(plan: RankPlan | None, budget: Budget, method: MaskMethod, aim: float) -> Start:
    """Return where each mask starts.

    Args:
        plan: The plan to start from, if there is one.
        budget: Has the modules.
        method: Makes the masks.
        aim: The fraction that learning begins at.

    Raises:
        ValueError: The plan does not cover all modules.
    """
    if plan is not None and method.own_start:
        raise ValueError(
            f"a plan to start from was given, but masks of {method.name} have a start of their own: leave it out"
        )
    if plan is None:
        return Start(dict.fromkeys(budget.shapes, method.start_keep(aim)))
    found = plan.modules
    missing = [name for name, shape in budget.shapes.items() if name not in found or found[name].shape != shape]
    if missing:
        raise ValueError(
            f"the plan to start from does not cover {missing[0]} and {len(missing) - 1} more modules: give a plan that "
            "was drawn for this base with the same include and exclude, or the name of an allocator (--model.start)"
        )
    entries = {name: found[name] for name in budget.shapes}
    subsets = [name for name, entry in entries.items() if entry.indices is not None]
    if subsets and not method.any_k:
        _log.warning(
            "%d modules of the plan to start from keep components that are not the first ones: masks of %s start from "
            "as many of the first ones",
            len(subsets),
            method.name,
        )
    # As this run's model will store them, whatever the plan's own storage is.
    ratios = {name: budget.cost(name, entry.rank) / entry.dense_parameters for name, entry in entries.items()}
    kept = {
        name: torch.arange(entry.rank) if entry.indices is None else torch.tensor(entry.indices)
        for name, entry in entries.items()
        if entry.rank is not None and (ratios[name] < 1 or entry.indices is not None)
    }
    return Start(ratios, kept)
