"""Pivoted forms are as exact as their type allows, whatever the factors look like."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_pl.factors import pivoting as module
from lowrank_pl.factors.pivoting import Pivoted, pivot
from lowrank_pl.models.hf_layers import PivotedLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = ["random", "spread", "nearly dependent", "dependent columns", "zero rows", "repeated rows", "scaled rows"]


def factors(kind, m, n, k, seed=0):
    """Factors of shapes ``[m, k]`` and ``[k, n]`` that are hard in some way."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = random(m, k), random(k, n)
    if kind == "spread":
        sigma = torch.logspace(0, -8, k, dtype=torch.float64).sqrt()
        left, right = torch.linalg.qr(left).Q * sigma, sigma[:, None] * torch.linalg.qr(right.T).Q.T
    elif kind == "nearly dependent":
        left = random(1, k) + 1e-6 * left
    elif kind == "dependent columns":
        left = random(m, max(1, k // 2)) @ random(max(1, k // 2), k)
    elif kind == "zero rows":
        left[k // 2 + 1 :] = 0
    elif kind == "repeated rows":
        left = left[torch.arange(m) % max(1, m // 2)]
    elif kind == "scaled rows":
        left = left * torch.logspace(0, -6, m, dtype=torch.float64)[:, None]
    return left, right


def layer_of(found):
    return PivotedLinear.from_parts(found.weight, found.right, found.pivots, side=found.side)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(2, 40), st.integers(2, 40)).flatmap(
        lambda shape: st.tuples(st.just(shape), st.integers(1, min(shape) - 1))
    ),
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_the_pivoted_form_is_as_exact_as_its_type(sizes, kind, dtype, seed):
    (m, n), k = sizes
    left, right = factors(kind, m, n, k, seed)
    found = pivot(left, right, dtype=dtype)
    exact = left @ right
    assert found.side == ("out" if m <= n else "in")
    assert found.growth < 1.06
    assert found.weight.dtype == found.right.dtype == dtype
    assert found.weight.numel() + found.right.numel() == k * (m + n - k)
    assert found.pivots.dtype == torch.int32
    assert (found.pivots.diff() > 0).all()
    assert found.is_accurate
    assert found.error <= (8 if dtype == torch.float64 else 4) * found.plain
    # What rounding the dense matrix itself may lose at most is eps / 2 of its largest number.
    lost = (layer_of(found).double().dense() - exact).abs().max()
    eps = max(torch.finfo(dtype).eps, 1e-14)
    assert lost <= 4 * eps * exact.abs().max() + torch.finfo(dtype).tiny


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_error_is_the_one_of_the_whole_matrix(shape, dtype):
    left, right = factors("random", *shape, 60)
    found = pivot(left, right, dtype=dtype)
    exact = left @ right
    error = (layer_of(found).double().dense() - exact).norm() / exact.norm()
    plain = (left.to(dtype).double() @ right.to(dtype).double() - exact).norm() / exact.norm()
    assert found.error == pytest.approx(error.item(), rel=0.15)
    assert found.plain == pytest.approx(plain.item(), rel=0.15)
    assert found.error < 2 * found.plain


def test_fitting_the_kept_rows_to_rounded_coefficients_helps(monkeypatch):
    left, right = factors("random", 96, 160, 60)
    fitted = pivot(left, right, dtype=torch.bfloat16).error
    monkeypatch.setattr(module, "_fit", lambda left, right, pivots, *_: left[pivots] @ right)
    assert fitted < 0.95 * pivot(left, right, dtype=torch.bfloat16).error


def test_swaps_shrink_the_coefficients_that_elimination_leaves(monkeypatch):
    left, right = factors("random", 200, 300, 100)
    swapped = pivot(left, right, dtype=torch.bfloat16)
    monkeypatch.setattr(module, "SWAPS", 0)
    first = pivot(left, right, dtype=torch.bfloat16)
    assert swapped.growth < 1.06 < first.growth
    assert swapped.error < first.error


def test_the_same_factors_give_the_same_form():
    left, right = factors("random", 30, 40, 12)
    state = torch.get_rng_state()
    one, two = (pivot(left.float(), right.float(), dtype=torch.float16) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("pivots", "weight", "right"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert (one.growth, one.error, one.plain) == (two.growth, two.error, two.plain)


def test_a_map_that_is_zero_is_exact():
    found = pivot(torch.zeros(4, 2), torch.zeros(2, 5), dtype=torch.bfloat16)
    assert (found.error, found.is_accurate) == (0.0, True)
    assert not layer_of(found).dense().any()


def test_a_product_that_overflows_is_not_accurate():
    left, right = torch.full((6, 2), 1e3), torch.full((2, 8), 1e3)
    assert not pivot(left, right, dtype=torch.float16).is_accurate
    assert pivot(left, right, dtype=torch.bfloat16).is_accurate


def test_pivots_are_taken_where_plain_factors_overflow():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((12, 4), (4, 16)))
    found = pivot(left * 1e5, right * 1e-5, dtype=torch.float16)
    assert not math.isfinite(found.plain)
    assert found.is_accurate
    torch.testing.assert_close(layer_of(found).dense().float(), left @ right, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("errors", "side"),
    [
        ({"out": 1.0, "in": 99.0}, "out"),
        ({"out": 17.0, "in": 1.0}, "in"),
        ({"out": 17.0, "in": 18.0}, "out"),
        ({"out": 18.0, "in": 17.0}, "in"),
        ({"out": float("nan"), "in": 2.0}, "in"),
    ],
)
def test_the_other_side_is_taken_where_the_first_is_not_accurate(monkeypatch, errors, side):
    def fake(left, right, side, dtype):
        return Pivoted(side, torch.tensor([0]), left, right, growth=1.0, error=errors[side], plain=1.0)

    monkeypatch.setattr(module, "_of_side", fake)
    assert pivot(torch.ones(3, 1), torch.ones(1, 3), dtype=torch.float32).side == side


@pytest.mark.parametrize("rank", [0, 4, 5])
def test_ranks_with_nothing_to_pivot_are_refused(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} of shape \(4, 9\) can't be stored pivoted: expected 1 to 3"):
        pivot(torch.ones(4, rank), torch.ones(rank, 9), dtype=torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(bad):
    left, right = torch.ones(4, 2), torch.ones(2, 5)
    right[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        pivot(left, right, dtype=torch.float32)
