from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lowrank_pl.costs.speed import Variant, uniform_modules
from lowrank_pl.export.export import load_compressed, save_compressed
from lowrank_pl.models.hf_experts import DroppedExpert, split_experts, split_modules
from lowrank_pl.models.hf_layers import LowRankLinear, SharedLowRankLinear
from lowrank_pl.models.targets import find_targets, replace_module
from lowrank_pl.models.tiny import MIXTURES, byte_tokenizer, tiny_model
from lowrank_pl.serving import grouped_experts, optimize
from lowrank_pl.serving.grouped_experts import GROUPED
from lowrank_pl.serving.optimize import optimize_for_inference, optimized, restore


def mixture(family, *forms):
    """A tiny mixture whose experts' layers have the given forms in turn, of different ranks; by default all three."""
    model = tiny_model(family)
    split_experts(model)
    targets = find_targets(model)
    made = [
        uniform_modules(model, targets, Variant(form, keep)) if form != "dense" else {}
        for form in forms or ("factored", "pivoted", "dense")
        for keep in (0.4, 0.7)
    ]
    for place, target in enumerate(targets.modules):
        layer = made[place % len(made)].get(target.name)
        if layer is not None:
            replace_module(model, target.name, layer)
    return model


def sharing(family, rank=12):
    """A tiny mixture whose experts have one right factor for the gates of a block and one for the ups."""
    model = mixture(family, "factored")
    for block in blocks(model):
        for name in ("gate_proj", "up_proj"):
            owner = None
            for expert in block:
                outputs, inputs = getattr(expert, name).dense().shape
                left, bias = torch.randn(outputs, rank) / rank**0.5, getattr(expert, name).bias
                if owner is None:
                    owner = layer = LowRankLinear.from_factors(left, torch.randn(rank, inputs) / inputs**0.5, bias)
                else:
                    layer = SharedLowRankLinear.from_owner(left, owner, bias)
                setattr(expert, name, layer.requires_grad_(False))
    return model


@pytest.fixture(params=["gathered", "grouped", "padded"])
def way(request, monkeypatch):
    """One way is taken whatever it takes: tiny experts say nothing of speed. Padded ones are grouped as on a GPU."""
    way = "gathered" if request.param == "gathered" else "grouped"

    def seconds(calls, blocks, ways):
        times = {None: 2.0, way: 1.0}
        return {(id(b), size, each): times.get(each, 3.0) for b in blocks for size in calls for each in ways}

    monkeypatch.setattr(grouped_experts, "_seconds", seconds)
    # Nor do their attention layers.
    monkeypatch.setattr(optimize, "use_onednn", lambda layers: [])
    monkeypatch.setattr(grouped_experts, "_has_grouped_mm", lambda device, dtype: request.param == "padded")
    return way


only_grouped = pytest.mark.parametrize("way", ["grouped"], indirect=True)


def compiled(model):
    # What other tests compiled counts towards the limit of a process.
    torch.compiler.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)


def blocks(model):
    return [module for _, module in split_modules(model)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("made", "family"),
    [(mixture, family) for family in MIXTURES] + [(sharing, family) for family in ("mixtral", "gpt_oss", "llama4")],
)
def test_experts_together_compute_the_same(made, family, way):
    model, tokens = made(family), torch.arange(40).view(2, 20)
    whole, single = model(tokens).logits, model(tokens[:1, :1]).logits
    optimize_for_inference(model)
    assert {way for block in blocks(model) for way in block.group.ways.values()} == {way}
    torch.testing.assert_close(model(tokens).logits, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens[:1, :1]).logits, single, rtol=1e-4, atol=1e-4)


def test_a_shared_factor_is_in_memory_once_and_comes_back(way):
    model = sharing("mixtral")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with optimized(model):
        (expert, *others), (matrices, *_) = blocks(model)[0], [block.group.matrices for block in blocks(model)]
        basis = matrices.kinds["gate_proj"].basis
        assert {layer.gate_proj.right.data_ptr() for layer in (expert, *others)} == {basis.data_ptr()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_dropped_experts_are_left_out(way):
    model, tokens = mixture("mixtral"), torch.arange(40).view(2, 20)
    for place in (0, 2):
        replace_module(model, f"model.layers.1.mlp.experts.{place}", DroppedExpert())
    whole, single = model(tokens).logits, model(tokens[:1, :1], use_cache=False).logits
    optimize_for_inference(model)
    assert {way for block in blocks(model) for way in block.group.ways.values()} == {way}
    torch.testing.assert_close(model(tokens).logits, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(model)(tokens[:1, :1], use_cache=False).logits, single, rtol=1e-4, atol=1e-4)


@only_grouped
def test_a_block_without_experts_stays_as_it_is(way):
    model, tokens = mixture("mixtral"), torch.arange(40).view(2, 20)
    for place in range(4):
        replace_module(model, f"model.layers.1.mlp.experts.{place}", DroppedExpert())
    before = model(tokens).logits
    optimize_for_inference(model)
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pairs_of_other_processes_are_left_out(way):
    block = blocks(mixture("mixtral"))[0]
    inputs = torch.randn(3, 32), torch.tensor([[0, 4], [4, 4], [2, 1]]), torch.rand(3, 2)
    before = block(*inputs)
    group = grouped_experts._group(block)
    group.ways = {"many": way}
    torch.testing.assert_close(block(*inputs), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_many_tokens_are_gathered_in_parts(monkeypatch):
    block = blocks(mixture("mixtral"))[0]
    inputs = torch.randn(5, 32), torch.tensor([[0, 1], [3, 2], [2, 1], [0, 3], [1, 2]]), torch.rand(5, 2)
    before = block(*inputs)
    grouped_experts._group(block).ways = {"many": "gathered"}
    monkeypatch.setattr(grouped_experts, "_GATHERED", 3 * 32 * 32)
    torch.testing.assert_close(block(*inputs), before, rtol=1e-4, atol=1e-5)


def test_names_and_values_stay_and_so_do_they_when_it_is_undone(way):
    model = mixture("mixtral")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [*map(type, model.modules())]
    with optimized(model):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [*map(type, model.modules())] == kinds
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_bytes_in_memory_are_those_of_the_factors():
    model = mixture("mixtral", "factored")
    block = blocks(model)[0]
    before = sum(parameter.nbytes for parameter in block.parameters())
    kinds = grouped_experts._group(block).matrices.kinds.values()
    # One row of zeros for each factor.
    zeros = sum(kind.right[-1].nbytes + kind.left[-1].nbytes for kind in kinds)
    assert sum(kind.right.nbytes + kind.left.nbytes for kind in kinds) == before + zeros


@torch.no_grad()
@pytest.mark.parametrize(("family", "way"), [("gpt_oss", "gathered"), ("mixtral", "grouped")], indirect=["way"])
def test_a_decoding_step_compiles_into_one_graph(family, way):
    model, token = mixture(family), torch.tensor([[7]])
    before = model(token, use_cache=False).logits
    optimize_for_inference(model)
    torch.testing.assert_close(compiled(model)(token, use_cache=False).logits, before, rtol=1e-4, atol=1e-4)


@only_grouped
def test_it_generates_the_same_tokens(way):
    model, prompt = mixture("qwen3_moe"), torch.arange(12)[None]
    asked = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    before = model.generate(prompt, **asked)
    optimize_for_inference(model)
    assert torch.equal(model.generate(prompt, **asked), before)


@only_grouped
def test_gradients_are_those_of_separate_experts(way):
    model, tokens = mixture("mixtral", "factored"), torch.arange(12)[None]
    right = model.model.layers[0].mlp.experts[0].up_proj.right
    model.requires_grad_()(tokens, labels=tokens).loss.backward()
    before = right.grad.clone()
    model.zero_grad()
    optimize_for_inference(model)
    model(tokens, labels=tokens).loss.backward()
    torch.testing.assert_close(right.grad, before)


@only_grouped
@torch.no_grad()
@pytest.mark.parametrize("change", ["replace", "convert", "copy", "load"])
def test_changed_experts_are_computed_one_after_the_other(change, way):
    model, tokens = mixture("mixtral"), torch.arange(6)[None]
    optimize_for_inference(model)
    if change == "replace":
        for block in blocks(model):
            block[1].up_proj = nn.Linear(32, 48, bias=False)
    elif change == "convert":
        model.double()
    elif change == "copy":
        model = copy.deepcopy(model)
    else:
        model.load_state_dict(
            {name: value * 1.5 if value.is_floating_point() else value for name, value in model.state_dict().items()}
        )
    assert not any(block.group.matrices for block in blocks(model))
    after = model(tokens).logits
    restore(model)
    torch.testing.assert_close(model(tokens).logits, after, rtol=1e-4, atol=1e-4)


@only_grouped
def test_rounded_experts_stay_apart_and_are_counted(way, caplog):
    model = mixture("mixtral")
    model.model.layers[1].mlp.experts[0].up_proj = nn.Sequential(model.model.layers[1].mlp.experts[0].up_proj)
    optimize_for_inference(model)
    assert [type(block) in GROUPED.values() for block in blocks(model)] == [True, False]
    assert "1 of 2 blocks of experts have other layers" in caplog.text


@only_grouped
def test_a_model_with_grouped_experts_is_not_exported(way, tmp_path):
    model = mixture("mixtral")
    optimize_for_inference(model)
    with pytest.raises(ValueError, match=r"GroupedRoutedExperts.*load the folder again without optimize"):
        save_compressed(model, tmp_path / "small", tokenizer=byte_tokenizer(), verify=False)


@torch.no_grad()
@only_grouped
@pytest.mark.parametrize("made", [mixture, sharing])
def test_a_loaded_model_with_grouped_experts_is_saved(made, way, tmp_path):
    save_compressed(made("mixtral"), tmp_path / "small", tokenizer=byte_tokenizer(), verify=False)
    loaded = load_compressed(tmp_path / "small", optimize=True)
    loaded.save_pretrained(tmp_path / "again")
    again, first = (load_compressed(tmp_path / name).state_dict() for name in ("again", "small"))
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("again", "small")]
    assert abs(sizes[0] - sizes[1]) < 4096
