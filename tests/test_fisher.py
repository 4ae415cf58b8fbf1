"""The Lagrangian allocation against all combinations of ranks, tried one by one."""

from __future__ import annotations

from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lowrank_pl.allocate import Problem, allocator
from lowrank_pl.budget import Budget
from lowrank_pl.sizes import resize

SHAPES = {"a": (6, 5), "b": (4, 9), "c": (7, 7)}


def spectrum(shape, seed, *, flat):
    """Descending singular values; with ``flat`` so slowly that dense beats the last ranks below it."""
    values = torch.rand(min(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * 0.2 + 1 if flat else values * 3).sort(descending=True).values


def draw(sigmas, keep, **constraints):
    budget = Budget(keep=keep, shapes=SHAPES, model_parameters=200, **constraints)
    factors = SimpleNamespace(sigma=sigmas.__getitem__, fingerprint={"kind": "two_sided"})
    return allocator("fisher").plan(Problem(budget, factors, None))


def sizes_of(shape, sigma, multiple, least):
    """Every allowed (rank or None, parameters, predicted loss)."""
    m, n = shape
    ranks = [k for k in range(1, min(m, n)) if k % multiple == 0 and k >= least and k * (m + n) < m * n]
    return [*((k, k * (m + n), sum(s.item() ** 2 for s in sigma[k:]) / 2) for k in ranks), (None, m * n, 0.0)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("multiple", "floor"), [(1, 0.0), (2, 0.0), (1, 0.6)])
def test_no_combination_of_ranks_does_better_at_any_budget_of_the_hull(seed, multiple, floor):
    sigmas = {n: spectrum(s, 10 * seed + i, flat=(seed + i) % 2 == 0) for i, (n, s) in enumerate(SHAPES.items())}
    floors = {"c": floor} if floor else {}
    ladders = [
        sizes_of(shape, sigmas[name], multiple, np.ceil(floor * 49 / 14) if name == "c" else 1)
        for name, shape in SHAPES.items()
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
    plans = {cost: draw(sigmas, cost / total, multiple_of=multiple, floors=floors) for cost in sorted(best)}
    for cost, plan in plans.items():
        least = min((loss, ranks) for spent, loss, ranks in combinations if spent <= cost)
        assert plan.kept_parameters == cost
        assert [module.rank for module in plan.modules.values()] == least[1]
    ranks = [[module.rank or 99 for module in plan.modules.values()] for plan in plans.values()]
    for smaller, larger in pairwise(ranks):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))
    # One order serves them all.
    largest = list(plans.values())[-1]
    for cost, plan in plans.items():
        assert resize(largest, cost / total).modules == plan.modules


def test_factors_of_another_kind_are_refused():
    factors = SimpleNamespace(fingerprint={"kind": "whitened"})
    budget = Budget(keep=0.5, shapes=SHAPES, model_parameters=200)
    with pytest.raises(
        ValueError,
        match=r"the allocator fisher was given factors of the kind 'whitened': expected two_sided "
        r"\(decomposition.kind\)",
    ):
        allocator("fisher").plan(Problem(budget, factors, None))
