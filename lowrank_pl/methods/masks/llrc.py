"""LLRC: one learned logit for every singular value, any subset of which may stay."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lowrank_pl.methods.masks.base import Mask, ModelMasks, dense_sizes, of_each, stacks
from lowrank_pl.methods.masks.gumbel import (
    GumbelMask,
    GumbelMethod,
    Noise,
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
    log_budget_penalty,
    total_variation,
)
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import Storage
from lowrank_pl.utils.checks import check_choices, check_counts, check_numbers

__all__ = ["LLRC", "LLRCMask"]

_log = logging.getLogger(__name__)

Cycle = Literal["cosine", "triangular"]

Pressure = Literal["layers", "log_ratio", "logits"]
"""What the pressure lowers: the mean over layers of their mean logits, log(size / target), or all logits' mean."""

REACH = 10
"""How many temperatures from 0 a logit may lie for its gate to have a slope; a sigmoid's is below 5e-5 beyond 10."""

MOST_GROWTH = 1e6
"""The pressure grows no further than by this factor, so that no weight becomes infinite."""

NOISE_REACH = 1.5
"""How far noise brings a logit towards 0 often enough to learn from: 1 % of Gumbel draws lie below -1.5."""


class LLRCMask(GumbelMask):
    """One learnable logit for each component of one module.

    Args:
        shape: ``(out, in)`` of the module.
        logits: ``[rank]`` to start from.
        storage: As in ``GumbelMask``.
        temperature: Temperature of the sigmoid.
        any_k: As in ``GumbelMask``.
        noisy_count: Whether ``ratio`` counts the components that are on under the noise of the step.
    """

    own: ClassVar[tuple[str, ...]] = ("logits", "noise")

    def __init__(
        self,
        shape: tuple[int, int],
        logits: Tensor,
        *,
        storage: Storage,
        temperature: float,
        any_k: bool,
        noisy_count: bool = False,
    ) -> None:
        super().__init__(shape, len(logits), storage=storage, temperature=temperature, any_k=any_k)
        self.noisy_count = noisy_count
        self.logits = nn.Parameter(logits.float())

    def gate_logits(self) -> Tensor:
        """Return the learnable logits ``[rank]``."""
        return self.logits

    def ratio(self) -> Tensor:
        """Return the parameters of the components that are on over the dense weight's, a scalar.

        The value is that of the hard count, without noise or, with ``noisy_count``, under the noise of the step. The
        gradient is that of the soft count.
        """
        return self.storage.ratio(self.shape, self().sum(-1)) if self.noisy_count else super().ratio()


class Progress(nn.Module):
    """The step at which the whole model first met its budget; -1 before that."""

    reached: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("reached", torch.tensor(-1))


class LLRC(GumbelMethod):
    """Learning to Low-Rank Compress (LLRC, arXiv 2512.13733): a binary gate with noise for every singular value.

    Masks gate full-rank factors and start with every component on. A pressure turns components off. Its weight
    oscillates; it is 0 once the hard count exceeds the target by ``tolerance`` at most. A module never computes densely
    while it learns. The paper gives neither the bounds and period of this weight nor the weight of the total variation.

    The authors' code counts the components that are on under the noise of the step, and exports a prefix of as many
    components (``noisy_count``, ``export_prefix``). By default this class counts without noise, because no noise is
    left in the plan, and exports the components themselves, because they are what was learned.

    Args:
        temperature: Temperature of the sigmoids.
        noise: ``gumbel``; ``logistic``, the difference of two Gumbel draws, whose mean is 0; or ``none``.
        start_high: Logit of the largest singular value at the start.
        start_low: Logit of the smallest one; all others lie on a line between both. Components that a plan to start
            from drops get the same logits, negated and in reverse.
        any_k: Keep any subset of the components, or else as many of the first ones, also while learning.
        export_prefix: Learn any subset, but let the plan keep as many of the first components.
        noisy_count: Count the size under the noise of the step.
        pressure: ``layers``, the mean over all layers of their mean logits: a layer has the same weight whatever its
            width; ``log_ratio``, the logarithm of the size over the target, which acts through the slope of the gates
            and so on logits near 0 alone; or ``logits``, the mean of all logits, where narrow layers (keys and values
            of grouped-query attention) weigh less. The authors' code has the first two.
        pressure_low: Least weight of the pressure.
        pressure_high: Greatest weight of the pressure.
        pressure_growth: Factor of both weights from one cycle to the next until the size is first met; the paper has
            none. Where noise in the gradients holds the logits up against the pressure, it grows until they fall, to a
            million times at most.
        period: Steps of one cycle of this weight, which starts at the least.
        cycle: ``cosine`` or ``triangular``.
        tolerance: Distance above the target fraction at which the pressure ends.
        variation_weight: Weight of the total variation of the gates, which is averaged over all pairs of neighbours, so
            that one weight serves any width.
        budget_weight: Weight of ARA's budget penalty, which can also turn components on again; the paper has none.
        patience: Steps from reaching the budget to the end of learning; ``None`` leaves the end to the Trainer.
        seed: Seed of the noise.

    Raises:
        ValueError: A setting outside its range; or a pressure of ``log_ratio`` on logits that start so far above 0 that
            it has no gradient.
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
        export_prefix: bool = False,
        noisy_count: bool = False,
        pressure: Pressure = "logits",
        pressure_low: float = 0.5,
        pressure_high: float = 1.5,
        pressure_growth: float = 1.0,
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
            "pressure_high": (pressure_high, pressure_low), "pressure_growth": (pressure_growth, 1),
            "tolerance": (tolerance, 0), "variation_weight": (variation_weight, 0),
            "budget_weight": (budget_weight, 0),
        })  # fmt: skip
        check_counts({"period": period})
        check_counts({"patience": patience}, least=0)
        check_choices({"noise": (noise, Noise), "cycle": (cycle, Cycle), "pressure": (pressure, Pressure)})
        reach = REACH * temperature + (NOISE_REACH if noisy_count and noise != "none" else 0)
        if pressure == "log_ratio" and start_low > reach:
            raise ValueError(
                f"pressure log_ratio acts through the slope of the gates, which ends at logits of {reach:g} here, but "
                f"start_low is {start_low:g}: lower it, or choose the pressure layers"
            )
        self.temperature, self.noise = temperature, noise
        self.start_high, self.start_low, self.any_k = start_high, start_low, any_k
        self.export_prefix, self.noisy_count, self.pressure = export_prefix, noisy_count, pressure
        self.pressure_low, self.pressure_high, self.period, self.cycle = pressure_low, pressure_high, period, cycle
        self.pressure_growth = pressure_growth
        self.tolerance, self.variation_weight, self.budget_weight = tolerance, variation_weight, budget_weight
        self.patience, self.seed = patience, seed

    @property
    def plans_any_k(self) -> bool:
        """Whether its plans may keep components that are not the first ones."""
        return self.any_k and not self.export_prefix

    def create(
        self, shape: tuple[int, int], sigma: Tensor, keep: float, *, storage: Storage, kept: Tensor | None = None
    ) -> LLRCMask:
        """Return a mask with the components of the start on and all others off; arguments as in ``MaskMethod``."""
        rank = self.stored_rank(shape, storage)
        on = chosen_at_start(shape, rank, keep, kept, storage=storage)
        slope = torch.linspace(self.start_high, self.start_low, rank)
        logits = torch.where(on, slope, -slope.flip(0))
        return LLRCMask(
            shape, logits, storage=storage, temperature=self.temperature, any_k=self.any_k, noisy_count=self.noisy_count
        )

    def shared_module(self, masks: Mapping[str, Mask]) -> Progress:
        """Return the record of when the budget was met."""
        return Progress()

    def advance(self, masks: ModelMasks, step: int, budget: Budget) -> None:
        """Draw the noise of ``step``."""
        draw_noise(masks, kind=self.noise, seed=self.seed, step=step)

    def pressure_weight(self, step: int, reached: int = -1) -> float:
        """Return the weight of the pressure at ``step`` while the size is above the target.

        Args:
            step: Optimizer steps done.
            reached: The step at which the size was first met; -1 before that.
        """
        weight = cyclical_weight(
            step, low=self.pressure_low, high=self.pressure_high, period=self.period, cycle=self.cycle
        )
        cycles = (step if reached < 0 else min(step, reached)) // self.period
        return weight * math.exp(min(cycles * math.log(self.pressure_growth), math.log(MOST_GROWTH)))

    def penalties(self, masks: ModelMasks, ratios: Tensor, keep: float, step: int) -> dict[str, Tensor]:
        """Return ``pressure`` and ``variation``, and ``budget`` where it has a weight, each weighted."""
        sizes = dense_sizes(masks, ratios)
        kept = kept_fractions(ratios)
        short = (kept_share(kept.detach(), sizes) > keep + self.tolerance).to(ratios.dtype)
        if self.pressure == "log_ratio":
            pressure = log_budget_penalty(kept, sizes, keep)
        else:
            logits = [mask.gate_logits() for mask in gumbel_masks(masks)]
            layers = of_each(masks, lambda mask: mask.gate_logits().mean(-1)) if self.pressure == "layers" else None
            pressure = (torch.cat(logits) if layers is None else layers).mean()
        reached = -1 if self.pressure_growth == 1 else int(_progress(masks).reached)
        terms = {"pressure": self.pressure_weight(step, reached) * short * pressure}
        if self.variation_weight:
            terms["variation"] = self.variation_weight * total_variation([mask() for _, mask in stacks(masks)])
        if self.budget_weight:
            terms["budget"] = self.budget_weight * budget_penalty(kept, sizes, keep)
        return terms

    def finished(self, masks: ModelMasks, budget: Budget, step: int) -> bool:
        """Tell whether ``patience`` steps have passed since the budget was met for the first time."""
        progress = _progress(masks)
        reached = int(progress.reached)
        if reached < 0:
            ratios = of_each(masks, lambda mask: mask.ratio().detach())
            if kept_share(kept_fractions(ratios), dense_sizes(masks, ratios)).item() > budget.share + self.tolerance:
                return False
            progress.reached.fill_(step)
            reached = step
            _log.info("%s: the masks meet their size for the first time after %d steps", self.name, step)
        return self.patience is not None and step - reached >= self.patience

    def finalise(self, masks: ModelMasks, budget: Budget) -> RankPlan:
        """Return the plan of the highest logits; noise has no part in it."""
        return select_by_logits(masks, budget, any_k=self.plans_any_k, method=self.name)


def _progress(masks: ModelMasks) -> Progress:
    assert isinstance(masks.shared, Progress)
    return masks.shared
