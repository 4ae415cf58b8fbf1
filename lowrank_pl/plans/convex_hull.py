"""The lower convex hull of a module's loss over its cost: exact Lagrangian allocation for all multipliers at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_pl.plans.budget import Budget

__all__ = ["Hull", "Sizes", "hull_of", "hull_slopes", "losses_by_rank", "predicted_scores", "sizes_of"]


Sizes = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Parameters of a module at each of its allowed sizes, and the nats that it loses there."""


def predicted_scores(budget: Budget, sigma: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return the predicted loss, in nats a parameter, at which each component of every module is given up.

    Args:
        budget: The cost of ranks.
        sigma: Returns the singular values ``[components]`` of a module's two-sided factors; half their squares are
            losses in nats.
    """
    return {name: hull_slopes(budget, name, sigma(name)) for name in budget.shapes}


def losses_by_rank(sigma: Tensor) -> NDArray[np.float64]:
    """Return a module's loss in nats at each rank, from 0 to all components, where the loss is 0.

    Args:
        sigma: ``[components]`` singular values, descending; half their squares are losses in nats.
    """
    energy = sigma.double().square().numpy() / 2
    return np.append(energy[::-1].cumsum()[::-1], 0.0)


def hull_slopes(budget: Budget, name: str, sigma: Tensor) -> Tensor:
    """Return the multiplier ``lambda``, in nats a parameter, up to which each component of a module is worth its cost.

    Args:
        budget: The cost of ranks.
        name: The module.
        sigma: ``[components]`` singular values, descending; half their squares are losses in nats.
    """
    least = budget.least_rank(name)
    energy = sigma.double().square().numpy() / 2
    if not least:
        return torch.zeros(len(sigma), dtype=torch.float64)
    ranks = _ranks(budget, name, least)
    slopes = hull_of(budget, name, sigma).slopes
    scores = np.empty(len(sigma))
    # The least allowed rank is not on the hull: its components are given up after all that are.
    scores[:least] = np.maximum(energy[:least] / sum(budget.shapes[name]), slopes[0])
    # Dense is one step above the last rank: all components beyond that rank have the slope of this step.
    for low, high, slope in zip(ranks, [*ranks[1:], len(sigma)], slopes, strict=True):
        scores[low:high] = slope
    return torch.from_numpy(scores)


@dataclass(frozen=True, eq=False)
class Hull:
    """The allowed sizes of a module, from the smallest to dense, and the lower convex hull of their losses.

    Args:
        costs: ``[sizes]`` parameters.
        losses: ``[sizes]`` nats.
        slopes: ``[sizes - 1]`` nats that each parameter saves on the hull, between neighbouring sizes; non-increasing.
    """

    costs: NDArray[np.float64]
    losses: NDArray[np.float64]
    slopes: NDArray[np.float64]

    def least(self, multipliers: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the least loss plus multiplier times parameters over all sizes, for each of ``multipliers``."""
        taken = np.searchsorted(-self.slopes, -multipliers, side="left")
        found: NDArray[np.float64] = self.losses[taken] + multipliers * self.costs[taken]
        return found


def hull_of(budget: Budget, name: str, sigma: Tensor) -> Hull:
    """Return the sizes of a module that is not dropped, and their hull; arguments as in ``hull_slopes``."""
    costs, losses = sizes_of(budget, name, sigma)
    return Hull(costs, losses, _hull(costs, losses))


def sizes_of(budget: Budget, name: str, sigma: Tensor) -> Sizes:
    """Return the allowed sizes of a module that is not dropped, from the smallest to dense.

    Arguments are those of ``hull_slopes``.
    """
    least = budget.least_rank(name)
    ranks = [] if least is None else _ranks(budget, name, least)
    return budget.costs(name, [*ranks, None]).astype(np.float64), np.array([*losses_by_rank(sigma)[ranks], 0.0])


def _ranks(budget: Budget, name: str, least: int) -> list[int]:
    return [*range(least, budget.top_rank(name) + 1, budget.multiple_of)]


def _hull(costs: NDArray[np.float64], losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the slope of the lower convex hull for each step between neighbouring sizes, non-increasing."""
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
    """Return the loss in nats that each parameter saves between two sizes."""
    return float((losses[low] - losses[high]) / (costs[high] - costs[low]))
