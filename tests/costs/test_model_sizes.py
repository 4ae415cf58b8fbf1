"""Sizes that are counted without weights, beside those of real models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_pl import find_targets
from lowrank_pl.costs.model_sizes import config_of, model_sizes
from lowrank_pl.models.base import Base, load_base
from lowrank_pl.models.hf_experts import is_fused, split_modules
from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.plans.constraints import Constraints


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


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "jetmoe"])
def test_one_expert_stands_for_all_of_a_mixture(family):
    found, model = model_sizes(Base(f"random:{family}"), length=16), load_base(f"random:{family}")
    assert found.modules == find_targets(model).modules
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    share = {"llama4": 1 / 4}.get(family, 2 / 4)
    experts = sum(p.numel() for _, split in split_modules(model) for p in split.parameters())
    assert sum(found.idle) == pytest.approx((1 - share) * experts)
    assert set(found.shares.values()) == {share}


def test_patterns_may_name_single_experts():
    which = Constraints(include=["*experts.3.*", "*.1.mlp.experts.0.up_proj"])
    found = model_sizes(Base("random:mixtral"), length=16, constraints=which)
    assert found.modules == which.targets(load_base("random:mixtral")).modules
    assert found.parameters == model_sizes(Base("random:mixtral"), length=16).parameters


def test_activations_of_experts_are_those_of_the_rows_that_they_compute():
    mixture, dense = model_sizes(Base("random:mixtral"), length=64), model_sizes(Base("random:llama"), length=64)
    # Two experts of 48 hidden features instead of an MLP of 96.
    assert mixture.activations.watched == pytest.approx(dense.activations.watched, rel=0.2)


@pytest.mark.parametrize(
    ("name", "parameters", "for_a_token"),
    [("mixtral-8x7b", 46.70, 12.88), ("qwen3-30b-a3b", 30.53, 3.35), ("deepseek-v3", 671.03, 37.55)],
)
def test_published_mixtures(name, parameters, for_a_token):
    config = config_of(Base(f"shapes:{name}"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = [module for module in model.modules() if is_fused(module)]
    inside = sum(parameter.numel() for module in experts for parameter in module.parameters())
    assert total / 1e9 == pytest.approx(parameters, abs=0.01)
    used = total - inside * (1 - config.num_experts_per_tok / experts[0].num_experts)
    assert used / 1e9 == pytest.approx(for_a_token, abs=0.01)


def test_a_model_that_asks_for_values_is_refused(monkeypatch):
    monkeypatch.setattr("lowrank_pl.costs.model_sizes._let_count", lambda router: None)
    with pytest.raises(ValueError, match="the needs of random:jetmoe can't be forecast"):
        model_sizes(Base("random:jetmoe"), length=16)


def test_experts_that_share_a_factor_are_decomposed_as_one_matrix():
    apart, shared = (
        model_sizes(Base("random:mixtral"), length=16, constraints=Constraints(shared_experts=sharing))
        for sharing in (False, True)
    )
    assert shared.shapes == [*find_targets(load_base("random:mixtral")).stacked().shapes.values()]
    assert (shared.targeted, len(shared.modules)) == (apart.targeted, len(apart.modules))
