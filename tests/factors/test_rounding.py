"""Rounded matrices: every number is on its grid, and error compensation minimises what it says."""

from __future__ import annotations

import itertools

import pytest
import torch

from lowrank_pl.factors.decomposition import decompose, square_root
from lowrank_pl.factors.pivoting import pivot
from lowrank_pl.factors.rounding import (
    Metric,
    compensated,
    component_costs,
    dense_costs,
    nearest,
    round_dense,
    round_factors,
    round_pivoted,
)
from lowrank_pl.models.hf_layers import PivotedLinear
from lowrank_pl.models.hf_quantized import SCALE_TYPE, Grid

GRIDS = [Grid(8), Grid(4, 32), Grid(4), Grid(3, 8), Grid(2, 16)]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def moment_of(size, generator, *, decay=1.0):
    """A second moment whose eigenvalues fall over several decades, not along the axes."""
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return turn @ torch.logspace(0, -2 * decay, size, dtype=torch.float64).diag() @ turn.mT


@pytest.fixture
def problem(generator):
    """A weight of 40 x 56 and its metric."""
    weight = torch.randn(40, 56, generator=generator)
    return weight, Metric(moment_of(56, generator), moment_of(40, generator))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_numbers_lie_within_half_a_step(grid, generator):
    matrix = torch.randn(6, 70, generator=generator)
    rounded = nearest(matrix, grid)
    step = rounded.scales.repeat_interleave(grid.group or 70, 1)[:, :70]
    far = (rounded.dense() - matrix).abs() > step * 0.501
    # Only the ends of a range are clipped.
    assert far.float().mean() < (0.2 if grid.bits > 2 else 0.4)
    assert torch.equal(rounded.scales, rounded.scales.to(SCALE_TYPE).float())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_matrix_on_the_grid_stays(grid, generator):
    once = nearest(torch.randn(5, 48, generator=generator), grid).dense()
    torch.testing.assert_close(nearest(once, grid).dense(), once, rtol=1e-2, atol=0.02)


def test_a_group_of_zeros_stays_zero():
    matrix = torch.zeros(2, 64)
    matrix[0, :32] = torch.linspace(-1, 1, 32)
    assert torch.equal(nearest(matrix, Grid(4, 32)).dense()[:, 32:], torch.zeros(2, 32))


def by_hand(values, table, upper, low, high):
    """GPTQ, column by column, as its paper has it."""
    rest, scale, zero = values.clone(), *table
    codes = torch.empty_like(values)
    for column in range(values.shape[1]):
        here = (rest[:, column] / scale[:, column] + zero[:, column]).round().clamp(low, high)
        back = (here - zero[:, column]) * scale[:, column]
        error = (rest[:, column] - back) / upper[column, column]
        rest[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
        codes[:, column] = here
    return codes


def test_compensation_is_the_recursion_of_gptq(problem):
    from lowrank_pl.factors.rounding import _inverse_root, _Table

    weight, metric = problem
    grid = Grid(4, 8)
    order, upper = _inverse_root(metric.inputs)
    remains = torch.empty(56).index_copy_(0, order, upper.diagonal() ** -2)
    table = _Table.of(weight, grid, remains)
    scale, zero = (part[:, order] for part in table.spread())
    codes = by_hand(weight[:, order], (scale, zero), upper, 0, 15)
    back = torch.empty_like(codes).index_copy_(1, order, (codes - zero) * scale)
    assert torch.equal(compensated(weight, grid, metric.inputs).dense(), back)


def test_compensation_between_rows_is_that_of_the_transposed_matrix(problem):
    weight, metric = problem
    # Groups of one column and of one row are the same for whole rows of one number.
    costs = [
        Metric(None, metric.outputs).cost(one.dense() - weight)
        for one in (nearest(weight, Grid(4, 8)), compensated(weight, Grid(4, 8), metric.outputs, between_rows=True))
    ]
    assert costs[1] < 0.7 * costs[0]


def test_each_step_of_the_two_sided_rounding_lowers_the_cost(problem):
    weight, metric = problem
    plain = metric.cost(nearest(weight, Grid(4, 8)).dense() - weight)
    one = metric.cost(compensated(weight, Grid(4, 8), metric.inputs).dense() - weight)
    both = metric.cost(round_dense(weight, Grid(4, 8), metric).dense() - weight)
    assert both < 0.8 * one < 0.8 * 0.8 * plain


def test_the_two_sided_rounding_is_its_recursion_number_by_number(problem):
    from lowrank_pl.factors.rounding import _Table, _triangular_root

    weight, metric = problem
    grid = Grid(4, 8)
    (columns, right), (rows, left) = _triangular_root(metric.inputs), _triangular_root(metric.outputs)
    table = _Table.of(weight, grid, torch.empty(56).index_copy_(0, columns, right.diagonal().square()))
    scale, zero = (part[rows][:, columns] for part in table.spread())
    values, errors = weight[rows][:, columns].double(), torch.zeros(40, 56, dtype=torch.float64)
    above, before = (left / left.diagonal()).double(), (right / right.diagonal()).double()
    back = torch.empty(40, 56)
    for i, j in itertools.product(range(40), range(56)):
        passed = above[:, i] @ errors @ before[:, j]
        code = ((values[i, j] - passed) / scale[i, j] + zero[i, j]).round().clamp(0, 15)
        back[i, j] = (code - zero[i, j]) * scale[i, j]
        errors[i, j] = back[i, j] - values[i, j]
    found = round_dense(weight, grid, metric).dense()[rows][:, columns]
    # Float32 sums may round a few numbers that lie between two codes to the other one.
    assert (found != back).float().mean() < 0.01


def test_many_grids_at_once_are_each_alone(problem):
    weight, metric = problem
    alone = [metric.cost(round_dense(weight, grid, metric).dense() - weight) for grid in GRIDS]
    assert dense_costs(weight, GRIDS, metric) == pytest.approx(alone, rel=1e-4)


@pytest.fixture
def factors(problem):
    weight, metric = problem
    roots = {"inputs": square_root(metric.inputs, damping=0.0), "outputs": square_root(metric.outputs, damping=0.0)}
    return decompose(weight, **roots)


@pytest.mark.parametrize("rank", [8, 24, 40])
def test_component_costs_predict_the_cost_of_rounded_factors(problem, factors, rank):
    weight, metric = problem
    grid = Grid(4, 8)
    parts = round_factors(factors.left[:, :rank], factors.right[:rank], grid, metric)
    found = metric.cost(parts["weight"].dense() @ parts["right"].dense() - weight)
    truncated = factors.sigma[rank:].square().sum().item() / 2
    (added,) = component_costs(factors.left.float(), factors.right.float(), [grid], metric)
    # What the left factor takes back is not predicted.
    assert truncated < found < truncated + 1.1 * added[:rank].sum().item()
    assert found > truncated + 0.4 * added[:rank].sum().item()


def test_rounded_factors_lose_less_than_factors_rounded_to_nearest(problem, factors):
    _, metric = problem
    left, right = factors.left[:, :16].float(), factors.right[:16].float()
    parts = round_factors(left, right, Grid(4, 8), metric)
    plain = nearest(left, Grid(4, 8)).dense() @ nearest(right, Grid(4, 8)).dense()
    costs = [metric.cost(made - left @ right) for made in (parts["weight"].dense() @ parts["right"].dense(), plain)]
    assert costs[0] < 0.7 * costs[1]


def test_pivoted_parts_are_rounded_in_their_own_metric(problem, factors):
    _, metric = problem
    low_rank = factors.left[:, :16] @ factors.right[:16]
    found = pivot(factors.left[:, :16], factors.right[:16], dtype=torch.float32)
    layer = PivotedLinear.from_parts(found.weight, found.right, found.pivots, side=found.side)
    costs = []
    for parts in (
        {name: nearest(layer.matrix(name).detach(), Grid(8)) for name in ("weight", "right")},
        round_pivoted(layer, Grid(8), metric),
    ):
        made = PivotedLinear.from_parts(parts["weight"].dense(), parts["right"].dense(), found.pivots, side=found.side)
        costs.append(metric.cost(made.dense() - low_rank))
    assert costs[1] < costs[0]


def test_a_singular_moment_is_damped(generator):
    weight, inputs = torch.randn(8, 32, generator=generator), torch.randn(4, 32, generator=generator)
    assert compensated(weight, Grid(4, 8), inputs.mT @ inputs).dense().isfinite().all()
    assert compensated(weight, Grid(4, 8), torch.zeros(32, 32)).dense().isfinite().all()
