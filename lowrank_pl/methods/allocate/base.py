"""What every closed-form allocator is: a score for every component of every module; the budget does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.factors.settings import Decomposition, Kind
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.targets import Targets
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.utils.tensor_store import TensorStore

__all__ = ["Allocator", "Problem", "drawn_on"]


@dataclass(frozen=True)
class Problem:
    """All that an allocator may look at.

    Args:
        budget: How much to keep, and of what.
        factors: The components of every module.
        targets: What was found in the model.
        model: The dense base; left as it was.
        sequences: ``[sequences, length]`` calibration token ids.
        gradients: Mean weight gradients (``lowrank_pl.prepare.build_gradients``), for allocators that need them.
    """

    budget: Budget
    factors: FactorStore
    targets: Targets
    model: PreTrainedModel | None = None
    sequences: Tensor | None = None
    gradients: TensorStore | None = None


class Allocator(ABC):
    """Draws a plan without training: scores every component, the highest-scored ones that the budget pays for stay.

    Attributes:
        name: What ``lowrank allocate --method`` calls it.
        default_kind: Kind of decomposition that it draws on when none is asked for, its paper's where there is one.
        kinds: Kinds of decomposition whose singular values mean what the scores take them for; empty for any.
        needs_gradients: Whether ``Problem.gradients`` has to be there.
        needs_model: Whether it runs the model, which then has to have its weights.
    """

    name: ClassVar[str]
    default_kind: ClassVar[Kind] = "whitened"
    kinds: ClassVar[tuple[str, ...]] = ()
    needs_gradients: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False

    @abstractmethod
    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return a score ``[components]`` for every module: higher is kept longer, across modules."""

    def notes(self, problem: Problem) -> Sequence[str]:
        """Return what the plan should remember of how it was drawn."""
        return ()

    def plan(self, problem: Problem) -> RankPlan:
        """Return the plan of the highest-scored components at exactly the budget.

        A method that makes factors of its own, as a correction of weights does, names them in the plan: its fingerprint
        is that of the new factors and ``origin["store"]`` their folder. Otherwise both are empty, and the plan is one
        for ``problem.factors``; ``drawn_on`` tells.

        Raises:
            ValueError: The factors are of a kind that this method can't read, or what it needs is missing.
        """
        self.check(problem)
        return problem.budget.select(self.scores(problem), method=self.name, notes=self.notes(problem))

    def default_decomposition(self) -> Decomposition:
        """Return the decomposition that this method draws on when none is asked for."""
        return Decomposition(self.default_kind)

    def need_model(self, problem: Problem) -> tuple[PreTrainedModel, Tensor]:
        """Return the dense model and the calibration sequences.

        Raises:
            ValueError: One of them is missing.
        """
        assert self.needs_model
        if problem.model is None or problem.sequences is None:
            what = "model" if problem.model is None else "calibration windows"
            raise ValueError(
                f"the allocator {self.name} was given no {what}, on which it measures: give Problem both model and "
                "windows, or draw the plan with lowrank_pl.draw.draw"
            )
        return problem.model, problem.sequences

    def check_kind(self, kind: str | None) -> None:
        """Check that this method can read factors of ``kind``, which it can be asked before there are any.

        Raises:
            ValueError: It can't.
        """
        if self.kinds and kind not in self.kinds:
            raise ValueError(
                f"the allocator {self.name} was given factors of the kind {kind!r}: expected "
                f"{' or '.join(self.kinds)} (decomposition.kind)"
            )

    def check(self, problem: Problem) -> None:
        """Check that ``problem`` has what this method needs.

        Raises:
            ValueError: It has not.
        """
        self.check_kind(problem.factors.fingerprint.get("kind"))
        if self.needs_gradients and problem.gradients is None:
            raise ValueError(
                f"the allocator {self.name} was given no weight gradients: collect them with "
                "lowrank_pl.prepare.build_gradients"
            )


def drawn_on(plan: RankPlan, factors: FactorStore) -> FactorStore:
    """Return the factors that an allocator's ``plan`` is for: those that it was given, or those that it made."""
    return FactorStore.existing(plan.origin["store"]) if plan.fingerprint else factors
