from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from lowrank_pl.costs.speed import Variant, uniform_modules
from lowrank_pl.export.export import save_compressed
from lowrank_pl.models.targets import find_targets, replace_module
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.serving import onednn_layers
from lowrank_pl.serving.onednn_layers import ONEDNN
from lowrank_pl.serving.optimize import optimize_for_inference, optimized

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a build with oneDNN")


@pytest.fixture(params=["factored", "pivoted"])
def model(request):
    made = tiny_model("qwen2").eval()  # has biases
    for name, layer in uniform_modules(made, find_targets(made), Variant(request.param, 0.5)).items():
        replace_module(made, name, layer)
    return made


@pytest.fixture
def always(monkeypatch):
    """OneDNN is taken whatever it takes: tiny layers say nothing of speed."""
    monkeypatch.setattr(onednn_layers, "_FASTER", float("inf"))


@needs_onednn
@torch.no_grad()
def test_an_optimised_model_computes_the_same(model, always):
    tokens = torch.arange(40).view(2, 20)
    whole, single = model(tokens).logits, model(tokens[:1, :1]).logits
    found = optimize_for_inference(model)
    matrices = 2 * sum(1 for layer in model.modules() if hasattr(layer, "right")) + 1
    assert (found.timed, found.one_token, found.few_tokens, found.many_tokens) == (matrices,) * 4
    assert type(model.lm_head) is ONEDNN[nn.Linear]
    torch.testing.assert_close(model(tokens).logits, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(tokens[:1, :1]).logits, single, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_gradients_are_those_of_the_model_before(model, always):
    tokens = torch.arange(12)[None]
    model(tokens, labels=tokens).loss.backward()
    before = model.model.layers[0].mlp.up_proj.right.grad.clone()
    model.zero_grad()
    optimize_for_inference(model)
    model(tokens, labels=tokens).loss.backward()
    assert torch.equal(model.model.layers[0].mlp.up_proj.right.grad, before)


@needs_onednn
@torch.no_grad()
def test_autocast_computes_as_before(model, always):
    tokens = torch.arange(12)[None]
    with torch.autocast("cpu", torch.bfloat16):
        before = model(tokens).logits
        optimize_for_inference(model)
        assert torch.equal(model(tokens).logits, before)


@needs_onednn
def test_layers_with_hooks_are_left_alone_and_counted(model, always, caplog):
    add_hook_to_module(model.lm_head, ModelHook())
    optimize_for_inference(model)
    assert type(model.lm_head) is nn.Linear
    assert "1 layers have hooks of accelerate" in caplog.text


@needs_onednn
@torch.no_grad()
def test_a_model_that_is_converted_afterwards_still_computes(model, always):
    optimize_for_inference(model)
    assert model.to(torch.float64)(torch.arange(5)[None]).logits.dtype == torch.float64


def test_names_and_values_stay_and_the_block_ends_with_the_model_as_it_was(model, always):
    state, kinds = {name: value.clone() for name, value in model.state_dict().items()}, [*map(type, model.modules())]
    with optimized(model):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [*map(type, model.modules())] == kinds


@needs_onednn
def test_an_optimised_model_is_not_exported(model, always, tmp_path):
    optimize_for_inference(model)
    with pytest.raises(ValueError, match="OneDNN"):
        save_compressed(model, tmp_path / "small", tokenizer=byte_tokenizer(), verify=False)


def test_a_model_with_nothing_to_optimise_says_so(caplog):
    assert optimize_for_inference(tiny_model("llama").bfloat16()).timed == 0
    assert "nothing to optimise in LlamaForCausalLM" in caplog.text
