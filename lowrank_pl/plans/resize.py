"""Any size from one run: plans of other budgets, nested in each other, from a plan with a component order.

Sizes follow from the plan itself: a smaller plan is contained in it, and a larger one contains it. The plan is
therefore one of its own sizes, and ranks that a person edited are bounds. Weights that were corrected
(``lowrank_pl.methods.allocate.zs_svd_correction``) or refitted (``lowrank_pl.methods.refit``) for one size fit this
size and smaller ones only, and so does a plan that drops experts: they stay dropped at smaller sizes, and which of them
a larger one would take back, its order does not say.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from lowrank_pl.plans.budget import Budget, check_keep
from lowrank_pl.plans.expert_dropping import PREDICTED
from lowrank_pl.plans.plan import BYTE_BUDGET, ModulePlan, RankPlan

__all__ = ["RESIZED", "component_bytes", "components_below", "cut_plan", "largest_keep", "nested"]

RESIZED = "resized from"
"""The beginning of the note that marks a resized plan."""

_NOTES_ON_ONE_SIZE = (RESIZED, "requested ranks scaled by", "wished ranks scaled by", PREDICTED)


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


def cut_plan(plan: RankPlan, keep: float, held: Container[str] = ()) -> RankPlan:
    """Return the plan of :func:`nested` at a smaller size, if an export of ``plan`` holds all components that it keeps.

    Weights hold components only of layers that are stored as two factors. A dense or pivoted layer stores its weight,
    so its components have to lie beside the weights (:func:`components_below`). The singular values of that weight are
    no substitute for the calibrated order: cutting SmolLM2-135M, stored pivoted, from keep 0.8 to 0.7 by them gave a
    perplexity of 22,800 instead of 22.4. Cutting other layers further in place of dense ones gave 86 instead of 33 at
    keep 0.6.

    Args:
        plan: The plan of the export.
        keep: Fraction of the targeted parameters to keep, at most the plan's own.
        held: Names of the layers whose components lie beside the weights.

    Raises:
        ValueError: ``keep`` is impossible or above the plan's own, or dense or pivoted layers without components would
            be cut; or no size follows from the plan: it has no component order, or its weights were corrected or
            refitted for its size.

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
    if keep < plan.keep:
        _check_unchanged(plan, f"make a plan for keep {keep:g} with `lowrank allocate` and export that")
    sized = nested(plan, [keep])[keep]
    lacking = _without_components(plan, sized, held)
    if lacking:
        cut = [name for name, entry in sized.modules.items() if entry.rank != plan.modules[name].rank]
        dense = sum(plan.modules[name].rank is None for name in lacking)
        counts = [f"{n} {form}" for n, form in ((dense, "dense"), (len(lacking) - dense, "pivoted")) if n]
        other = "; exports with --storage factored have no pivoted layers" if dense < len(lacking) else ""
        raise ValueError(
            f"keep {keep:g} cuts {len(cut)} layers, of which {' and '.join(counts)}, e.g. {lacking[0]}, and the export "
            f"holds no components of these: {instead}, or export the plan with `--any_size true` for a folder that "
            f"serves every smaller size{other}. {_served(plan, held)}"
        )
    return sized


def components_below(plan: RankPlan) -> dict[str, ModulePlan]:
    """Return the components that smaller sizes may keep of layers whose weights do not hold them, by layer.

    These are the dense and pivoted layers of ``plan`` that some smaller size cuts. Of a dense layer, the components up
    to break-even are enough: a size that would keep more leaves the layer dense. Layers that ``plan`` stores as two
    factors are among them only if a smaller size stores them pivoted.

    Args:
        plan: The plan of an export.

    Raises:
        ValueError: No smaller size follows from the plan: it has no component order, or one without some module, keeps
            components that its order does not put first, or its weights were corrected or refitted for its size.

    Example:
        >>> import torch
        >>> budget = Budget(keep=0.8, shapes={"a": (8, 8), "b": (8, 8)}, model_parameters=128, storage="factored")
        >>> plan = budget.select({"a": torch.arange(8, 0, -1.0), "b": torch.arange(4, 0, -0.5)}, method="hand")
        >>> {name: module.rank for name, module in plan.modules.items()}
        {'a': None, 'b': 2}
        >>> {name: module.rank for name, module in components_below(plan).items()}
        {'a': 3}
    """
    _check_unchanged(plan, "make the smaller sizes with `lowrank allocate`")
    budget = _budget(plan, 1.0)
    scores = budget.order(_scores(plan)).scores
    found = {}
    for name, entry in plan.modules.items():
        least = budget.least_rank(name)
        if least is None or (entry.rank is not None and entry.rank <= least):
            continue
        if entry.rank is None:
            found[name] = ModulePlan.of_highest(entry.shape, budget.top_rank(name), scores[name])
        elif "pivoted" in (entry.storage, budget.costs_of(name).form(entry.shape, entry.rank - 1)):
            found[name] = entry
    return found


def component_bytes(plan: RankPlan) -> int:
    """Return the bytes of the components of :func:`components_below` as they lie beside an export.

    They are stored in the type of the weights; those that pivots are computed from, in float32.
    """
    size = plan.bytes_per_parameter if plan.storage == "factored" else 4
    return size * sum((entry.rank or 0) * sum(entry.shape) for entry in components_below(plan).values())


def largest_keep(plan: RankPlan) -> float:
    """Return the largest ``keep`` of a plan's sizes: 1, or its own if it drops experts or its weights were changed.

    A correction moves the truncated weights away from the base's to compensate for the loss at its size. A larger size
    loses less, so the same correction would make it worse.
    """
    return min([1.0, *_changes(plan).values(), *([plan.keep] if plan.dropped_modules else [])])


def _without_components(plan: RankPlan, smaller: RankPlan, held: Container[str]) -> list[str]:
    """Return the layers that ``smaller`` cuts and whose components an export of ``plan`` does not hold."""
    pivoted = set(plan.pivoted_modules)
    return [
        name
        for name, entry in smaller.modules.items()
        if entry.rank != plan.modules[name].rank
        and (plan.modules[name].rank is None or name in pivoted)
        and name not in held
    ]


def _served(plan: RankPlan, held: Container[str]) -> str:
    """Return in a sentence which sizes an export of ``plan`` serves, to a hundredth."""

    def is_served(hundredths: int) -> bool:
        keep = hundredths / 100
        try:
            return not _without_components(plan, nested(plan, [keep])[keep], held)
        except ValueError:
            # Below the floors.
            return False

    most = math.floor(plan.keep * 100)
    least = 1 + bisect_left(range(1, most + 1), True, key=is_served)
    if least > most or least / 100 == plan.keep:
        return f"This export serves its own size only, keep {plan.keep:g}"
    return f"This export serves sizes down to keep {least / 100:g}"


def _check_unchanged(plan: RankPlan, advice: str) -> None:
    """Raise ``ValueError`` if the weights were corrected or refitted for one size."""
    changes = _changes(plan)
    if changes:
        raise ValueError(
            f"the factors have a {' and a '.join(changes)} for keep {plan.keep:g}, so their first components are no "
            f"model of their own: {advice}"
        )


def _changes(plan: RankPlan) -> dict[str, float]:
    """Return the steps that changed the factors for one size, such as a refit, each with the ``keep`` of that size."""
    changed = {step: made for step, made in plan.fingerprint.items() if isinstance(made, Mapping) and "keep" in made}
    return {step: float(made["keep"]) for step, made in changed.items()}


def _is_larger(plan: RankPlan, keep: float) -> bool:
    """Tell whether ``keep`` is above the plan's own and has room for the plan, whose ranks may have been edited."""
    return keep > plan.keep and _budget(plan, keep).limit >= plan.kept_parameters


def _larger(plan: RankPlan, keep: float) -> RankPlan:
    most = largest_keep(plan)
    if plan.dropped_modules:
        raise ValueError(
            f"keep is {keep:g}, but the plan drops {len(plan.dropped_experts)} experts for keep {plan.keep:g}, and "
            "does not say which to take back: make a plan for this size with `lowrank allocate --drop_experts true`"
        )
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
    if plan.is_rounded:
        raise ValueError(
            "the plan's numbers are rounded to a few bits, so no other size follows from it: make this size from the "
            "plan before rounding, with `lowrank export PLAN --keep`, or choose another budget with `lowrank allocate`"
        )
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
        embeddings=plan.embedded,
        alike_experts=plan.alike_experts,
        dropped=frozenset(plan.dropped_modules),
        stacks={name: module.layers for name, module in plan.modules.items() if module.layers},
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
    origin = {key: value for key, value in plan.origin.items() if key != BYTE_BUDGET}
    return replace(sized, origin=origin, fingerprint=plan.fingerprint, notes=notes)
