"""Exports of models whose numbers are rounded to a few bits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowrank_pl.cli.export import export
from lowrank_pl.export.export import load_compressed, save_compressed
from lowrank_pl.export.health.diagnosis import Finding
from lowrank_pl.export.health.examine import diagnose
from lowrank_pl.export.health.quality import Prompts
from lowrank_pl.export.health.weights import check_plan, check_weights, tensors_of
from lowrank_pl.export.reload import ExportError
from lowrank_pl.factors.components import AnySize
from lowrank_pl.factors.cutting import cut
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.hf_quantized import Grid, QuantizedEmbedding, QuantizedLinear, TiedHead
from lowrank_pl.models.targets import model_parameters
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.text.sequences import Calibration
from tests.helpers import fork_server as forked
from tests.helpers.low_rank_models import compress_at_random, low_rank_layer
from tests.helpers.rounded_models import round_model, rounded_layer

TOKENS = torch.arange(24)[None]
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2")


def rounded(family):
    """A tiny model whose layers are of every storage and rounded to every grid, with its embedding and its head."""
    return round_model(compress_at_random(tiny_model(family, hidden=64), ("factored", "shorter", "dense")))


def module_plan(module):
    shape = [module.out_features, module.in_features] if hasattr(module, "out_features") else None
    shape = tuple(shape or (module.num_embeddings, module.embedding_dim))
    storage = "pivoted" if hasattr(module, "side") else "factored"
    return ModulePlan(shape, getattr(module, "rank", None), None, storage, getattr(module, "grid", None))


def plan_of(model, dense_parameters, dtype_bytes=4):
    """The plan that says what ``model`` holds."""
    stored = {name: module_plan(module) for name, module in model.named_modules() if hasattr(module, "grid")}
    inside = {name: entry for name, entry in stored.items() if ".layers." in name or ".h." in name}
    outside = {name: entry for name, entry in stored.items() if name not in inside}
    return RankPlan("hand", 0.5, inside, dense_parameters, dtype_bytes, embeddings=outside)


def parameters(family):
    return sum(parameter.numel() for parameter in tiny_model(family, hidden=64).parameters())


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def tokenizer(family):
    return byte_tokenizer(bos=family == "gemma3")


def test_the_files_take_the_bytes_of_the_plan_and_reload_bit_for_bit(family, tokenizer, tmp_path):
    model = rounded(family)
    plan = plan_of(model, parameters(family))
    report = save_compressed(model, tmp_path / "out", tokenizer=tokenizer, plan=plan, verify=False)
    names = {*plan.modules, *plan.embeddings}
    assert report.modules == len(names)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) == plan.bytes
    assert torch.equal(logits(load_compressed(tmp_path / "out")), logits(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["schema"] == 4
    assert config["modules"] == {name: as_entry(module) for name, module in model.named_modules() if name in names}


def test_all_rounded_numbers_count_as_parameters():
    for family in FAMILIES:
        assert model_parameters(round_model(tiny_model(family))) == model_parameters(tiny_model(family))


def test_the_plan_of_a_half_precision_model_counts_its_bytes(tmp_path):
    model = rounded("llama").to(torch.bfloat16)
    model.model.rotary_emb = tiny_model("llama", hidden=64).model.rotary_emb
    plan = plan_of(model, parameters("llama"), 2)
    save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(), plan=plan, verify=False)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) == plan.bytes


def test_a_merged_export_holds_the_values_of_the_rounded_numbers(family, tokenizer, tmp_path):
    model = rounded(family)
    plan, verify = plan_of(model, parameters(family)), family == "gpt2"
    with forked.new_processes():
        save_compressed(model, tmp_path / "out", tokenizer=tokenizer, merge=True, plan=plan, verify=verify)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kinds = (QuantizedLinear, QuantizedEmbedding, TiedHead, LowRankLinear, PivotedLinear)
    assert not any(isinstance(module, kinds) for module in plain.modules())
    assert torch.equal(plain.get_input_embeddings().weight, model.get_input_embeddings().dense())
    for name, module in plain.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            assert torch.equal(weight, model.get_submodule(name).dense())
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)


def test_a_model_with_rounded_layers_of_a_folders_copy_of_the_code_is_exported(tmp_path):
    model = rounded("gemma3")
    for module in model.modules():
        kind = type(module)
        if hasattr(module, "grid") and isinstance(module, torch.nn.Linear):
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    assert not any(type(module) is QuantizedLinear for module in model.modules())
    save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(bos=True), verify=False)
    assert torch.equal(logits(load_compressed(tmp_path / "out")), logits(model))


def test_a_head_that_is_rounded_apart_from_the_embedding_it_is_tied_to_is_refused(tmp_path):
    model = tiny_model("gemma3")
    model.lm_head = rounded_layer(model.lm_head, Grid(8))
    with pytest.raises(ValueError, match=r"lm_head is compressed, but the config ties it to model.embed_tokens.weight"):
        save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(bos=True))
    model = round_model(tiny_model("gemma3"), ["model.embed_tokens"])
    model.lm_head.source = (round_model(tiny_model("gemma3"), ["model.embed_tokens"]).model.embed_tokens,)
    with pytest.raises(ValueError, match="lm_head reads the rows of an embedding that the config does not tie it to"):
        save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(bos=True))


def test_no_smaller_size_is_cut_from_a_rounded_model(tmp_path):
    model = rounded("llama")
    plan = plan_of(model, parameters("llama"))
    held = object.__new__(AnySize)
    vars(held).update(plan=plan, factors=None)
    with pytest.raises(ValueError, match=r"rounded to a few bits, and no components .*: give the plan alone"):
        save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(), plan=held)
    with pytest.raises(ValueError, match=r"rounds numbers to a few bits, .*: leave out --any_size"):
        export(plan.save(tmp_path / "plan.json"), output=tmp_path / "any", any_size=True)
    save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(), plan=plan, verify=False)
    with pytest.raises(ValueError, match=r"rounded .*: make this size from the plan .* --keep` before rounding"):
        load_compressed(tmp_path / "out", keep=0.3)
    with pytest.raises(ValueError, match=r"rounded to a few bits and can't be cut: make this size from the plan"):
        cut(model, plan, plan)


# doctor


def findings(model, plan=None):
    entries = {name: as_entry(module) for name, module in model.named_modules() if hasattr(module, "grid")}
    found = check_weights(tensors_of(model), entries, () if plan is None else plan.zero_modules)
    found += [] if plan is None else check_plan(plan, tensors_of(model), entries)
    return {finding.name: finding for finding in found}


def as_entry(module):
    entry = {"rank": module.rank} if hasattr(module, "rank") else {}
    entry |= {"storage": "pivoted", "side": module.side} if hasattr(module, "side") else {}
    return entry | module.grid.to_json()


def test_the_doctor_finds_a_rounded_model_healthy_and_says_its_bits(tmp_path):
    model = rounded("gemma3")
    plan = plan_of(model, parameters("gemma3"))
    tokenizer = byte_tokenizer(bos=True)
    with forked.new_processes():
        save_compressed(model, tmp_path / "out", tokenizer=tokenizer, plan=plan)
        diagnosis = diagnose(
            tmp_path / "out", device="cpu", text=Calibration("python-docs", 32, 2), prompts=Prompts(prompts=())
        )
    assert diagnosis.health in ("healthy", "warning"), diagnosis.text()
    found: dict[str, Finding] = {finding.name: finding for finding in diagnosis.findings}
    assert "4 with 8 bits" in found["factors"].message
    assert sum(found["factors"].figures["bits"].values()) == len(plan.modules) + len(plan.embeddings)
    assert found["plan"].message.startswith("ranks, shapes, storage and bits of all 14 modules")
    assert found["counts"].health == "healthy"
    assert found["counts"].figures["bytes"] == plan.bytes
    assert found["types"].health == "healthy"


def test_pivots_on_the_other_side_than_plans_assume_are_counted_as_they_are():
    model = tiny_model("llama", hidden=64)
    model.model.layers[0].mlp.up_proj = rounded_layer(low_rank_layer(192, 64, 20, "out"), Grid(4, 32))
    plan = plan_of(model, parameters("llama"))
    found = findings(model, plan)
    assert found["counts"].health == "healthy"
    assert found["counts"].figures["bytes"] != plan.bytes


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(8), Grid(3)])
@pytest.mark.parametrize("by", ["codes", "scales"])
def test_a_layer_of_zeros_is_dead_unless_the_base_has_it_too(grid, by):
    model = tiny_model("llama")
    name = "model.layers.1.mlp.up_proj"
    layer = rounded_layer(model.get_submodule(name), grid)
    model.set_submodule(name, layer)
    if by == "scales":
        layer.weight.data.zero_()
    else:
        code = 128 if grid.bits == 8 else 0
        layer.weight_packed.fill_(code)
        layer.weight_zeros.fill_(0) if grid.has_zeros else None
    assert findings(model)["factors"].health == "broken"
    plan = plan_of(model, sum(parameter.numel() for parameter in tiny_model("llama").parameters()))
    zero = RankPlan(**{**vars(plan), "notes": (f"{name}: all zeros in the base too",)})
    assert findings(model, zero)["factors"].health == "healthy"
    layer.weight_packed[-1, -1] ^= 1
    layer.weight.data.fill_(0.5)
    assert findings(model)["factors"].health == "healthy"


def test_scales_that_are_no_numbers_are_damage():
    model = rounded("llama")
    model.model.embed_tokens.weight.data[3, 0] = float("nan")
    found = findings(model)["weights"]
    assert found.health == "broken"
    assert "model.embed_tokens.weight" in found.message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"grid": Grid(5)}, "bits and shape|bits"),
        ({"rank": 3}, "the plan has rank 3"),
        ({"grid": None}, r"has .*bits.*, but the plan has"),
    ],
)
def test_a_plan_with_other_bits_is_not_this_models(change, text):
    model = rounded("llama")
    plan = plan_of(model, parameters("llama"))
    name, entry = next((name, entry) for name, entry in plan.modules.items() if entry.rank and entry.storage != "dense")
    modules = {**plan.modules, name: ModulePlan(**{**vars(entry), **change})}
    found = findings(model, RankPlan(**{**vars(plan), "modules": modules}))["plan"]
    assert found.health == "broken"
    assert name in found.message
    found = findings(model, RankPlan(**{**vars(plan), "embeddings": {}}))["plan"]
    assert "model.embed_tokens is rounded and not in the plan" in found.message


def test_a_broken_rounded_model_is_not_exported(tmp_path):
    model = rounded("llama")
    model.model.layers[0].self_attn.q_proj.right.data.zero_()
    with pytest.raises(ExportError, match=r"q_proj.right holds only zeros"):
        save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer())
    assert not (tmp_path / "out").exists()


def test_the_doctor_names_damage_in_a_folder_that_does_not_load(tmp_path):
    model = rounded("llama")
    folder = tmp_path / "out"
    save_compressed(model, folder, tokenizer=byte_tokenizer(), verify=False, plan=plan_of(model, parameters("llama")))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight_packed"] = weights["model.embed_tokens.weight_packed"][:, :-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    diagnosis = diagnose(folder, device="cpu")
    found = {finding.name: finding for finding in diagnosis.findings}
    assert "model.embed_tokens has weight_packed [261, 31], expected [261, 32]" in found["plan"].message
    assert found["types"].health == "healthy"
