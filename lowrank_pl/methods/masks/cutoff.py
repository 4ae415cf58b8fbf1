"""What Dobi-SVD and Fermi have in common: one learned number a module, the place where its gate falls from 1 to 0."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank_pl.methods.masks.base import Mask, MaskMethod, ModelMasks
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import Storage
from lowrank_pl.utils.checks import check_numbers

__all__ = ["CutoffMask", "CutoffMethod"]


class CutoffMask(Mask):
    """A smooth step ``sigmoid(slope * (cutoff - position))`` over the components of one module.

    The learned number ``level`` is the cutoff over the rank that costs as much as the dense weight, ``mn / (m + n)``
    for two factors. For these ``level`` is the module's parameter ratio, so an optimizer step of 0.01 moves any module
    by one percent of its dense size. Component ``j``, from 0, lies at position ``j + 1/2``, so that the gates of a long
    enough spectrum sum up to the cutoff.

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that the mask gates.
        keep: Ratio to start at.
        storage: How the finished module is stored.
        top: The largest level, which keeps the cutoff within reach of the components.
        slope: Steepness at the cutoff, per component.
    """

    own: ClassVar[tuple[str, ...]] = ("level", "slope")

    positions: Tensor
    slope: Tensor

    def __init__(
        self, shape: tuple[int, int], rank: int, keep: float, *, storage: Storage, top: float, slope: float
    ) -> None:
        super().__init__(shape, rank, storage)
        self.even = storage.rank_at(shape, 1.0)
        self.top = top
        self.level = nn.Parameter(torch.tensor(storage.rank_at(shape, keep) / self.even))
        self.register_buffer("positions", torch.arange(rank) + 0.5, persistent=False)
        self.register_buffer("slope", torch.tensor(float(slope)), persistent=False)

    def cutoff(self) -> Tensor:
        """Return the cutoff in components, a scalar."""
        return self.level * self.even

    def ratio(self) -> Tensor:
        """Return the parameters up to the cutoff as a fraction of the dense weight's, a scalar."""
        return self.storage.ratio(self.shape, self.cutoff())

    def forward(self) -> Tensor:
        """Return the soft gate ``[rank]``, falling from left to right; its gradient is exact."""
        return (self.slope[..., None] * (self.cutoff()[..., None] - self.positions)).sigmoid()

    def kept(self) -> Tensor:
        """Return which components lie below the cutoff, bool ``[rank]``."""
        return self.positions < self.cutoff().detach()[..., None]


class CutoffMethod(MaskMethod):
    """The base of ``DobiSVD`` and ``Fermi``, which differ in the slope of the step.

    ARA's budget penalty holds the cutoffs to the target. After every step, cutoffs that have left the range from 0 to
    ``top`` are put back.

    Args:
        top: Parameters of the gated components over those of the dense weight; above 1, so that a module can be dense.
        budget_weight: Weight of the squared distance of the kept parameters from the budget.

    Raises:
        ValueError: ``top`` not above 1, or a negative weight.
    """

    def __init__(self, *, top: float, budget_weight: float) -> None:
        check_numbers({"top": (top, 1)}, above=True)
        check_numbers({"budget_weight": (budget_weight, 0)})
        self.top = top
        self.budget_weight = budget_weight

    @abstractmethod
    def slope_at(self, mask: CutoffMask, step: int) -> float:
        """Return the steepness of the gate ``mask`` at ``step``, per component."""

    def create(
        self, shape: tuple[int, int], sigma: Tensor, keep: float, *, storage: Storage, kept: Tensor | None = None
    ) -> CutoffMask:
        """Return a mask whose cutoff costs ``keep``; arguments as in ``MaskMethod.create``."""
        rank, top = self.stored_rank(shape, storage), storage.rank_at(shape, self.top) / storage.rank_at(shape, 1.0)
        mask = CutoffMask(shape, rank, min(keep, 1.0), storage=storage, top=top, slope=0.0)
        mask.slope.fill_(self.slope_at(mask, 0))
        return mask

    def advance(self, masks: ModelMasks, step: int, budget: Budget) -> None:
        """Set the slopes of ``step``, and put cutoffs that have left their range back."""
        with torch.no_grad():
            for mask in _cutoffs(masks):
                mask.slope.fill_(self.slope_at(mask, step))
                mask.level.clamp_(0.0, mask.top)

    def finalise(self, masks: ModelMasks, budget: Budget) -> RankPlan:
        """Return the plan of the cutoffs: ratios from 1 become dense, one common factor scales all other ranks."""
        requested = {}
        for name, mask in zip(masks, _cutoffs(masks), strict=True):
            cutoff = mask.cutoff().clamp(min=0.0).item()
            requested[name] = math.inf if mask.ratio().item() >= self.dense_from else cutoff
        return budget.fit(requested, method=self.name)


def _cutoffs(masks: Mapping[str, Mask]) -> list[CutoffMask]:
    found = [mask for mask in masks.values() if isinstance(mask, CutoffMask)]
    assert len(found) == len(masks)
    return found
