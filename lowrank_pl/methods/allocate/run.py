"""A plan without training: factors made or found, what the allocator needs collected, the plan drawn and its origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.calibration.build import build_factors, build_gradients
from lowrank_pl.calibration.provenance import base_notes, describe_origin, preparation_notes
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.allocate import allocator
from lowrank_pl.methods.allocate.base import Allocator, Problem, drawn_on
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.targets import Targets, find_targets
from lowrank_pl.plans.budget import Budget, budget_for
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import StorageChoice

__all__ = ["allocate_ranks", "draw", "draw_plan"]


def allocate_ranks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Tensor,
    *,
    method: str = "fisher",
    settings: Mapping[str, Any] | None = None,
    keep: float = 0.8,
    decomposition: Decomposition | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    multiple_of: int = 1,
    floors: dict[str, float] | None = None,
    storage: StorageChoice = "auto",
    store: Path | None = None,
    base: str = "",
    text: str = "",
) -> tuple[RankPlan, FactorStore]:
    """Return a rank plan that an allocator draws without training, and the factors that it is for.

    What ``lowrank allocate`` does, on a model that is loaded. ``compress(model, plan, factors)`` is the next step.

    Args:
        model: The dense base, on the device that is to do the work; left as it was.
        tokenizer: The base's.
        sequences: ``[sequences, length]`` calibration token ids, as ``token_windows`` makes them.
        method: Name of the allocator.
        settings: Its settings.
        keep: Fraction of the targeted parameters to keep.
        decomposition: How weights are decomposed; by default as the allocator's paper does.
        include: Globs of modules to target, on full names or names inside a block.
        exclude: Globs of modules to leave alone; they are not counted in ``keep``.
        multiple_of: Every rank is a multiple of this.
        floors: Least kept fraction by glob on module names; 1.0 keeps these dense.
        storage: How low-rank modules are stored: as two factors, pivoted, or ``auto`` for the smaller of both.
        store: Folder of the factors; by default one named by their fingerprint in the cache.
        base: Name of the base, for the plan to remember: without it ``lowrank export`` has to be told.
        text: Name of the calibration text, likewise, to make factors again that are gone.

    Raises:
        ValueError: An unknown allocator or setting, a budget that can't be met, or factors that it can't read.

    Example:
        >>> import torch
        >>> from lowrank_pl.tiny_models import byte_tokenizer, tiny_model
        >>> model, sequences = tiny_model("llama"), torch.arange(256).view(4, 64)
        >>> plan, factors = allocate_ranks(model, byte_tokenizer(), sequences, keep=0.5)
        >>> plan.method, plan.keep_targeted <= 0.5
        ('fisher', True)
    """
    drawer = allocator(method, **(settings or {}))
    targets = find_targets(model, include=include, exclude=exclude)
    budget = budget_for(model, targets, keep, multiple_of=multiple_of, floors=floors, storage=storage)
    return draw_plan(
        drawer, budget, targets, model, sequences, tokenizer, settings=decomposition or drawer.default_decomposition(),
        base=base, dtype=str(model.dtype).removeprefix("torch."), text=text, directory=store,
    )  # fmt: skip


def draw(
    method: Allocator,
    budget: Budget,
    store: FactorStore,
    targets: Targets,
    model: PreTrainedModel,
    sequences: Tensor,
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
        sequences: ``[sequences, length]`` calibration token ids.
        tokenizer: The one that made them.
        directory: The store's folder where it was named, so that gradients are kept beside the factors.

    Raises:
        ValueError: The factors are not of the kind that the allocator reads.
    """
    gradients = None
    if method.needs_gradients:
        gradients = build_gradients(model, targets, sequences, tokenizer, directory=directory)
    problem = Problem(
        budget=budget, factors=store, targets=targets, model=model, sequences=sequences, gradients=gradients
    )
    return method.plan(problem)


def draw_plan(
    method: Allocator,
    budget: Budget,
    targets: Targets,
    model: PreTrainedModel,
    sequences: Tensor,
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
        sequences: ``[sequences, length]`` calibration token ids.
        tokenizer: The one that made them.
        settings: How weights are decomposed.
        base: The base's name, for the origin.
        dtype: Type that it was loaded in, for the origin.
        text: The calibration text's name, for the origin.
        directory: Folder of the factors; by default one named by their fingerprint in the cache.

    Raises:
        ValueError: As ``build_factors`` and the allocator do.
    """
    made = build_factors(model, targets, sequences, tokenizer, settings=settings, directory=directory)
    plan = draw(method, budget, made, targets, model, sequences, tokenizer, directory=directory)
    store = drawn_on(plan, made)
    origin = describe_origin(
        base=base, dtype=dtype, text=text, sequences=sequences, settings=settings, store=made, narrowed=Origin.of(model)
    )
    notes = [*base_notes(model, targets), *preparation_notes(targets, made)]
    return plan.with_origin({**origin, **plan.origin}, store.fingerprint, notes), store
