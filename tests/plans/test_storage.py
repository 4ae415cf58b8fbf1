"""The cost of ranks: exact counts, their real-valued continuation and its inverse, for every choice of form."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_pl.plans.storage import Storage

SIZES = st.integers(1, 40)


def counted(choice, shape, rank, size):
    """The numbers of a layer on disk."""
    m, n = shape
    factored = rank * m + rank * n
    pivoted = rank * n + (m - rank) * rank + math.ceil(Fraction(4 * rank, size))
    return {"factored": factored, "pivoted": pivoted, "auto": min(factored, pivoted)}[choice]


@settings(deadline=None)
@given(st.sampled_from(["factored", "pivoted", "auto"]), SIZES, SIZES, st.sampled_from([2, 4]))
def test_costs_are_what_is_stored(choice, m, n, size):
    storage = Storage(choice, size)
    costs = [storage.cost((m, n), rank) for rank in range(1, min(m, n) + 1)]
    assert costs == [counted(choice, (m, n), rank, size) for rank in range(1, min(m, n) + 1)]
    assert costs == storage.costs((m, n), torch.arange(1, min(m, n) + 1).numpy()).tolist()
    smaller = [rank for rank in range(1, min(m, n)) if costs[rank - 1] < m * n]
    assert storage.break_even((m, n)) == max(smaller, default=0)
    # Of any two ranks below break-even the higher one takes more, or budgets could not be met step by step.
    assert all(a < b for a, b in pairwise(costs[: len(smaller)]))
    for rank in smaller:
        form = storage.form((m, n), rank)
        assert counted(form, (m, n), rank, size) == costs[rank - 1]
        assert choice in (form, "auto")


@settings(deadline=None)
@given(st.sampled_from(["factored", "pivoted"]), SIZES, SIZES, st.floats(0, 1.2))
def test_ratios_continue_costs_and_have_an_inverse(choice, m, n, ratio):
    storage = Storage(choice)
    ranks = torch.arange(1, min(m, n) + 1, dtype=torch.float64)
    exact = torch.tensor([counted(choice, (m, n), int(rank), 4) for rank in ranks], dtype=torch.float64)
    torch.testing.assert_close(storage.ratio((m, n), ranks), exact / (m * n))
    rank = storage.rank_at((m, n), ratio)
    assert 0 <= rank <= min(m, n)
    if rank < min(m, n):
        assert storage.ratio((m, n), torch.tensor(rank, dtype=torch.float64)).item() == pytest.approx(ratio, abs=1e-9)


def test_break_even_is_nearly_gone():
    shape = (576, 576)
    assert Storage("factored").break_even(shape) == 287
    assert Storage().break_even(shape) == 552
    assert int(Storage("factored").rank_at(shape, 0.8)) == 230
    assert int(Storage().rank_at(shape, 0.8)) == 317


def test_gradients_are_what_the_next_component_takes():
    rank = torch.tensor([3.0, 10.0], requires_grad=True)
    Storage().ratio((20, 30), rank).sum().backward()
    torch.testing.assert_close(rank.grad, (50 + 1 - 2 * rank.detach()) / 600)


def test_unknown_storage():
    with pytest.raises(ValueError, match="'dense': expected one of factored, pivoted, auto"):
        Storage("dense")
