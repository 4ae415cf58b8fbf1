"""How long each component was kept while the aim came down: one order of all components, from one run, for any size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank_pl.methods.masks.base import Mask
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan

__all__ = ["Lifetimes"]


class Lifetimes(nn.Module):
    """Remembers for every component the last step at which its mask kept it (the score map of ACIP, arXiv 2502.01717).

    While the aim goes from a large model to a small one, a later step is a smaller model: components that were kept
    later are the ones to keep longer. The record is part of checkpoints.

    Args:
        ranks: Components that each module's mask gates, by name.
    """

    last: Tensor

    def __init__(self, ranks: Mapping[str, int]) -> None:
        super().__init__()
        self.ranks = dict(ranks)
        self.register_buffer("last", torch.full((sum(ranks.values()),), -1, dtype=torch.int64))

    @torch.no_grad()
    def record(self, masks: Mapping[str, Mask], step: int) -> None:
        """Note which components ``masks`` keep at ``step``; of a module that is dense by its ratio that is all."""
        kept = torch.cat([masks[name].kept() | (masks[name].ratio() >= 1) for name in self.ranks])
        self.last.masked_fill_(kept, step)

    def scores(self) -> dict[str, Tensor]:
        """Return a score ``[rank]`` a module for ``Budget.select``: the last step, and by position within one step.

        Positions count as fractions of their module's components, so that ties are broken alike in all modules.
        """
        parts = torch.split(self.last.cpu(), list(self.ranks.values()))
        return {
            name: part.double() - torch.arange(len(part)) / len(part)
            for name, part in zip(self.ranks, parts, strict=True)
        }

    def finalise(self, budget: Budget, *, method: str, start: float | None) -> RankPlan:
        """Return the plan of the components that were kept longest, at the exact budget.

        Args:
            budget: What to meet.
            method: Name for the plan.
            start: Where the aim came down from.
        """
        note = f"components in the order in which they were last kept from keep {start} to {budget.keep}"
        return budget.select(self.scores(), method=method, notes=[note])
