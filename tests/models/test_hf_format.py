from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from lowrank_pl.models import digests, hf_experts, hf_format, hf_layers, hf_quantized
from lowrank_pl.models.hf_format import LowRankConfig, LowRankQuantizer, align
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.tiny import tiny_model


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return LowRankLinear.from_factors(torch.randn(12, 4), torch.randn(4, 8), torch.randn(12))


def entry(rank, storage, side="out"):
    return rank if storage == "factored" else {"rank": rank, "storage": storage, "side": side}


@pytest.fixture(params=["factored", "pivoted"])
def storage(request):
    return request.param


@pytest.fixture
def small(storage):
    """A Llama whose linear layers in the blocks all have rank 5; pivots of every other one are columns."""
    torch.manual_seed(0)
    model = tiny_model("llama")
    entries = {}
    for name, module in list(model.model.named_modules(prefix="model")):
        if not isinstance(module, nn.Linear):
            continue
        side = "out" if len(entries) % 2 else "in"
        new = LowRankLinear(module.in_features, module.out_features, 5, bias=False)
        if storage == "pivoted":
            new = PivotedLinear(module.in_features, module.out_features, 5, side=side, bias=False)
            new.pivots = torch.tensor([1, 4, 5, 9, 15], dtype=torch.int32)
        model.set_submodule(name, new)
        entries[name] = entry(5, storage, side)
    model.config.quantization_config = LowRankConfig(entries)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(24)[None]).logits


# the layer


def test_the_layer_computes_what_its_merged_weight_does(layer):
    x = torch.randn(3, 5, 8)
    assert layer.dense().shape == (12, 8)
    torch.testing.assert_close(layer(x), functional.linear(x, layer.dense(), layer.bias))
    exact = (layer.weight.double() @ layer.right.double()).float()
    assert torch.equal(layer.dense(), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_merged_in_float32(layer, dtype):
    half = copy.deepcopy(layer).to(dtype)
    assert torch.equal(half.dense(), (half.weight.float() @ half.right.float()).to(dtype))


def test_from_factors_keeps_the_tensors_and_takes_views():
    left, right = torch.randn(6, 3), torch.randn(3, 4)
    layer = LowRankLinear.from_factors(left, right)
    assert layer.weight.data_ptr() == left.data_ptr()
    assert layer.right.data_ptr() == right.data_ptr()
    assert layer.bias is None
    assert (layer.in_features, layer.out_features, layer.rank) == (4, 6, 3)
    strided = LowRankLinear.from_factors(left[:, :2], right[:2])
    assert strided.weight.is_contiguous()


@pytest.mark.parametrize(
    ("left", "right", "bias", "text"),
    [
        (torch.ones(6, 3), torch.ones(2, 4), None, r"\[6, 3\], \[2, 4\]: expected \[out, rank\], \[rank, in\]"),
        (torch.ones(6, 3), torch.ones(3, 4), torch.ones(4), r"a bias of \[out\]"),
        (torch.ones(6, 3), torch.ones(3, 4).double(), None, "torch.float32 on cpu, torch.float64 on cpu: expected one"),
    ],
)
def test_factors_that_do_not_fit_are_refused(left, right, bias, text):
    with pytest.raises(ValueError, match=text):
        LowRankLinear.from_factors(left, right, bias)


def test_a_fresh_layer_is_finite_and_the_meta_device_allocates_nothing():
    fresh = LowRankLinear(7, 9, 3)
    assert all(parameter.isfinite().all() for parameter in fresh.parameters())
    huge = LowRankLinear(1 << 20, 1 << 20, 1 << 10, device="meta", dtype=torch.bfloat16)
    assert huge.right.is_meta
    assert [name for name, _ in huge.named_parameters()] == ["weight", "right", "bias"]


def test_the_layer_under_autocast_copy_and_pickle(layer):
    x = torch.randn(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_the_layer_compiles_into_one_graph(layer):
    x = torch.randn(2, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft itself asks for it
def test_peft_adapters_learn_and_merging_them_is_an_error(small):
    import peft

    before = logits(small)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(small, config)
    assert torch.equal(logits(adapted), before)
    adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(adapters) == 8
    optimizer = torch.optim.SGD(adapters, lr=0.1)
    tokens = torch.arange(24)[None]
    losses = []
    for _ in range(3):
        loss = adapted(tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    assert not torch.equal(logits(adapted), before)
    with pytest.raises(ValueError, match=r"q_proj can't be merged .* save_pretrained, or adapt a merged export"):
        adapted.merge_and_unload()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_dora_takes_the_norms_of_the_merged_weight(small):
    import peft

    before, norms = logits(small), small.model.layers[0].mlp.down_proj.dense().norm(dim=1)
    adapted = peft.get_peft_model(small, peft.LoraConfig(r=2, use_dora=True, target_modules=["down_proj"]))
    magnitude = adapted.base_model.model.model.layers[0].mlp.down_proj.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.data, norms)
    torch.testing.assert_close(logits(adapted), before)
    adapted(torch.arange(24)[None], labels=torch.arange(24)[None]).loss.backward()
    assert magnitude.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("LoraConfig", {"init_lora_weights": "pissa_niter_4"}, "PiSSA"),
        ("LoraConfig", {"init_lora_weights": "olora"}, "OLoRA"),
        ("LoKrConfig", {}, "LoKr"),
        ("LoHaConfig", {}, "LoHa"),
    ],
)
@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"]])
def test_adapters_that_need_the_dense_weight_are_refused_by_name(small, kind, settings, name, targets):
    import peft

    before = logits(small)
    with pytest.raises(ValueError, match=rf"{name} needs the dense weight of .*proj.*: use LoRA, DoRA"):
        peft.get_peft_model(small, getattr(peft, kind)(r=2, target_modules=targets, **settings))
    assert torch.equal(logits(small), before)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_of_dense_layers_are_not_refused(small):
    import peft

    config = peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["lm_head"])
    before = logits(small)
    adapted = peft.get_peft_model(small, config)
    torch.testing.assert_close(logits(adapted), before)
    assert adapted.merge_and_unload() is small


@pytest.mark.parametrize("storage", ["pivoted"])
def test_a_whole_model_exports_to_torch_export_and_onnx(small, tmp_path):
    import onnxruntime

    small.eval()
    tokens, expected = torch.arange(24)[None], logits(small)
    program = torch.export.export(small, (tokens,), {"use_cache": False})
    with torch.no_grad():
        assert torch.equal(program.module()(tokens, use_cache=False).logits, expected)
    torch.onnx.export(program, f=tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def test_aligning_moves_memory_and_no_value():
    layer = nn.Linear(4, 5)
    layer.weight.data = torch.randn(21)[1:].view(5, 4)
    parameter, before = layer.weight, layer.weight.detach().clone()
    assert parameter.data_ptr() % 64
    align(layer)
    assert layer.weight is parameter
    assert parameter.data_ptr() % 64 == 0
    assert torch.equal(parameter, before)


# the config


def test_the_config_survives_json():
    config = LowRankConfig({"a": 3})
    assert config.to_dict() == {"modules": {"a": 3}, "schema": 1, "quant_method": "lowrank"}
    assert LowRankConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    modules = {"a": 3, "b": {"rank": 2, "storage": "pivoted", "side": "in"}}
    config = LowRankConfig(modules)
    assert config.to_dict() == {"modules": modules, "schema": 2, "quant_method": "lowrank"}
    assert LowRankConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()
    modules = {"a": {"bits": 8}, "b": {"rank": 2, "storage": "pivoted", "side": "in", "bits": 4, "group": 32}}
    config = LowRankConfig(modules, {"a": [5, 7]})
    assert (config.schema, config.modules) == (4, modules)
    config = LowRankConfig({"a": 3}, {"a": [5, 7]})
    assert (config.schema, config.to_dict()["shapes"]) == (3, {"a": [5, 7]})
    assert LowRankConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"schema": 7, "pivots": {}},
            "schema 7, .* up to 6: upgrade",
        ),
        ({"shapes": {"a": [3]}}, r"'a' the shape \[3\]: expected \[out, in\]"),
        ({"shapes": {"a": [3, 0]}}, r"'a' the shape \[3, 0\]: expected \[out, in\]"),
        ({"pivots": {}}, r"\['pivots'\]: expected modules, shapes, experts, schema"),
        ({"modules": {"a": 0}}, "'a' the rank 0: expected a positive integer"),
        ({"modules": {"a": "3"}}, "'a' the rank '3': expected a positive integer"),
        ({"modules": {"a": entry(0, "pivoted")}}, "'a' the rank 0: expected a positive integer"),
        ({"modules": {"a": entry(3, "sparse")}}, "'a' .*'sparse'.*: expected a rank, or rank, storage"),
        ({"modules": {"a": {"rank": 3}}}, "'a' .*{'rank': 3}: expected a rank, or rank, storage"),
        ({"modules": {"a": {}}}, "'a' .*{}: expected a rank, or rank, storage"),
        ({"modules": {"a": {"rank": 3, "group": 8}}}, "'a' .*'group': 8}: expected a rank, or rank, storage"),
        ({"modules": {"a": {"rank": 3, "side": "in", "bits": 4}}}, "'a' .*: expected a rank, or rank, storage"),
        ({"modules": {"a": {"rank": 0, "bits": 4}}}, "'a' the rank 0: expected a positive integer"),
        ({"modules": {"a": {"bits": 9}}}, "'a' .*9 bits .*: expected a whole number from 2 to 8"),
        ({"modules": {"a": {"bits": [4]}}}, r"'a' .*\[4\] bits .*: expected a whole number from 2 to 8"),
        ({"shapes": ["a"]}, r"the shapes \['a'\]: expected an entry for each module"),
        ({"modules": {"a": {"bits": 4, "group": 12}}}, "'a' .*group 12 .*: expected a multiple of 8"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(given, text):
    with pytest.raises(ValueError, match=text):
        LowRankConfig(**given)


# through transformers


def test_saving_and_loading_twice_keeps_every_bit(small, tmp_path):
    small.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(loaded), logits(small))
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "two")
    for code in (hf_format.__file__, hf_layers.__file__, hf_quantized.__file__, hf_experts.__file__, digests.__file__):
        assert (tmp_path / "two" / Path(code).name).read_bytes() == Path(code).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(logits(again), logits(small))
    assert again.config.auto_map == {"AutoModelForCausalLM": "hf_format.LlamaForCausalLM"}


def test_a_loaded_model_can_be_trained_cast_copied_and_pickled(small, tmp_path):
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(24)[None]
    loaded(tokens, labels=tokens).loss.backward()
    assert loaded.model.layers[0].mlp.up_proj.right.grad.abs().sum() > 0
    assert loaded.half().dtype == torch.float16
    assert torch.equal(logits(pickle.loads(pickle.dumps(loaded.float()))), logits(loaded))
    assert isinstance(loaded, type(small))


def test_the_part_below_the_head_loads_alone(small, tmp_path):
    small.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        expected = small.model(tokens).last_hidden_state
        assert torch.equal(body(tokens).last_hidden_state, expected)
        body.save_pretrained(tmp_path / "body")
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "body")(tokens).last_hidden_state, expected)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_and_another_dtype_work(small, tmp_path, device_map):
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert logits(loaded).isfinite().all()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "model.layers.7.mlp.up_proj",
            "'model.layers.7.mlp.up_proj', .*LlamaForCausalLM .*export it again",
        ),
        ("model.norm", "'model.norm' is a LlamaRMSNorm: only nn.Linear and Conv1D"),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused(small, tmp_path, name, text):
    small.config.quantization_config.modules[name] = 2
    small.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=text):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("rank", [4, 6])
def test_a_wrong_rank_is_a_size_mismatch(small, storage, tmp_path, rank):
    small.config.quantization_config.modules["model.layers.0.mlp.up_proj"] = entry(rank, storage)
    small.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_another_storage_is_a_size_mismatch(small, storage, tmp_path):
    other = {"factored": "pivoted", "pivoted": "factored"}[storage]
    small.config.quantization_config.modules["model.layers.0.mlp.up_proj"] = entry(5, other)
    small.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            entry(32, "pivoted"),
            r"up_proj: rank 32 .*\[96, 32\] .*: expected 1 to 31",
        ),
        (entry(5, "pivoted", "left"), "model.layers.0.mlp.up_proj: .*'left' .*expected one of out, in"),
    ],
)
@pytest.mark.parametrize("storage", ["pivoted"])
def test_a_config_of_an_impossible_layer_is_refused(small, tmp_path, given, text):
    small.config.quantization_config.modules["model.layers.0.mlp.up_proj"] = given
    small.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=text):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("pivots", [[0, 0, 1, 2, 3], [0, 1, 2, 3, 96], [-1, 0, 1, 2, 3], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("storage", ["pivoted"])
def test_pivots_that_are_damaged_are_an_error(small, tmp_path, pivots):
    small.model.layers[0].mlp.up_proj.pivots = torch.tensor(pivots, dtype=torch.int32)
    small.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"mlp.up_proj: .* 5 ascending .*; the folder is damaged, copy or export it again"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_model_whose_parts_stay_on_disk_computes_the_same(small, tmp_path, offload_buffers):
    small.save_pretrained(tmp_path / "one")
    places = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload", "offload_buffers": offload_buffers}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", **places)
    assert loaded.model.layers[0].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(logits(loaded), logits(small), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(loaded), logits(small), rtol=1e-5, atol=1e-5)


def test_a_folder_of_the_first_schema_still_loads(tmp_path, llama):
    llama.model.layers[0].mlp.up_proj = LowRankLinear(32, 96, 8, bias=False)
    llama.config.quantization_config = LowRankConfig({"model.layers.0.mlp.up_proj": 8})
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == {"modules": {"model.layers.0.mlp.up_proj": 8}, "quant_method": "lowrank", "schema": 1}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(llama))


def test_a_new_head_may_be_new_and_nothing_else(small, tmp_path):
    small.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(classifier.model.layers[1].mlp.up_proj.right, small.model.layers[1].mlp.up_proj.right)
    weights = load_file(tmp_path / "model.safetensors")
    for key in [key for key in weights if ".layers.1." not in key]:
        damaged = {name: value for name, value in weights.items() if name != key}
        save_file(damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"no {key}: .* copy or export it again"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_model_is_not_compressed_by_loading_it(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LowRankConfig({"lm_head": 2}))


def test_only_model_classes_of_transformers_are_made_up():
    assert hf_format.LlamaForCausalLM is hf_format.LlamaForCausalLM
    assert hf_format.LlamaForCausalLM.__name__ == "LlamaForCausalLM"
    for name in ("LlamaConfig", "NoSuchModel", "_private", "LlamaForSequenceClassification"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(hf_format, name)


def test_a_copy_registers_only_if_it_reads_more(monkeypatch):
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "lowrank", LowRankConfig)
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "lowrank", LowRankQuantizer)
    source = Path(hf_format.__file__).read_text(encoding="utf-8")
    same, newer = (
        {"__name__": name, "__package__": "lowrank_pl.models"} for name in ("copy_of_hf_format", "newer_hf_format")
    )
    exec(source, same)
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["lowrank"] is LowRankConfig
    exec(source.replace("SCHEMA = 6", "SCHEMA = 7"), newer)
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["lowrank"] is newer["LowRankConfig"]
