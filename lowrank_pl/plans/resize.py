"""Any size from one run: a plan that carries a component order becomes plans of other budgets, one inside the other.

What is special: sizes are counted from the plan itself. A smaller one is contained in it and a larger one contains it,
so that the plan is a member of its own family, and ranks that a person edited hold as bounds. Weights that were
corrected (``lowrank_pl.methods.allocate.zs_svd_correction``) or refitted (``lowrank_pl.methods.refit``) for a size serve that one and smaller ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import ModulePlan, RankPlan

__all__ = ["RESIZED", "largest_keep", "nested", "resize"]

RESIZED = "resized from"
"""How the note begins that tells a resized plan."""

_ABOUT_ONE_SIZE = (RESIZED, "wished ranks scaled by")


def resize(plan: RankPlan, keep: float) -> RankPlan:
    """Return the plan that the order of ``plan`` gives at another budget (ACIP's score map, arXiv 2502.01717).

    It contains ``plan`` at a higher ``keep`` and is contained in it at a lower one; at the same one it is ``plan``.

    Args:
        plan: A plan with a component order.
        keep: Fraction of the targeted parameters to keep.

    Raises:
        ValueError: The plan has no order, or keeps components that its order does not put first, or the budget is
            impossible, or larger than the weights were corrected or refitted for.

    Example:
        >>> import torch
        >>> budget = Budget(keep=0.5, shapes={"a": (8, 8), "b": (8, 8)}, model_parameters=128, storage="factored")
        >>> plan = budget.select({"a": torch.arange(8, 0, -1.0), "b": torch.arange(4, 0, -0.5)}, method="hand")
        >>> [module.rank for module in plan.modules.values()]
        [3, 1]
        >>> [module.rank for module in resize(plan, 0.25).modules.values()]
        [1, 1]
    """
    return _beyond(plan, keep) if _is_larger(plan, keep) else _within(plan, keep)


def nested(plan: RankPlan, keeps: Iterable[float]) -> dict[float, RankPlan]:
    """Return a plan for each of ``keeps``, largest first, each contained in the one before it.

    Args:
        plan: A plan with a component order; it is contained in those that are larger, and contains the others.
        keeps: Fractions of the targeted parameters to keep.

    Raises:
        ValueError: No fractions, or as in ``resize``.
    """
    ascending = sorted(set(keeps))
    if not ascending:
        raise ValueError("no size was asked for: expected one or more fractions to keep")
    plans: dict[float, RankPlan] = {}
    inner = outer = plan
    for keep in ascending:
        if _is_larger(plan, keep):
            plans[keep] = inner = _beyond(inner, keep)
    for keep in reversed(ascending):
        if keep not in plans:
            plans[keep] = outer = _within(outer, keep)
    return {keep: plans[keep] for keep in reversed(ascending)}


def largest_keep(plan: RankPlan) -> float:
    """Return the largest fraction of a plan's sizes: 1, or what its weights were corrected or refitted for.

    A correction moves truncated weights away from the base's, to make up for what its size loses: a larger size, which
    loses less, would come out worse.
    """
    changes = [plan.fingerprint[change] for change in ("correction", "refit") if change in plan.fingerprint]
    return min([1.0, *(float(change["keep"]) for change in changes)])


def _is_larger(plan: RankPlan, keep: float) -> bool:
    """Tell whether ``keep`` is more than ``plan`` was drawn for and pays for it, if it was edited to more by hand."""
    return keep > plan.keep and _budget(plan, keep).limit >= plan.kept_parameters


def _beyond(plan: RankPlan, keep: float) -> RankPlan:
    most = largest_keep(plan)
    if keep > most:
        raise ValueError(
            f"keep is {keep:g}, but the weights were changed for keep {most:g}: larger sizes need a plan of their "
            "own, which `lowrank allocate` draws"
        )
    drawn = _budget(plan, keep).select(_scores(plan), method=plan.method, beyond=plan.modules)
    return _described(drawn, plan)


def _within(plan: RankPlan, keep: float) -> RankPlan:
    drawn = _budget(plan, keep).select(_scores(plan), method=plan.method, within=plan.modules)
    return _described(drawn, plan)


def _budget(plan: RankPlan, keep: float) -> Budget:
    """Return the budget of ``keep`` for the modules of ``plan``, under the constraints that held for it."""
    if plan.order is None:
        raise ValueError(
            f"the plan (method {plan.method}) carries no component order, so it has this one size only: "
            "draw it again with `lowrank allocate` or `lowrank fit`"
        )
    return Budget(
        keep=keep,
        shapes={name: module.shape for name, module in plan.modules.items()},
        model_parameters=plan.model_parameters,
        bytes_per_parameter=plan.bytes_per_parameter,
        multiple_of=plan.multiple_of,
        floors=plan.floors,
        storage=plan.storage,
        left_out=plan.left_out,
    )


def _scores(plan: RankPlan) -> dict[str, Tensor]:
    """Return the scores of the planned modules, having looked that the plan keeps the highest ones."""
    assert plan.order is not None
    scores = {name: plan.order.scores[name] for name in plan.modules if name in plan.order.scores}
    for name, module in plan.modules.items():
        if name in scores and not _is_highest(module, scores[name]):
            raise ValueError(
                f"the plan keeps other components of {name} than its order has first, so no other size follows from "
                'it: put its "rank" and "indices" back as they were, or draw the plan again'
            )
    return scores


def _is_highest(module: ModulePlan, scores: Tensor) -> bool:
    highest = ModulePlan.of_highest(module.shape, module.rank, scores)
    return highest.indices == module.indices or (highest.is_prefix and module.is_prefix)


def _described(drawn: RankPlan, plan: RankPlan) -> RankPlan:
    """Return ``drawn`` with what it inherits from ``plan``; ``plan`` itself where that is what was drawn."""
    if (drawn.keep, drawn.modules) == (plan.keep, plan.modules):
        return plan
    # The order came with the first of all sizes.
    source = next((note for note in plan.notes if note.startswith(RESIZED)), None)
    note = source or f"{RESIZED} the plan of {plan.method} at keep {plan.keep:g}, by its component order"
    inherited = [old for old in plan.notes if not old.startswith(_ABOUT_ONE_SIZE)]
    notes = tuple(dict.fromkeys([note, *inherited, *drawn.notes]))
    return replace(drawn, origin=plan.origin, fingerprint=plan.fingerprint, notes=notes)
