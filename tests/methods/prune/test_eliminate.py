"""Elimination of hidden neurons, against a slow search and against least squares."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from lowrank_pl.factors.decomposition import square_root
from lowrank_pl.methods.prune import eliminate
from lowrank_pl.methods.prune.eliminate import prune_inputs


def drawn(features, outputs, *, tokens=400, seed=0):
    """Return features that depend on each other, a weight that reads them, and the root of what its errors cost."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features) / 2
    z = (torch.randn(tokens, features, generator=generator) @ mix).double()
    weight = torch.randn(outputs, features, generator=generator)
    return z, weight, square_root(torch.diag(torch.rand(outputs, generator=generator) + 0.1))


def error(z, weight, features, new, root):
    lost = z @ weight.double().T - z[:, features] @ new.T
    return (lost @ root.root).square().sum(1).mean().item()


def test_the_remaining_weight_is_that_of_least_squares_and_the_loss_its_error():
    z, weight, root = drawn(90, 20)
    found = prune_inputs(weight, z.T @ z / len(z), 40, outputs=root, damping=0.0)
    assert found.features.tolist() == sorted(set(found.features.tolist()))
    assert found.weight.shape == (20, 40)
    least = torch.linalg.lstsq(z[:, found.features], z @ weight.double().T).solution.T
    torch.testing.assert_close(found.weight, least, rtol=1e-4, atol=1e-5)
    assert found.loss == pytest.approx(error(z, weight, found.features, found.weight, root), rel=1e-4)


def test_groups_lose_hardly_more_than_one_by_one(monkeypatch):
    z, weight, root = drawn(300, 20, seed=1)
    many = prune_inputs(weight, z.T @ z / len(z), 120, outputs=root)
    monkeypatch.setattr(eliminate, "_GROUP", 1)
    single = prune_inputs(weight, z.T @ z / len(z), 120, outputs=root)
    assert many.loss == pytest.approx(single.loss, rel=0.05)


def test_of_a_few_features_the_best_one_goes():
    z, weight, root = drawn(7, 3, seed=2)
    found = prune_inputs(weight, z.T @ z / len(z), 6, outputs=root, damping=0.0)
    losses = {}
    for kept in combinations(range(7), 6):
        least = torch.linalg.lstsq(z[:, kept], z @ weight.double().T).solution.T
        losses[kept] = error(z, weight, list(kept), least, root)
    assert tuple(found.features.tolist()) == min(losses, key=losses.__getitem__)


def test_all_features_may_stay():
    z, weight, root = drawn(12, 5)
    whole = prune_inputs(weight, z.T @ z / len(z), 12, outputs=root)
    torch.testing.assert_close(whole.weight, weight.double())
    assert (whole.features.tolist(), whole.loss) == (list(range(12)), 0.0)


def test_dead_features_go_first():
    z, weight, _ = drawn(12, 5)
    z[:, [2, 7]] = 0
    found = prune_inputs(weight, z.T @ z / len(z), 10)
    assert found.features.tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    torch.testing.assert_close(found.weight, weight.double()[:, found.features])


def test_where_all_features_are_dead_the_weight_is_finite():
    _, weight, _ = drawn(12, 5)
    assert prune_inputs(weight, torch.zeros(12, 12), 3).weight.isfinite().all()


def test_damping_leads_to_the_weight_as_it_was():
    z, weight, _ = drawn(30, 8)
    moved = []
    for damping in (1e-3, 1.0, 1e6):
        found = prune_inputs(weight, z.T @ z / len(z), 20, damping=damping)
        moved.append((found.weight - weight.double()[:, found.features]).norm().item())
    assert moved[0] > moved[1] > 0.1
    assert moved[2] < 1e-4


@pytest.mark.parametrize("keep", [0, 7])
def test_an_impossible_number_of_features_is_refused(keep):
    z, weight, _ = drawn(6, 2)
    with pytest.raises(ValueError, match=f"{keep} features.* from 1 to 6"):
        prune_inputs(weight, z.T @ z, keep)


@pytest.mark.parametrize("damaged", ["weight", "moment"])
def test_what_is_not_finite_is_refused(damaged):
    z, weight, _ = drawn(6, 2)
    given = {"weight": weight, "moment": z.T @ z}
    given[damaged][0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity: the checkpoint"):
        prune_inputs(given["weight"], given["moment"], 3)
