"""Masks with a noisy on/off switch for every component, which LLRC and ARS have in common."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lowrank_pl.methods.masks.base import Mask, MaskMethod
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import Storage

__all__ = [
    "GumbelMask",
    "GumbelMethod",
    "Noise",
    "chosen_at_start",
    "draw_noise",
    "seeded",
    "select_by_logits",
    "switches",
]

Noise = Literal["gumbel", "logistic", "none"]
"""Gumbel(0, 1), the difference of two of them, or nothing."""


class GumbelMask(Mask):
    """A gate of zeros and ones: component ``j`` is on where ``sigmoid((logit[j] + noise[j]) / temperature) > 1/2``.

    The gradient is that of the sigmoid (straight through). Noise is drawn outside, by ``draw_noise``, and stays the
    same until the next draw: forward passes that gradient checkpointing repeats see the same gate.

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that it gates.
        temperature: Of the sigmoid.
        prices: What ranks cost in the finished model.
        any_k: Whether the components that are on stay where they are; otherwise as many of the first ones are on.
    """

    noise: Tensor

    def __init__(self, shape: tuple[int, int], rank: int, *, prices: Storage, temperature: float, any_k: bool) -> None:
        super().__init__(shape, rank, prices)
        self.temperature = temperature
        self.any_k = any_k
        self.drawn_at: int | None = None
        self.register_buffer("noise", torch.zeros(rank), persistent=False)

    @abstractmethod
    def switch_logits(self) -> Tensor:
        """Return the logits ``[rank]``, differentiable."""

    def forward(self) -> Tensor:
        """Return the hard gate ``[rank]`` under this step's noise, with the gradient of the soft one."""
        soft = self._soft()
        return self._arranged(soft > 0.5).to(soft.dtype) + (soft - soft.detach())

    def soft(self) -> Tensor:
        """Return the sigmoid of the logits without noise, ``[rank]``."""
        return (self.switch_logits() / self.temperature).sigmoid()

    def lit(self) -> Tensor:
        """Return which components are on under this step's noise, bool ``[rank]``."""
        return self._arranged(self._soft().detach() > 0.5)

    def kept(self) -> Tensor:
        """Return which components are on without noise, bool ``[rank]``."""
        return self._arranged(self.switch_logits().detach() > 0)

    def ratio(self) -> Tensor:
        """Return the parameters of the components that are on without noise, over the dense weight's, a scalar.

        The value is that of the hard count; the gradient that of the soft one, at what the next component costs.
        """
        soft = self.soft().sum()
        return self.prices.ratio(self.shape, self.kept().sum() + (soft - soft.detach()))

    def _soft(self) -> Tensor:
        return ((self.switch_logits() + self.noise) / self.temperature).sigmoid()

    def _arranged(self, on: Tensor) -> Tensor:
        return on if self.any_k else torch.arange(self.rank, device=on.device) < on.sum()


class GumbelMethod(MaskMethod):
    """What methods with switches have in common: full-rank factors that never compute densely, and a start with all on.

    Attributes:
        dense_from: Infinity.
    """

    dense_from = float("inf")

    def stored_rank(self, shape: tuple[int, int], prices: Storage) -> int:
        """Return ``min(m, n)``: every component has its switch."""
        return min(shape)

    def start_keep(self, aim: float) -> float:
        """Return 1: without a plan everything starts on, whatever ``aim`` is."""
        return 1.0


def switches(masks: Mapping[str, Mask]) -> list[GumbelMask]:
    """Return the masks, all of them with switches."""
    found = [mask for mask in masks.values() if isinstance(mask, GumbelMask)]
    assert len(found) == len(masks)
    return found


def seeded(*words: object) -> torch.Generator:
    """Return a CPU generator whose stream depends on ``words`` and nothing else.

    >>> torch.equal(torch.rand(2, generator=seeded(0, 1)), torch.rand(2, generator=seeded(0, 1)))
    True
    """
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def draw_noise(masks: Mapping[str, Mask], *, kind: Noise, seed: int, step: int) -> None:
    """Give every mask its noise of ``step``: the same on all processes, and again after a resume.

    Args:
        masks: Every module's mask by name.
        kind: Which noise.
        seed: Of the whole run.
        step: Optimizer steps done.
    """
    todo = switches(masks)
    if kind == "none" or all(mask.drawn_at == step for mask in todo):
        return
    drawn = [_noise(mask.rank, kind, seeded(seed, step, index)) for index, mask in enumerate(todo)]
    # One transfer for all modules.
    parts = torch.split(torch.cat(drawn).to(todo[0].noise.device), [mask.rank for mask in todo])
    for mask, part in zip(todo, parts, strict=True):
        mask.noise.copy_(part)
        mask.drawn_at = step


def _noise(count: int, kind: Noise, generator: torch.Generator) -> Tensor:
    # Minus the logarithm of an exponential variable is Gumbel's.
    draws = torch.empty(2 if kind == "logistic" else 1, count).exponential_(generator=generator)
    gumbel = -draws.clamp_min(torch.finfo(draws.dtype).tiny).log()
    return gumbel[0] - gumbel[1] if kind == "logistic" else gumbel[0]


def check_noise(noise: str) -> None:
    """Check the name of a noise.

    Raises:
        ValueError: There is none of this name.
    """
    if noise not in get_args(Noise):
        raise ValueError(f"noise is {noise!r}: expected one of {', '.join(get_args(Noise))}")


def chosen_at_start(shape: tuple[int, int], rank: int, keep: float, kept: Tensor | None, *, prices: Storage) -> Tensor:
    """Return which components are on at the start, bool ``[rank]``.

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that the mask gates.
        keep: Fraction of the module's parameters; from 1 on all components are on.
        kept: Indices of the components instead.
        prices: What ranks cost.

    Raises:
        ValueError: An index is not one of the components.
    """
    if kept is None:
        count = rank if keep >= 1 else min(rank, max(1, round(prices.rank_at(shape, keep))))
        return torch.arange(rank) < count
    if len(kept) and not (kept.min() >= 0 and kept.max() < rank):
        raise ValueError(f"a component to start from has an index of {kept.tolist()}: expected 0 to {rank - 1}")
    on = torch.zeros(rank, dtype=torch.bool)
    on[kept.cpu()] = True
    return on


def select_by_logits(
    masks: Mapping[str, Mask], budget: Budget, *, any_k: bool, method: str, notes: Iterable[str] = ()
) -> RankPlan:
    """Return the plan that keeps the components of the highest logits, at the exact budget.

    The threshold is 0 where the masks have learnt the budget, and moves as far as the budget needs otherwise; a note
    says what the bare threshold would have kept.

    Args:
        masks: Every module's mask by name.
        budget: What to meet.
        any_k: Whether to keep the components themselves, or as many of the first ones of each module.
        method: Name for the plan.
        notes: More notes for the plan.
    """
    with torch.no_grad():
        logits = {name: mask.switch_logits().cpu() for name, mask in zip(masks, switches(masks), strict=True)}
    on = {name: int((values > 0).sum()) for name, values in logits.items()}
    bare = sum(min(budget.cost(name, on[name]), budget.cost(name, None)) for name in masks)
    notes = [f"{method}: the bare threshold at 0 would have kept {bare / budget.total:.4f} of the targeted", *notes]
    scores = logits if any_k else {name: values.sort(descending=True).values for name, values in logits.items()}
    return budget.select(scores, method=method, notes=notes)
