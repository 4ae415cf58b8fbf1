"""Ranks that minimise a predicted loss of which every module's share is rescaled by what the true loss says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lowrank_pl.methods.masks.base import Mask, MaskMethod, check_numbers, gated_rank
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.convex_hull import hull_slopes
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import Storage

__all__ = ["Rescaled", "RescaledMask"]


class RescaledMask(Mask):
    """A hard prefix whose length follows from the scales of all modules, and the loss's slope around its end.

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that it gates.
        sigma: ``[min(out, in)]`` singular values in roots of twice a loss, descending.
        prices: What ranks cost in the finished model.
        width: Components on each side of the end over which the slope is averaged, as a fraction of the length.

    Attributes:
        scale: Of the module's losses, as of the last allocation.
        length: Components of the prefix, by the last allocation; ``None`` is dense.
    """

    inactive_learn = False

    def __init__(self, shape: tuple[int, int], rank: int, sigma: Tensor, *, prices: Storage, width: float) -> None:
        super().__init__(shape, rank, prices)
        self.width = width
        self.log_scale = nn.Parameter(torch.zeros(()))
        # No buffers: sizes are chosen on the CPU, wherever the model is.
        self.sigma = sigma.double().cpu()
        self._slopes: tuple[tuple[int, int | None], Tensor] | None = None
        self.scale = 1.0
        self.length: int | None = rank
        self.foreseen = self.charged = 0.0
        self.remembered: tuple[Balance, ...] = ()

    def slopes(self, budget: Budget, name: str) -> Tensor:
        """Return the predicted loss a parameter ``[min(out, in)]`` at which each component is given up.

        Args:
            budget: Has the sizes that the module may take, whose hull it is.
            name: What the module is called there.
        """
        sizes = budget.multiple_of, budget.least_rank(name)
        if self._slopes is None or self._slopes[0] != sizes:
            self._slopes = sizes, hull_slopes(budget, name, self.sigma).float()
        return self._slopes[1]

    def reach(self) -> int:
        """Return how many components on each side of the end are measured; 0 where there are none beyond it."""
        if self.length is None:
            return 0
        return min(max(3, math.ceil(self.width * self.length)), self.length, self.rank - self.length)

    def predicted(self) -> float:
        """Return what ``forward`` would measure if the rescaled prediction were true; 0 where nothing is measured.

        That is what the components beyond the end are worth, not the slope of the hull, which where the next size is
        dense stands for all of them at once.
        """
        near = self.reach()
        if not near:
            return 0.0
        assert self.length is not None
        return self.scale * float(self.sigma[self.length : self.length + near].square().mean()) / 2

    def forward(self) -> Tensor:
        """Return the hard prefix ``[rank]``; the scale gets the mean gradient of the gates around its end.

        With a loss that is quadratic in the gates, the slope at a gate of 1 is nothing and at 0 twice what the
        component is worth: their mean over as many gates on both sides is what moving the end by one component is
        worth.
        """
        length, near = self.rank if self.length is None else self.length, self.reach()
        positions = torch.arange(self.rank, device=self.log_scale.device)
        around = ((positions >= length - near) & (positions < length + near)).float()
        soft = self.log_scale * around / max(1, 2 * near)
        return (positions < length).float() + (soft - soft.detach())

    def lit(self) -> Tensor:
        """Return the prefix and what is measured beyond its end, bool ``[rank]``."""
        length = self.rank if self.length is None else self.length
        return torch.arange(self.rank, device=self.log_scale.device) < length + self.reach()

    def ratio(self) -> Tensor:
        """Return the parameters of the prefix over the dense weight's, 1 when dense; constant in the scale."""
        length = torch.tensor(float(self.rank if self.length is None else self.length), device=self.log_scale.device)
        return torch.ones_like(length) if self.length is None else self.prices.ratio(self.shape, length)

    def kept(self) -> Tensor:
        """Return which components the prefix has, bool ``[rank]``."""
        length = self.rank if self.length is None else self.length
        return torch.arange(self.rank, device=self.log_scale.device) < length


class Balance(nn.Module):
    """Sums of measured and of predicted savings over all modules and steps, and how many steps they are of.

    Attributes:
        batches: Times that the next step's gradients were added to.
        drawn: Scales and budget of the last allocation.
    """

    measured: Tensor
    predicted: Tensor
    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("measured", "predicted"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_buffer("counted", torch.tensor(0))
        self.batches = 0
        self.drawn: tuple[list[float], Budget] | None = None

    def ratio(self) -> float:
        """Return by how much more a component saves than was predicted, on average; 1 before anything is known."""
        measured, predicted = torch.stack([self.measured, self.predicted]).tolist()
        return measured / predicted if predicted > 0 and measured > 0 else 1.0


class Rescaled(MaskMethod):
    """Learned scales of the losses that the ``fisher`` allocator adds up (ours): one number a module.

    The allocation minimises ``sum(exp(scale) * predicted loss)`` at the budget exactly, every step anew, from the
    plan of ``fisher`` on. The quadratic prediction knows nothing of how modules disturb each other; the gradient of the
    true loss, taken where each module's prefix ends in the compressed model, does. A scale rises where a component
    saves more than predicted, compared with the average module, and rests where the ratio is the average one: there
    the rescaled prediction has the true loss's slopes, up to one common factor, and the allocation that is exact for it
    cannot be improved to first order. Modules that are dense or nearly so, or whose prefix has all gated components,
    have no end to measure at: the optimizer leaves them out, and they keep their scale.

    Args:
        width: Components on each side of a prefix's end that are measured, as a fraction of its length; at least 3
            where there are as many.
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

    def stored_rank(self, shape: tuple[int, int], prices: Storage) -> int:
        """Return how many components cost ``top`` times the dense weight, as ``gated_rank`` counts them."""
        return gated_rank(shape, self.top, prices)

    def create(
        self, shape: tuple[int, int], sigma: Tensor, keep: float, *, prices: Storage, kept: Tensor | None = None
    ) -> RescaledMask:
        """Return a mask of scale 1; where its prefix ends, ``advance`` says. Arguments as in ``MaskMethod.create``."""
        return RescaledMask(shape, self.stored_rank(shape, prices), sigma, prices=prices, width=self.width)

    def share(self, masks: Mapping[str, Mask]) -> Balance:
        """Return the sums of what was measured and predicted."""
        balance = Balance()
        for mask in _rescaled(masks):
            mask.remembered = (balance,)  # in a tuple, so that only the learner registers it
        return balance

    def advance(self, masks: Mapping[str, Mask], step: int, budget: Budget) -> None:
        """End every prefix where the rescaled allocation has it; while it warms up, put scales back to 1 first."""
        every, balance = _rescaled(masks), _balance(masks)
        if 0 < step <= self.warmup:
            for mask in every:
                mask.log_scale.data.zero_()
        logs = _log_scales(masks)
        if balance.drawn == (logs, budget):
            return
        sizes = budget.sizes(_scores(masks, budget, logs))
        for mask, log, size in zip(every, logs, sizes.values(), strict=True):
            mask.scale = math.exp(log)
            mask.length = None if size is None or size > mask.rank else size
        balance.drawn = logs, budget

    def penalties(self, masks: Mapping[str, Mask], ratios: Tensor, keep: float, step: int) -> dict[str, Tensor]:
        """Return ``balance``, linear in the scales: its gradient is what each module saves at the average ratio."""
        every, balance = _rescaled(masks), _balance(masks)
        average = balance.ratio()
        balance.batches += 1
        for mask in every:
            mask.foreseen = mask.predicted()
            mask.charged = average * mask.foreseen
        return {"balance": torch.stack([mask.charged * mask.log_scale for mask in every]).sum()}

    def observe(self, masks: Mapping[str, Mask], step: int, *, accumulated: int = 1) -> None:
        """Add what the gradients say to the balance, without the penalty's part; leave out what was not measured."""
        balance = _balance(masks)
        batches, balance.batches = balance.batches, 0
        measured = [mask for mask in _rescaled(masks) if mask.foreseen > 0 and mask.log_scale.grad is not None]
        for mask in _rescaled(masks):
            if mask.foreseen == 0:
                mask.log_scale.grad = None
        if step < int(balance.counted) or not batches or not measured:
            return
        # One transfer for all modules.
        gradients = torch.stack([mask.log_scale.grad for mask in measured if mask.log_scale.grad is not None]).tolist()
        mean = accumulated / batches
        saved = sum(m.charged - mean * gradient for m, gradient in zip(measured, gradients, strict=True))
        # Steps of mixed precision that overflow are skipped by the optimizer too.
        if math.isfinite(saved):
            balance.measured += saved
            balance.predicted += sum(mask.foreseen for mask in measured)
        balance.counted.fill_(step + 1)

    def finalise(self, masks: Mapping[str, Mask], budget: Budget) -> RankPlan:
        """Return the plan that minimises the rescaled loss at the exact budget."""
        logs = _log_scales(masks)
        note = f"predicted losses rescaled by {math.exp(min(logs)):.2f} to {math.exp(max(logs)):.2f}"
        return budget.select(_scores(masks, budget, logs), method=self.name, notes=[note])


def _scores(masks: Mapping[str, Mask], budget: Budget, logs: Sequence[float]) -> dict[str, Tensor]:
    """Return the rescaled slopes of every module by name."""
    return {
        name: math.exp(log) * mask.slopes(budget, name)
        for name, mask, log in zip(masks, _rescaled(masks), logs, strict=True)
    }


def _log_scales(masks: Mapping[str, Mask]) -> list[float]:
    # One transfer for all modules: asking each for itself would wait for the device once a module.
    logs: list[float] = torch.stack([mask.log_scale.detach() for mask in _rescaled(masks)]).tolist()
    return logs


def _balance(masks: Mapping[str, Mask]) -> Balance:
    (balance,) = _rescaled(masks)[0].remembered
    return balance


def _rescaled(masks: Mapping[str, Mask]) -> list[RescaledMask]:
    found = [mask for mask in masks.values() if isinstance(mask, RescaledMask)]
    assert len(found) == len(masks)
    return found
