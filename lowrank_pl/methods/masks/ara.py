"""ARA: each module's mask is a mixture of prefix lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank_pl.methods.masks.base import Mask, MaskMethod, ModelMasks, dense_sizes
from lowrank_pl.methods.masks.objectives import budget_penalty, guidance_penalty
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import Storage

__all__ = ["ARA", "ARAMask"]

_DENSE_FROM = 0.99
"""Ratio from which a module of the finished plan is dense, as in the paper."""


class ARAMask(Mask):
    """A probability distribution over ``steps + 1`` prefix lengths of one module's components.

    Candidate ``i`` keeps the first ``int(span * (steps - i) / steps)`` components, of which the mask gates ``rank``.
    With ``alpha = softmax(logits)``, the expected gate ``p`` falls from left to right, and every logit gets a gradient
    from the whole spectrum. The forward value is the hard prefix of the expected length, the gradient that of ``p``
    (straight through).

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that the mask gates.
        sigma: All singular values of the module, descending, for the error table.
        start: Fraction of the longest candidate to start from.
        storage: How the finished module is stored.
        steps: Candidates less one, 100 in the paper.
        longest: Real number of components that the longest candidate is charged for; ``span`` is its whole part.
    """

    own: ClassVar[tuple[str, ...]] = ("logits",)

    rungs: Tensor
    candidates: Tensor
    error: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        rank: int,
        sigma: Tensor,
        start: float,
        *,
        storage: Storage,
        steps: int = 100,
        longest: float,
    ) -> None:
        super().__init__(shape, rank, storage)
        self.longest = longest
        self.span = _span(longest)
        lengths = torch.tensor([self.span * (steps - i) // steps for i in range(steps + 1)])
        candidates = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
        self.logits = nn.Parameter(_starting_logits(candidates, start).float())
        # Position j (from 0) is on under the candidates whose length exceeds j. These come first, so their joint
        # probability is one entry of the cumulative sum, which replaces the (steps + 1) x rank staircase matrix.
        rungs = torch.searchsorted(-lengths, -torch.arange(rank), side="left") - 1
        self.register_buffer("rungs", rungs, persistent=False)
        self.register_buffer("candidates", candidates.float(), persistent=False)
        self.register_buffer("error", _relative_errors(shape, sigma, storage).float(), persistent=False)

    def probabilities(self) -> Tensor:
        """Return the expected gate ``[rank]``, non-increasing."""
        return self.logits.softmax(-1).cumsum(-1)[..., self.rungs]

    def fraction(self) -> Tensor:
        """Return the expected length over that of the longest candidate, a scalar in [0, 1]."""
        return (self.logits.softmax(-1) * self.candidates).sum(-1)

    def ratio(self) -> Tensor:
        """Return the parameters of the prefix of expected length as a fraction of the dense weight's, a scalar."""
        return self.storage.ratio(self.shape, self.longest * self.fraction())

    def forward(self) -> Tensor:
        """Return the hard prefix ``[rank]`` with the gradient of the expected gate."""
        expected = self.probabilities()
        return self.kept().to(expected.dtype) + (expected - expected.detach())

    def soft(self) -> Tensor:
        """Return the expected gate ``[rank]``."""
        return self.probabilities()

    def active(self) -> Tensor:
        """Return the prefix of the expected length, bool ``[rank]``."""
        return self.kept()

    def kept(self) -> Tensor:
        """Return the prefix of the expected length, bool ``[rank]``."""
        length = (self.span * self.fraction().detach()).round()
        return torch.arange(self.rank, device=length.device) < length[..., None]


class ARA(MaskMethod):
    """Adaptive Rank Allocation (ARA, arXiv 2510.19389): staircase masks, a budget penalty and a guidance loss.

    Args:
        steps: Candidate lengths of each module less one.
        top: Parameters of the gated components over those of the dense weight; above 1, so that a module can be dense.
        budget_weight: Weight of the squared distance of the kept parameters from the budget.
        guidance_weight: Weight of the pull to dense for modules that keep a larger share of parameters than of norm.

    Raises:
        ValueError: ``steps`` below 2, or ``top`` not above 1.
    """

    name: ClassVar[str] = "ara"
    paper: ClassVar[str | None] = "2510.19389"
    skips_inactive = True

    def __init__(
        self, *, steps: int = 100, top: float = 1.2, budget_weight: float = 100.0, guidance_weight: float = 50.0
    ) -> None:
        if steps < 2:
            raise ValueError(f"steps is {steps}: expected at least 2, which gives 2 candidate lengths besides 0")
        if not top > 1:
            raise ValueError(f"top is {top}: expected a number above 1, or no module could ever be dense")
        self.steps = steps
        self.top = top
        self.budget_weight = budget_weight
        self.guidance_weight = guidance_weight

    def create(
        self, shape: tuple[int, int], sigma: Tensor, keep: float, *, storage: Storage, kept: Tensor | None = None
    ) -> ARAMask:
        """Return a mask with an expected ratio of ``keep``; with ``kept``, its prefix has exactly that many components.

        Arguments as in ``MaskMethod.create``.
        """
        rank, longest = self.stored_rank(shape, storage), storage.rank_at(shape, self.top)
        # A plan to start from may hold ranks that cost more than dense.
        start = storage.rank_at(shape, min(keep, 1.0)) / longest
        if kept is not None and keep < 1:
            # The length is rounded down and `longest` is not, so the prefix could be one component too long or short.
            low, high = ((len(kept) + off) / _span(longest) for off in (-0.49, 0.49))
            start = min(max(start, low), high)
        return ARAMask(shape, rank, sigma, start, storage=storage, steps=self.steps, longest=longest)

    def penalties(self, masks: ModelMasks, ratios: Tensor, keep: float, step: int) -> dict[str, Tensor]:
        """Return ``budget`` and ``guidance``, weighted; arguments as in ``MaskMethod.penalties``."""
        kept = ratios.clamp(max=1.0)
        errors = errors_at(list(_staircases(masks)), kept)
        return {
            "budget": self.budget_weight * budget_penalty(kept, dense_sizes(masks, ratios), keep),
            "guidance": self.guidance_weight * guidance_penalty(kept, errors),
        }

    def finalise(self, masks: ModelMasks, budget: Budget) -> RankPlan:
        """Return the plan of expected lengths: ratios from 0.99 become dense, one common factor scales all others."""
        requested = {}
        with torch.no_grad():
            for name, mask in zip(masks, _staircases(masks), strict=True):
                dense = mask.ratio().item() >= _DENSE_FROM
                requested[name] = math.inf if dense else mask.fraction().item() * mask.span
        return budget.fit(requested, method=self.name)


def errors_at(masks: Sequence[ARAMask], ratios: Tensor) -> Tensor:
    """Return the share of each spectrum's norm that is lost at ``ratios`` ``[masks]``, from the tables."""
    places = (ratios.detach() * 100).round().long().clamp(1, 99) - 1
    return torch.stack([mask.error for mask in masks]).gather(1, places[:, None]).squeeze(1)


def _span(longest: float) -> int:
    """Return the whole components of the longest candidate, at least one."""
    return max(1, int(longest))


def _staircases(masks: Mapping[str, Mask]) -> list[ARAMask]:
    found = [mask for mask in masks.values() if isinstance(mask, ARAMask)]
    assert len(found) == len(masks)
    return found


def _starting_logits(candidates: Tensor, fraction: float) -> Tensor:
    """Return logits of one value ``d`` for candidates of at least ``fraction`` and 0 below, with mean ``fraction``.

    The equation is linear in ``exp(d)``. At the ends of the range no finite ``d`` solves it; the clamp then leaves the
    mask within a thousandth of the requested start.
    """
    upper = candidates >= fraction - 1e-12
    high, low = candidates[upper], candidates[~upper]
    gain = (fraction * len(low) - low.sum()).clamp_min(1e-3) / (high.sum() - fraction * len(high)).clamp_min(1e-3)
    return torch.where(upper, gain.log(), torch.zeros((), dtype=candidates.dtype))


def _relative_errors(shape: tuple[int, int], sigma: Tensor, storage: Storage) -> Tensor:
    """Return the lost share of the spectrum's norm at kept fractions .01, .02, ... .99, ``[99]``.

    Entry ``s`` is ``sqrt(sum(sigma[k:] ** 2) / sum(sigma ** 2))`` with the whole rank ``k`` that ``s`` pays for:
    ``int(s * mn / (m + n))`` for two factors.

    Args:
        shape: ``(out, in)`` of the module.
        sigma: All its singular values, descending.
        storage: How the finished module is stored.
    """
    energy = sigma.double().square()
    tail = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    paid = [int(storage.rank_at(shape, percent / 100) + 1e-9) for percent in range(1, 100)]
    ranks = torch.tensor([min(rank, len(energy)) for rank in paid])
    return (tail[ranks] / tail[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
