"""The budget of a plan: how requested ranks or scored components become whole ranks that meet it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lowrank_pl.models.names import without_expert
from lowrank_pl.plans.component_order import ComponentOrder, requested_rank_scores
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.plans.storage import Storage, StorageChoice
from lowrank_pl.utils.checks import check_counts

__all__ = ["Budget", "check_keep"]

_log = logging.getLogger(__name__)

Shape = tuple[int, int]


@dataclass(frozen=True)
class Budget:
    """The number of parameters that a model's targeted modules may keep, and the ranks that each may have.

    Args:
        keep: Fraction of the targeted parameters to keep, in (0, 1].
        shapes: ``(out, in)`` of every targeted module by name, in the model's order.
        model_parameters: Parameters of the whole dense model, ``left_out`` included.
        bytes_per_parameter: Bytes of one stored number.
        multiple_of: Every rank is a multiple of this; modules too small for one multiple stay dense.
        floors: Least kept fraction by glob on the module's name; 1.0 keeps the matching modules dense.
        storage: How low-rank modules are stored, which determines the cost of a rank.
        left_out: Parameters that width pruning has removed from the modules; ``keep`` is a fraction of all, with these.
        embeddings: Names of the modules that are embeddings or a head, which are stored as two factors in any case.
        alike_experts: Whether the experts of a block get equal ranks. The score of a step is then the mean over the
            experts: with scores in nats a parameter, what the step saves in all of them over what it costs.
        drop_experts: Whether a method may choose experts to drop.
        dropped: Names of the modules of the experts that are dropped.
        stacks: Names of layers by the name in ``shapes`` of the matrix whose rows they are, one layer below the other.
            Its right factor is theirs in common, so it is stored as two factors in any case.

    Raises:
        ValueError: ``keep`` lies outside (0, 1], a floor lies outside [0, 1] or matches nothing, the floors need more
            than ``keep``, experts that are to be alike have different floors or don't exist, or layers of a stack have
            different floors.

    Example:
        >>> budget = Budget(keep=0.5, shapes={"a": (8, 8), "b": (8, 8)}, model_parameters=128, storage="factored")
        >>> plan = budget.fit({"a": 3.0, "b": 1.0}, method="hand")
        >>> [module.rank for module in plan.modules.values()], plan.keep_targeted
        ([3, 1], 0.5)
    """

    keep: float
    shapes: Mapping[str, Shape]
    model_parameters: int
    bytes_per_parameter: int = 4
    multiple_of: int = 1
    floors: Mapping[str, float] = field(default_factory=dict)
    storage: StorageChoice = "auto"
    left_out: int = 0
    embeddings: tuple[str, ...] = ()
    alike_experts: bool = False
    drop_experts: bool = False
    dropped: frozenset[str] = frozenset()
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_counts({"multiple_of": self.multiple_of})
        for pattern, floor in self.floors.items():
            if not 0 <= floor <= 1:
                raise ValueError(f"the floor of {pattern!r} is {floor}: expected a fraction in [0, 1]")
            if not any(fnmatchcase(layer, pattern) for name in self.shapes for layer in self.stacks.get(name, (name,))):
                raise ValueError(f"the floor pattern {pattern!r} matches none of the {len(self.shapes)} modules")
        if self.alike_experts and (self.drop_experts or self.dropped):
            raise ValueError(
                "experts can't both be alike and be dropped, since dropping chooses among experts by what each costs: "
                "leave out alike_experts or drop_experts"
            )
        if self.alike_experts and len(self.units) == len(self.shapes):
            raise ValueError("alike_experts is true, but no two modules are of experts of one block: leave it out")
        for unit in self.units:
            if len({self.least_rank(name) for name in unit}) > 1:
                raise ValueError(
                    f"alike_experts is true, but a floor holds for {unit[0]} or another expert of its block only: give "
                    "patterns that match all experts of a block, or leave alike_experts out"
                )
        for name, layers in self.stacks.items():
            if len({self.floor(layer) for layer in layers}) > 1:
                raise ValueError(
                    f"a floor holds for some of the layers of {name} only, which share a right factor: give patterns "
                    "that match all experts of a block, or leave shared_experts out"
                )
        least = sum(self.cost(name, self.least_rank(name)) for name in self.shapes)
        if least > self.limit:
            raise ValueError(
                f"keep {self.keep} allows {self.limit:,} parameters, but the floors and multiple_of "
                f"{self.multiple_of} need at least {least:,} (keep {least / self.total:.4f}): raise keep or lower them"
            )

    @cached_property
    def units(self) -> tuple[tuple[str, ...], ...]:
        """The modules that have one rank: each by itself, or the same matrix of all experts of a block together."""
        found: dict[tuple[str, bool, Shape], list[str]] = {}
        for name, shape in self.shapes.items():
            unit = without_expert(name) if self.alike_experts else name
            found.setdefault((unit, unit == name, shape), []).append(name)
        return tuple(map(tuple, found.values()))

    @property
    def present(self) -> int:
        """Parameters of the targeted modules when all are dense."""
        return sum(m * n for m, n in self.shapes.values())

    @property
    def total(self) -> int:
        """Parameters of the targeted modules when all are dense, with those that width pruning has removed."""
        return self.present + self.left_out

    @property
    def limit(self) -> int:
        """Parameters that the targeted modules may keep."""
        # The small addend undoes the rounding of products such as 0.7 * 10 == 7.000000000000001 or 6.999...
        return min(self.present, math.floor(self.keep * self.total + 1e-6))

    @property
    def share(self) -> float:
        """``keep`` as a fraction of ``present``: larger than ``keep`` for a pruned base, at most 1."""
        return min(1.0, self.keep * self.total / self.present) if self.left_out else self.keep

    def cost(self, name: str, rank: int | None) -> int:
        """Return the parameters of module ``name`` at ``rank``, indices of pivots included; ``None`` is dense."""
        shape = self.shapes[name]
        return shape[0] * shape[1] if rank is None else self.costs_of(name).cost(shape, rank)

    def costs(self, name: str, sizes: Sequence[int | None]) -> NDArray[np.int64]:
        """Return the cost of each of ``sizes`` of module ``name``."""
        m, n = self.shapes[name]
        ranks = np.array([0 if size is None else size for size in sizes], dtype=np.int64)
        return np.where([size is None for size in sizes], m * n, self.costs_of(name).costs((m, n), ranks))

    @cached_property
    def rank_costs(self) -> Storage:
        """The cost of ranks of linear layers of the blocks."""
        return Storage(self.storage, self.bytes_per_parameter)

    def costs_of(self, name: str) -> Storage:
        """Return the cost of ranks of module ``name``."""
        factored = name in self.embeddings or name in self.stacks
        return Storage("factored", self.bytes_per_parameter) if factored else self.rank_costs

    def break_even(self, name: str) -> int:
        """Return the largest rank of ``name`` that costs less than its dense weight; 0 if there is none."""
        return self.costs_of(name).break_even(self.shapes[name])

    def top_rank(self, name: str) -> int:
        """Return the largest allowed rank of ``name`` below dense; 0 if only dense is allowed."""
        return self.break_even(name) // self.multiple_of * self.multiple_of

    def floor(self, name: str) -> float:
        """Return the least kept fraction of the layer ``name``."""
        return max((f for pattern, f in self.floors.items() if fnmatchcase(name, pattern)), default=0.0)

    def least_rank(self, name: str) -> int | None:
        """Return the smallest allowed rank of ``name``; ``None`` if it must stay dense, 0 if it is dropped."""
        if name in self.dropped:
            return 0
        floor = self.floor(next(iter(self.stacks.get(name, ())), name))
        wanted = max(1, math.ceil(self.costs_of(name).rank_at(self.shapes[name], floor) - 1e-9))
        rank = math.ceil(wanted / self.multiple_of) * self.multiple_of
        return rank if floor < 1 and rank <= self.top_rank(name) else None

    def fit(self, requested: Mapping[str, float], *, method: str) -> RankPlan:
        """Return the plan nearest to the requested ranks that meets the budget to within one rank step.

        Finite ranks are scaled by one common factor (ARA's rule) and rounded down to allowed ranks. The rest of the
        budget goes to the modules nearest to their next component, until no further step fits. In the plan's component
        order, modules requested dense stay dense at this size and above, and shrink with the others below it.

        Args:
            requested: The requested rank of every module, a real number; ``math.inf`` requests dense and is not scaled.
            method: Name of the method that requests these ranks.

        Raises:
            ValueError: A rank is missing, belongs to no module, or is negative or NaN.
        """
        self._check_names(requested, "requested rank")
        for name, rank in requested.items():
            if math.isnan(rank) or rank < 0:
                raise ValueError(f"the requested rank of {name} is {rank}: expected a number of at least 0")
        notes = []
        requested = self._alike(requested)
        least = {name: self.least_rank(name) if math.isfinite(rank) else None for name, rank in requested.items()}
        if sum(self.cost(name, rank) for name, rank in least.items()) > self.limit:
            dropped = sum(math.isinf(rank) for rank in requested.values())
            even = {name: self.costs_of(name).rank_at(shape, 1.0) for name, shape in self.shapes.items()}
            requested = {name: even[name] if math.isinf(rank) else rank for name, rank in requested.items()}
            said = "were requested dense, which the budget does not allow: scaled like the rest"
            notes.append(f"{dropped} modules {said}")
        order = ComponentOrder(
            {name: requested_rank_scores(shape, requested[name]) for name, shape in self.shapes.items()}
        )
        chosen = self._choose(order)
        order = self._with_finite_requests(order, requested, chosen.threshold)
        # If all modules came out dense, the factor means nothing.
        if 0 < chosen.threshold < math.inf and any(size is not None for size in chosen.sizes.values()):
            notes.append(f"requested ranks scaled by {1 / chosen.threshold:.4f} to meet keep {self.keep}")
        return self._plan(chosen.sizes, order, method, notes)

    def select(
        self,
        scores: Mapping[str, Tensor],
        *,
        method: str,
        notes: Iterable[str] = (),
        within: Mapping[str, ModulePlan] | None = None,
        beyond: Mapping[str, ModulePlan] | None = None,
    ) -> RankPlan:
        """Return the plan of the highest-scored components that meets the budget to within one rank step.

        Components are taken one by one, highest score first. Each costs what it adds to its module; beyond break-even,
        the module becomes dense and further components cost nothing (the accounting of ZS-SVD, arXiv 2602.02848). A
        component that no longer fits closes its module. The plan carries the scores, so that other sizes follow from it
        (the score map of ACIP, arXiv 2502.01717).

        Args:
            scores: Scores of the first components of every module, at most ``min(out, in)``; components without a
                score come last. Higher scores are kept longer, across modules. Among equal scores, the component
                nearer to the start of its module is kept.
            method: Name of the method that made the scores.
            notes: Notes for the plan.
            within: Modules of a larger plan, whose ranks are upper bounds.
            beyond: Modules of a smaller plan, whose ranks are lower bounds even where ``multiple_of`` or ``floors``
                forbid them.

        Raises:
            ValueError: Scores are missing, belong to no module, are too many or NaN, or ``beyond`` costs too much.

        Example:
            >>> import torch
            >>> budget = Budget(keep=0.5, shapes={"a": (8, 8), "b": (8, 8)}, model_parameters=128, storage="factored")
            >>> plan = budget.select({"a": torch.tensor([9.0, 1, 8]), "b": torch.tensor([7.0, 6.0])}, method="hand")
            >>> [(module.rank, module.indices) for module in plan.modules.values()]
            [(2, (0, 2)), (2, None)]
        """
        order = self.order(scores)
        return self._plan(self.sizes(order.scores, within=within, beyond=beyond), order, method, list(notes))

    def sizes(
        self,
        scores: Mapping[str, Tensor],
        *,
        within: Mapping[str, ModulePlan] | None = None,
        beyond: Mapping[str, ModulePlan] | None = None,
    ) -> dict[str, int | None]:
        """Return the rank of every module (``None`` is dense) in the plan of ``select``, without making the plan."""
        return self._choose(self.order(scores), within=within, beyond=beyond).sizes

    def order(self, scores: Mapping[str, Tensor]) -> ComponentOrder:
        """Return the order of components by ``scores``.

        Raises:
            ValueError: A module without scores or with too many, or scores of no module.
        """
        self._check_names(scores, "scores")
        for name, shape in self.shapes.items():
            if (given := scores[name].numel()) > min(shape):
                raise ValueError(f"{name} of shape {shape} has {given} scores: expected {min(shape)} or fewer")
        return ComponentOrder(scores)

    def _choose(
        self,
        order: ComponentOrder,
        *,
        within: Mapping[str, ModulePlan] | None = None,
        beyond: Mapping[str, ModulePlan] | None = None,
    ) -> _Choice:
        """Return the sizes that follow from ``order``, and the score of the last component before one did not fit."""
        units = self.units
        ladders = [self._common_ladder(unit, within, beyond) for unit in units]
        rest = self.limit - sum(
            len(unit) * self.cost(unit[0], ladder[0]) for unit, ladder in zip(units, ladders, strict=True)
        )
        if rest < 0:
            raise ValueError(
                f"the smaller plan has {-rest:,} parameters more than keep {self.keep} allows: give a smaller one, or "
                f"raise keep to {math.ceil(1e4 * (self.limit - rest) / self.total) / 1e4}"
            )
        value, owner_of, cost, sequence = self._steps(order, ladders)
        spent = np.cumsum(cost[sequence])
        fitting = int(np.searchsorted(spent, rest, side="right"))
        rest -= int(spent[fitting - 1]) if fitting else 0
        taken = np.bincount(owner_of[sequence[:fitting]], minlength=len(units))
        closed: set[int] = set()
        for step in sequence[fitting:]:
            owner = int(owner_of[step])
            if owner in closed or cost[step] > rest:
                closed.add(owner)
                if len(closed) == len(units):
                    break
                continue
            taken[owner] += 1
            rest -= int(cost[step])
        chosen = {
            name: ladder[count] for unit, ladder, count in zip(units, ladders, taken, strict=True) for name in unit
        }
        sizes = {name: chosen[name] for name in self.shapes}
        in_a_row = value[sequence[:fitting]]
        finite = in_a_row[np.isfinite(in_a_row)]
        return _Choice(sizes, float(finite[-1]) if len(finite) else math.inf)

    def _steps(
        self, order: ComponentOrder, ladders: Sequence[Sequence[int | None]]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the score, the unit and the cost of every step of every ladder, and the order of the steps."""
        values, owners, steps, places = [], [], [], []
        for owner, (unit, ladder) in enumerate(zip(self.units, ladders, strict=True)):
            name = unit[0]
            dense = self.break_even(name) + 1
            # Dense stands for the first rank beyond break-even: further components cost nothing.
            reached = np.array([dense if size is None else size for size in ladder[1:]], dtype=np.int64)
            ranked = np.full((len(unit), min(self.shapes[name]) + 1), -np.inf, dtype=np.float32)
            for row, member in zip(ranked, unit, strict=True):
                scores = order.scores[member]
                row[: len(scores)] = np.sort(scores.numpy())[::-1]
            ranked = ranked.mean(axis=0) if len(unit) > 1 else ranked[0]
            values.append(ranked[reached - 1])
            owners.append(np.full(len(reached), owner, dtype=np.int64))
            costs = self.costs(name, ladder)
            steps.append(len(unit) * (costs[1:] - costs[:-1]))
            places.append(reached / dense)
        value, owner_of, cost = np.concatenate(values), np.concatenate(owners), np.concatenate(steps)
        # Equal scores go by position: in the order of modules, the first module would be filled before the last.
        return value, owner_of, cost, np.lexsort((np.concatenate(places), -value))

    def _common_ladder(
        self,
        unit: Sequence[str],
        within: Mapping[str, ModulePlan] | None,
        beyond: Mapping[str, ModulePlan] | None,
    ) -> list[int | None]:
        """Return the allowed sizes of the modules of a unit."""
        ladders = [
            self._ladder(name, within[name] if within else None, beyond[name] if beyond else None) for name in unit
        ]
        if any(ladder != ladders[0] for ladder in ladders):
            raise ValueError(
                f"the experts' ranks are to be alike, but those of {unit[0]} and of other experts of its block differ "
                'in the plan: make them equal, or take "alike_experts" out of the plan\'s constraints'
            )
        return ladders[0]

    def _alike(self, requested: Mapping[str, float]) -> dict[str, float]:
        """Return the requested ranks, with the mean of a unit for each of its modules."""
        found = dict(requested)
        for unit in self.units:
            ranks = [requested[name] for name in unit]
            if len(set(ranks)) > 1:
                even = self.rank_costs.rank_at(self.shapes[unit[0]], 1.0)
                found |= dict.fromkeys(unit, sum(min(rank, even) for rank in ranks) / len(ranks))
        return found

    def _ladder(self, name: str, most: ModulePlan | None, least: ModulePlan | None) -> list[int | None]:
        """Return the allowed sizes of ``name`` in ascending order; ``None`` is dense.

        ``least`` and ``most`` may come from a plan edited by hand, so they hold even where they are not allowed.
        """
        first = self.least_rank(name)
        if first == 0:
            return [0]
        ranks: list[int] = [] if first is None else list(range(first, self.top_rank(name) + 1, self.multiple_of))
        if most is not None and most.rank is not None:
            return [rank for rank in ranks if rank <= most.rank] or [most.rank]
        if least is None:
            return [*ranks, None]
        if least.rank is None:
            return [None]
        more = [rank for rank in ranks if rank > least.rank]
        return [least.rank, *more, *([None] if least.rank <= self.break_even(name) else [])]

    def _plan(
        self, sizes: Mapping[str, int | None], order: ComponentOrder, method: str, notes: Sequence[str]
    ) -> RankPlan:
        too_small = [name for name in self.shapes if self.top_rank(name) == 0 and name not in self.dropped]
        notes = [*(f"{name}: too small for a rank of {self.multiple_of}, left dense" for name in too_small), *notes]
        for note in notes:
            _log.info("%s: %s", method, note)
        modules = {}
        for name, size in sizes.items():
            shape = self.shapes[name]
            form = "factored" if not size else self.costs_of(name).form(shape, size)
            chosen = ModulePlan.of_highest(shape, size, order.scores[name], storage=form)
            modules[name] = replace(chosen, layers=self.stacks.get(name, ()))
        return RankPlan(
            method=method,
            keep=self.keep,
            modules=modules,
            model_parameters=self.model_parameters,
            bytes_per_parameter=self.bytes_per_parameter,
            notes=tuple(notes),
            order=order,
            multiple_of=self.multiple_of,
            floors=dict(self.floors),
            storage=self.storage,
            left_out=self.left_out,
            embedded=self.embeddings,
            alike_experts=self.alike_experts,
        )

    def _with_finite_requests(
        self, order: ComponentOrder, requested: Mapping[str, float], threshold: float
    ) -> ComponentOrder:
        """Return ``order`` with the modules requested dense scored just high enough to be dense at ``threshold``.

        Infinite scores would keep these modules dense in smaller plans too, until nothing were left for the others.
        """
        if not math.isfinite(threshold):
            finite = [float(order.scores[name].max()) for name, rank in requested.items() if math.isfinite(rank)]
            threshold = max([1.0, *finite])
        scores = dict(order.scores)
        for name, rank in requested.items():
            if math.isinf(rank):
                shape = self.shapes[name]
                # Slightly above, so that no component of another module comes between.
                just_dense = (self.break_even(name) + 1) * max(threshold, 1e-30) * (1 + 1e-6)
                scores[name] = requested_rank_scores(shape, just_dense)
        return ComponentOrder(scores)

    def _check_names(self, given: Mapping[str, Any], what: str) -> None:
        missing = [name for name in self.shapes if name not in given]
        if missing:
            others = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise ValueError(f"{what} missing for {missing[0]}{others}: expected an entry for every module")
        for name in given:
            if name not in self.shapes:
                raise ValueError(
                    f"{what} given for {name}: expected one of the {len(self.shapes)} modules, such as "
                    f"{next(iter(self.shapes))}"
                )


@dataclass(frozen=True)
class _Choice:
    """The size of every module (``None`` is dense), and the lowest score of the steps taken before one did not fit."""

    sizes: dict[str, int | None]
    threshold: float


def check_keep(keep: float) -> None:
    """Check that ``keep`` is a fraction of parameters kept.

    Raises:
        ValueError: ``keep`` lies outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}: expected the fraction of parameters to keep, above 0 and at most 1")
