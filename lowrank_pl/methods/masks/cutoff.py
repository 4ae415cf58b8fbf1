"""Masks with one number a module: the place in the spectrum from which components fade out."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank_pl.methods.masks.base import Mask, MaskMethod, check_numbers, dense_sizes, gated_rank
from lowrank_pl.methods.masks.objectives import budget_penalty, kept_fractions
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import Storage

__all__ = ["CutoffMask", "CutoffMethod", "DobiSVD", "Fermi"]


class CutoffMask(Mask):
    """A smooth step ``sigmoid(slope * (cutoff - position))`` over the components of one module.

    The learnable number is the cutoff over the rank that costs what the dense weight does, ``mn / (m + n)`` for
    factors: of these it is the module's parameter ratio, and an optimizer step of 0.01 moves any module by one percent
    of its dense size. Component ``j``, from 0, lies at position ``j + 1/2``, so that the gates of a spectrum that
    reaches far enough sum up to the cutoff.

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that it gates.
        keep: Ratio that it starts at.
        prices: What ranks cost in the finished model.
        top: The largest level; the cutoff stays in reach of the components.
        slope: Steepness at the cutoff, per component.
    """

    positions: Tensor
    slope: Tensor

    def __init__(
        self, shape: tuple[int, int], rank: int, keep: float, *, prices: Storage, top: float, slope: float
    ) -> None:
        super().__init__(shape, rank, prices)
        self.even = prices.rank_at(shape, 1.0)
        self.top = top
        self.level = nn.Parameter(torch.tensor(prices.rank_at(shape, keep) / self.even))
        self.register_buffer("positions", torch.arange(rank) + 0.5, persistent=False)
        self.register_buffer("slope", torch.tensor(float(slope)), persistent=False)

    def cutoff(self) -> Tensor:
        """Return the cutoff in components, a scalar."""
        return self.level * self.even

    def ratio(self) -> Tensor:
        """Return the parameters up to the cutoff as a fraction of the dense weight's, a scalar."""
        return self.prices.ratio(self.shape, self.cutoff())

    def forward(self) -> Tensor:
        """Return the soft gate ``[rank]``, falling from left to right; its gradient is its own."""
        return (self.slope * (self.cutoff() - self.positions)).sigmoid()

    def kept(self) -> Tensor:
        """Return which components lie below the cutoff, bool ``[rank]``."""
        return self.positions < self.cutoff().detach()


class CutoffMethod(MaskMethod):
    """What the masks of one cutoff a module have in common; ``DobiSVD`` and ``Fermi`` differ in the slope of the step.

    ARA's budget penalty holds the cutoffs to the aim. Its gradient reaches modules that compute densely too, so that
    they come back when the budget asks for it. After every step cutoffs are put back between 0 and ``top``.

    Args:
        top: Parameters of the gated components over those of the dense weight; above 1 so that dense is in reach.
        budget_weight: Weight of the squared distance of kept parameters from the budget.

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

    def stored_rank(self, shape: tuple[int, int], prices: Storage) -> int:
        """Return how many components cost ``top`` times the dense weight, as ``gated_rank`` counts them."""
        return gated_rank(shape, self.top, prices)

    def create(
        self, shape: tuple[int, int], sigma: Tensor, keep: float, *, prices: Storage, kept: Tensor | None = None
    ) -> CutoffMask:
        """Return a mask whose cutoff stands for ``keep``; arguments as in ``MaskMethod.create``."""
        rank, top = self.stored_rank(shape, prices), prices.rank_at(shape, self.top) / prices.rank_at(shape, 1.0)
        mask = CutoffMask(shape, rank, min(keep, 1.0), prices=prices, top=top, slope=0.0)
        mask.slope.fill_(self.slope_at(mask, 0))
        return mask

    def advance(self, masks: Mapping[str, Mask], step: int, budget: Budget) -> None:
        """Set the slopes of ``step`` and put cutoffs that have left their range back."""
        with torch.no_grad():
            for mask in _cutoffs(masks):
                mask.slope.fill_(self.slope_at(mask, step))
                mask.level.clamp_(0.0, mask.top)

    def penalties(self, masks: Mapping[str, Mask], ratios: Tensor, keep: float, step: int) -> dict[str, Tensor]:
        """Return ``budget``, weighted; arguments as in ``MaskMethod.penalties``."""
        return {"budget": self.budget_weight * budget_penalty(kept_fractions(ratios), dense_sizes(masks, ratios), keep)}

    def finalise(self, masks: Mapping[str, Mask], budget: Budget) -> RankPlan:
        """Return the plan of the cutoffs: ratios from 1 become dense, the rest share one factor."""
        wishes = {}
        for name, mask in zip(masks, _cutoffs(masks), strict=True):
            cutoff = max(0.0, mask.cutoff().item())
            wishes[name] = math.inf if mask.ratio().item() >= self.dense_from else cutoff
        return budget.fit(wishes, method=self.name)


class DobiSVD(CutoffMethod):
    """Dobi-SVD's gate (arXiv 2502.02723), on weights: ``tanh(steepness * (cutoff - j)) / 2 + 1/2``.

    Args:
        steepness: Called beta in the paper, per component whatever the rank: about one component on each side of the
            cutoff feels the loss at the paper's 10.
        top: As in ``CutoffMethod``.
        budget_weight: As in ``CutoffMethod``.

    Raises:
        ValueError: A setting outside its range.
    """

    name = "tanh"

    def __init__(self, *, steepness: float = 10.0, top: float = 1.2, budget_weight: float = 100.0) -> None:
        super().__init__(top=top, budget_weight=budget_weight)
        check_numbers({"steepness": (steepness, 0)}, above=True)
        self.steepness = steepness

    def slope_at(self, mask: CutoffMask, step: int) -> float:
        """Return twice the steepness: ``tanh(x) / 2 + 1/2`` is ``sigmoid(2 x)``."""
        return 2 * self.steepness


class Fermi(CutoffMethod):
    """Fermi-Dirac gates (arXiv 2512.03062): ``1 / (1 + exp((j - cutoff) / T))`` with a temperature that falls.

    The temperature goes geometrically from ``temperature_start`` to ``temperature_end`` over ``anneal_steps`` and then
    stays: first the loss moves the cutoff by what lies far around it, in the end the gate is a hard step. The course
    is ours; the paper's is not public.

    Args:
        temperature_start: At step 0.
        temperature_end: From ``anneal_steps`` on.
        anneal_steps: Optimizer steps between them; 0 has the last temperature from the start.
        relative: Count temperatures in break-even ranks of each module instead of components.
        top: As in ``CutoffMethod``.
        budget_weight: As in ``CutoffMethod``.

    Raises:
        ValueError: A setting outside its range, or a temperature that rises.
    """

    name = "fermi"

    def __init__(
        self,
        *,
        temperature_start: float = 0.1,
        temperature_end: float = 0.002,
        anneal_steps: int = 1000,
        relative: bool = True,
        top: float = 1.2,
        budget_weight: float = 100.0,
    ) -> None:
        super().__init__(top=top, budget_weight=budget_weight)
        check_numbers({"temperature_end": (temperature_end, 0)}, above=True)
        check_numbers({"temperature_start": (temperature_start, temperature_end), "anneal_steps": (anneal_steps, 0)})
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.anneal_steps, self.relative = anneal_steps, relative

    def temperature_at(self, step: int) -> float:
        """Return the temperature at ``step``."""
        done = min(1.0, step / self.anneal_steps) if self.anneal_steps else 1.0
        return float(self.temperature_start * (self.temperature_end / self.temperature_start) ** done)

    def slope_at(self, mask: CutoffMask, step: int) -> float:
        """Return the inverse of the temperature in components."""
        return 1 / (self.temperature_at(step) * (mask.even if self.relative else 1.0))


def _cutoffs(masks: Mapping[str, Mask]) -> list[CutoffMask]:
    found = [mask for mask in masks.values() if isinstance(mask, CutoffMask)]
    assert len(found) == len(masks)
    return found
