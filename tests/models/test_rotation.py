"""Rotated models: the same logits from other weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_pl.factors.compression import factored_embedding
from lowrank_pl.factors.decomposition import Factors
from lowrank_pl.models.rotation import RotationError, logit_difference, rotated
from lowrank_pl.models.targets import replace_module
from lowrank_pl.models.tiny import VOCABULARY, tiny_model
from tests.helpers.pruned_models import ragged

TOKENS = torch.arange(40).view(2, 20) * 5


def other(kind, **settings):
    """Return a tiny model of a family that `tiny_model` does not know."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    config = AutoConfig.for_model(kind, num_attention_heads=4, num_key_value_heads=2, **sizes, **settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def with_gains(model):
    """Return the model with norms whose gains differ between channels."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += torch.rand(parameter.shape, generator=generator)
    return model


def made(family):
    return with_gains(other(family, head_dim=8) if family == "gemma" else tiny_model(family))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma"])
def test_logits_stay_and_every_matrix_changes(family):
    model = made(family)
    turned = rotated(model, seed=3)
    torch.testing.assert_close(turned(TOKENS).logits, model(TOKENS).logits, atol=3e-5, rtol=1e-4)
    before = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in turned.named_parameters(remove_duplicate=False):
        if parameter.dim() == 2:
            assert (parameter - before[name]).norm() > 0.5 * before[name].norm(), name


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_gains_of_the_stream_become_one(family):
    norm = rotated(made(family)).model.layers[0].input_layernorm
    assert torch.equal(norm.weight, torch.full((32,), 0.0 if family == "gemma" else 1.0))


def test_the_model_stays_as_it_was():
    model = made("gemma")
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    rotated(model)
    assert model.config.tie_word_embeddings
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.state_dict().items())


def test_seeds_give_rotations():
    model = made("llama")
    one, same, different = (rotated(model, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, different, atol=0.1)


def test_a_tied_head_is_untied_and_survives_a_reload(tmp_path):
    model = made("gemma")
    turned = rotated(model)
    assert turned.num_parameters() == model.num_parameters() + model.lm_head.weight.numel()
    turned.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded(TOKENS).logits, turned(TOKENS).logits)


def test_a_tied_head_stays_tied_if_the_final_gain_is_one_number():
    model = made("gemma")
    with torch.no_grad():
        model.model.norm.weight.fill_(0.7)
    turned = rotated(model)
    assert turned.lm_head.weight is turned.get_input_embeddings().weight
    assert logit_difference(model, turned, TOKENS) < 1e-5


def test_half_precision():
    model = made("llama").bfloat16()
    turned = rotated(model)
    assert turned.dtype == torch.bfloat16
    assert logit_difference(model, turned, TOKENS) < 0.05


def test_mlps_of_several_widths():
    model = with_gains(ragged("llama"))
    assert logit_difference(model, rotated(model), TOKENS) < 1e-5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: made("gpt2"), "norm transformer.h.0.ln_1 .* is no RMSNorm"),
        (lambda: made("opt"), "is no RMSNorm"),
        (lambda: made("gpt_neox"), "is no RMSNorm"),
        (lambda: made("gemma2"), r"post_attention_layernorm scales the output of .*o_proj"),
        (lambda: made("gemma3"), r"post_attention_layernorm scales the output of .*o_proj"),
        (lambda: other("mixtral", num_local_experts=2), "mlp.gate.weight is no linear layer"),
    ],
    ids=["gpt2", "opt", "gpt_neox", "gemma2", "gemma3", "mixtral"],
)
def test_models_that_cannot_be_rotated_are_refused_by_name(model, message):
    with pytest.raises(RotationError, match=f"can't be rotated: .*{message}"):
        rotated(model())


def test_a_model_that_uses_the_stream_otherwise_is_refused():
    model = made("llama")
    model.model.layers[1].register_forward_hook(lambda _module, _args, output: output.abs())
    with pytest.raises(RotationError, match="its logits change by"):
        rotated(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_blocks_are_turned_inside_and_a_tied_head_stays_tied(family):
    model = made(family)
    turned = rotated(model, stream=False)
    torch.testing.assert_close(turned(TOKENS).logits, model(TOKENS).logits, atol=3e-5, rtol=1e-4)
    assert (turned.lm_head.weight is turned.model.embed_tokens.weight) == model.config.tie_word_embeddings
    before = dict(model.named_parameters())
    for name, parameter in turned.model.layers.named_parameters(prefix="model.layers"):
        if parameter.dim() == 2:
            assert not torch.equal(parameter, before[name]), name


def test_fused_layers_are_not_turned_inside():
    with pytest.raises(RotationError, match="turn its stream instead"):
        rotated(made("phi3"), stream=False)


def test_embeddings_of_low_rank_are_refused():
    model = tiny_model("qwen3")
    for place, module in factored_embedding(
        model, "model.embed_tokens", Factors(torch.randn(261, 4), torch.randn(4, 32), torch.ones(4))
    ).items():
        replace_module(model, place, module)
    with pytest.raises(RotationError, match="embeddings are of low rank; rotate the base"):
        rotated(model)
