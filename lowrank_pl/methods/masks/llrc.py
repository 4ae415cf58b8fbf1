"""LLRC: one learned logit for every singular value, any subset of which may stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lowrank_pl.methods.masks.base import Mask, ModelMasks, check_numbers, dense_sizes
from lowrank_pl.methods.masks.gumbel import (
    GumbelMask,
    GumbelMethod,
    Noise,
    check_noise,
    chosen_at_start,
    draw_noise,
    gumbel_masks,
    select_by_logits,
)
from lowrank_pl.methods.masks.objectives import (
    budget_penalty,
    cyclical_weight,
    kept_fractions,
    kept_share,
    total_variation,
)
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import Storage

__all__ = ["LLRC", "LLRCMask"]

Cycle = Literal["cosine", "triangular"]


class LLRCMask(GumbelMask):
    """One learnable logit for each component of one module.

    Args:
        shape: ``(out, in)`` of the module.
        logits: ``[rank]`` to start from.
        storage: As in ``GumbelMask``.
        temperature: Temperature of the sigmoid.
        any_k: As in ``GumbelMask``.
    """

    def __init__(
        self, shape: tuple[int, int], logits: Tensor, *, storage: Storage, temperature: float, any_k: bool
    ) -> None:
        super().__init__(shape, len(logits), storage=storage, temperature=temperature, any_k=any_k)
        self.logits = nn.Parameter(logits.float())

    def gate_logits(self) -> Tensor:
        """Return the learnable logits ``[rank]``."""
        return self.logits


class Progress(nn.Module):
    """The step at which the whole model first met its budget; -1 before that."""

    reached: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("reached", torch.tensor(-1))


class LLRC(GumbelMethod):
    """Learning to Low-Rank Compress (LLRC, arXiv 2512.13733): a binary gate with noise for every singular value.

    Masks gate full-rank factors and start with every component on. The mean of all logits is a pressure that turns
    components off. Its weight oscillates; it is 0 once the hard count exceeds the target by ``tolerance`` at most. A
    module never computes densely while it learns. The paper gives neither the bounds and period of this weight nor the
    weight of the total variation.

    Args:
        temperature: Temperature of the sigmoids.
        noise: ``gumbel``; ``logistic``, the difference of two Gumbel draws, whose mean is 0; or ``none``.
        start_high: Logit of the largest singular value at the start.
        start_low: Logit of the smallest one; all others lie on a line between both. Components that a plan to start
            from drops get the same logits, negated and in reverse.
        any_k: Keep any subset of the components, or else as many of the first ones.
        pressure_low: Least weight of the mean of the logits.
        pressure_high: Greatest weight of the mean of the logits.
        period: Steps of one cycle of this weight, which starts at the least.
        cycle: ``cosine`` or ``triangular``.
        tolerance: Distance above the target fraction at which the pressure ends.
        variation_weight: Weight of the total variation of the gates, which is averaged over all pairs of neighbours, so
            that one weight serves any width.
        budget_weight: Weight of ARA's budget penalty, which can also turn components on again; the paper has none.
        patience: Steps from reaching the budget to the end of learning; ``None`` leaves the end to the Trainer.
        seed: Seed of the noise.

    Raises:
        ValueError: A setting outside its range.
    """

    name: ClassVar[str] = "llrc"
    paper: ClassVar[str | None] = "2512.13733"

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        noise: Noise = "gumbel",
        start_high: float = 6.0,
        start_low: float = 3.0,
        any_k: bool = True,
        pressure_low: float = 0.5,
        pressure_high: float = 1.5,
        period: int = 200,
        cycle: Cycle = "cosine",
        tolerance: float = 0.002,
        variation_weight: float = 0.01,
        budget_weight: float = 0.0,
        patience: int | None = 750,
        seed: int = 0,
    ) -> None:
        check_numbers({"temperature": (temperature, 0), "start_low": (start_low, 0)}, above=True)
        check_numbers({
            "start_high": (start_high, start_low), "pressure_low": (pressure_low, 0),
            "pressure_high": (pressure_high, pressure_low), "period": (period, 1), "tolerance": (tolerance, 0),
            "variation_weight": (variation_weight, 0), "budget_weight": (budget_weight, 0),
            "patience": (patience or 0, 0),
        })  # fmt: skip
        check_noise(noise)
        if cycle not in get_args(Cycle):
            raise ValueError(f"cycle is {cycle!r}: expected one of {', '.join(get_args(Cycle))}")
        self.temperature, self.noise = temperature, noise
        self.start_high, self.start_low, self.any_k = start_high, start_low, any_k
        self.pressure_low, self.pressure_high, self.period, self.cycle = pressure_low, pressure_high, period, cycle
        self.tolerance, self.variation_weight, self.budget_weight = tolerance, variation_weight, budget_weight
        self.patience, self.seed = patience, seed

    def create(
        self, shape: tuple[int, int], sigma: Tensor, keep: float, *, storage: Storage, kept: Tensor | None = None
    ) -> LLRCMask:
        """Return a mask with the components of the start on and all others off; arguments as in ``MaskMethod``."""
        rank = self.stored_rank(shape, storage)
        on = chosen_at_start(shape, rank, keep, kept, storage=storage)
        slope = torch.linspace(self.start_high, self.start_low, rank)
        logits = torch.where(on, slope, -slope.flip(0))
        return LLRCMask(shape, logits, storage=storage, temperature=self.temperature, any_k=self.any_k)

    def shared_module(self, masks: Mapping[str, Mask]) -> Progress:
        """Return the record of when the budget was met."""
        return Progress()

    def advance(self, masks: ModelMasks, step: int, budget: Budget) -> None:
        """Draw the noise of ``step``."""
        draw_noise(masks, kind=self.noise, seed=self.seed, step=step)

    def pressure_weight(self, step: int) -> float:
        """Return the weight of the pressure at ``step`` while the target is not reached."""
        return cyclical_weight(
            step, low=self.pressure_low, high=self.pressure_high, period=self.period, cycle=self.cycle
        )

    def penalties(self, masks: ModelMasks, ratios: Tensor, keep: float, step: int) -> dict[str, Tensor]:
        """Return ``pressure`` and ``variation``, and ``budget`` where it has a weight, each weighted."""
        sizes = dense_sizes(masks, ratios)
        kept = kept_fractions(ratios)
        short = (kept_share(kept.detach(), sizes) > keep + self.tolerance).to(ratios.dtype)
        logits = torch.cat([mask.gate_logits() for mask in gumbel_masks(masks)])
        terms = {"pressure": self.pressure_weight(step) * short * logits.mean()}
        if self.variation_weight:
            terms["variation"] = self.variation_weight * total_variation([mask() for mask in masks.values()])
        if self.budget_weight:
            terms["budget"] = self.budget_weight * budget_penalty(kept, sizes, keep)
        return terms

    def finished(self, masks: ModelMasks, budget: Budget, step: int) -> bool:
        """Tell whether ``patience`` steps have passed since the budget was met for the first time."""
        if self.patience is None:
            return False
        progress = masks.shared
        assert isinstance(progress, Progress)
        reached = int(progress.reached)
        if reached < 0:
            ratios = torch.stack([mask.ratio().detach() for mask in masks.values()])
            if kept_share(kept_fractions(ratios), dense_sizes(masks, ratios)).item() > budget.share + self.tolerance:
                return False
            progress.reached.fill_(step)
            reached = step
        return step - reached >= self.patience

    def finalise(self, masks: ModelMasks, budget: Budget) -> RankPlan:
        """Return the plan of the highest logits; noise has no part in it."""
        return select_by_logits(masks, budget, any_k=self.any_k, method=self.name)
