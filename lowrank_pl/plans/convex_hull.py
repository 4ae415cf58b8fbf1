"""The lower convex hull of what a module loses at each size: exact Lagrangian allocation, for every price at once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_pl.plans.budget import Budget

__all__ = ["hull_slopes", "losses_by_rank", "predicted_scores"]


def predicted_scores(budget: Budget, sigma: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return for every component of every module the predicted nats a parameter at which it is given up.

    Args:
        budget: What sizes cost.
        sigma: Returns a module's singular values ``[components]``: those of two-sided factors, roots of twice a loss.
    """
    return {name: hull_slopes(budget, name, sigma(name)) for name in budget.shapes}


def losses_by_rank(sigma: Tensor) -> NDArray[np.float64]:
    """Return the nats that a module loses at each rank from 0 to all of its components, where it loses nothing.

    Args:
        sigma: ``[components]`` singular values in roots of twice a loss, descending.
    """
    energy = sigma.double().square().numpy() / 2
    return np.append(energy[::-1].cumsum()[::-1], 0.0)


def hull_slopes(budget: Budget, name: str, sigma: Tensor) -> Tensor:
    """Return for each component of a module the price per parameter ``lambda`` up to which it is worth keeping.

    Args:
        budget: What sizes cost.
        name: The module.
        sigma: ``[components]`` singular values in roots of twice a loss, descending.
    """
    least = budget.least_rank(name)
    energy = sigma.double().square().numpy() / 2
    if least is None:
        return torch.zeros(len(sigma), dtype=torch.float64)
    tail = losses_by_rank(sigma)
    ranks = [*range(least, budget.top_rank(name) + 1, budget.multiple_of)]
    costs = budget.costs(name, [*ranks, None]).astype(np.float64)
    slopes = _hull(costs, np.array([*tail[ranks], 0.0]))
    scores = np.empty(len(sigma))
    # What the budget grants every module anyway lies on no hull, and goes after all that does.
    scores[:least] = np.maximum(energy[:least] / sum(budget.shapes[name]), slopes[0])
    # Dense is one step from the last rank; all components beyond share what it is worth.
    for low, high, slope in zip(ranks, [*ranks[1:], len(sigma)], slopes, strict=True):
        scores[low:high] = slope
    return torch.from_numpy(scores)


def _hull(costs: NDArray[np.float64], losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return, for each step between neighbouring sizes, the slope of the lower convex hull over it, non-increasing."""
    hull = [0]
    for point in range(1, len(costs)):
        while len(hull) > 1 and _slope(costs, losses, hull[-2], hull[-1]) <= _slope(costs, losses, hull[-1], point):
            hull.pop()
        hull.append(point)
    slopes = np.empty(len(costs) - 1)
    for low, high in pairwise(hull):
        slopes[low:high] = _slope(costs, losses, low, high)
    return slopes


def _slope(costs: NDArray[np.float64], losses: NDArray[np.float64], low: int, high: int) -> float:
    """Return the loss that a parameter saves between two sizes."""
    return float((losses[low] - losses[high]) / (costs[high] - costs[low]))
