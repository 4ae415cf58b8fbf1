"""Square roots, whitened components and the drivers of the decomposition against what they must satisfy."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.factors.decomposition import (
    StackedRoots,
    decompose,
    diagonal_root,
    polar_svd,
    square_root,
    thin_svd,
    truncate,
)


def sample(tokens, features, *, seed=0):
    """Correlated inputs [tokens, features] with scales over three decades, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1.5, 1.5, features, dtype=torch.float64)
    return torch.randn(tokens, features, generator=generator, dtype=torch.float64) * scales @ mixing


def weight(out_features, in_features, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)


def mean_output_error(difference, inputs):
    """Mean over tokens of |difference @ x|^2, token by token."""
    return sum((difference @ x).square().sum().item() for x in inputs) / len(inputs)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (12, 12), (1, 7), (7, 1)])
def test_whitening_identity_holds_exactly_on_a_sample(shape):
    inputs = sample(60, shape[1])
    moment = torch.stack([torch.outer(x, x) for x in inputs]).mean(0)
    matrix = weight(*shape)
    factors = decompose(matrix, inputs=square_root(moment, damping=0.0))
    assert factors.left.dtype == factors.right.dtype == factors.sigma.dtype == torch.float64
    for rank in range(min(shape) + 1):
        part = truncate(factors, rank)
        assert (part.left.shape, part.right.shape) == ((shape[0], rank), (rank, shape[1]))
        predicted = sum(s.item() ** 2 for s in factors.sigma[rank:])
        measured = mean_output_error(matrix - part.left @ part.right, inputs)
        scale = mean_output_error(matrix, inputs)
        assert measured == pytest.approx(predicted, rel=1e-8, abs=1e-12 * scale)


def test_no_other_matrix_of_that_rank_does_better():
    inputs = sample(50, 8)
    moment = inputs.T @ inputs / 50
    matrix = weight(6, 8)
    best = truncate(decompose(matrix, inputs=square_root(moment, damping=0.0)), 3)
    least = mean_output_error(matrix - best.left @ best.right, inputs)
    for seed in range(20):
        left = best.left + 1e-2 * weight(6, 3, seed=seed)
        right = best.right + 1e-2 * weight(3, 8, seed=seed + 100)
        assert mean_output_error(matrix - left @ right, inputs) > least
    plain = truncate(decompose(matrix), 3)
    assert mean_output_error(matrix - plain.left @ plain.right, inputs) > least


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (1, 5), (5, 1), (1, 1)])
def test_plain_svd_is_exact_and_sorted(shape):
    matrix = weight(*shape).float()
    factors = decompose(matrix)
    torch.testing.assert_close(factors.left @ factors.right, matrix.double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(factors.sigma, torch.linalg.svdvals(matrix.double()))
    assert (factors.sigma.diff() <= 0).all()
    eigenvalues = torch.linalg.eigvalsh(matrix.double() @ matrix.double().T).flip(0)[: min(shape)]
    torch.testing.assert_close(factors.sigma.square(), eigenvalues)


def test_singular_values_are_split_evenly_over_both_sides():
    factors = decompose(weight(6, 9))
    torch.testing.assert_close(factors.left.square().sum(0), factors.sigma)
    torch.testing.assert_close(factors.right.square().sum(1), factors.sigma)


def test_zero_weight_has_zero_factors():
    factors = decompose(torch.zeros(4, 6), inputs=square_root(torch.eye(6)))
    assert factors.sigma.tolist() == [0.0] * 4
    assert torch.equal(factors.left @ factors.right, torch.zeros(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("root", [square_root, diagonal_root])
def test_components_cost_nothing_where_the_loss_does_not_depend_on_a_layer(root, side):
    matrix, nothing = weight(5, 5), torch.zeros(5, 5) if root is square_root else torch.zeros(5)
    factors = decompose(matrix, **{side: root(nothing)})
    assert factors.sigma.tolist() == [0.0] * 5
    torch.testing.assert_close(factors.left @ factors.right, matrix)


def test_a_dead_feature_leaves_factors_finite_without_damping():
    scales = torch.tensor([1.0, 0.0, 3.0])
    factors = decompose(weight(4, 3), inputs=diagonal_root(scales, damping=0.0))
    assert factors.right.float().isfinite().all()


def test_low_precision_weights_are_decomposed_in_float64():
    matrix = weight(5, 7).bfloat16()
    factors = decompose(matrix)
    torch.testing.assert_close(factors.left @ factors.right, matrix.double(), rtol=0, atol=1e-13)


def rank_one():
    x = sample(1, 10)
    return x.T @ x


def singular():
    inputs = sample(4, 10)
    return inputs.T @ inputs / 4


def indefinite():
    """A float32 sum of few tokens whose rounding makes eigenvalues negative."""
    inputs = sample(3, 10).float()
    moment = (inputs.T @ inputs).double()
    moment -= 1e-6 * moment.diagonal().max() * torch.eye(10, dtype=torch.float64)
    assert torch.linalg.eigvalsh(moment)[0] < 0
    return moment


def huge():
    inputs = sample(40, 10)
    inputs[:, 3] *= 1e12
    return inputs.T @ inputs / 40


def dead_input():
    inputs = sample(40, 10)
    inputs[:, 3] = 0
    return inputs.T @ inputs / 40


MOMENTS = [rank_one, singular, indefinite, huge, dead_input, lambda: torch.zeros(10, 10), lambda: 1e-30 * torch.eye(10)]


@pytest.mark.parametrize("make", MOMENTS)
@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-6, 1e-2])
def test_square_root_never_fails(make, damping):
    moment = make()
    root = square_root(moment, damping=damping)
    assert torch.isfinite(root.root).all()
    assert root.root.dtype == torch.float64
    inverse = root.solve_right(torch.eye(10, dtype=torch.float64))
    assert torch.isfinite(inverse).all()
    largest = max(moment.abs().max().item(), root.damping)
    expected = moment.double() + root.damping * torch.eye(10, dtype=torch.float64)
    # The eigen fallback lifts eigenvalues to its floor, negative ones from as far below as they were.
    lifted = max(0.0, -torch.linalg.eigvalsh(expected)[0].item()) + root.damping + 1e-14 * largest
    assert (root.root @ root.root.T - expected).abs().max() <= 2 * lifted
    factors = decompose(weight(8, 10), inputs=root)
    assert torch.isfinite(factors.left).all()
    assert torch.isfinite(factors.right).all()


def test_indefinite_moments_fall_back_to_eigenvectors_whose_inverse_is_right():
    root = square_root(indefinite(), damping=1e-9)
    assert root.kind == "eigen"
    identity = torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(root.solve_right(root.root), identity, rtol=0, atol=1e-6)
    torch.testing.assert_close(root.solve_right(identity), torch.linalg.inv(root.root), rtol=1e-5, atol=1e-5)
    matrix = weight(8, 10)
    factors = decompose(matrix, inputs=root)
    torch.testing.assert_close(factors.left @ factors.right, matrix, rtol=0, atol=1e-6)


def test_cholesky_is_lower_triangular_and_its_inverse_is_right():
    inputs = sample(40, 10)
    root = square_root(inputs.T @ inputs / 40)
    assert root.kind == "cholesky"
    assert torch.equal(root.root, root.root.tril())
    torch.testing.assert_close(root.solve_right(root.root), torch.eye(10, dtype=torch.float64))


def test_damping_is_relative_to_the_mean_of_the_diagonal():
    moment = torch.diag(torch.tensor([1.0, 3.0, 8.0]))
    assert square_root(moment, damping=0.5).damping == 2.0
    assert square_root(1e6 * moment, damping=0.5).damping == 2e6
    torch.testing.assert_close(
        square_root(moment, damping=0.5).root.diagonal().square(), torch.tensor([3.0, 5.0, 10.0]).double()
    )
    assert square_root(torch.zeros(2, 2)).root.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_arguments_are_left_alone():
    moment = torch.eye(3, dtype=torch.float64)
    moment[0, 1] = 0.25  # asymmetric: symmetrised to 0.125 on both sides
    before = moment.clone()
    root = square_root(moment, damping=0.0)
    assert torch.equal(moment, before)
    assert (root.root @ root.root.T)[0, 1].item() == pytest.approx(0.125)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    moment = torch.eye(3)
    moment[1, 2] = bad
    with pytest.raises(ValueError, match=r"NaN or infinity: .* measure again"):
        square_root(moment)
    with pytest.raises(ValueError, match="NaN or infinity: the checkpoint is damaged"):
        decompose(moment)


def test_truncation_picks_components_and_is_contiguous():
    factors = decompose(weight(6, 9))
    first = truncate(factors, 2)
    assert torch.equal(first.left, factors.left[:, :2])
    assert first.left.is_contiguous()
    picked = truncate(factors, torch.tensor([0, 4]))
    assert torch.equal(picked.right, torch.stack([factors.right[0], factors.right[4]]))
    assert picked.sigma.tolist() == [factors.sigma[0].item(), factors.sigma[4].item()]
    assert picked.left.is_contiguous()


EPS = torch.finfo(torch.float64).eps


def matrix_of(shape, decades):
    generator = torch.Generator().manual_seed(0)
    rank = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q for size in shape
    )
    sigma = torch.logspace(0, -decades, rank, dtype=torch.float64)
    return left * sigma @ right.mT, sigma


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (40, 40), (30, 80), (80, 30)])
@pytest.mark.parametrize("decades", [0, 3, 8, 14])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_polar_driver_is_backward_stable(shape, decades, scale):
    matrix, sigma = matrix_of(shape, decades)
    left, found, right = polar_svd(scale * matrix)
    rank = min(shape)
    assert (left.shape, found.shape, right.shape) == ((shape[0], rank), (rank,), (rank, shape[1]))
    assert (found.diff() <= 0).all()
    torch.testing.assert_close(found, scale * sigma, rtol=0, atol=scale * rank * 4 * EPS)
    torch.testing.assert_close(left * found @ right, scale * matrix, rtol=0, atol=scale * rank * 8 * EPS)
    for part in (left.mT @ left, right @ right.mT):
        torch.testing.assert_close(part, torch.eye(rank, dtype=torch.float64), rtol=0, atol=rank * 20 * EPS)


@pytest.mark.parametrize("shape", [(12, 12), (12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_matrices_that_lack_rank(shape, rank):
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in shape)
    matrix = left @ right.mT
    left, sigma, right = polar_svd(matrix)
    torch.testing.assert_close(left * sigma @ right, matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(matrix), rtol=0, atol=1e-12)
    assert torch.isfinite(left).all()


def test_a_cpu_keeps_lapack():
    matrix, _ = matrix_of((6, 9), 2)
    for one, two in zip(thin_svd(matrix), torch.linalg.svd(matrix, full_matrices=False), strict=True):
        assert torch.equal(one, two)


def test_singular_values_of_stacked_layers_are_their_weighted_error():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    moments = [a @ a.mT for a in (torch.randn(4, 9, generator=generator, dtype=torch.float64) for _ in range(2))]
    rows = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    inputs, scales = square_root(rows @ rows.mT / 20), (1.0, 2.0, 0.5)
    outputs = StackedRoots((*map(square_root, moments), None), scales, 4)
    factors = decompose(torch.cat(weights), inputs=inputs, outputs=outputs)
    for rank in (1, 4):
        small = truncate(factors, rank)
        lost = [weight - part for weight, part in zip(weights, (small.left @ small.right).split(4), strict=True)]
        costs = [square_root(moment).moment() for moment in moments] + [torch.eye(4, dtype=torch.float64)]
        error = sum(
            scale**2 * (change.mT @ cost @ change @ inputs.moment()).trace()
            for change, cost, scale in zip(lost, costs, scales, strict=True)
        )
        torch.testing.assert_close(error, factors.sigma[rank:].square().sum())
    torch.testing.assert_close(factors.left @ factors.right, torch.cat(weights))
