"""Rank allocation without training: build or load the factors, then let an allocator choose the ranks."""

from __future__ import annotations

from pathlib import Path

from lowrank_pl.calibration.build import build_factors, build_gradients
from lowrank_pl.calibration.expert_losses import expert_losses
from lowrank_pl.calibration.provenance import base_notes, describe_origin, preparation_notes
from lowrank_pl.calibration.statistics import statistics_of_factors
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.allocate import Allocator, Problem, factors_of_plan, make_allocator
from lowrank_pl.models.targets import droppable
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.expert_dropping import ExpertLosses
from lowrank_pl.plans.plan import RankPlan

__all__ = ["allocate_on", "allocate_ranks"]


def allocate_ranks(
    subject: Subject,
    *,
    keep: float = 0.8,
    allocator: str | Allocator = "fisher",
    decomposition: Decomposition | None = None,
    store: Path | None = None,
) -> tuple[RankPlan, FactorStore]:
    """Return the rank plan of a closed-form allocator, and the factors that the plan is for.

    ``lowrank allocate`` does the same with a model that it loads. The next step is ``compress(model, plan, factors)``.

    Args:
        subject: The dense model, its tokenizer, the calibration sequences and the constraints on ranks.
        keep: Fraction of the targeted parameters to keep.
        allocator: The allocator, or its name for an allocator with default settings.
        decomposition: How weights are decomposed; by default as the allocator's paper does.
        store: Folder of the factors; by default one named by their fingerprint in the cache.

    Raises:
        ValueError: The allocator is unknown or can't read the factors, or the budget can't be met.

    Example:
        >>> import torch
        >>> from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
        >>> subject = Subject(tiny_model("llama"), byte_tokenizer(), torch.arange(256).view(4, 64))
        >>> plan, factors = allocate_ranks(subject, keep=0.5)
        >>> plan.method, plan.keep_targeted <= 0.5
        ('fisher', True)
    """
    method = make_allocator(allocator) if isinstance(allocator, str) else allocator
    budget = subject.budget(keep)
    method.check_budget(budget)
    settings = decomposition or method.default_decomposition()
    method.check_decomposition(settings)
    made = build_factors(subject, settings=settings, directory=store)
    plan = allocate_on(made, subject, budget, method, directory=store)
    factors = factors_of_plan(plan, made)
    notes = [*base_notes(subject), *preparation_notes(subject.targets, made)]
    origin = {**describe_origin(subject, settings, made), **plan.origin}
    return plan.with_origin(origin, factors.fingerprint, notes), factors


def allocate_on(
    factors: FactorStore, subject: Subject, budget: Budget, method: Allocator, *, directory: Path | None = None
) -> RankPlan:
    """Return the plan of ``method`` on existing factors; what else it needs is collected.

    Args:
        factors: The factors.
        subject: The model and the text that the factors were made from.
        budget: How many parameters to keep, and of which modules.
        method: The allocator.
        directory: The factors' folder if one was named; gradients are then kept beside the factors.

    Raises:
        ValueError: The factors are not of a kind that the allocator reads.
    """
    method.check_decomposition(Decomposition.of_fingerprint(factors.fingerprint))
    gradients = build_gradients(subject, directory=directory) if method.needs_gradients else None
    problem = Problem(
        budget=budget, factors=factors, targets=subject.targets, model=subject.model, sequences=subject.sequences,
        gradients=gradients, expert_losses=_expert_losses(factors, subject) if budget.drop_experts else {},
    )  # fmt: skip
    return method.plan(problem)


def _expert_losses(factors: FactorStore, subject: Subject) -> dict[str, ExpertLosses]:
    """Return the predicted losses of dropping experts; they are measured if they are not on disk."""
    statistics = statistics_of_factors(factors, subject.model, subject.sequences)
    labels = Decomposition.of_fingerprint(factors.fingerprint).labels
    store = statistics.collect("dropped_losses", droppable(subject.model, subject.targets), labels)
    return expert_losses(store, subject.model, subject.targets)
