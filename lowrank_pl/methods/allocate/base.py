"""The interface of closed-form allocators: they score every component, and the budget takes the best."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.factors.settings import Decomposition, Kind
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.targets import EMBEDDINGS, Targets
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.expert_dropping import ExpertLosses
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.utils.tensor_store import TensorStore

__all__ = ["Allocator", "Problem", "factors_of_plan"]


@dataclass(frozen=True)
class Problem:
    """The input of an allocator.

    Args:
        budget: How many parameters to keep, and of which modules.
        factors: The components of every module.
        targets: The target layers of the model.
        model: The dense base; it stays unchanged.
        sequences: ``[sequences, length]`` calibration token ids.
        gradients: Mean weight gradients (``lowrank_pl.calibration.build.build_gradients``), for allocators that need
            them.
        expert_losses: The predicted losses of dropping experts, by module of experts; empty unless experts may be
            dropped.
    """

    budget: Budget
    factors: FactorStore
    targets: Targets
    model: PreTrainedModel | None = None
    sequences: Tensor | None = None
    gradients: TensorStore | None = None
    expert_losses: Mapping[str, ExpertLosses] = field(default_factory=dict)

    @cached_property
    def sigma(self) -> Callable[[str], Tensor]:
        """The singular values of a module by its name, as ``factors.sigma``; each is read from disk once."""
        return cache(self.factors.sigma)

    @cached_property
    def notes(self) -> Callable[[str], dict[str, str]]:
        """The notes on a module's factors by its name, as ``factors.notes``; each is read from disk once."""
        return cache(self.factors.notes)


class Allocator(ABC):
    """Chooses ranks without training: it scores every component, and the budget keeps the highest-scored ones.

    Attributes:
        name: Its name in ``lowrank allocate --method`` and in plans.
        paper: arXiv number of its paper; None for a method of ours or a paper that is not on arXiv.
        former_names: Names of the method in plans and commands of earlier versions.
        default_kind: Kind of decomposition by default: that of its paper, if it has one.
        kinds: Kinds of decomposition whose singular values the scores can read; empty for any.
        needs_gradients: Whether it reads ``Problem.gradients``.
        needs_model: Whether it runs the model, whose weights must then be loaded.
        takes_embeddings: Whether embeddings and head may be among the targets.
        drops_experts: Whether it can choose experts to drop.
        takes_shared: Whether experts may share right factors, so that a module is several layers.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    former_names: ClassVar[tuple[str, ...]] = ()
    default_kind: ClassVar[Kind] = "whitened"
    kinds: ClassVar[tuple[str, ...]] = ()
    needs_gradients: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    takes_embeddings: ClassVar[bool] = False
    drops_experts: ClassVar[bool] = False
    takes_shared: ClassVar[bool] = False

    @abstractmethod
    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return a score ``[components]`` for every module: higher is kept longer, across modules."""

    def notes(self, problem: Problem) -> Sequence[str]:
        """Return notes for the plan on how its ranks were chosen."""
        return ()

    def plan(self, problem: Problem) -> RankPlan:
        """Return the plan of the highest-scored components at exactly the budget.

        A method that makes its own factors, such as a correction of weights, names them in the plan: the plan has the
        fingerprint of the new factors, and ``origin["store"]`` is their folder. Otherwise both are empty, and the plan
        is for ``problem.factors``. ``factors_of_plan`` distinguishes the two cases.

        Raises:
            ValueError: The method can't read this kind of factors, or needs something that ``problem`` lacks.
        """
        self.check(problem)
        return problem.budget.select(self.scores(problem), method=self.name, notes=self.notes(problem))

    def default_decomposition(self) -> Decomposition:
        """Return the decomposition that this method uses by default."""
        return Decomposition(self.default_kind)

    def need_model(self, problem: Problem) -> tuple[PreTrainedModel, Tensor]:
        """Return the dense model and the calibration sequences.

        Raises:
            ValueError: One of them is missing.
        """
        assert self.needs_model
        if problem.model is None or problem.sequences is None:
            what = "model" if problem.model is None else "calibration sequences"
            raise ValueError(
                f"the allocator {self.name} was given no {what}, on which it measures: give Problem both model and "
                "sequences, or use allocate_ranks"
            )
        return problem.model, problem.sequences

    def check_kind(self, kind: str | None) -> None:
        """Check the kind of factors.

        Raises:
            ValueError: This method can't read factors of ``kind``.
        """
        if self.kinds and kind not in self.kinds:
            raise ValueError(
                f"the allocator {self.name} was given factors of the kind {kind!r}: expected "
                f"{' or '.join(self.kinds)} (decomposition.kind)"
            )

    def check_decomposition(self, decomposition: Decomposition) -> None:
        """Check the decomposition that factors are made by, before any are built.

        Raises:
            ValueError: This method can't read such factors.
        """
        self.check_kind(decomposition.kind)

    def check_budget(self, budget: Budget) -> None:
        """Check that this method can give every module of ``budget`` a rank, before any factors are built.

        Raises:
            ValueError: Embeddings or experts that share a factor are among the modules, and it knows single linear
                layers of blocks only, or experts may be dropped, and it can't choose which.
        """
        if budget.drop_experts and not self.drops_experts:
            raise ValueError(
                f"drop_experts is true, but the allocator {self.name} does not know what dropping costs: allocate by "
                "fisher, or leave drop_experts out"
            )
        if budget.stacks and not self.takes_shared:
            raise ValueError(
                f"shared_experts is true, but the allocator {self.name} knows every layer by itself: allocate by "
                "fisher, or leave shared_experts out"
            )
        if budget.embeddings and not self.takes_embeddings:
            raise ValueError(
                f"the allocator {self.name} was given the embeddings {budget.embeddings[0]}, and knows linear "
                f"layers of blocks only: allocate by fisher, or leave out --include {EMBEDDINGS}"
            )

    def check(self, problem: Problem) -> None:
        """Check that ``problem`` has everything that this method needs.

        Raises:
            ValueError: The factors are of another kind, gradients are missing, or there are targets that it does not
                know.
        """
        self.check_budget(problem.budget)
        self.check_kind(problem.factors.fingerprint.get("kind"))
        if self.needs_gradients and problem.gradients is None:
            raise ValueError(
                f"the allocator {self.name} was given no weight gradients: collect them with "
                "lowrank_pl.calibration.build.build_gradients"
            )


def factors_of_plan(plan: RankPlan, factors: FactorStore) -> FactorStore:
    """Return the factors that an allocator's ``plan`` is for: ``factors``, or those that the allocator itself made."""
    return FactorStore.existing(plan.origin["store"]) if plan.fingerprint else factors
