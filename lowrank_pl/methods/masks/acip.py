"""ACIP: one learning run orders all components, by when the masks drop them, and so serves every size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank_pl.methods.masks.base import Mask, MaskMethod
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan

__all__ = ["ACIP"]


class ACIP(nn.Module):
    """The score map of ACIP (arXiv 2502.01717): the last step at which each component's mask kept it.

    During the run the target falls from a large model to a small one. A later step is thus a smaller model, and
    components that were kept later belong to more sizes. Any mask method can learn while this module records.
    Checkpoints hold the record.

    Args:
        ranks: Components that each module's mask gates, by name.
    """

    paper: ClassVar[str | None] = "2502.01717"

    last: Tensor

    def __init__(self, ranks: Mapping[str, int]) -> None:
        super().__init__()
        self.ranks = dict(ranks)
        self.register_buffer("last", torch.full((sum(ranks.values()),), -1, dtype=torch.int64))

    @torch.no_grad()
    def record(self, masks: Mapping[str, Mask], step: int) -> None:
        """Record which components ``masks`` keep at ``step``; a module whose ratio makes it dense keeps all."""
        kept = torch.cat([masks[name].kept() | (masks[name].ratio() >= 1) for name in self.ranks])
        self.last.masked_fill_(kept, step)

    def scores(self) -> dict[str, Tensor]:
        """Return a score ``[rank]`` a module for ``Budget.select``: the last step, and by position within one step.

        A position counts as a fraction of its module's components, so that ties are broken alike in all modules.
        """
        parts = torch.split(self.last.cpu(), list(self.ranks.values()))
        return {
            name: part.double() - torch.arange(len(part)) / len(part)
            for name, part in zip(self.ranks, parts, strict=True)
        }

    def finalise(self, budget: Budget, method: MaskMethod, *, start: float | None) -> RankPlan:
        """Return the plan of the components that were kept longest, at the exact budget.

        Args:
            budget: What to meet.
            method: The mask method; where its plans keep the first components, as many of these are kept.
            start: The fraction to keep from which the target fell.
        """
        scores = self.scores()
        if not method.plans_any_k:
            scores = {name: part.sort(descending=True).values for name, part in scores.items()}
        note = f"components in the order in which they were last kept from keep {start} to {budget.keep}"
        return budget.select(scores, method=method.name, notes=[note])
