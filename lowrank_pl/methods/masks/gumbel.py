"""What LLRC and ARS have in common: masks with a binary gate for every component, learned under Gumbel noise."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Literal

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
    "gumbel_masks",
    "seeded",
    "select_by_logits",
]

Noise = Literal["gumbel", "logistic", "none"]
"""Gumbel(0, 1), the difference of two such draws, or no noise."""


class GumbelMask(Mask):
    """A gate of zeros and ones: component ``j`` is on where ``sigmoid((logit[j] + noise[j]) / temperature) > 1/2``.

    The gradient is that of the sigmoid (straight through). ``draw_noise`` sets the noise, which stays until the next
    draw: forward passes that activation checkpointing repeats see the same gate.

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that the mask gates.
        storage: How the finished module is stored.
        temperature: Temperature of the sigmoid.
        any_k: Whether any subset of components can be on; otherwise as many of the first components are on.
    """

    noise: Tensor

    def __init__(self, shape: tuple[int, int], rank: int, *, storage: Storage, temperature: float, any_k: bool) -> None:
        super().__init__(shape, rank, storage)
        self.temperature = temperature
        self.any_k = any_k
        self.drawn_at: int | None = None
        self.register_buffer("noise", torch.zeros(rank), persistent=False)

    @abstractmethod
    def gate_logits(self) -> Tensor:
        """Return the logits ``[rank]``, differentiable."""

    def forward(self) -> Tensor:
        """Return the hard gate ``[rank]`` under this step's noise, with the gradient of the soft one."""
        soft = self._noisy()
        return self._subset_or_prefix(soft > 0.5).to(soft.dtype) + (soft - soft.detach())

    def soft(self) -> Tensor:
        """Return the sigmoid of the logits without noise, ``[rank]``."""
        return (self.gate_logits() / self.temperature).sigmoid()

    def active(self) -> Tensor:
        """Return which components are on under this step's noise, bool ``[rank]``."""
        return self._subset_or_prefix(self._noisy().detach() > 0.5)

    def kept(self) -> Tensor:
        """Return which components are on without noise, bool ``[rank]``."""
        return self._subset_or_prefix(self.gate_logits().detach() > 0)

    def ratio(self) -> Tensor:
        """Return the parameters of the components that are on without noise, over the dense weight's, a scalar.

        The value is that of the hard count. The gradient is that of the soft count, at the cost of the next component.
        """
        soft = self.soft().sum(-1)
        return self.storage.ratio(self.shape, self.kept().sum(-1) + (soft - soft.detach()))

    def _noisy(self) -> Tensor:
        return ((self.gate_logits() + self.noise) / self.temperature).sigmoid()

    def _subset_or_prefix(self, on: Tensor) -> Tensor:
        return on if self.any_k else torch.arange(self.rank, device=on.device) < on.sum(-1, keepdim=True)


class GumbelMethod(MaskMethod):
    """The base of ``LLRC`` and ``ARS``: masks gate full-rank factors, and every component starts on.

    Attributes:
        dense_from: Infinity: a module never computes densely while it learns.
    """

    dense_from = float("inf")
    skips_inactive = True

    def stored_rank(self, shape: tuple[int, int], storage: Storage) -> int:
        """Return ``min(m, n)``: every component has its gate."""
        return min(shape)

    def start_keep(self, target: float) -> float:
        """Return 1: without a plan every component starts on, whatever ``target`` is."""
        return 1.0


def gumbel_masks(masks: Mapping[str, Mask]) -> list[GumbelMask]:
    """Return the masks, all of which have Gumbel gates."""
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
    """Set every mask's noise of ``step``: the same on all processes, and again after a resume.

    Args:
        masks: Every module's mask by name.
        kind: Which noise.
        seed: Seed of the whole run.
        step: Optimizer steps done.
    """
    todo = gumbel_masks(masks)
    if kind == "none" or all(mask.drawn_at == step for mask in todo):
        return
    drawn = [_noise(mask.rank, kind, seeded(seed, step, index)) for index, mask in enumerate(todo)]
    # One transfer for all modules.
    parts = torch.split(torch.cat(drawn).to(todo[0].noise.device), [mask.rank for mask in todo])
    for mask, part in zip(todo, parts, strict=True):
        mask.noise.copy_(part)
        mask.drawn_at = step


def _noise(count: int, kind: Noise, generator: torch.Generator) -> Tensor:
    # Minus the logarithm of an exponential variable is a Gumbel variable.
    draws = torch.empty(2 if kind == "logistic" else 1, count).exponential_(generator=generator)
    gumbel = -draws.clamp_min(torch.finfo(draws.dtype).tiny).log()
    return gumbel[0] - gumbel[1] if kind == "logistic" else gumbel[0]


def chosen_at_start(shape: tuple[int, int], rank: int, keep: float, kept: Tensor | None, *, storage: Storage) -> Tensor:
    """Return which components are on at the start, bool ``[rank]``.

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that the mask gates.
        keep: Fraction of the module's parameters; from 1 on all components are on.
        kept: Indices of the components to start from; they replace ``keep``.
        storage: How the finished module is stored.

    Raises:
        ValueError: An index beyond the components.
    """
    if kept is None:
        count = rank if keep >= 1 else min(rank, max(1, round(storage.rank_at(shape, keep))))
        return torch.arange(rank) < count
    if len(kept) and not (kept.min() >= 0 and kept.max() < rank):
        raise ValueError(
            f"the plan to start from keeps the components {kept.tolist()} of a module that has {rank}: expected "
            f"indices from 0 to {rank - 1}; give a plan that was made for this base"
        )
    on = torch.zeros(rank, dtype=torch.bool)
    on[kept.cpu()] = True
    return on


def select_by_logits(
    masks: Mapping[str, Mask], budget: Budget, *, any_k: bool, method: str, notes: Iterable[str] = ()
) -> RankPlan:
    """Return the plan that keeps the components of the highest logits, at the exact budget.

    The threshold is 0 where the masks have learned the budget; otherwise it moves as far as the budget needs. A note
    says what the threshold at 0 would have kept.

    Args:
        masks: Every module's mask by name.
        budget: What to meet.
        any_k: Whether to keep these components themselves, or as many of the first ones of each module.
        method: Name for the plan.
        notes: More notes for the plan.
    """
    with torch.no_grad():
        logits = {name: mask.gate_logits().cpu() for name, mask in zip(masks, gumbel_masks(masks), strict=True)}
    on = {name: int((values > 0).sum()) for name, values in logits.items()}
    bare = sum(min(budget.cost(name, on[name]), budget.cost(name, None)) for name in masks)
    notes = [f"{method}: the bare threshold at 0 would have kept {bare / budget.total:.4f} of the targeted", *notes]
    scores = logits if any_k else {name: values.sort(descending=True).values for name, values in logits.items()}
    return budget.select(scores, method=method, notes=notes)
