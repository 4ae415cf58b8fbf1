"""ZS-SVD: components are dropped in an order in which their first-order changes of the loss cancel out."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.allocate.base import Allocator, Problem
from lowrank_pl.methods.allocate.zs_svd_correction import Rounds, check_reprofile, correct
from lowrank_pl.plans.plan import RankPlan

__all__ = ["ZSSVD", "drop_order", "first_order_changes"]


@dataclass(frozen=True)
class ZSSVD(Allocator):
    """The dropped components change the loss by zero in sum, to first order (ZS-SVD, arXiv 2602.02848).

    Every module offers its last component. The one that is dropped brings the running sum of the changes nearer to
    zero: the smallest rise while the sum is 0 or negative, otherwise the smallest fall. A component's score is its
    place in this order. The order does not depend on the budget, which counts what a drop saves as the paper does.

    An expert that no token of the calibration text reached has no gradient, and would be free. The mean gradient of
    the same layer of its block's experts stands in for it, and the plan notes how many there are (ours).

    Args:
        keep_rank_ratio: Fraction of its break-even rank below which a module offers nothing. The paper uses 0, and 0.3
            where it removes 60 %.
        rounds: How often the truncated weights are corrected and truncated again, as in ``zs_svd_correction``. The
            paper describes 1 round; the released code runs 5, with ``batch=1``, ``reprofile`` and ``random_batch``. The
            plan is then for the corrected factors, which its fingerprint and its ``origin["store"]`` name.
        batch: How many calibration sequences give the correction's gradients; the first ones.
        reprofile: Measure the statistics of the factors again in every round, in the model with the corrected weights
            and on all calibration sequences. By default all rounds use those of the dense model.
        random_batch: Draw the sequences for the step of each round at random.

    Raises:
        ValueError: A setting out of its range, or a setting of the correction without rounds.
    """

    keep_rank_ratio: float = 0.0
    rounds: int = 0
    batch: int = 8
    reprofile: bool = False
    random_batch: bool = False
    name: ClassVar[str] = "zs_svd"
    paper: ClassVar[str | None] = "2602.02848"
    former_names: ClassVar[tuple[str, ...]] = ("zero_sum",)
    needs_gradients: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.keep_rank_ratio <= 1:
            raise ValueError(f"keep_rank_ratio is {self.keep_rank_ratio}: expected a fraction in [0, 1]")
        if self.rounds < 0 or self.batch < 1:
            raise ValueError(f"rounds is {self.rounds}, batch {self.batch}: expected at least 0 rounds and 1 sequence")
        if self.rounds == 0 and (self.reprofile or self.random_batch or self.batch != ZSSVD.batch):
            raise ValueError(
                f"reprofile is {self.reprofile}, random_batch {self.random_batch}, batch {self.batch} and rounds 0: "
                "expected at least 1 round with them, since only the correction uses them"
            )

    def check_decomposition(self, decomposition: Decomposition) -> None:
        """Check the kind of factors, and that the statistics behind them can be measured again if that is asked for.

        Raises:
            ValueError: This method can't read such factors, or ``reprofile`` has nothing to measure again.
        """
        super().check_decomposition(decomposition)
        if self.reprofile:
            check_reprofile(decomposition)

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return every component's place in the order of drops; components below a module's floor come last."""
        return self._scores(problem, _changes(problem, _Gradients(problem)))

    def plan(self, problem: Problem) -> RankPlan:
        """Return the plan, which notes the sum of the changes; errors as in ``Allocator.plan``."""
        if self.rounds == 0:
            return self._plan(problem)
        _, sequences = self.need_model(problem)
        plan, factors = correct(
            self._plan(problem),
            problem.factors,
            problem,
            rounds=Rounds(self.rounds, self.batch, self.reprofile, self.random_batch),
            settings={"keep_rank_ratio": self.keep_rank_ratio},
            reallocate=lambda factors, gradients: self._plan(replace(problem, factors=factors, gradients=gradients)),
        )
        note = f"weights corrected in {self.rounds} rounds on {len(sequences[: self.batch])} sequences"
        note += " drawn at random" * self.random_batch + ", statistics measured again in each" * self.reprofile
        origin = {"store": str(factors.directory.resolve())}
        return replace(plan, origin=origin, fingerprint=factors.fingerprint, notes=(*plan.notes, note))

    def _plan(self, problem: Problem) -> RankPlan:
        self.check(problem)
        gradients = _Gradients(problem)
        changes = _changes(problem, gradients)
        plan = problem.budget.select(self._scores(problem, changes), method=self.name)
        total = sum(changes[n][module.rank :].sum().item() for n, module in plan.modules.items() if module.rank)
        note = f"first-order changes of the loss sum to {total:.3g} nats"
        return replace(plan, notes=(*plan.notes, note, *gradients.notes()))

    def _scores(self, problem: Problem, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return drop_order(changes, {name: self._floor(problem, name) for name in changes})

    def _floor(self, problem: Problem, name: str) -> int:
        """Return how many components ``name`` does not offer: at least the rank that the budget grants it anyway."""
        least = problem.budget.least_rank(name)
        # A module that must stay dense offers nothing.
        if least is None:
            return min(problem.budget.shapes[name])
        return max(least, math.ceil(self.keep_rank_ratio * problem.budget.break_even(name)))


class _Gradients:
    """The mean weight gradient of every module; that of its block's experts for experts that have none.

    Args:
        problem: The stored gradients, and the layers that belong to experts.

    Attributes:
        stood_in: Layers of experts without a gradient of their own, by name, so far as they were read.
    """

    def __init__(self, problem: Problem) -> None:
        assert problem.gradients is not None
        self._store = problem.gradients
        self._device = "cpu" if problem.model is None else problem.model.device
        self._of_experts = {target.name: target for target in problem.targets.modules if target.experts}
        self._alike: dict[str, list[str]] = defaultdict(list)
        for target in self._of_experts.values():
            self._alike[target.of_expert(0).name].append(target.name)
        self._means: dict[str, Tensor] = {}
        self.stood_in: set[str] = set()

    def of(self, name: str) -> Tensor:
        """Return the gradient ``[out, in]`` of a module, float32."""
        gradient = self._read(name)
        if name not in self._of_experts or gradient.any():
            return gradient
        self.stood_in.add(name)
        first = self._of_experts[name].of_expert(0).name
        if first not in self._means:
            # Only the last of them is asked for again: experts of a block follow each other.
            self._means = {first: self._mean(self._alike[first])}
        return self._means[first]

    def _read(self, name: str) -> Tensor:
        return self._store.read(name, "mean").to(self._device, torch.float32)

    def _mean(self, names: list[str]) -> Tensor:
        total = self._read(names[0])
        for name in names[1:]:
            total = total + self._read(name)
        return total / len(names)

    def notes(self) -> list[str]:
        """Return how many layers of experts had no gradient; nothing where all have one."""
        if not self.stood_in:
            return []
        return [
            f"{len(self.stood_in)} layers of experts that no calibration token reached count by the mean gradient of "
            "their block's experts"
        ]


def _changes(problem: Problem, gradients: _Gradients) -> dict[str, Tensor]:
    return {name: first_order_changes(problem, name, gradients) for name in problem.budget.shapes}


def first_order_changes(problem: Problem, name: str, gradients: _Gradients | None = None) -> Tensor:
    """Return the first-order change of the loss when each component ``[components]`` of a module is dropped.

    Dropping component ``i`` subtracts ``left[:, i] right[i]`` from the weight, for any kind of decomposition. With the
    mean weight gradient ``G``, the change is ``-left[:, i]' G right[i]``: ZS-SVD's ``-sigma_i dloss/dsigma_i``.
    """
    device = "cpu" if problem.model is None else problem.model.device
    factors = problem.factors.factors(name)
    gradient = (gradients or _Gradients(problem)).of(name)
    left, right = factors.left.to(device), factors.right.to(device)
    return -((left.mT @ gradient) * right).sum(1, dtype=torch.float64).cpu()


def drop_order(changes: Mapping[str, Tensor], floors: Mapping[str, int]) -> dict[str, Tensor]:
    """Return for each component ``[components]`` its place in the zero-sum order of drops, from 0.

    Args:
        changes: By module, the change of the loss when each component is dropped, in order of importance.
        floors: How many of its first components each module does not offer; these get larger numbers than all others.

    >>> drop_order({"a": torch.tensor([1.0, 0.2, -0.5]), "b": torch.tensor([2.0, 0.3])}, {"a": 1, "b": 1})
    {'a': tensor([6., 2., 1.], dtype=torch.float64), 'b': tensor([6., 0.], dtype=torch.float64)}
    """
    names = list(changes)
    values = [changes[name].tolist() for name in names]
    left = [len(value) for value in values]
    dropped = sum(max(0, count - floors[name]) for name, count in zip(names, left, strict=True))
    scores = [_above(dropped, count, floors[name]) for name, count in zip(names, left, strict=True)]
    rises: list[tuple[float, int]] = []
    falls: list[tuple[float, int]] = []

    def offer(module: int) -> None:
        if left[module] > floors[names[module]]:
            change = values[module][left[module] - 1]
            heapq.heappush(rises if change >= 0 else falls, (abs(change), module))

    for module in range(len(names)):
        offer(module)
    total = 0.0
    for place in range(dropped):
        heap = (rises or falls) if total <= 0 else (falls or rises)
        _, module = heapq.heappop(heap)
        left[module] -= 1
        total += values[module][left[module]]
        scores[module][left[module]] = place
        offer(module)
    return dict(zip(names, scores, strict=True))


def _above(places: int, count: int, floor: int) -> Tensor:
    """Return ``count`` scores above all ``places``; a budget below the floors shrinks all modules at one rate."""
    return (places or 1) * (1 + max(1, floor) / torch.arange(1, count + 1, dtype=torch.float64))
