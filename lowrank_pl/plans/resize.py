"""Any size from one run: plans of other budgets, nested in each other, from a plan with a component order.

Sizes follow from the plan itself: a smaller plan is contained in it, and a larger one contains it. The plan is
therefore one of its own sizes, and ranks that a person edited are bounds. Weights that were corrected
(``lowrank_pl.methods.allocate.zs_svd_correction``) or refitted (``lowrank_pl.methods.refit``) for one size fit this
size and smaller ones only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from lowrank_pl.plans.budget import Budget, check_keep
from lowrank_pl.plans.plan import ModulePlan, RankPlan

__all__ = ["RESIZED", "cut_plan", "largest_keep", "nested"]

RESIZED = "resized from"
"""The beginning of the note that marks a resized plan."""

_NOTES_ON_ONE_SIZE = (RESIZED, "wished ranks scaled by")


def nested(plan: RankPlan, keeps: Iterable[float]) -> dict[float, RankPlan]:
    """Return a plan for each of ``keeps``, largest first, each contained in the one before it.

    The component order of ``plan`` decides on all sizes (ACIP's score map, arXiv 2502.01717). At the plan's own
    ``keep``, the result is ``plan`` itself.

    Args:
        plan: A plan with a component order. Larger plans contain it; smaller ones are contained in it.
        keeps: Fractions of the targeted parameters to keep.

    Raises:
        ValueError: ``keeps`` is empty or impossible, the plan has no order or keeps components that its order does not
            put first, or its weights were corrected or refitted for a smaller size.

    Example:
        >>> import torch
        >>> budget = Budget(keep=0.5, shapes={"a": (8, 8), "b": (8, 8)}, model_parameters=128, storage="factored")
        >>> plan = budget.select({"a": torch.arange(8, 0, -1.0), "b": torch.arange(4, 0, -0.5)}, method="hand")
        >>> sizes = nested(plan, [0.25, 0.5])
        >>> {keep: [module.rank for module in sized.modules.values()] for keep, sized in sizes.items()}
        {0.5: [3, 1], 0.25: [1, 1]}
    """
    ascending = sorted(set(keeps))
    if not ascending:
        raise ValueError("no size was given: expected one or more fractions to keep")
    plans: dict[float, RankPlan] = {}
    inner = outer = plan
    for keep in ascending:
        if _is_larger(plan, keep):
            plans[keep] = inner = _larger(inner, keep)
    for keep in reversed(ascending):
        if keep not in plans:
            plans[keep] = outer = _smaller(outer, keep)
    return {keep: plans[keep] for keep in reversed(ascending)}


def cut_plan(plan: RankPlan, keep: float) -> RankPlan:
    """Return the plan of :func:`nested` at a smaller size, if an export of ``plan`` holds all components that it keeps.

    Only layers that are stored as two factors can be cut. A dense or pivoted layer stores its weight, not its
    components. The singular values of that weight are no substitute for the calibrated order: cutting SmolLM2-135M,
    stored pivoted, from keep 0.8 to 0.7 by them gave a perplexity of 22,800 instead of 22.4. Cutting other layers
    further in place of dense ones gave 86 instead of 33 at keep 0.6.

    Args:
        plan: The plan of the export.
        keep: Fraction of the targeted parameters to keep, at most the plan's own.

    Raises:
        ValueError: ``keep`` is impossible or above the plan's own, or dense or pivoted layers would be cut; or no size
            follows from the plan: it has no component order, or its weights were corrected or refitted for its size.

    Example:
        >>> import torch
        >>> budget = Budget(keep=0.5, shapes={"a": (8, 8), "b": (8, 8)}, model_parameters=128, storage="factored")
        >>> plan = budget.select({"a": torch.arange(8, 0, -1.0), "b": torch.arange(4, 0, -0.5)}, method="hand")
        >>> [module.rank for module in cut_plan(plan, 0.25).modules.values()]
        [1, 1]
    """
    check_keep(keep)
    instead = f"make this size from the plan with `lowrank export PLAN --keep {keep:g}`"
    if keep > plan.keep:
        raise ValueError(
            f"keep is {keep:g}, but the export has keep {plan.keep:g}: its weights hold smaller sizes only; {instead}"
        )
    changes = _changes(plan)
    if changes and keep < plan.keep:
        raise ValueError(
            f"the factors have a {' and a '.join(changes)} for keep {plan.keep:g}, so their first components are no "
            f"model of their own: make a plan for keep {keep:g} with `lowrank allocate` and export that"
        )
    sized = nested(plan, [keep])[keep]
    cut = [name for name, entry in sized.modules.items() if entry.rank != plan.modules[name].rank]
    dense = [name for name in cut if plan.modules[name].rank is None]
    pivoted = [name for name in cut if name in set(plan.pivoted_modules)]
    if dense or pivoted:
        counts = [f"{len(names)} {form}" for form, names in (("dense", dense), ("pivoted", pivoted)) if names]
        other = "; exports with --storage factored have no pivoted layers" if pivoted else ""
        raise ValueError(
            f"keep {keep:g} cuts {len(cut)} layers, of which {' and '.join(counts)}, e.g. {(dense or pivoted)[0]}, and "
            f"the export holds no components of these: {instead}{other}"
        )
    return sized


def largest_keep(plan: RankPlan) -> float:
    """Return the largest ``keep`` of a plan's sizes: 1, or the one that its weights were corrected or refitted for.

    A correction moves the truncated weights away from the base's to compensate for the loss at its size. A larger size
    loses less, so the same correction would make it worse.
    """
    return min([1.0, *_changes(plan).values()])


def _changes(plan: RankPlan) -> dict[str, float]:
    """Return the steps that changed the factors for one size, such as a refit, each with the ``keep`` of that size."""
    changed = {step: made for step, made in plan.fingerprint.items() if isinstance(made, Mapping) and "keep" in made}
    return {step: float(made["keep"]) for step, made in changed.items()}


def _is_larger(plan: RankPlan, keep: float) -> bool:
    """Tell whether ``keep`` is above the plan's own and has room for the plan, whose ranks may have been edited."""
    return keep > plan.keep and _budget(plan, keep).limit >= plan.kept_parameters


def _larger(plan: RankPlan, keep: float) -> RankPlan:
    most = largest_keep(plan)
    if keep > most:
        raise ValueError(
            f"keep is {keep:g}, but the weights were changed for keep {most:g}: make another plan for larger sizes, "
            "with `lowrank allocate`"
        )
    sized = _budget(plan, keep).select(_scores(plan), method=plan.method, beyond=plan.modules)
    return _described(sized, plan)


def _smaller(plan: RankPlan, keep: float) -> RankPlan:
    sized = _budget(plan, keep).select(_scores(plan), method=plan.method, within=plan.modules)
    return _described(sized, plan)


def _budget(plan: RankPlan, keep: float) -> Budget:
    """Return the budget of ``keep`` for the modules of ``plan``, under the plan's own constraints."""
    if plan.order is None:
        raise ValueError(
            f"the plan (method {plan.method}) has no component order, so no other size follows from it: "
            "make it again with `lowrank allocate` or `lowrank fit`"
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
    """Return the scores of the planned modules, after a check that the plan keeps the highest ones."""
    assert plan.order is not None
    scores = {name: plan.order.scores[name] for name in plan.modules if name in plan.order.scores}
    for name, module in plan.modules.items():
        if name in scores and not _is_highest(module, scores[name]):
            raise ValueError(
                f"the plan keeps other components of {name} than its order puts first, so no other size follows from "
                'it: restore its "rank" and "indices", or make the plan again'
            )
    return scores


def _is_highest(module: ModulePlan, scores: Tensor) -> bool:
    highest = ModulePlan.of_highest(module.shape, module.rank, scores)
    return highest.indices == module.indices or (highest.is_prefix and module.is_prefix)


def _described(sized: RankPlan, plan: RankPlan) -> RankPlan:
    """Return ``sized`` with the origin and the notes of ``plan``; ``plan`` itself if both are the same."""
    if (sized.keep, sized.modules) == (plan.keep, plan.modules):
        return plan
    # A plan that was itself resized names the plan that its order came with.
    source = next((note for note in plan.notes if note.startswith(RESIZED)), None)
    note = source or f"{RESIZED} the plan of {plan.method} at keep {plan.keep:g}, by its component order"
    inherited = [old for old in plan.notes if not old.startswith(_NOTES_ON_ONE_SIZE)]
    notes = tuple(dict.fromkeys([note, *inherited, *sized.notes]))
    return replace(sized, origin=plan.origin, fingerprint=plan.fingerprint, notes=notes)
