"""D-Rank: ranks by effective rank, with a fraction of the queries' and keys' ranks moved to the values."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lowrank_pl.methods.allocate.base import Allocator, Problem
from lowrank_pl.methods.allocate.energy import energy_shares
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.component_order import requested_rank_scores
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.utils.checks import check_choices

__all__ = ["DRank", "Scope"]

Scope = Literal["type", "model"]
"""What shares one budget: the layers of one type, such as all ``up_proj``, or all layers of the model."""

_ALWAYS = ("q_proj", "k_proj", "v_proj")
"""Types that take the dynamic ranks in the authors' code whatever they lose."""

_NEVER = "gate"
"""What the names of types hold that keep uniform ranks in the authors' code whatever they would gain."""


@dataclass(frozen=True)
class DRank(Allocator):
    """Ranks are proportional to the square root of effective rank over cost (D-Rank, arXiv 2509.25622).

    These ranks minimise the sum of effective rank over rank at a given size. As in the authors' code, the layers of
    each type share a budget of their own, the type's uniform one. Queries, keys and values take these dynamic ranks.
    Gates keep uniform ranks. Any other type takes the dynamic ranks only where their truncation error, summed over its
    layers, is below that of uniform ranks. Then a fraction of what queries and keys keep moves to the values, in equal
    parts for all blocks. It is counted in parameters, which preserves the size under grouped-query attention too. A
    value layer takes at most what it costs dense; queries and keys get the rest back.

    Three details differ from the authors' code. It can concatenate layers of neighbouring blocks; here every layer has
    factors of its own. It rounds each rank and then repairs the size of each type; here ranks are rounded down, and the
    rest of the budget goes to the layers nearest to their next rank. It lets values cost more than their dense weight.

    Args:
        shift: Fraction that moves to the values; the paper advises 0.1 to 0.2.
        scope: ``type``, as above, or ``model``: one budget for all layers, dynamic ranks for all of them, and what
            queries and keys give stays in their block. This was the only rule at first.

    Raises:
        ValueError: ``shift`` lies outside [0, 1), or an unknown scope.
    """

    shift: float = 0.15
    scope: Scope = "type"
    name: ClassVar[str] = "drank"
    paper: ClassVar[str | None] = "2509.25622"

    def __post_init__(self) -> None:
        if not 0 <= self.shift < 1:
            raise ValueError(f"shift is {self.shift}: expected the fraction of q and k to move to v, in [0, 1)")
        check_choices({"scope": (self.scope, Scope)})

    def plan(self, problem: Problem) -> RankPlan:
        """Return the plan; errors as in ``Allocator.plan``."""
        self.check(problem)
        types = self._types(problem)
        return problem.budget.select(self._scores(problem, types), method=self.name, notes=self._notes(problem, types))

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return scores by which every module shrinks in proportion to its requested rank."""
        return self._scores(problem, self._types(problem))

    def notes(self, problem: Problem) -> Sequence[str]:
        """Return which types have dynamic ranks, and in how many attentions ranks were moved."""
        return self._notes(problem, self._types(problem))

    def _types(self, problem: Problem) -> _Types | None:
        return None if self.scope == "model" else _of_types(problem)

    def _scores(self, problem: Problem, types: _Types | None) -> dict[str, Tensor]:
        requested = self._over_the_model(problem) if types is None else self._with_values(problem, types.ranks)
        return {name: requested_rank_scores(shape, requested[name]) for name, shape in problem.budget.shapes.items()}

    def _notes(self, problem: Problem, types: _Types | None) -> list[str]:
        notes = []
        if types is not None:
            dynamic = types.dynamic
            uniform = [kind for kind in dynamic if not dynamic[kind]]
            notes.append(f"uniform ranks in {', '.join(uniform) or 'no type'}, dynamic ranks in the other types")
        if self.shift == 0:
            return notes
        count = len(_attentions(problem))
        if count == 0:
            return [
                *notes,
                "no block has q_proj, k_proj and v_proj among its targets: nothing was moved from q and k to v",
            ]
        return [*notes, f"{self.shift:.0%} of q and k was moved to v in {count} blocks"]

    def _over_the_model(self, problem: Problem) -> dict[str, float]:
        """Return ranks in the relation that the rule gives them, over all layers together."""
        shapes = problem.budget.shapes
        requested = {name: _weight(problem.budget, name, problem.sigma(name)) for name in shapes}
        for attention in _attentions(problem):
            moved = 0.0
            for part in ("q_proj", "k_proj"):
                moved += self.shift * requested[attention[part]] * sum(shapes[attention[part]])
                requested[attention[part]] *= 1 - self.shift
            requested[attention["v_proj"]] += moved / sum(shapes[attention["v_proj"]])
        return requested

    def _with_values(self, problem: Problem, ranks: Mapping[str, float]) -> dict[str, float]:
        """Return ``ranks`` after queries and keys gave a fraction of theirs to the values of all blocks."""
        budget, attentions = problem.budget, _attentions(problem)
        costs = {part: {a[part]: _cost(budget, a[part], ranks[a[part]]) for a in attentions} for part in _ALWAYS}
        given: dict[str, float] = {}
        for part in ("q_proj", "k_proj"):
            for name, cost in costs[part].items():
                costs[part][name] = _cost(budget, name, (1 - self.shift) * ranks[name])
                given[part] = given.get(part, 0.0) + cost - costs[part][name]
        rest = _add(budget, costs["v_proj"], sum(given.values()))
        for part, gave in given.items():
            if gave > 0:
                _add(budget, costs[part], rest * gave / sum(given.values()))
        moved = {name: _rank(budget, name, cost) for part in _ALWAYS for name, cost in costs[part].items()}
        return {**ranks, **moved}


class _Types(NamedTuple):
    """The rank of every layer, a real number, within the budget of its type; and which types are dynamic."""

    ranks: dict[str, float]
    dynamic: dict[str, bool]


def _effective_rank(sigma: Tensor) -> float:
    """Return ``exp(entropy)`` of the energy shares of singular values ``[components]``.

    >>> round(_effective_rank(torch.ones(5)), 6)
    5.0
    """
    shares = energy_shares(sigma)
    return math.exp(torch.special.entr(shares).sum().item())


def _weight(budget: Budget, name: str, sigma: Tensor) -> float:
    """Return the number that the dynamic rank of ``name`` is proportional to."""
    return math.sqrt(_effective_rank(sigma) / sum(budget.shapes[name]))


def _of_types(problem: Problem) -> _Types:
    budget = problem.budget
    types: dict[str, list[str]] = defaultdict(list)
    for target in problem.targets.modules:
        if target.name in budget.shapes:
            types[target.kind].append(target.name)
    ranks: dict[str, float] = {}
    dynamic: dict[str, bool] = {}
    for kind, names in types.items():
        uniform = {name: budget.rank_costs.rank_at(budget.shapes[name], budget.share) for name in names}
        sigmas = {name: problem.sigma(name) for name in names}
        proposed = _dynamic(budget, sigmas)
        last = kind.rpartition(".")[2]
        if last in _ALWAYS:
            dynamic[kind] = True
        else:
            dynamic[kind] = _NEVER not in last and _error(budget, sigmas, proposed) < _error(budget, sigmas, uniform)
        ranks |= proposed if dynamic[kind] else uniform
    return _Types(ranks, dynamic)


def _dynamic(budget: Budget, sigmas: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ranks in the relation that the rule gives them, which cost what uniform ranks cost."""
    weights = {name: _weight(budget, name, sigma) for name, sigma in sigmas.items()}
    target = budget.share * sum(math.prod(budget.shapes[name]) for name in sigmas)

    def at(factor: float) -> dict[str, float]:
        return {name: min(factor * weight, _dense_rank(budget, name)) for name, weight in weights.items()}

    # Costs grow with the factor, but not in proportion: dense is the most, and pivoted storage costs less and less.
    high = max(_dense_rank(budget, name) / weight for name, weight in weights.items())
    low = 0.0
    for _ in range(80):
        middle = (low + high) / 2
        found = sum(_cost(budget, name, rank) for name, rank in at(middle).items())
        low, high = (middle, high) if found < target else (low, middle)
    return at(high)


def _error(budget: Budget, sigmas: Mapping[str, Tensor], ranks: Mapping[str, float]) -> float:
    """Return the summed squared error of truncation at ``ranks``, rounded down; 0 where the layer is dense."""
    lost = 0.0
    for name, rank in ranks.items():
        # The addend undoes the rounding of bisection.
        whole = max(1, int(rank + 1e-6))
        if whole <= budget.break_even(name):
            lost += sigmas[name][whole:].double().square().sum().item()
    return lost


def _dense_rank(budget: Budget, name: str) -> float:
    return budget.rank_costs.rank_at(budget.shapes[name], 1.0)


def _cost(budget: Budget, name: str, rank: float) -> float:
    """Return the parameters of a real ``rank``."""
    shape = budget.shapes[name]
    return budget.rank_costs.ratio(shape, torch.tensor(rank, dtype=torch.float64)).item() * math.prod(shape)


def _rank(budget: Budget, name: str, cost: float) -> float:
    """Return the real rank that costs ``cost`` parameters."""
    shape = budget.shapes[name]
    return budget.rank_costs.rank_at(shape, cost / math.prod(shape))


def _add(budget: Budget, costs: dict[str, float], parameters: float) -> float:
    """Add ``parameters`` to ``costs`` in equal parts, none beyond dense; return what found no place."""
    rest = 0.0
    for name, cost in costs.items():
        more = cost + parameters / len(costs)
        costs[name] = min(more, float(math.prod(budget.shapes[name])))
        rest += more - costs[name]
    return rest if costs else parameters


def _attentions(problem: Problem) -> list[dict[str, str]]:
    """Return the names of ``q_proj``, ``k_proj`` and ``v_proj`` of every attention that has all three."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for target in problem.targets.modules:
        parent, _, last = target.name.rpartition(".")
        if last in ("q_proj", "k_proj", "v_proj") and target.name in problem.budget.shapes:
            found[parent][last] = target.name
    return [parts for parts in found.values() if len(parts) == 3]
