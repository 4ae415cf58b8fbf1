"""D-Rank: ranks by effective rank, with a fraction of the queries' and keys' ranks moved to the values."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_pl.methods.allocate.base import Allocator, Problem
from lowrank_pl.methods.allocate.energy import energy_shares
from lowrank_pl.plans.component_order import requested_rank_scores

__all__ = ["DRank", "effective_rank"]


@dataclass(frozen=True)
class DRank(Allocator):
    """Ranks are proportional to the square root of effective rank over cost (D-Rank, arXiv 2509.25622).

    These ranks minimise the sum of effective rank over rank at a given size. Within a block, a fraction of the
    allocation of ``q_proj`` and ``k_proj`` moves to ``v_proj``. The fraction is counted in parameters: where all three
    have the same shape, this is the paper's count of ranks, and elsewhere it preserves the size.

    Args:
        shift: Fraction that moves to the values; the paper advises 0.1 to 0.2.

    Raises:
        ValueError: ``shift`` lies outside [0, 1).
    """

    shift: float = 0.15
    name: ClassVar[str] = "drank"
    paper: ClassVar[str | None] = "2509.25622"

    def __post_init__(self) -> None:
        if not 0 <= self.shift < 1:
            raise ValueError(f"shift is {self.shift}: expected the fraction of q and k to move to v, in [0, 1)")

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return scores by which every module shrinks in proportion to its requested rank."""
        shapes = problem.budget.shapes
        requested = {n: math.sqrt(effective_rank(problem.factors.sigma(n)) / sum(shape)) for n, shape in shapes.items()}
        for attention in _attentions(problem):
            moved = 0.0
            for part in ("q_proj", "k_proj"):
                moved += self.shift * requested[attention[part]] * sum(shapes[attention[part]])
                requested[attention[part]] *= 1 - self.shift
            requested[attention["v_proj"]] += moved / sum(shapes[attention["v_proj"]])
        return {name: requested_rank_scores(shape, requested[name]) for name, shape in shapes.items()}

    def notes(self, problem: Problem) -> Sequence[str]:
        """Return in how many attentions ranks were moved, or that no attention allowed it."""
        if self.shift == 0:
            return ()
        count = len(_attentions(problem))
        if count == 0:
            return ("no block has q_proj, k_proj and v_proj among its targets: nothing was moved from q and k to v",)
        return (f"{self.shift:.0%} of q and k was moved to v in {count} blocks",)


def effective_rank(sigma: Tensor) -> float:
    """Return ``exp(entropy)`` of the energy shares of singular values ``[components]``.

    >>> round(effective_rank(torch.ones(5)), 6)
    5.0
    """
    shares = energy_shares(sigma)
    return math.exp(torch.special.entr(shares).sum().item())


def _attentions(problem: Problem) -> list[dict[str, str]]:
    """Return the names of ``q_proj``, ``k_proj`` and ``v_proj`` of every attention that has all three."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for target in problem.targets.modules:
        parent, _, last = target.name.rpartition(".")
        if last in ("q_proj", "k_proj", "v_proj") and target.name in problem.budget.shapes:
            found[parent][last] = target.name
    return [parts for parts in found.values() if len(parts) == 3]
