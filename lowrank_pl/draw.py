"""A plan without training: factors made or found, what the allocator needs collected, the plan drawn and its origin."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.allocate import Allocator, Problem, drawn_on
from lowrank_pl.budget import Budget
from lowrank_pl.decomposition import Decomposition
from lowrank_pl.factor_store import FactorStore
from lowrank_pl.plan import RankPlan
from lowrank_pl.prepare import build_factors, build_gradients, describe_origin, preparation_notes
from lowrank_pl.targets import Targets

__all__ = ["draw", "draw_plan"]


def draw(
    method: Allocator,
    budget: Budget,
    store: FactorStore,
    targets: Targets,
    model: PreTrainedModel,
    windows: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    directory: Path | None = None,
) -> RankPlan:
    """Return the plan that ``method`` draws, with weight gradients collected for it where it needs them.

    Args:
        method: The allocator.
        budget: How much to keep, and of what.
        store: The factors.
        targets: What was found in the model.
        model: The dense base.
        windows: ``[windows, length]`` calibration token ids.
        tokenizer: The one that made them.
        directory: The store's folder where it was named, so that gradients are kept beside the factors.

    Raises:
        ValueError: The factors are not of the kind that the allocator reads.
    """
    gradients = None
    if method.needs_gradients:
        gradients = build_gradients(model, targets, windows, tokenizer, directory=directory)
    problem = Problem(budget=budget, factors=store, targets=targets, model=model, windows=windows, gradients=gradients)
    return method.plan(problem)


def draw_plan(
    method: Allocator,
    budget: Budget,
    targets: Targets,
    model: PreTrainedModel,
    windows: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: Decomposition,
    base: str,
    dtype: str,
    text: str,
    directory: Path | None = None,
) -> tuple[RankPlan, FactorStore]:
    """Return the plan that ``method`` draws on the factors of ``settings``, with its origin, and the factors it is for.

    Args:
        method: The allocator.
        budget: How much to keep, and of what.
        targets: What was found in the model.
        model: The dense base.
        windows: ``[windows, length]`` calibration token ids.
        tokenizer: The one that made them.
        settings: How weights are decomposed.
        base: The base's name, for the origin.
        dtype: Type that it was loaded in, for the origin.
        text: The calibration text's name, for the origin.
        directory: Folder of the factors; by default one named by their fingerprint in the cache.

    Raises:
        ValueError: As ``build_factors`` and the allocator do.
    """
    made = build_factors(model, targets, windows, tokenizer, settings=settings, directory=directory)
    plan = draw(method, budget, made, targets, model, windows, tokenizer, directory=directory)
    store = drawn_on(plan, made)
    origin = describe_origin(base=base, dtype=dtype, text=text, windows=windows, settings=settings, store=made)
    notes = preparation_notes(targets, made)
    return plan.with_origin({**origin, **plan.origin}, store.fingerprint, notes), store
