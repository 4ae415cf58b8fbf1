"""Experts as separate layers: the same model, back again to the bit, targets, and unknown layouts refused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lowrank_pl.models.base import load_base, split_known_experts
from lowrank_pl.models.forward import forward_with_activations
from lowrank_pl.models.hf_experts import (
    Fused,
    all_experts_called,
    drop_experts,
    experts_fused,
    fuse_experts,
    is_fused,
    routers,
    split_experts,
    split_modules,
)
from lowrank_pl.models.targets import ROUTER, find_targets
from lowrank_pl.models.tiny import FAMILIES, MIXTURES, tiny_model

TOKENS = torch.arange(24).view(2, 12) * 7 % 256


@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_separate_experts_give_the_same_logits_and_the_same_fused_tensors(family):
    model = tiny_model(family)
    expected, before = model(TOKENS).logits, {name: value.clone() for name, value in model.state_dict().items()}
    names = split_experts(model)
    assert names
    assert not any(is_fused(module) for module in model.modules())
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    # All matrices of experts are targets, each with a name of its own.
    experts = [target for target in find_targets(model).modules if target.experts]
    assert {target.experts for target in experts} == set(names)
    numbers = {target.name.removeprefix(f"{target.experts}.").partition(".")[0] for target in experts}
    assert numbers == {"0", "1", "2", "3"}
    fuse_experts(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_models_without_experts_stay_as_they_are():
    assert not any(split_experts(tiny_model(family)) for family in FAMILIES)


def test_experts_are_fused_for_a_while():
    model = tiny_model("gpt_oss")
    (name, *_) = split_experts(model)
    split = model.get_submodule(name)
    with experts_fused(model):
        assert is_fused(model.get_submodule(name))
    assert model.get_submodule(name) is split
    assert not list(split.fused.module.parameters())


def test_an_expert_sees_the_tokens_that_are_routed_to_it_and_the_weights_of_the_router():
    model = tiny_model("mixtral")
    split_experts(model)
    (_, experts), *_ = split_modules(model)
    rows = {}
    for number, expert in enumerate(experts):
        expert.register_forward_pre_hook(
            lambda module, args, number=number: rows.update({number: (len(args[0]), module.routing_weights)})
        )
    model(TOKENS)
    assert sum(count for count, _ in rows.values()) == 2 * TOKENS.numel()
    assert all(weights.shape == (count,) for count, weights in rows.values())
    assert sum(weights.sum().item() for _, weights in rows.values()) == pytest.approx(TOKENS.numel(), rel=1e-5)
    assert all(expert.routing_weights is None for expert in experts)
    rows.clear()
    model(TOKENS[:1, :1])
    assert len(rows) == 2
    with all_experts_called():
        model(TOKENS[:1, :1])
    assert [rows[number][0] for number in range(4)].count(0) == 2


def test_a_layout_that_is_not_known_is_refused(caplog):
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.scales = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"the layout of MixtralExperts is not known: its parameters are .*scales"):
        split_experts(model)
    assert is_fused(experts)
    with caplog.at_level(logging.WARNING):
        split_known_experts(model)
    assert "experts stay fused" in caplog.text


@torch.no_grad()
def test_a_layout_that_is_not_what_its_module_says_is_found_by_a_trial():
    model = tiny_model("llama4")
    before = model(TOKENS).logits
    # Then rows of gate and up would take turns.
    model.model.layers[1].feed_forward.experts.is_concatenated = False
    with pytest.raises(ValueError, match=r"do not compute what Llama4TextExperts computes \(relative error"):
        split_experts(model)
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("family", ["phimoe", "qwen2_moe"])
def test_exchanged_gate_and_up_are_found_in_half_precision(family, monkeypatch):
    monkeypatch.setattr(Fused, "parted", lambda self, both: both.tensor_split(2)[::-1])
    with pytest.raises(ValueError, match=r"separate experts do not compute what"):
        split_experts(tiny_model(family, hidden=64).bfloat16())


def test_experts_with_a_replaced_layer_are_not_fused():
    model = tiny_model("mixtral")
    split_experts(model)
    before = split_modules(model)
    model.model.layers[1].mlp.experts[2].up_proj = nn.Bilinear(2, 2, 2)
    with (
        pytest.raises(ValueError, match=r"2\.up_proj is a Bilinear: only dense experts can be fused"),
        experts_fused(model),
    ):
        pass
    assert split_modules(model) == before


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jetmoe"])
def test_an_expert_s_parameters_are_found_in_its_part_of_a_fused_one(family):
    model = tiny_model(family)
    fused = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if is_fused(module)
        for key, value in module.named_parameters(recurse=False)
    }
    split_experts(model)
    for name, module in split_modules(model):
        for key, value in fused.items():
            owner, _, parameter = key.rpartition(".")
            if owner == name:
                for part, found in module.parts(parameter, value[3]).items():
                    assert torch.equal(model.get_parameter(f"{name}.3.{part}"), found)


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


@pytest.mark.parametrize("family", MIXTURES)
def test_the_activation_before_the_head_is_the_hidden_state(family, sequences):
    model = tiny_model(family)
    _, seen = forward_with_activations(model, sequences[:1], {"last": None})
    assert seen["last"].shape == (*sequences[:1].shape, model.get_output_embeddings().weight.shape[1])


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


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_other_experts_of_a_token_take_over_the_weight_of_dropped_ones(family):
    model = tiny_model(family)
    name = split_experts(model)[0]
    experts = model.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, model.config.hidden_size, generator=generator)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in rows])
    index[:3] = torch.tensor([[1, 3], [3, 1], [0, 2]])
    weights = torch.rand(index.shape, generator=generator)
    outputs = torch.stack([expert(rows) for expert in experts], dim=1)
    whole = experts(rows, index, weights)
    drop_experts(model, [f"{name}.1", f"{name}.3"])
    expected = torch.zeros_like(rows)
    for token, chosen in enumerate(index.tolist()):
        kept = [(place, expert) for place, expert in enumerate(chosen) if expert not in (1, 3)]
        rest = sum(weights[token, place] for place, _ in kept)
        for place, expert in kept:
            expected[token] += weights[token].sum() / rest * weights[token, place] * outputs[token, expert]
    found = experts(rows, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not found[:2].any()
    # A token that chose none of the dropped experts gets the same bits.
    assert torch.equal(found[2], whole[2])
    with all_experts_called():
        assert torch.equal(experts(rows, index, weights), found)
    with pytest.raises(ValueError, match="2 of 4 experts were dropped"):
        fuse_experts(model)
