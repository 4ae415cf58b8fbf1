"""STRS, sensitivity-based truncation rank search: modules are truncated by what each alone does to perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_pl.allocate.base import Allocator, Problem
from lowrank_pl.allocate.sensitivity import DENSE, measure
from lowrank_pl.decomposition import Kind

__all__ = ["Strs", "grid_scores"]


@dataclass(frozen=True)
class Strs(Allocator):
    """The plan that cuts a sorted list of perplexities, each of one module truncated alone (ASVD, arXiv 2312.05821).

    Each module is truncated to each of a few ratios, all else dense. ASVD sorts the triples of module, ratio and
    perplexity and gives every module the smallest ratio among those below a threshold. As scores: dropping a component
    leaves the module at the next smaller ratio of the grid, so it is worth the least loss measured there or further
    down. Components below the grid are kept before all others and shrink at one rate.

    Args:
        ratios: The grid, as fractions of the module's parameters.
        windows: How many calibration windows are scored; the first ones.
        length: Tokens of a window that are used; all by default.
        batch_size: Windows per forward.

    Raises:
        ValueError: A setting out of its range.
    """

    ratios: Sequence[float] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    windows: int = 4
    length: int | None = None
    batch_size: int = 4
    name: ClassVar[str] = "strs"
    default_kind: ClassVar[Kind] = "asvd"
    needs_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        rising = sorted(set(self.ratios))
        if not rising or rising[0] <= 0 or rising[-1] >= 1:
            raise ValueError(f"ratios are {list(self.ratios)}: expected one or more fractions between 0 and 1")
        if self.windows < 1 or self.batch_size < 1 or (self.length is not None and self.length < 2):
            raise ValueError(
                f"windows is {self.windows}, batch_size {self.batch_size}, length {self.length}: expected at least one "
                "window, one a batch and two tokens"
            )
        object.__setattr__(self, "ratios", tuple(rising))

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return by how many nats a token the loss exceeds the dense model's once a component's module is below it."""
        model, windows = self.need_model(problem)
        shapes = problem.budget.shapes
        prices = problem.budget.prices
        ranks = {
            name: [max(1, int(prices.rank_at(shape, ratio) + 1e-9)) for ratio in self.ratios]
            for name, shape in shapes.items()
        }
        # A module that has to stay dense asks for no measurement.
        open_ = [t for t in problem.targets.modules if t.name in shapes and problem.budget.least_rank(t.name)]
        known = measure(
            model,
            problem.factors,
            windows[: self.windows, : self.length],
            [(target, list(dict.fromkeys(ranks[target.name]))) for target in open_],
            batch_size=self.batch_size,
        )
        rises = {t.name: [known[t.name, rank] - known[DENSE] for rank in ranks[t.name]] for t in open_}
        ceiling = max((rise for found in rises.values() for rise in found), default=0.0)
        return {
            name: grid_scores(prices.ratios(shape), self.ratios, rises[name], ceiling)
            if name in rises
            else torch.zeros(min(shape))
            for name, shape in shapes.items()
        }

    def notes(self, problem: Problem) -> Sequence[str]:
        """Return on what sensitivity was measured."""
        _, windows = self.need_model(problem)
        used = windows[: self.windows, : self.length]
        return (f"sensitivity measured on {used.shape[0]} windows of {used.shape[1]} tokens",)


def grid_scores(own: Tensor, ratios: Sequence[float], rises: Sequence[float], ceiling: float) -> Tensor:
    """Return scores ``[min(out, in)]`` of a module's components from the losses measured at a grid of its ratios.

    Args:
        own: ``[min(out, in)]`` the ratio at which the module has as many components as each one's place.
        ratios: The grid, ascending.
        rises: The loss at each.
        ceiling: The highest loss of any module, above which components below the grid score.

    >>> grid_scores(torch.tensor([0.5, 1.0, 1.5, 2.0]), (0.5, 0.9), (3.0, 1.0), 5.0).tolist()
    [6.0, 1.0, 1.0, 1.0]
    """
    # Where a smaller ratio costs less than a larger one, the threshold reaches it first.
    least = torch.tensor(rises, dtype=torch.float64).cummin(0).values
    below = torch.searchsorted(torch.tensor(ratios, dtype=torch.float64), own.double() - 1e-9)
    return torch.where(below == 0, ceiling + ratios[0] / own, least[(below - 1).clamp_min(0)])
