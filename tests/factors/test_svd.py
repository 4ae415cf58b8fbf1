"""Singular value decompositions: as exact by every driver as LAPACK's, whatever the matrix."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.factors.decomposition import polar_svd, thin_svd

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
