"""What every closed-form allocator is: a score for every component of every module; the budget does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.budget import Budget
from lowrank_pl.factor_store import FactorStore, TensorStore
from lowrank_pl.plan import RankPlan
from lowrank_pl.targets import Targets

__all__ = ["Allocator", "Problem"]


@dataclass(frozen=True)
class Problem:
    """All that an allocator may look at.

    Args:
        budget: How much to keep, and of what.
        factors: The components of every module.
        targets: What was found in the model.
        model: The dense base; left as it was.
        windows: ``[windows, length]`` calibration token ids.
        gradients: Mean weight gradients (``lowrank_pl.prepare.build_gradients``), for allocators that need them.
    """

    budget: Budget
    factors: FactorStore
    targets: Targets
    model: PreTrainedModel | None = None
    windows: Tensor | None = None
    gradients: TensorStore | None = None


class Allocator(ABC):
    """Draws a plan without training: scores every component, the highest-scored ones that the budget pays for stay.

    Attributes:
        name: What ``lowrank allocate --method`` calls it.
        kinds: Kinds of decomposition whose singular values mean what the scores take them for; empty for any.
        needs_gradients: Whether ``Problem.gradients`` has to be there.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ()
    needs_gradients: ClassVar[bool] = False

    @abstractmethod
    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return a score ``[components]`` for every module: higher is kept longer, across modules."""

    def notes(self, problem: Problem) -> Sequence[str]:
        """Return what the plan should remember of how it was drawn."""
        return ()

    def plan(self, problem: Problem) -> RankPlan:
        """Return the plan of the highest-scored components at exactly the budget.

        Raises:
            ValueError: The factors are of a kind that this method can't read, or what it needs is missing.
        """
        self.check(problem)
        return problem.budget.select(self.scores(problem), method=self.name, notes=self.notes(problem))

    def check(self, problem: Problem) -> None:
        """Check that ``problem`` has what this method needs.

        Raises:
            ValueError: It has not.
        """
        kind = problem.factors.fingerprint.get("kind")
        if self.kinds and kind not in self.kinds:
            raise ValueError(
                f"the allocator {self.name} was given factors of the kind {kind!r}: expected "
                f"{' or '.join(self.kinds)} (--decomposition.kind)"
            )
        if self.needs_gradients and problem.gradients is None:
            raise ValueError(
                f"the allocator {self.name} was given no weight gradients: collect them with "
                "lowrank_pl.prepare.build_gradients"
            )
