"""Where masks start: the same ratio everywhere, a plan in a file, or a plan that an allocator makes first."""

from __future__ import annotations

import logging
import re
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
from lowrank_pl.utils.files import at_home

__all__ = ["MaskStart", "check_start", "read_start", "start_of"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskStart:
    """What each module's mask starts from.

    Args:
        ratios: The fraction of parameters, by module name.
        kept: Indices of the components, by module name, for modules that a plan makes smaller than dense.
    """

    ratios: Mapping[str, float]
    kept: Mapping[str, Tensor] = field(default_factory=dict)


def read_start(start: str | Path | None) -> RankPlan | Allocator | None:
    """Return the plan in the file ``start``, or the allocator of this name.

    Args:
        start: A path, or an allocator's name: a word without a dot or slash, or MODULE:CLASS. A file of this name
            comes first.

    Raises:
        ValueError: ``start`` is neither a file nor an allocator, or the file holds no plan.

    >>> read_start("uniform").name
    'uniform'
    """
    if start is None:
        return None
    word = isinstance(start, str) and not Path(start).suffix and Path(start).name == start
    imported = isinstance(start, str) and re.fullmatch(r"[\w.]+:\w+", start)
    if not (word or imported) or Path(start).exists():
        return RankPlan.load(at_home(start))
    try:
        return make_allocator(str(start))
    except ValueError as error:
        raise ValueError(f"start is {str(start)!r}, which is no file, and {error}, or the path of a plan") from None


def check_start(start: RankPlan | Allocator | None, method: MaskMethod) -> None:
    """Check that masks of ``method`` can start from a plan, where ``start`` is one or makes one.

    Raises:
        ValueError: They have a start of their own, or the plan's experts share factors or were dropped.
    """
    if start is not None and method.own_start:
        raise ValueError(
            f"a plan to start from was given, but masks of {method.name} have a start of their own: leave it out "
            "(--model.start.plan)"
        )
    if isinstance(start, RankPlan):
        if start.dropped_experts:
            raise ValueError(
                f"the plan to start from drops {len(start.dropped_experts)} experts, e.g. {start.dropped_experts[0]}, "
                "and masks learn ranks of all: start from a plan that was allocated without drop_experts"
            )
        start.refuse_shared("masks learn the rank of every layer by itself: start from a plan without shared_experts")


def start_of(plan: RankPlan | None, budget: Budget, method: MaskMethod, target: float) -> MaskStart:
    """Return where each mask starts.

    Args:
        plan: The plan to start from, if there is one.
        budget: The budget, which knows the modules.
        method: The method that makes the masks.
        target: The target fraction of the first step.

    Raises:
        ValueError: The plan does not cover all modules or drops experts, or the method takes no plan to start from.
    """
    check_start(plan, method)
    if plan is None:
        return MaskStart(dict.fromkeys(budget.shapes, method.start_keep(target)))
    found = plan.modules
    missing = [name for name, shape in budget.shapes.items() if name not in found or found[name].shape != shape]
    if missing:
        raise ValueError(
            f"the plan to start from does not cover {missing[0]} and {len(missing) - 1} more modules: give a plan that "
            "was made for this base with the same include and exclude, or the name of an allocator (--model.start.plan)"
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
    # What the ranks cost in this run's storage, whatever the plan's own storage is.
    ratios = {name: budget.cost(name, entry.rank) / entry.dense_parameters for name, entry in entries.items()}
    kept = {
        name: torch.arange(entry.rank) if entry.indices is None else torch.tensor(entry.indices)
        for name, entry in entries.items()
        if entry.rank is not None and (ratios[name] < 1 or entry.indices is not None)
    }
    return MaskStart(ratios, kept)
