"""Any size from one run: a plan that carries a component order becomes plans of other budgets, one inside the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lowrank_pl.budget import Budget
from lowrank_pl.plan import ModulePlan, RankPlan

__all__ = ["nested", "resize"]


def resize(plan: RankPlan, keep: float, *, within: Mapping[str, ModulePlan] | None = None) -> RankPlan:
    """Return the plan that the order of ``plan`` gives at another budget (ACIP's score map, arXiv 2501.01717).

    Args:
        plan: A plan with a component order.
        keep: Fraction of the targeted parameters to keep.
        within: Modules of a larger plan that the new one has to be contained in.

    Raises:
        ValueError: The plan has no order, or the budget is impossible.

    Example:
        >>> import torch
        >>> budget = Budget(keep=0.5, shapes={"a": (8, 8), "b": (8, 8)}, model_parameters=128)
        >>> plan = budget.select({"a": torch.arange(8, 0, -1.0), "b": torch.arange(4, 0, -0.5)}, method="hand")
        >>> [module.rank for module in resize(plan, 0.25).modules.values()]
        [1, 1]
    """
    if plan.order is None:
        raise ValueError(
            f"the plan (method {plan.method}) carries no component order, so it has this one size only: "
            "draw it again with `lowrank allocate` or `lowrank fit`"
        )
    budget = Budget(
        keep=keep,
        shapes={name: module.shape for name, module in plan.modules.items()},
        model_parameters=plan.model_parameters,
        bytes_per_parameter=plan.bytes_per_parameter,
        multiple_of=plan.multiple_of,
        floors=plan.floors,
    )
    scores = {name: plan.order.scores[name] for name in plan.modules if name in plan.order.scores}
    note = f"resized from the order of a plan of keep {plan.keep}"
    kept = [old for old in plan.notes if not old.startswith("resized from")]
    resized = budget.select(scores, method=plan.method, within=within)
    notes = tuple(dict.fromkeys([*kept, *resized.notes, note]))
    return replace(resized, origin=plan.origin, fingerprint=plan.fingerprint, notes=notes)


def nested(plan: RankPlan, keeps: Sequence[float]) -> dict[float, RankPlan]:
    """Return a plan for each of ``keeps``, largest first, each contained in the one before it.

    Args:
        plan: A plan with a component order.
        keeps: Fractions of the targeted parameters to keep.

    Raises:
        ValueError: No fractions, the plan has no order, or a budget is impossible.
    """
    if not keeps:
        raise ValueError("no size was asked for: expected one or more fractions to keep")
    plans: dict[float, RankPlan] = {}
    within: Mapping[str, ModulePlan] | None = None
    for keep in sorted(set(keeps), reverse=True):
        plans[keep] = resize(plan, keep, within=within)
        within = plans[keep].modules
    return plans
