"""Speeds that are measured here."""

from __future__ import annotations

import pytest

from lowrank_pl.costs import probe as probe_module
from lowrank_pl.costs.model_sizes import model_sizes
from lowrank_pl.costs.probe import probe
from lowrank_pl.models.base import Base

BASE = Base("random:llama")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))
    return tmp_path


def test_every_kind_of_work_is_measured_and_nothing_stays(home):
    found = probe(BASE, model_sizes(BASE), device="cpu", length=32)
    assert set(found.rates) == {"model", "float32", "float64", "svd", "disk"}
    assert all(rate > 0 for rate in found.rates.values())
    assert "one block" in found.source
    assert list(home.iterdir()) == []


def test_a_layer_stands_for_a_block_that_is_too_large(home, monkeypatch):
    monkeypatch.setattr(probe_module, "_LARGEST", 1000)
    found = probe(BASE, model_sizes(BASE), device="cpu", length=32)
    assert found.rates["model"] > 0
    assert "one layer" in found.source
