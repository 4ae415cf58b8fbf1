"""Singular value decompositions: as exact by every driver as LAPACK's, whatever the matrix."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.cli.bench import bench
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


def test_drivers_are_measured(capsys, tmp_path):
    figures = bench("svd", base="random:llama", repeats=1, device="cpu", json=tmp_path / "svd.json")
    assert {(row["shape"], row["driver"]) for row in figures["rows"]} == {
        (shape, driver) for shape in ("16 x 32", "32 x 32", "32 x 96", "96 x 32") for driver in ("polar", "lapack")
    }
    assert all(row["seconds"] > 0 and row["error"] < 1e-14 and row["orthogonality"] < 1e-13 for row in figures["rows"])
    assert (tmp_path / "svd.json").exists()
    assert "orthogonality" in capsys.readouterr().out


def test_options_of_other_cases_are_refused():
    with pytest.raises(ValueError, match=r"bench svd has no use for keep, which is 0\.8: leave it out"):
        bench("svd", keep=0.8)
    with pytest.raises(ValueError, match="the model is on cpu: only what runs on a CUDA device can be recorded"):
        bench("decode", base="random:llama", length=4, repeats=1, device="cpu", record=True)
