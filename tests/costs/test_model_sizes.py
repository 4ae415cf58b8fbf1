"""Sizes that are counted without weights, beside those of real models."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl import find_targets
from lowrank_pl.costs.model_sizes import config_of, model_sizes
from lowrank_pl.models.base import Base
from lowrank_pl.models.tiny import tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_sizes_are_those_of_the_real_model(family):
    found, model = model_sizes(Base(f"random:{family}"), length=16), tiny_model(family)
    assert found.modules == find_targets(model).modules
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.vocabulary == model(torch.zeros(1, 2, dtype=torch.long)).logits.shape[-1]


def test_a_token_is_multiplied_by_the_blocks_and_the_head():
    found, model = model_sizes(Base("random:llama")), tiny_model("llama")
    head = model.lm_head.weight.numel()
    assert found.multiply_adds == sum(p.numel() for p in model.model.layers.parameters()) + head
    assert found.outside == 2 * head + model.model.norm.weight.numel()


def test_large_models_are_known_by_name():
    found = model_sizes(Base("shapes:llama-3.2-1b", dtype="bfloat16"), length=2)
    assert (found.parameters, found.bytes, len(found.modules)) == (1_235_814_400, 2_471_628_800, 16 * 7)
    assert config_of(Base("shapes:llama-3.1-405b")).num_hidden_layers == 126


def test_activations_of_a_token_hardly_depend_on_the_length():
    short, long = (model_sizes(Base("random:llama"), length=length).activations.kept for length in (64, 128))
    assert long == pytest.approx(short, rel=0.1)


def test_activations_are_smaller_in_bfloat16():
    wide, narrow = (model_sizes(Base("random:llama", dtype=dtype)).activations for dtype in ("float32", "bfloat16"))
    assert narrow.kept < 0.8 * wide.kept
    assert narrow.watched == wide.watched / 2


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match=r"'llama-9' .*llama-3-70b"):
        model_sizes(Base("shapes:llama-9"))


def test_a_damaged_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json.* shapes:NAME"):
        config_of(Base(str(tmp_path)))
