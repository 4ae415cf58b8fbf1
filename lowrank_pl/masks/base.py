"""What every learned mask offers: a gate per component, a price, and a way to whole ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from lowrank_pl.budget import Budget
from lowrank_pl.plan import RankPlan

__all__ = ["Mask", "MaskMethod"]


class Mask(nn.Module, ABC):
    """The learnable gate of one module's components; its parameters stay float32 whatever the base's type is.

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that it gates.
    """

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        super().__init__()
        self.shape = shape
        self.rank = rank

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the gate ``[rank]`` of this training step, differentiable in the mask's parameters."""

    @abstractmethod
    def ratio(self) -> Tensor:
        """Return the expected parameters as a fraction of the dense weight's, differentiable, a scalar.

        At 1 and above the module is dense.
        """


class MaskMethod(ABC):
    """A family of masks with its settings: makes them, charges them and turns them into a plan."""

    name: str

    @abstractmethod
    def stored_rank(self, shape: tuple[int, int]) -> int:
        """Return how many components of a module of ``shape`` a mask gates."""

    @abstractmethod
    def create(self, shape: tuple[int, int], sigma: Tensor, keep: float) -> Mask:
        """Return a mask that starts at ``keep`` of the module's parameters.

        Args:
            shape: ``(out, in)`` of the module.
            sigma: All its singular values, descending.
            keep: Fraction to start from; 1 is dense.
        """

    @abstractmethod
    def penalties(self, masks: Mapping[str, Mask], ratios: Tensor, keep: float) -> dict[str, Tensor]:
        """Return the weighted loss terms that hold the masks to the budget, by name, each a scalar.

        Args:
            masks: Every module's mask by name.
            ratios: ``[modules]``, each mask's ``ratio()`` in the same order.
            keep: Fraction of the targeted parameters aimed at.
        """

    @abstractmethod
    def finalise(self, masks: Mapping[str, Mask], budget: Budget) -> RankPlan:
        """Return the plan that the masks stand for, at the exact budget."""
