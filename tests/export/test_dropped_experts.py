"""A mixture with dropped experts, from the allocation to the folder: the same model everywhere, or a refusal."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from lowrank_pl.calibration.subject import Subject
from lowrank_pl.cli.allocate import allocate
from lowrank_pl.cli.export import export
from lowrank_pl.export.export import load_compressed, save_compressed
from lowrank_pl.export.health.examine import diagnose
from lowrank_pl.export.health.quality import Prompts
from lowrank_pl.export.health.weights import check_plan, check_weights, tensors_of
from lowrank_pl.factors.compression import compress, compressed, deployed_plan
from lowrank_pl.methods.allocate.run import allocate_ranks
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.start import start_of
from lowrank_pl.methods.quantize.byte_budget import allocate_bytes
from lowrank_pl.methods.quantize.quantizing import quantize
from lowrank_pl.methods.quantize.settings import ByteBudget, Rounding
from lowrank_pl.methods.recipes import recipe
from lowrank_pl.methods.refit.refitting import refit
from lowrank_pl.methods.refit.settings import Joint, Refit
from lowrank_pl.models.base import Base, load_base
from lowrank_pl.models.hf_experts import dropped_experts
from lowrank_pl.models.hf_format import LowRankConfig
from lowrank_pl.models.tiny import byte_tokenizer
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.report.rank_map import rank_table
from lowrank_pl.serving.optimize import optimize_for_inference
from lowrank_pl.text.sequences import Calibration
from lowrank_pl.training.module import RankLearner

SHORT = Calibration("python-docs::part=0%-10%", 32, 2)
GONE = "model.layers.1.mlp.experts.2"


@pytest.fixture(scope="module")
def dropping(sequences):
    """A mixture without its third expert of the second block, which no token of the text reached."""
    model = load_base("random:mixtral")
    with torch.no_grad():
        # The tokens of the expert go to others.
        model.model.layers[1].mlp.gate.weight[2] = -model.model.layers[1].mlp.gate.weight[[0, 1, 3]].sum(dim=0)
    subject = Subject(model, byte_tokenizer(), sequences[:4], Constraints(drop_experts=True))
    plan, factors = allocate_ranks(subject, keep=0.5)
    # Whatever random weights are worth.
    modules = {
        name: replace(module, rank=0, indices=None, storage="factored") if name.startswith(GONE) else module
        for name, module in plan.modules.items()
    }
    return model, replace(plan, modules=modules), factors, subject


@torch.no_grad()
def logits(model, sequences):
    return model(input_ids=sequences[:2]).logits


def test_the_same_model_comes_back_in_a_fresh_process_with_as_many_parameters_as_planned(dropping, sequences, tmp_path):
    dense, plan, factors, _ = dropping
    before = logits(dense, sequences)
    model = compress(copy.deepcopy(dense), plan, factors)
    assert GONE in dropped_experts(model)
    found = logits(model, sequences)
    with compressed(dense, plan, factors):
        assert torch.equal(logits(dense, sequences), found)
    assert torch.equal(logits(dense, sequences), before)
    plan = deployed_plan(model, plan)
    # A fresh process loads the folder and compares logits; ranks and counts are checked as well.
    report = save_compressed(model, tmp_path / "small", tokenizer=byte_tokenizer(), plan=plan)
    assert report.verified
    reloaded = load_compressed(tmp_path / "small")
    assert torch.equal(logits(reloaded, sequences), found)
    assert not any(name.startswith(f"{GONE}.") for name in reloaded.state_dict())
    stored = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert stored["schema"] == 6
    assert stored["modules"][GONE] == {"dropped": True}
    # Again, from the loaded model.
    save_compressed(reloaded, tmp_path / "again", tokenizer=byte_tokenizer(), plan=plan, verify=False)
    assert torch.equal(logits(load_compressed(tmp_path / "again"), sequences), found)
    optimize_for_inference(reloaded)
    torch.testing.assert_close(logits(reloaded, sequences), found, rtol=1e-4, atol=1e-4)


def test_plans_that_do_not_fit_the_weights_are_found(dropping):
    dense, plan, factors, _ = dropping
    model = compress(copy.deepcopy(dense), plan, factors)
    entries = {name: {"dropped": True} for name in dropped_experts(model)}
    entries |= {name: layer.rank for name, layer in model.named_modules() if type(layer).__name__ == "LowRankLinear"}
    entries |= {
        name: {"rank": layer.rank, "storage": "pivoted", "side": layer.side}
        for name, layer in model.named_modules()
        if type(layer).__name__ == "PivotedLinear"
    }
    tensors = tensors_of(model)
    assert {found.health for found in check_weights(tensors, entries)} == {"healthy"}
    assert check_plan(deployed_plan(model, plan), tensors, entries)[0].health == "healthy"
    whole = {name: replace(one, rank=1) if one.is_dropped else one for name, one in plan.modules.items()}
    said = check_plan(replace(plan, modules=whole), tensors, entries)[0]
    assert said.health == "broken"
    assert GONE in said.message


def test_the_command_drops_experts_and_its_export_is_healthy(tmp_path):
    plan = allocate(
        Base("random:mixtral"), method="fisher", keep=0.3, calibration=Calibration("python-docs::part=0%-10%", 32, 8),
        constraints=Constraints(drop_experts=True), output=tmp_path / "plan.json", store=tmp_path / "store",
        json=tmp_path / "figures.json",
    )  # fmt: skip
    assert plan.dropped_experts
    assert 0.29 < plan.keep_targeted <= 0.3
    assert any(note.startswith(f"dropped {len(plan.dropped_experts)} of 8 experts") for note in plan.notes)
    assert json.loads((tmp_path / "figures.json").read_text())["dropped_experts"] == len(plan.dropped_experts)
    assert "dropped" in rank_table(plan).splitlines()[0]
    export(tmp_path / "plan.json", output=tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"{len(plan.dropped_modules)} are gone with {len(plan.dropped_experts)} dropped experts" in card
    says = {found.name: found for found in diagnose(tmp_path / "model", text=SHORT, prompts=Prompts(())).findings}
    assert says["loads"].health == says["plan"].health == says["counts"].health == "healthy"
    assert f"{len(plan.dropped_experts)} experts are dropped" in says["plan"].message


@pytest.mark.parametrize("joint", [None, Joint()], ids=["layers", "blocks"])
def test_a_refit_leaves_dropped_experts_out(dropping, sequences, joint):
    model, plan, factors, subject = dropping
    settings = Refit(sequences=8, joint=joint)
    new, made = refit(plan, factors, subject, sequences=sequences[:8], settings=settings)
    assert new.dropped_experts == plan.dropped_experts
    assert new.kept_parameters == plan.kept_parameters
    with compressed(model, new, made):
        assert GONE in dropped_experts(model)
        assert logits(model, sequences).isfinite().all()


def test_rounding_leaves_dropped_experts_out(dropping, sequences, tmp_path):
    dense, plan, factors, subject = dropping
    rounded, made = quantize(plan, factors, subject, settings=Rounding(8, embeddings=None))
    assert rounded.dropped_experts == plan.dropped_experts
    assert sum(rounded.bits.values()) == len(plan.modules) - len(plan.dropped_modules)
    assert made.seconds(rounded.stored_modules) >= 0
    model = compress(copy.deepcopy(dense), rounded, made)
    save_compressed(model, tmp_path / "small", tokenizer=byte_tokenizer(), plan=rounded)
    assert torch.equal(logits(load_compressed(tmp_path / "small"), sequences), logits(model, sequences))


def test_a_smaller_size_is_cut_from_the_folder(sequences, tmp_path):
    model = load_base("random:mixtral")
    constraints = Constraints(drop_experts=True, storage="factored", include=["*experts*"])
    plan, factors = allocate_ranks(Subject(model, byte_tokenizer(), sequences[:4], constraints), keep=0.3)
    assert plan.dropped_experts
    save_compressed(
        compress(copy.deepcopy(model), plan, factors), tmp_path / "m", tokenizer=byte_tokenizer(), plan=plan,
        verify=False,
    )  # fmt: skip
    cut = load_compressed(tmp_path / "m", keep=0.2)
    assert dropped_experts(cut) == plan.dropped_experts
    assert cut.config.quantization_config.schema == 6


# PEFT itself asks for it.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_put_on_the_experts_that_are_left(dropping, sequences):
    from peft import LoraConfig, get_peft_model

    dense, plan, factors, _ = dropping
    model = compress(copy.deepcopy(dense), plan, factors)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    adapted(input_ids=sequences[:2]).logits.sum().backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert any("experts.0.down_proj" in name for name in trained)
    assert not any(GONE in name for name, _ in adapted.named_parameters())


def test_what_cannot_be_done_with_dropped_experts_is_refused(dropping, sequences, tmp_path):
    dense, plan, factors, subject = dropping
    model = compress(copy.deepcopy(dense), plan, factors)
    with pytest.raises(ValueError, match="export without merge, or allocate without drop_experts"):
        save_compressed(model, tmp_path / "merged", tokenizer=byte_tokenizer(), merge=True)
    assert not (tmp_path / "merged").exists()
    half = {name: replace(one, rank=1) if name == f"{GONE}.up_proj" else one for name, one in plan.modules.items()}
    with pytest.raises(ValueError, match="dropped as a whole"):
        compress(copy.deepcopy(dense), replace(plan, modules=half), factors)
    none = {
        name: replace(one, rank=0, indices=None, storage="factored") if "layers.0.mlp.experts" in name else one
        for name, one in plan.modules.items()
    }
    untouched = copy.deepcopy(dense)
    with pytest.raises(ValueError, match=r"all 4 experts .* expected at least one"):
        compress(untouched, replace(plan, modules=none), factors)
    assert not dropped_experts(untouched)
    other = {
        name: replace(one, rank=0, indices=None, storage="factored") if "layers.0.self_attn" in name else one
        for name, one in plan.modules.items()
    }
    with pytest.raises(ValueError, match="only whole experts"):
        compress(copy.deepcopy(dense), replace(plan, modules=other), factors)
    with pytest.raises(ValueError, match="allocate by fisher, or leave drop_experts out"):
        allocate_ranks(subject, keep=0.5, allocator="uniform")
    with pytest.raises(ValueError, match="drop_experts is true, but a budget of bytes"):
        allocate_bytes(subject, ByteBudget(keep=0.5))
    with pytest.raises(ValueError, match="lowrank allocate --method fisher --drop_experts true"):
        RankLearner(Base("random:mixtral"), constraints=Constraints(drop_experts=True))
    with pytest.raises(ValueError, match="allocated without drop_experts"):
        start_of(plan, Constraints().budget(dense, subject.targets, 0.5), ARA(), 0.5)
    for name in ("uniform+drop", "ara+drop", "bytes+drop"):
        with pytest.raises(ValueError, match="one that allocates by fisher"):
            recipe(name)
    with pytest.raises(ValueError, match="expected experts to be true"):
        LowRankConfig({GONE: {"dropped": True}})


@pytest.mark.parametrize(
    ("family", "said"), [("llama", "no experts are targets"), ("llama4", "WeightedInput"), ("jetmoe", "SortedExperts")]
)
def test_models_whose_experts_cannot_take_over_are_refused_before_work_starts(family, said, sequences):
    subject = Subject(load_base(f"random:{family}"), byte_tokenizer(), sequences[:1], Constraints(drop_experts=True))
    with pytest.raises(ValueError, match=f"{said}.*leave drop_experts out"):
        allocate_ranks(subject, keep=0.5)


def test_a_variant_of_a_recipe_drops_experts():
    made = recipe("fisher+drop+pivoted")
    assert made.constrained(Constraints()) == Constraints(storage="auto", drop_experts=True)
    assert made.describe()["drop_experts"] is True
    assert "drop_experts" not in recipe("fisher").describe()
