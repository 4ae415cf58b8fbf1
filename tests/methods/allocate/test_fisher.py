"""The Lagrangian allocation against all combinations of ranks, tried one by one."""

from __future__ import annotations

from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.base import Problem
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.resize import nested

SHAPES = {"a": (6, 5), "b": (4, 9), "c": (7, 7)}


def spectrum(shape, seed, *, flat):
    """Descending singular values; with ``flat`` so slowly that dense beats the last ranks below it."""
    values = torch.rand(min(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * 0.2 + 1 if flat else values * 3).sort(descending=True).values


def draw(sigmas, keep, **constraints):
    budget = Budget(keep=keep, shapes=SHAPES, model_parameters=200, **constraints)
    factors = SimpleNamespace(sigma=sigmas.__getitem__, fingerprint={"kind": "two_sided"})
    return make_allocator("fisher").plan(Problem(budget, factors, None))


def sizes_of(shape, sigma, multiple, least, storage):
    """Every allowed (rank or None, parameters, predicted loss); an index takes as much as a parameter."""
    m, n = shape
    cost = {k: k * (m + n) if storage == "factored" else k * (m + n - k) + k for k in range(1, min(m, n))}
    ranks = [k for k in cost if k % multiple == 0 and k >= least and cost[k] < m * n]
    return [*((k, cost[k], sum(s.item() ** 2 for s in sigma[k:]) / 2) for k in ranks), (None, m * n, 0.0)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("storage", "multiple", "least"),
    [("factored", 1, 1), ("factored", 2, 1), ("factored", 1, 3), ("pivoted", 1, 1), ("auto", 2, 1), ("pivoted", 1, 3)],
)
def test_no_combination_of_ranks_does_better_at_any_budget_of_the_hull(seed, storage, multiple, least):
    sigmas = {n: spectrum(s, 10 * seed + i, flat=(seed + i) % 2 == 0) for i, (n, s) in enumerate(SHAPES.items())}
    # The fraction that three components of a 7 x 7 weight take.
    floors = {"c": (42 if storage == "factored" else 36) / 49} if least > 1 else {}
    ladders = [
        sizes_of(shape, sigmas[name], multiple, least if name == "c" else 1, storage) for name, shape in SHAPES.items()
    ]
    combinations = [
        (sum(cost for _, cost, _ in chosen), sum(loss for _, _, loss in chosen), [rank for rank, _, _ in chosen])
        for chosen in product(*ladders)
    ]
    total = sum(m * n for m, n in SHAPES.values())
    best = {
        min(combinations, key=lambda entry: entry[1] + price * entry[0])[0] for price in np.geomspace(1e-5, 1e2, 4000)
    }
    assert len(best) > 3
    plans = {
        cost: draw(sigmas, cost / total, multiple_of=multiple, floors=floors, storage=storage) for cost in sorted(best)
    }
    for cost, plan in plans.items():
        lowest = min((loss, ranks) for spent, loss, ranks in combinations if spent <= cost)
        assert plan.kept_parameters == cost
        assert [module.rank for module in plan.modules.values()] == lowest[1]
    ranks = [[module.rank or 99 for module in plan.modules.values()] for plan in plans.values()]
    for smaller, larger in pairwise(ranks):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))
    # One order serves them all.
    largest = list(plans.values())[-1]
    for cost, plan in plans.items():
        assert nested(largest, [cost / total])[cost / total].modules == plan.modules


def test_factors_of_another_kind_are_refused():
    factors = SimpleNamespace(fingerprint={"kind": "whitened"})
    budget = Budget(storage="factored", keep=0.5, shapes=SHAPES, model_parameters=200)
    with pytest.raises(ValueError, match=r"'whitened'.*expected two_sided \(decomposition\.kind\)"):
        make_allocator("fisher").plan(Problem(budget, factors, None))
