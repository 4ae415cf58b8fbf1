"""Rescaled: ranks minimise a predicted loss, with one factor a module that is learned from the true loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank_pl.methods.masks.base import Mask, MaskMethod, ModelMasks
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.convex_hull import hull_slopes
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import Storage
from lowrank_pl.utils.checks import check_counts, check_numbers

__all__ = ["Rescaled", "RescaledMask"]


class RescaledMask(Mask):
    """A hard prefix of one module; the scales of all modules decide its length.

    The gradient of the module's own scale is the loss's slope around the prefix's end.

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that the mask gates.
        sigma: ``[min(out, in)]`` singular values, descending; half the square of one is a loss in nats.
        storage: How the finished module is stored.
        width: Components on each side of the end over which the slope is averaged, as a fraction of the length.

    Attributes:
        scale: Factor of the module's predicted losses in the last allocation.
        end: Components of the prefix in the last allocation, all gated ones where it is dense.
        near: Components on each side of the end that are measured; 0 where none lie beyond it.
        is_dense: Whether the last allocation leaves the module dense.
        foreseen: Predicted saving of one more component in the last batch; 0 where nothing is measured.
        charged: ``foreseen`` times the average ratio of measured to predicted savings.
    """

    own: ClassVar[tuple[str, ...]] = ("log_scale", "end", "near", "is_dense")
    inactive_learn = False

    def __init__(self, shape: tuple[int, int], rank: int, sigma: Tensor, *, storage: Storage, width: float) -> None:
        super().__init__(shape, rank, storage)
        self.width = width
        self.log_scale = nn.Parameter(torch.zeros(()))
        # No buffer: lengths are chosen on the CPU, wherever the model is.
        self.sigma = sigma.double().cpu()
        self._slopes: tuple[tuple[int, int | None], Tensor] | None = None
        self.scale = 1.0
        self.length = rank
        self.foreseen = self.charged = 0.0

    def slopes(self, budget: Budget, name: str) -> Tensor:
        """Return the predicted loss a parameter ``[min(out, in)]`` at which each component is dropped.

        Args:
            budget: Knows the allowed sizes of the module; the slopes are those of their convex hull.
            name: The module's name in the budget.
        """
        sizes = budget.multiple_of, budget.least_rank(name)
        if self._slopes is None or self._slopes[0] != sizes:
            self._slopes = sizes, hull_slopes(budget, name, self.sigma).float()
        return self._slopes[1]

    @property
    def length(self) -> int | None:
        """Components of the prefix in the last allocation; ``None`` is dense."""
        return None if self.is_dense else self.end

    @length.setter
    def length(self, length: int | None) -> None:
        self.is_dense, self.end, self.near, self._saving = length is None, self.rank, 0, 0.0
        if length is not None:
            self.end = length
            self.near = min(max(3, math.ceil(self.width * length)), length, self.rank - length)
        if self.near:
            self._saving = float(self.sigma[self.end : self.end + self.near].square().mean())

    def predicted(self) -> float:
        """Return what ``forward`` would measure if the rescaled prediction were true; 0 where nothing is measured.

        This is the mean saving of the components just beyond the end. The slope of the hull would be wrong here: where
        the next size is dense, it stands for all remaining components at once.
        """
        return self.scale * self._saving / 2

    def forward(self) -> Tensor:
        """Return the hard prefix ``[rank]``; the scale gets the mean gradient of the gates around its end.

        If the loss is quadratic in the gates, its slope is 0 at a gate of 1, and twice the component's saving at a gate
        of 0. The mean over equally many gates on both sides is therefore the saving of one more component.
        """
        positions, end, near = self._positions(), self._column(self.end), self._column(self.near)
        around = ((positions >= end - near) & (positions < end + near)).float()
        measured = 2 * near.clamp(min=1) if isinstance(near, Tensor) else max(1, 2 * near)
        soft = self.log_scale[..., None] * around / measured
        return (positions < end).float() + (soft - soft.detach())

    def active(self) -> Tensor:
        """Return the prefix and the components that are measured beyond its end, bool ``[rank]``."""
        return self._positions() < self._column(self.end) + self._column(self.near)

    def ratio(self) -> Tensor:
        """Return the parameters of the prefix over the dense weight's, 1 when dense; constant in the scale."""
        device = self.log_scale.device
        ratio = self.storage.ratio(self.shape, torch.as_tensor(self.end, dtype=torch.float32, device=device))
        return ratio.masked_fill(torch.as_tensor(self.is_dense, device=device), 1.0)

    def kept(self) -> Tensor:
        """Return which components the prefix has, bool ``[rank]``."""
        return self._positions() < self._column(self.end)

    def _positions(self) -> Tensor:
        return torch.arange(self.rank, device=self.log_scale.device)

    def _column(self, number: int | Tensor) -> int | Tensor:
        """Return a number of this mask as it is, or those of several masks as ``[masks, 1]``."""
        return number.to(self.log_scale.device)[..., None] if isinstance(number, Tensor) else number


class Balance(nn.Module):
    """Sums of the measured and the predicted savings over all modules and steps, and the number of these steps.

    Attributes:
        batches: Batches whose gradients the next step adds up.
        allocated: Logarithms of the scales, and the budget, of the last allocation.
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
        self.allocated: tuple[list[float], Budget] | None = None

    def ratio(self) -> float:
        """Return the average ratio of a component's measured saving to the predicted one; 1 before any measurement."""
        measured, predicted = torch.stack([self.measured, self.predicted]).tolist()
        return measured / predicted if predicted > 0 and measured > 0 else 1.0


class Rescaled(MaskMethod):
    """Learned scales of the losses that the ``fisher`` allocator adds up (ours): one number a module.

    Every step minimises ``sum(exp(scale) * predicted loss)`` exactly at the budget. All scales start at 0, so learning
    starts at the plan of ``fisher``. The quadratic prediction ignores how modules interact. The gradient of the true
    loss at the end of each module's prefix, in the compressed model, includes it. A scale rises where one more
    component saves more than predicted, relative to the average module, and stays where this ratio is the average. Then
    the rescaled prediction has the slopes of the true loss, up to one common factor, and no other allocation is better
    to first order. A module that is dense or nearly dense, or whose prefix has all gated components, has no end to
    measure at. The optimizer leaves such a module out, and it keeps its scale.

    Args:
        width: Components on each side of a prefix's end that are measured, as a fraction of its length; at least 3
            where there are as many.
        warmup: First steps, which only measure the average.
        top: Parameters of the gated components over those of the dense weight.

    Raises:
        ValueError: ``width`` or ``warmup`` outside its range, or ``top`` not above 1.
    """

    name: ClassVar[str] = "rescaled"
    paper: ClassVar[str | None] = None
    kinds = ("two_sided",)
    own_start = True
    skips_inactive = True

    def __init__(self, *, width: float = 0.05, warmup: int = 8, top: float = 1.1) -> None:
        check_numbers({"width": (width, 0)}, above=True)
        check_numbers({"top": (top, 1)}, above=True)
        check_counts({"warmup": warmup}, least=0)
        self.width, self.warmup, self.top = width, warmup, top

    @property
    def idle_steps(self) -> int:
        """The warm-up, which only measures: the plan is that of ``fisher`` until its end."""
        return self.warmup

    def create(
        self, shape: tuple[int, int], sigma: Tensor, keep: float, *, storage: Storage, kept: Tensor | None = None
    ) -> RescaledMask:
        """Return a mask of scale 1; ``advance`` sets its length. Arguments as in ``MaskMethod.create``."""
        return RescaledMask(shape, self.stored_rank(shape, storage), sigma, storage=storage, width=self.width)

    def shared_module(self, masks: Mapping[str, Mask]) -> Balance:
        """Return the sums of measured and predicted savings."""
        return Balance()

    def advance(self, masks: ModelMasks, step: int, budget: Budget) -> None:
        """Set every prefix's length by the rescaled allocation; during warm-up, set scales back to 1 first."""
        every, balance = _rescaled(masks), _balance(masks)
        if 0 < step <= self.warmup:
            for mask in every:
                mask.log_scale.data.zero_()
        logs = _log_scales(masks)
        if balance.allocated == (logs, budget):
            return
        sizes = budget.sizes(_scores(masks, budget, logs))
        for mask, log, size in zip(every, logs, sizes.values(), strict=True):
            mask.scale = math.exp(log)
            length = None if size is None or size > mask.rank else size
            if length != mask.length:
                mask.length = length
        balance.allocated = logs, budget

    def penalties(self, masks: ModelMasks, ratios: Tensor, keep: float, step: int) -> dict[str, Tensor]:
        """Return ``balance``, linear in the scales: its gradient is each module's saving at the average ratio."""
        every, balance = _rescaled(masks), _balance(masks)
        average = balance.ratio()
        balance.batches += 1
        for mask in every:
            mask.foreseen = mask.predicted()
            mask.charged = average * mask.foreseen
        logs = torch.stack([mask.log_scale for mask in every])
        return {"balance": (logs * torch.tensor([mask.charged for mask in every], device=logs.device)).sum()}

    def observe(self, masks: ModelMasks, step: int, *, accumulated: int = 1) -> None:
        """Add the measured savings to the balance: the gradients without the penalty's part.

        Modules without a measurement lose their gradient, so that the optimizer leaves them out.
        """
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
        # The optimizer skips steps of mixed precision that overflow, too.
        if math.isfinite(saved):
            balance.measured += saved
            balance.predicted += sum(mask.foreseen for mask in measured)
        balance.counted.fill_(step + 1)

    def finalise(self, masks: ModelMasks, budget: Budget) -> RankPlan:
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
    # One transfer for all modules: one for each would wait for the device once a module.
    logs: list[float] = torch.stack([mask.log_scale.detach() for mask in _rescaled(masks)]).tolist()
    return logs


def _balance(masks: ModelMasks) -> Balance:
    assert isinstance(masks.shared, Balance)
    return masks.shared


def _rescaled(masks: Mapping[str, Mask]) -> list[RescaledMask]:
    found = [mask for mask in masks.values() if isinstance(mask, RescaledMask)]
    assert len(found) == len(masks)
    return found
