from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from lowrank_pl.factors.compression import factored_embedding
from lowrank_pl.factors.decomposition import Factors
from lowrank_pl.models.base import load_base
from lowrank_pl.models.hf_format import LowRankConfig
from lowrank_pl.models.hf_layers import LowRankLinear
from lowrank_pl.models.hf_quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    TiedHead,
    pack,
    stored_state,
    unpack,
)
from lowrank_pl.models.offload import streamed
from lowrank_pl.models.targets import find_targets, replace_module
from lowrank_pl.models.tiny import PAD, tiny_model
from tests.helpers.low_rank_models import compress_at_random
from tests.helpers.rounded_models import round_model

TOKENS = torch.arange(24)[None]
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2")


def entry(module):
    rank = {"rank": module.rank} if hasattr(module, "rank") else {}
    side = {"storage": "pivoted", "side": module.side} if hasattr(module, "side") else {}
    return {**rank, **side, **module.grid.to_json()}


def rounded(family):
    """A tiny model whose layers are of every storage and rounded to every grid, with its embedding and its head."""
    model = round_model(compress_at_random(tiny_model(family, hidden=64)))
    entries = {name: entry(module) for name, module in model.named_modules() if hasattr(module, "grid")}
    model.config.quantization_config = LowRankConfig(entries)
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    rounded("gemma3").save_pretrained(tmp_path)
    return tmp_path


def change(folder, key, value=None):
    """Replace a tensor in the weights of ``folder``, or remove it."""
    weights = load_file(folder / "model.safetensors")
    del weights[key]
    more = {} if value is None else {key: value}
    save_file({**weights, **more}, folder / "model.safetensors", metadata={"format": "pt"})


# the layers


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_codes_are_those_that_were_packed(bits):
    codes = torch.randint(0, 2**bits, (5, 37), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() * 8 < codes.numel() * bits + 8 * 3 * len(codes)
    assert torch.equal(unpack(packed, bits, 37), codes)


def test_a_rounded_layer_computes_what_its_dense_weight_does():
    for module in rounded("gpt2").transformer.h.modules():
        if hasattr(module, "grid"):
            x = torch.randn(3, module.in_features)
            expected = nn.functional.linear(x, module.dense(), module.bias)
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_scales_are_stored_in_bfloat16_unless_they_were_changed():
    model = rounded("gemma3")
    stored = stored_state(model.state_dict())
    scales = {name for name in stored if f"{name}_packed" in stored}
    assert {stored[name].dtype for name in scales} == {torch.bfloat16}
    assert stored["model.norm.weight"].dtype == torch.float32
    assert stored["lm_head.weight"] is stored["model.embed_tokens.weight"]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 1.001
    assert stored_state(model.state_dict())["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32


# whole models


def test_saving_and_loading_twice_keeps_every_bit(family, tmp_path):
    model = rounded(family)
    expected = logits(model)
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(loaded), expected)
    head = loaded.get_output_embeddings()
    assert isinstance(loaded.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(head, TiedHead if family in ("gemma3", "gpt2") else QuantizedLinear)
    loaded.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(logits(again), expected)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    assert files[1]["model.embed_tokens.weight" if family != "gpt2" else "transformer.wte.weight"].element_size() == 2


def test_a_loaded_model_is_copied_cast_and_trained_with_its_tie(family, tmp_path):
    rounded(family).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = logits(loaded)
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(logits(other), expected)
        head, embedding = other.get_output_embeddings(), other.get_input_embeddings()
        assert not isinstance(head, TiedHead) or (head.source[0] is embedding and head.weight is embedding.weight)
        half = other.to(torch.bfloat16)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        assert (logits(half).float() - expected).norm() < 0.03 * expected.norm()
    input = loaded.get_input_embeddings()(TOKENS).detach().requires_grad_()
    loaded(inputs_embeds=input, labels=TOKENS).loss.backward()
    assert input.grad.abs().sum() > 0
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected)


def test_the_part_below_the_head_loads_alone(family, tmp_path):
    model = rounded(family)
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        expected = model.base_model(TOKENS).last_hidden_state
        body = AutoModel.from_pretrained(tmp_path / "one")
        body.save_pretrained(tmp_path / "two")
        for found in (body, AutoModel.from_pretrained(tmp_path / "two")):
            assert torch.equal(found(TOKENS).last_hidden_state, expected)


@pytest.mark.parametrize("places", [{"": "cpu"}, "auto", {"": "disk"}])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_device_map_computes_the_same(folder, tmp_path, places, offload_buffers):
    options = {"device_map": places, "offload_folder": tmp_path / "offload", "offload_buffers": offload_buffers}
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert torch.equal(logits(loaded), logits(rounded("gemma3")))


def test_a_streamed_model_computes_the_same():
    model = rounded("gemma3")
    expected = logits(model)
    with streamed(model, torch.device("cpu")):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["weight", "weight_packed", "weight_zeros"])
@pytest.mark.parametrize("options", [{}, {"device_map": {"": "disk"}}])
def test_what_no_file_holds_is_an_error(folder, tmp_path, kind, options):
    options = {**options, "offload_folder": tmp_path / "offload"} if options else {}
    for name in ("model.embed_tokens", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"):
        if f"{name}.{kind}" not in load_file(folder / "model.safetensors"):
            continue  # At 8 bits there are no zero points.
        copied = tmp_path / name
        rounded("gemma3").save_pretrained(copied)
        change(copied, f"{name}.{kind}")
        if options and kind == "weight":
            continue  # Parameters that stay on disk are read when they are used.
        with pytest.raises(ValueError, match=rf"hold no .*{kind}.*: .* copy or export it again"):
            AutoModelForCausalLM.from_pretrained(copied, **options)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight_packed", "model.layers.1.mlp.up_proj.right"])
def test_a_tensor_of_another_shape_is_an_error(folder, key):
    change(folder, key, load_file(folder / "model.safetensors")[key][:-1].clone())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("given", [{"bits": 4}, {"bits": 3, "group": 8}, {"rank": 4, "bits": 4, "group": 8}])
def test_other_bits_than_those_of_the_files_are_an_error(tmp_path, given):
    model = rounded("llama")
    name = "model.layers.0.mlp.up_proj"
    assert entry(model.get_submodule(name)) != given
    model.config.quantization_config.modules[name] = given
    model.save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched_sizes|hold no"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("lm_head", {"bits": 8}, "'lm_head', which is tied to model.embed_tokens.weight"),
        ("model.embed_tokens", {"bits": 8, "rank": 4}, "'model.embed_tokens' is a .*Embedding: only nn.Linear"),
        ("model.norm", {"bits": 8}, "'model.norm' is a .*Norm: only nn.Linear and Conv1D can be stored as factors"),
        ("model.nothing", {"bits": 8}, "'model.nothing', which Gemma3ForCausalLM does not have"),
    ],
)
def test_an_entry_that_does_not_fit_the_model_is_refused(tmp_path, name, given, text):
    model = rounded("gemma3")
    model.config.quantization_config.modules[name] = given
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=text):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_rounded_model_is_not_compressed_again(folder):
    with pytest.raises(ValueError, match=r"quantised \(module model.embed_tokens\) and can't be compressed"):
        find_targets(rounded("gemma3"))
    with pytest.raises(ValueError, match="already compressed by lowrank_pl: give the dense model"):
        load_base(str(folder))


def test_only_embeddings_that_stay_right_are_resized(folder, tmp_path):
    with pytest.raises(
        ValueError, match="QuantizedGemma3TextScaledWordEmbedding, which can't be resized: resize the base"
    ):
        AutoModelForCausalLM.from_pretrained(folder).resize_token_embeddings(270)
    model, entries = tiny_model("llama"), {"lm_head": 4}
    replace_module(model, "lm_head", LowRankLinear(32, 261, 4, bias=False))
    model.config.quantization_config = LowRankConfig(entries)
    model.save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="LowRankLinear, which can't be resized: resize the base"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "head").resize_token_embeddings(270)
    model = tiny_model("gemma3")
    factors = Factors(torch.randn(261, 4), torch.randn(4, 32), torch.ones(4))
    for place, module in factored_embedding(model, "model.embed_tokens", factors).items():
        replace_module(model, place, module)
    model.config.quantization_config = LowRankConfig({"model.embed_tokens": {"rank": 4, "storage": "embedding"}})
    model.save_pretrained(tmp_path / "low")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    loaded.resize_token_embeddings(270, mean_resizing=False)
    assert torch.equal(logits(loaded)[..., :261], logits(model))
    loaded.save_pretrained(tmp_path / "larger")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "larger")), logits(loaded))


# adapters


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("where", ["all-linear", "embeddings"])
def test_lora_learns_on_rounded_layers_and_is_saved_alone(family, where, tmp_path):
    import peft

    model = rounded(family)
    embedding = "wte" if family == "gpt2" else "embed_tokens"
    targets = [embedding, "lm_head"] if where == "embeddings" else where
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert torch.equal(logits(adapted), logits(rounded(family)))
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        loss = adapted(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(rounded(family), tmp_path)
    assert torch.equal(logits(again), logits(adapted))
    with pytest.raises(ValueError, match=r"can't be merged into its .*: save it on its own with save_pretrained"):
        adapted.merge_and_unload()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.is_gradient_checkpointing:FutureWarning")
def test_dora_takes_the_norms_of_the_rounded_weight():
    import peft

    model = rounded("gemma3")
    expected = {name: module.dense().norm(dim=1) for name, module in model.named_modules() if hasattr(module, "W_q")}
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, use_dora=True, target_modules=[*expected]))
    # The row of the padding token is zero, and has no direction.
    torch.testing.assert_close(logits(adapted)[..., :PAD], before[..., :PAD])
    norms = {
        name.removeprefix("base_model.model."): module.lora_magnitude_vector["default"].weight
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_magnitude_vector")
    }
    assert norms.keys() == expected.keys()
    assert "lm_head" in norms
    for name, norm in norms.items():
        torch.testing.assert_close(norm.data, expected[name])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_dora": True, "target_modules": ["embed_tokens"]}, "DoRA"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "training of single tokens"),
        ({"init_lora_weights": "pissa", "target_modules": ["lm_head"]}, "PiSSA"),
        ({"init_lora_weights": "olora", "target_modules": "all-linear"}, "OLoRA"),
    ],
)
def test_adapters_that_need_the_dense_weight_are_refused_by_name(settings, name):
    import peft

    model = rounded("gemma3")
    with pytest.raises(ValueError, match=rf"{name} needs the dense weight of .*: use LoRA"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_of_dense_layers_beside_a_rounded_embedding_are_not_refused():
    import peft

    model = round_model(tiny_model("gemma3"), ["model.embed_tokens"])
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules="all-linear"))
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_of_other_layers_work_beside_an_embedding_of_low_rank():
    import peft

    def made():
        model = tiny_model("gemma3")
        factors = Factors(torch.ones(261, 4), torch.ones(4, 32), torch.ones(4))
        for place, module in factored_embedding(model, "model.embed_tokens", factors).items():
            replace_module(model, place, module)
        return model

    model = made()
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(logits(adapted), before)
    with pytest.raises(ValueError, match=r"PiSSA needs the dense weight of lm_head, which is stored as low-rank parts"):
        peft.get_peft_model(made(), peft.LoraConfig(init_lora_weights="pissa", target_modules=["lm_head"]))
