"""Experts of mixtures as separate linear layers: which are found, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lowrank_pl.models.base import load_base
from lowrank_pl.models.hf_experts import routers, split_experts, split_modules
from lowrank_pl.models.targets import ROUTER, find_targets
from lowrank_pl.models.tiny import MIXTURES, tiny_model


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_is_a_target_and_every_router_is_dense(family, sequences):
    fused, model = tiny_model(family), load_base(f"random:{family}")
    with torch.no_grad():
        found = model(sequences[:2]).logits
        torch.testing.assert_close(found, fused(sequences[:2]).logits, rtol=1e-3, atol=1e-4)
    targets = find_targets(model)
    names = {target.name for target in targets.modules}
    for experts, module in split_modules(model):
        linear = {f"{experts}.{name}" for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
        assert linear <= names
    chosen_by = routers(model)
    assert chosen_by.keys() == {name for name, _ in split_modules(model)}
    dense = [entry.name for entry in targets.skipped if entry.reason == ROUTER]
    assert len(dense) == len({*chosen_by.values()})


def test_shared_experts_are_ordinary_layers():
    kinds = {target.kind for target in find_targets(load_base("random:deepseek_v3")).modules}
    assert {"mlp.shared_experts.up_proj", "mlp.experts.0.up_proj"} <= kinds


def test_patterns_name_single_experts():
    found = find_targets(load_base("random:mixtral"), include=["*experts.2.*"], exclude=["*.down_proj"])
    assert [target.name for target in found.modules] == [
        f"model.layers.{block}.mlp.experts.2.{kind}_proj" for block in (0, 1) for kind in ("gate", "up")
    ]
    with pytest.raises(ValueError, match=r"pattern '\*experts.9.\*' matches no matrix .* mlp.experts.0.gate_proj"):
        find_targets(load_base("random:mixtral"), include=["*experts.9.*"])


def test_experts_of_an_unknown_layout_stay_dense_and_the_layout_is_named(monkeypatch, caplog):
    odd = tiny_model("mixtral")
    for block in odd.model.layers:
        block.mlp.experts.register_parameter("scale", nn.Parameter(torch.ones(4, 1, 1)))
    with pytest.raises(
        ValueError, match=r"layout of MixtralExperts is not known: its parameters are down_proj, .* scale"
    ):
        split_experts(odd)
    monkeypatch.setattr("lowrank_pl.models.base.tiny_model", lambda _: odd)
    monkeypatch.setattr("lowrank_pl.models.base._rebuilt", lambda model, _: model)
    with caplog.at_level(logging.WARNING):
        model = load_base("random:mixtral")
    assert "experts stay fused: the layout of MixtralExperts is not known" in caplog.text
    assert all(".experts" not in target.name for target in find_targets(model).modules)


def test_a_router_without_top_k_is_refused(sequences):
    model = load_base("random:mixtral")

    def all_experts(_, __, output):
        weights = output[0].softmax(-1)
        return output[0], weights, weights

    model.model.layers[0].mlp.gate.register_forward_hook(all_experts)
    with pytest.raises(
        ValueError, match=r"router of MixtralExperts chooses no experts \(top-k\): .* can't be compressed"
    ):
        find_targets(model)
