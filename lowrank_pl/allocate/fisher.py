"""Exact Lagrangian allocation of the loss that the two-sided decomposition predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_pl.allocate.base import Allocator, Problem
from lowrank_pl.budget import Budget

__all__ = ["Fisher", "hull_slopes"]


@dataclass(frozen=True)
class Fisher(Allocator):
    """The ranks that minimise the predicted rise of the loss at the budget.

    With two-sided factors, ``sum(sigma[k:] ** 2) / 2`` is K-FAC's estimate of what truncating a module at rank ``k``
    costs in nats a token. Minimising its sum plus ``lambda`` times the parameters, every rank and dense enumerated,
    gives each module the lower convex hull of its (parameters, loss) points; a component's score is the slope at which
    it leaves the hull, so one pass over all scores solves the problem for every ``lambda`` at once.
    """

    name: ClassVar[str] = "fisher"
    kinds: ClassVar[tuple[str, ...]] = ("two_sided",)

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return for every component the predicted nats a parameter at which it is given up."""
        return {name: hull_slopes(problem.budget, name, problem.factors.sigma(name)) for name in problem.budget.shapes}



def hull_slopes(budget: Budget, name: str, sigma: Tensor) -> Tensor:
    """Return for each component of a module the price per parameter ``lambda`` up to which it is worth keeping.

    Args:
        budget: What sizes cost.
        name: The module.
        sigma: ``[components]`` singular values in roots of twice a loss, descending.
    """
    energy = sigma.double().square()
    # tail[k] is the loss at rank k, and dense loses nothing.
    tail = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]).numpy() / 2
    top = budget.top_rank(name)
    costs = np.array([0, *(budget.cost(name, rank) for rank in range(1, top + 1)), budget.cost(name, None)])
    losses = np.append(tail[: top + 1], 0.0)
    slopes = _hull(costs.astype(np.float64), losses)
    # Dense is one step from the last rank; all components beyond share what it is worth.
    scores = np.full(len(sigma), slopes[-1])
    scores[:top] = slopes[:top]
    return torch.from_numpy(scores)


def _hull(costs: NDArray[np.float64], losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return, for each step between neighbouring sizes, the slope of the lower convex hull over it, non-increasing."""
    hull = [0]
    for point in range(1, len(costs)):
        while len(hull) > 1 and _slope(costs, losses, hull[-2], hull[-1]) <= _slope(costs, losses, hull[-1], point):
            hull.pop()
        hull.append(point)
    slopes = np.empty(len(costs) - 1)
    for low, high in zip(hull[:-1], hull[1:], strict=True):
        slopes[low:high] = _slope(costs, losses, low, high)
    return slopes


def _slope(costs: NDArray[np.float64], losses: NDArray[np.float64], low: int, high: int) -> float:
    """Return the loss that a parameter saves between two sizes."""
    return float((losses[low] - losses[high]) / (costs[high] - costs[low]))
