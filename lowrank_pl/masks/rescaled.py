"""Ranks that minimise a predicted loss of which every module's share is rescaled by what the true loss says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lowrank_pl.budget import Budget
from lowrank_pl.hull import hull_slopes
from lowrank_pl.masks.base import Mask, MaskMethod, check_numbers
from lowrank_pl.plan import RankPlan

__all__ = ["Rescaled", "RescaledMask"]


class RescaledMask(Mask):
    """A hard prefix whose length follows from the scales of all modules, and the loss's slope around its end.

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that it gates.
        slopes: ``[min(out, in)]`` predicted loss a parameter at which each component is given up.
        width: Components on each side of the end over which the slope is averaged, as a fraction of the length.
    """

    slopes: Tensor

    def __init__(self, shape: tuple[int, int], rank: int, slopes: Tensor, *, width: float) -> None:
        super().__init__(shape, rank)
        self.width = width
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("slopes", slopes.float(), persistent=False)
        self.length: int | None = rank
        self.foreseen = self.charged = 0.0
        self.remembered: tuple[Balance, ...] = ()

    def scores(self) -> Tensor:
        """Return the rescaled slopes ``[min(out, in)]``."""
        return self.log_scale.detach().exp() * self.slopes

    def predicted(self) -> float:
        """Return the rescaled loss that the next component is predicted to save; 0 when dense."""
        if self.length is None:
            return 0.0
        return float(self.scores()[min(self.length, len(self.slopes) - 1)]) * sum(self.shape)

    def forward(self) -> Tensor:
        """Return the hard prefix ``[rank]``; the scale gets the mean gradient of the gates around its end.

        With a loss that is quadratic in the gates, the slope at a gate of 1 is nothing and at 0 twice what the
        component is worth: their mean over both sides is what moving the end by one component is worth.
        """
        length = self.rank if self.length is None else self.length
        positions = torch.arange(self.rank, device=self.slopes.device)
        near = max(3, math.ceil(self.width * length))
        inside = ((positions >= length - near) & (positions < length + near)).float()
        soft = self.log_scale * inside / inside.sum().clamp_min(1)
        return (positions < length).float() + (soft - soft.detach())

    def ratio(self) -> Tensor:
        """Return the parameters of the prefix over the dense weight's, 1 when dense; constant in the scale."""
        return torch.tensor(1.0 if self.length is None else self.length * self.price, device=self.slopes.device)

    def kept(self) -> Tensor:
        """Return which components the prefix has, bool ``[rank]``."""
        length = self.rank if self.length is None else self.length
        return torch.arange(self.rank, device=self.slopes.device) < length


class Balance(nn.Module):
    """Sums of measured and of predicted savings over all modules and steps, and the last step that they include."""

    measured: Tensor
    predicted: Tensor
    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("measured", "predicted"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_buffer("counted", torch.tensor(0))

    def ratio(self) -> float:
        """Return by how much more a component saves than was predicted, on average; 1 before anything is known."""
        ratio = (self.measured / self.predicted).item() if self.predicted > 0 else 1.0
        return ratio if ratio > 0 else 1.0


class Rescaled(MaskMethod):
    """Learned scales of the losses that the ``fisher`` allocator adds up (ours): one number a module.

    The allocation minimises ``sum(exp(scale) * predicted loss)`` at the budget exactly, every step anew, from the
    plan of ``fisher`` on. The quadratic prediction knows nothing of how modules disturb each other; the gradient of the
    true loss, taken where each module's prefix ends in the compressed model, does. A scale rises where a component
    saves more than predicted, compared with the average module, and rests where the ratio is the average one: there
    all modules give up their last component at the same price a parameter, which no allocation can improve to first
    order. Modules that are dense have no end to measure at, and keep their scale.

    Args:
        width: Components on each side of a prefix's end that are measured, as a fraction of its length.
        warmup: First steps, which only measure the average.
        top: Parameters of the gated components over those of the dense weight.

    Raises:
        ValueError: A width or warmup out of its range, or ``top`` not above 1.
    """

    name = "rescaled"
    kinds = ("two_sided",)
    own_start = True

    def __init__(self, *, width: float = 0.05, warmup: int = 8, top: float = 1.1) -> None:
        check_numbers({"width": (width, 0)}, above=True)
        check_numbers({"top": (top, 1)}, above=True)
        check_numbers({"warmup": (warmup, 0)})
        self.width, self.warmup, self.top = width, warmup, top

    def stored_rank(self, shape: tuple[int, int]) -> int:
        """Return ``int(top * mn / (m + n))``, at most ``min(m, n)``."""
        m, n = shape
        return max(1, min(int(self.top * m * n / (m + n)), m, n))

    def create(self, shape: tuple[int, int], sigma: Tensor, keep: float, *, kept: Tensor | None = None) -> RescaledMask:
        """Return a mask of scale 1; where its prefix ends, ``advance`` says. Arguments as in ``MaskMethod.create``."""
        alone = Budget(keep=1.0, shapes={"": shape}, model_parameters=shape[0] * shape[1])
        return RescaledMask(shape, self.stored_rank(shape), hull_slopes(alone, "", sigma), width=self.width)

    def share(self, masks: Mapping[str, Mask]) -> Balance:
        """Return the sums of what was measured and predicted."""
        balance = Balance()
        for mask in _rescaled(masks):
            mask.remembered = (balance,)  # in a tuple, so that only the learner registers it
        return balance

    def advance(self, masks: Mapping[str, Mask], step: int, budget: Budget) -> None:
        """Take in what the last step measured, and end every prefix where the rescaled allocation has it."""
        every = list(_rescaled(masks))
        balance = every[0].remembered[0] if every[0].remembered else None
        if balance is not None and step > int(balance.counted):
            for mask in every:
                _count(mask, balance)
            balance.counted.fill_(step)
            if step <= self.warmup:
                for mask in every:
                    mask.log_scale.data.zero_()
        plan = self.finalise(masks, budget)
        for mask, entry in zip(every, plan.modules.values(), strict=True):
            mask.length = entry.rank if entry.rank is None else min(entry.rank, mask.rank)

    def penalties(self, masks: Mapping[str, Mask], ratios: Tensor, keep: float, step: int) -> dict[str, Tensor]:
        """Return ``balance``, linear in the scales: its gradient is what each module saves at the average ratio."""
        every = list(_rescaled(masks))
        balance = every[0].remembered[0] if every[0].remembered else None
        average = 1.0 if balance is None else balance.ratio()
        for mask in every:
            mask.foreseen = mask.predicted()
            mask.charged = average * mask.foreseen
        return {"balance": torch.stack([mask.charged * mask.log_scale for mask in every]).sum()}

    def finalise(self, masks: Mapping[str, Mask], budget: Budget) -> RankPlan:
        """Return the plan that minimises the rescaled loss at the exact budget."""
        scores = {name: mask.scores() for name, mask in zip(masks, _rescaled(masks), strict=True)}
        scales = torch.stack([mask.log_scale.detach() for mask in _rescaled(masks)]).exp()
        note = f"predicted losses rescaled by {scales.min():.2f} to {scales.max():.2f}"
        return budget.select(scores, method=self.name, notes=[note])


def _count(mask: RescaledMask, balance: Balance) -> None:
    """Add what the gradient of the last step says of ``mask`` to ``balance``; the penalty's part is taken out again."""
    if mask.log_scale.grad is not None and mask.foreseen > 0:
        balance.measured += mask.charged - mask.log_scale.grad.double()
        balance.predicted += mask.foreseen


def _rescaled(masks: Mapping[str, Mask]) -> Iterable[RescaledMask]:
    for mask in masks.values():
        assert isinstance(mask, RescaledMask)
        yield mask
