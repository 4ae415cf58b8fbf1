"""Which experts to drop: the Lagrangian choice between an expert's ranks and what its tokens lose without it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.convex_hull import Hull, hull_of, losses_by_rank, predicted_scores

__all__ = ["PREDICTED", "Dropping", "ExpertLosses", "choose_dropped"]

PREDICTED = "predicted loss in nats with dropped experts:"
"""How the note of a plan begins on what its size is predicted to lose."""


@dataclass(frozen=True, eq=False)
class ExpertLosses:
    """The predicted losses of dropping experts of one block.

    Args:
        single: ``[experts]`` predicted loss in nats when one expert is dropped.
        both: ``[experts, experts]`` what two experts cost together more than alone, because tokens chose both of them.
        chosen: How many experts a token chooses; as many are kept.
        matrices: The names of the matrices of those experts that may be dropped, by number.
    """

    single: NDArray[np.float64]
    both: NDArray[np.float64]
    chosen: int
    matrices: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class Dropping:
    """A choice of experts to drop.

    Args:
        modules: Names of their matrices.
        experts: How many they are.
        among: How many could have been dropped.
        dropping_loss: Predicted loss in nats of dropping them.
        loss: Predicted loss in nats of the whole plan, with ``dropping_loss``.
        loss_without: Predicted loss in nats of the plan that drops none.
    """

    modules: frozenset[str]
    experts: int
    among: int
    dropping_loss: float
    loss: float
    loss_without: float

    def sentences(self) -> list[str]:
        """Return what was dropped, and what it is predicted to cost at this size."""
        if not self.experts:
            return [f"dropped none of {self.among} experts: that would not lower the predicted loss"]
        return [
            f"dropped {self.experts} of {self.among} experts, whose tokens use the other experts that they chose",
            f"{PREDICTED} {self.dropping_loss:.4g} by dropping, {self.loss:.4g} in all, {self.loss_without:.4g} if "
            "none were dropped",
        ]


def choose_dropped(budget: Budget, sigma: Callable[[str], Tensor], losses: Mapping[str, ExpertLosses]) -> Dropping:
    """Return the experts to drop at the size of ``budget``.

    For a multiplier ``lambda`` (nats a parameter), an expert is dropped where that loses at most the least sum, over
    the ranks of its matrices, of their predicted loss and ``lambda`` times their parameters. Experts are dropped in the
    order of the multipliers from which on this holds. Dropping one raises the loss of dropping those that tokens chose
    together with it, and these are ordered anew. The number of experts is that at which the multiplier of the budget,
    spent on all others, meets this order; of it and its neighbours, and of none, the one with the lowest predicted loss
    is taken, so that the loss is never above that of a plan without dropping. Of each block, as many experts are kept
    as a token chooses, so that few tokens can be left with none. Experts with a floor are kept.

    Args:
        budget: How many parameters to keep, and of which modules.
        sigma: Returns the singular values ``[components]`` of a module's two-sided factors; half their squares are
            losses in nats.
        losses: The predicted losses of dropping experts, by module of experts.
    """
    return _Choice(budget, sigma, losses).best()


class _Choice:
    def __init__(self, budget: Budget, sigma: Callable[[str], Tensor], losses: Mapping[str, ExpertLosses]) -> None:
        self.budget, self.sigma, self.losses = budget, sigma, losses
        self.hulls = {name: hull_of(budget, name, sigma(name)) for name in budget.shapes}
        self.free = {
            (block, number): names
            for block, of_block in losses.items()
            for number, names in of_block.matrices.items()
            if not any(budget.floor(name) for name in names)
        }
        self.curves = {expert: _curve([self.hulls[name] for name in names]) for expert, names in self.free.items()}

    def best(self) -> Dropping:
        """Return the choice with the lowest predicted loss among those where the multipliers meet."""
        order = [*self._in_order()]
        # Whoever drops an expert with a low multiplier has dropped those before it.
        needed = np.maximum.accumulate([multiplier for _, multiplier, _ in order]) if order else np.zeros(0)
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if self._multiplier([expert for expert, _, _ in order[:middle]]) >= needed[middle]:
                low = middle + 1
            else:
                high = middle
        counts = sorted({0, *(count for count in (low - 1, low, low + 1) if 0 <= count <= len(order))})
        found = {count: self._planned(order[:count]) for count in counts}
        # The first of equals: an expert that saves nothing stays.
        count = min(counts, key=lambda count: sum(found[count][:2]))
        dropping, loss, modules = found[count]
        return Dropping(modules, count, len(self.free), dropping, dropping + loss, sum(found[0][:2]))

    def _in_order(self) -> Iterator[tuple[tuple[str, int], float, float]]:
        """Yield experts in the order in which they are dropped, with the multiplier and the loss of each."""
        losses = {expert: float(self.losses[expert[0]].single[expert[1]]) for expert in self.free}
        left = {block: len(one.single) - max(1, one.chosen) for block, one in self.losses.items()}
        waiting = [(self._threshold(expert, losses[expert]), expert) for expert in self.free]
        heapq.heapify(waiting)
        done: set[tuple[str, int]] = set()
        current = {expert: multiplier for multiplier, expert in waiting}
        while waiting:
            multiplier, expert = heapq.heappop(waiting)
            block, number = expert
            if expert in done or current[expert] != multiplier or not left[block]:
                continue
            done.add(expert)
            left[block] -= 1
            yield expert, multiplier, losses[expert]
            for other in self.free:
                if other[0] == block and other not in done and (more := self.losses[block].both[number, other[1]]):
                    # Of three experts of a token these sums are no longer exact; nothing is gained by dropping one.
                    losses[other] = max(0.0, losses[other] + float(more))
                    current[other] = self._threshold(other, losses[other])
                    heapq.heappush(waiting, (current[other], other))

    def _threshold(self, expert: tuple[str, int], loss: float) -> float:
        """Return the multiplier from which on an expert is dropped that loses ``loss``."""
        multipliers, costs = self.curves[expert]
        if loss <= 0:
            return 0.0
        if loss > costs[-1]:
            # Beyond the last multiplier, all matrices have their least rank.
            slope = (costs[-1] - costs[-2]) / (multipliers[-1] - multipliers[-2])
            return float(multipliers[-1] + (loss - costs[-1]) / slope)
        return float(np.interp(loss, costs, multipliers))

    def _multiplier(self, dropped: Sequence[tuple[str, int]]) -> float:
        """Return the nats a parameter at which the modules of other experts spend the budget; 0 if all are dense."""
        gone = np.isin(self._owners, [self._places[name] for expert in dropped for name in self.free[expert]])
        least = sum(hull.costs[0] for hull in self.hulls.values())
        least -= sum(self.hulls[name].costs[0] for expert in dropped for name in self.free[expert])
        spent = least + np.cumsum(np.where(gone, 0.0, self._costs))
        over = int(np.searchsorted(spent, self.budget.limit, side="right"))
        return float(self._slopes[over]) if over < len(spent) else 0.0

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.hulls)}

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        slopes = np.concatenate([hull.slopes for hull in self.hulls.values()])
        costs = np.concatenate([np.diff(hull.costs) for hull in self.hulls.values()])
        owners = np.repeat(np.arange(len(self.hulls)), [len(hull.slopes) for hull in self.hulls.values()])
        order = np.argsort(-slopes, kind="stable")
        return slopes[order], costs[order], owners[order]

    @property
    def _slopes(self) -> NDArray[np.float64]:
        return self._sorted[0]

    @property
    def _costs(self) -> NDArray[np.float64]:
        return self._sorted[1]

    @property
    def _owners(self) -> NDArray[np.int64]:
        return self._sorted[2]

    def _planned(self, dropped: Sequence[tuple[tuple[str, int], float, float]]) -> tuple[float, float, frozenset[str]]:
        """Return the loss of dropping, that by the ranks of all others at the budget, and the dropped modules."""
        modules = frozenset(name for expert, _, _ in dropped for name in self.free[expert])
        budget = replace(self.budget, dropped=modules)
        sizes = budget.sizes(predicted_scores(budget, self.sigma))
        kept = {name: size for name, size in sizes.items() if name not in modules and size is not None}
        loss = sum(float(losses_by_rank(self.sigma(name))[size]) for name, size in kept.items())
        return math.fsum(dropping for _, _, dropping in dropped), loss, modules


def _curve(hulls: Sequence[Hull]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return multipliers, ascending from 0, and the least loss plus multiplier times parameters of matrices at each.

    Between them, that sum is linear in the multiplier.
    """
    slopes = np.unique(np.concatenate([[0.0], *(hull.slopes for hull in hulls)]))
    multipliers = np.append(slopes, 2 * slopes[-1] or 1.0)
    return multipliers, np.sum([hull.least(multipliers) for hull in hulls], axis=0)
