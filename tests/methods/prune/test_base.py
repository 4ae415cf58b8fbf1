"""Narrower MLPs: elimination against a slow search, every family, and a folder that plain transformers loads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lowrank_pl import (
    Decomposition,
    FinishRun,
    RankLearner,
    RankPlan,
    allocate_ranks,
    build_factors,
    load_compressed,
    save_compressed,
)
from lowrank_pl.calibration.build_by_block import build_factors_by_block
from lowrank_pl.calibration.provenance import base_notes
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.cli.commands import allocate, export
from lowrank_pl.cli.compare import compare
from lowrank_pl.cli.doctor import doctor
from lowrank_pl.cli.main import main
from lowrank_pl.cli.prune import prune
from lowrank_pl.costs.anatomy import anatomy
from lowrank_pl.factors.compression import compress
from lowrank_pl.factors.decomposition import square_root
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.prune import eliminate as leaving_out
from lowrank_pl.methods.prune import base as narrow_base
from lowrank_pl.methods.prune.base import WidthPruning, pruned_base
from lowrank_pl.methods.prune.eliminate import leave_out
from lowrank_pl.methods.prune.mlp import find_hidden, prune_model, pruned_config
from lowrank_pl.methods.prune.widths import Map, Option, Widths
from lowrank_pl.methods.recipes import Recipe
from lowrank_pl.models.base import Base, load_base
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.lazy import open_skeleton
from lowrank_pl.models.targets import dense_weight, find_targets
from lowrank_pl.models.tiny import FAMILIES, byte_tokenizer, tiny_model
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.plan import ModulePlan
from lowrank_pl.plans.resize import resize
from lowrank_pl.report.finish import Protocol
from lowrank_pl.utils.distributed import cooperating
from tests.helpers.two_processes import in_two_processes
from tests.helpers.unchanged import assert_untouched, state

TEXT = {"text": "python-docs::part=0%-5%", "length": 32, "sequences": 8}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


@pytest.fixture
def doubled(tmp_path):
    """A model whose every other hidden feature is nearly that before it."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.gate_proj.weight[1::2] = layer.mlp.gate_proj.weight[::2]
            layer.mlp.up_proj.weight[1::2] = layer.mlp.up_proj.weight[::2] * 1.01
    for part in (model, byte_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def drawn(features, outputs, *, tokens=400, seed=0):
    """Features that depend on each other, a weight that reads them, and what its outputs' errors count."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features) / 2
    z = (torch.randn(tokens, features, generator=generator) @ mix).double()
    weight = torch.randn(outputs, features, generator=generator)
    return z, weight, square_root(torch.diag(torch.rand(outputs, generator=generator) + 0.1))


def error(z, weight, features, new, root):
    lost = z @ weight.double().T - z[:, features] @ new.T
    return (lost @ root.root).square().sum(1).mean().item()


def test_the_weight_that_is_left_is_that_of_least_squares_and_the_loss_what_it_costs():
    z, weight, root = drawn(90, 20)
    found = leave_out(weight, z.T @ z / len(z), 40, outputs=root, damping=0.0)
    assert found.features.tolist() == sorted(set(found.features.tolist()))
    assert found.weight.shape == (20, 40)
    least = torch.linalg.lstsq(z[:, found.features], z @ weight.double().T).solution.T
    torch.testing.assert_close(found.weight, least, rtol=1e-4, atol=1e-5)
    assert found.loss == pytest.approx(error(z, weight, found.features, found.weight, root), rel=1e-4)


def test_groups_lose_hardly_more_than_one_by_one(monkeypatch):
    z, weight, root = drawn(300, 20, seed=1)
    many = leave_out(weight, z.T @ z / len(z), 120, outputs=root)
    monkeypatch.setattr(leaving_out, "_GROUP", 1)
    single = leave_out(weight, z.T @ z / len(z), 120, outputs=root)
    assert many.loss == pytest.approx(single.loss, rel=0.05)


def test_of_a_few_features_the_best_one_goes():
    z, weight, root = drawn(7, 3, seed=2)
    found = leave_out(weight, z.T @ z / len(z), 6, outputs=root, damping=0.0)
    losses = {}
    for kept in combinations(range(7), 6):
        least = torch.linalg.lstsq(z[:, kept], z @ weight.double().T).solution.T
        losses[kept] = error(z, weight, list(kept), least, root)
    assert tuple(found.features.tolist()) == min(losses, key=losses.__getitem__)


def test_all_features_may_stay_and_dead_ones_go_first():
    z, weight, root = drawn(12, 5)
    whole = leave_out(weight, z.T @ z / len(z), 12, outputs=root)
    torch.testing.assert_close(whole.weight, weight.double())
    assert (whole.features.tolist(), whole.loss) == (list(range(12)), 0.0)
    z[:, [2, 7]] = 0
    found = leave_out(weight, z.T @ z / len(z), 10)
    assert found.features.tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    torch.testing.assert_close(found.weight, weight.double()[:, found.features])
    assert leave_out(weight, torch.zeros(12, 12), 3).weight.isfinite().all()


def test_damping_leads_to_the_weight_as_it_was():
    z, weight, _ = drawn(30, 8)
    moved = []
    for damping in (1e-3, 1.0, 1e6):
        found = leave_out(weight, z.T @ z / len(z), 20, damping=damping)
        moved.append((found.weight - weight.double()[:, found.features]).norm().item())
    assert moved[0] > moved[1] > 0.1
    assert moved[2] < 1e-4


def test_what_cannot_be_left_out_is_refused():
    z, weight, _ = drawn(6, 2)
    moment = z.T @ z
    for keep in (0, 7):
        with pytest.raises(ValueError, match=f"{keep} features are to stay: expected a number from 1 to the 6"):
            leave_out(weight, moment, keep)
    for damaged in (weight, moment):
        number, damaged[0, 0] = damaged[0, 0].item(), torch.nan
        with pytest.raises(ValueError, match="the weight or the second moment holds NaN or infinity: the checkpoint"):
            leave_out(weight, moment, 3)
        damaged[0, 0] = number


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, sequences):
    model = tiny_model(family)
    before, targets = state(model), find_targets(model)
    hidden = find_hidden(model, targets)
    assert [mlp.reader.block for mlp in hidden] == [0, 1]
    fed = {}
    for mlp in hidden:
        model.get_submodule(mlp.reader.name).register_forward_pre_hook(
            lambda _, args, name=mlp.reader.name: fed.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    config = pruned_config(model, hidden, 40)
    with torch.no_grad():
        whole = model(input_ids=sequences[:4]).logits
    for mlp in hidden:
        model.get_submodule(mlp.reader.name)._forward_pre_hooks.clear()
    assert_untouched(model, before)
    moments = {name: torch.cat(parts).T @ torch.cat(parts) for name, parts in fed.items()}

    def weights(reader):
        return moments[reader.name], square_root(torch.eye(reader.shape[0]))

    nats = prune_model(model, hidden, [40, 40], weights)
    assert nats > 0
    assert model.config.to_dict() == config.to_dict()
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        part = model(input_ids=sequences[:4]).logits
        torch.testing.assert_close(fresh.eval()(input_ids=sequences[:4]).logits, part)
    # More is left than of a model whose last maps were not told.
    plain = tiny_model(family)
    for mlp in hidden:
        weight = dense_weight(plain.get_submodule(mlp.reader.name))
        with torch.no_grad():
            weight[:, 40:] = 0
    with torch.no_grad():
        cut = plain(input_ids=sequences[:4]).logits
    assert (part - whole).norm() < 0.7 * (cut - whole).norm()


def test_what_is_no_mlp_or_has_no_setting_is_told(llama):
    # What its maps compute is not looked at.
    llama.model.layers[0].mlp.forward = lambda x: x
    hidden = find_hidden(llama, find_targets(tiny_model("llama")))
    assert [mlp.reader.block for mlp in hidden] == [1]
    with pytest.raises(ValueError, match="no setting of LlamaConfig makes the MLPs 40 wide and leaves all else as it"):
        pruned_config(llama, hidden, 40)
    model = tiny_model("llama")
    only = find_targets(model, include=["self_attn.*"])
    with pytest.raises(ValueError, match="no MLP that can be narrowed was found in LlamaForCausalLM: expected maps of"):
        find_hidden(model, only)
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = (nn.Linear(32, 48, bias=False) for _ in range(2))
    mlp.down_proj = nn.Linear(48, 32, bias=False)
    with pytest.raises(ValueError, match=r"the MLPs of LlamaForCausalLM are \[48, 96\] wide: expected one width"):
        find_hidden(model, find_targets(model))
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="a width of 97 was asked for: expected 1 to the 96 that there is"):
        prune_model(model, find_hidden(model, find_targets(model)), [40, 97], lambda _: None)


@pytest.mark.parametrize("base", ["random:llama", "random:gpt2"])
def test_the_folder_is_a_checkpoint_like_any_other(base, tmp_path, capsys):
    folder = prune(base, share=0.5, output=tmp_path / "prune", json=tmp_path / "narrow.json", **TEXT)
    figures = json.loads((tmp_path / "narrow.json").read_text())
    model, dense = AutoModelForCausalLM.from_pretrained(folder), load_base(base)
    targeted, whole = figures["parameters"]["targeted"], figures["parameters"]["model"]
    assert (figures["width"]["after"], figures["width"]["before"]) == (
        figures["width"]["before"] // 2,
        dense_width(base),
    )
    assert whole["dense"] == sum(p.numel() for p in dense.parameters())
    assert whole["kept"] == sum(p.numel() for p in model.parameters())
    assert 0 < targeted["dense"] - targeted["kept"] <= whole["dense"] - whole["kept"]
    assert figures["bytes"] >= 4 * whole["kept"]
    said = capsys.readouterr().out
    assert f"narrowed MLPs from {dense_width(base)} to {dense_width(base) // 2} hidden features:" in said
    assert f"keep of plans on it counts what {base} had" in said
    origin, width = Origin.of(model), dense_width(base)
    assert origin is not None
    assert (origin.base, origin.targeted, origin.parameters) == (base, targeted["dense"], whole["dense"])
    assert (origin.width, set(origin.left.values()), len(origin.left)) == (width, {width // 2}, 2)
    assert origin.left_out(find_targets(model)) == targeted["dense"] - targeted["kept"]
    card = (folder / "README.md").read_text()
    assert f"of {width} hidden features {width // 2} are left" in card
    # It is a base: its plans count what it had before, and so do its exports.
    plan = allocate(str(folder), keep=0.5, output=tmp_path / "plan.json", **TEXT)
    assert (plan.targeted_parameters, plan.left_out) == (targeted["dense"], targeted["dense"] - targeted["kept"])
    assert 0.49 < plan.keep_targeted <= 0.5
    assert plan.kept_model_parameters == whole["kept"] - targeted["kept"] + plan.kept_parameters
    assert plan.origin["narrowed"] == {"base": base, "width": width, "left": f"{width // 2:,}"}
    share = f"{targeted['kept'] / targeted['dense']:.1%}".replace("%", " %")
    note = next(note for note in plan.notes if note.startswith("the base was narrowed"))
    assert note.startswith(
        f"the base was narrowed from {width} to {width // 2} hidden features of an MLP: {share} of the"
    )
    small = export(tmp_path / "plan.json", output=tmp_path / "small")
    assert load_compressed(small).num_parameters() == plan.kept_model_parameters - indices(plan)
    assert doctor(small, sequences=2, length=32, prompts=["A list"], max_new_tokens=4).health != "sick"
    merged = export(tmp_path / "plan.json", output=tmp_path / "merged", merge=True)
    assert doctor(merged, sequences=2, length=32, prompts=["A list"], max_new_tokens=4).health != "sick"
    read = RankPlan.load(tmp_path / "plan.json")
    assert read == plan
    assert 0.44 < resize(read, 0.45).keep_targeted <= 0.45
    # All that is left stays where that is less than what may be kept.
    most = allocate(str(folder), keep=1.0, output=tmp_path / "most.json", **TEXT)
    assert most.keep_targeted == pytest.approx(targeted["kept"] / targeted["dense"])
    assert len(most.dense_modules) == len(most.modules)
    # What was narrowed once keeps its origin.
    again = Origin.of(load_base(str(prune(str(folder), share=0.75, multiple_of=4, output=tmp_path / "again", **TEXT))))
    assert again is not None
    assert (again.base, again.width, again.widths) == (base, width, f"{3 * width // 8:,}")
    part = find_targets(model, include=["*.0.*"])
    assert origin.left_out(part) == origin.left_out(find_targets(model)) // 2


def indices(plan):
    """Numbers whose room the indices of pivots take, which are no parameters."""
    return sum(plan.modules[name].numbers(4) - plan.modules[name].parameters for name in plan.pivoted_modules)


def test_a_config_that_says_something_else_is_told(llama):
    llama.config.lowrank_narrowed = {"base": "x", "width": 96}
    with pytest.raises(
        ValueError, match="under lowrank_narrowed: expected what `lowrank prune` of this version writes"
    ):
        Origin.of(llama)


def dense_width(base):
    model = load_base(base)
    return find_hidden(model, find_targets(model))[0].width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.0}, "share is 1.0: expected a fraction above 0 and below 1"),
        ({"keep": 0.0}, "keep is 0.0: expected a fraction above 0 and below 1"),
        ({}, "give one of keep, the size that is wanted in the end, and share, of the hidden features"),
        ({"keep": 0.6, "share": 0.5}, "give one of keep, the size that is wanted in the end, and share"),
        ({"share": 0.5, "multiple_of": 0}, "multiple_of is 0: expected a whole number of at least 1"),
        ({"share": 0.5, "damping": 0.0}, "damping is 0.0: expected a finite number of at least 0.000001"),
        ({"share": 0.5, "damping": float("inf")}, "damping is inf: expected a finite number of at least 0.000001"),
        (
            {"share": 0.99},
            "of 96 hidden features none would be left out at a share of 0.99, in multiples of 8: lower one of both",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prune("random:llama", output=tmp_path / "prune", **{**TEXT, **changes})
    assert not (tmp_path / "prune").exists()


def test_a_folder_of_something_else_is_left_alone_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "thesis.txt").write_text("all of it")
    monkeypatch.setattr("lowrank_pl.cli.prune.load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="holds other files than an earlier export: name a new folder or empty it"):
        prune("random:llama", share=0.5, output=tmp_path / "prune", **TEXT)
    assert (tmp_path / "prune" / "thesis.txt").read_text() == "all of it"


def test_an_earlier_narrowed_folder_is_replaced(tmp_path):
    for share, width in ((0.5, 48), (0.75, 72)):
        folder = prune("random:llama", share=share, output=tmp_path / "prune", **TEXT)
        assert load_base(str(folder)).config.intermediate_size == width


def test_the_width_is_the_one_that_is_predicted_to_lose_least(doubled, tmp_path, capsys):
    # Copies can be made up for nearly in full, if the text is trusted.
    prune(doubled, keep=0.6, damping=0.01, output=tmp_path / "prune", json=tmp_path / "narrow.json", **TEXT)
    figures = json.loads((tmp_path / "narrow.json").read_text())
    tried = {int(width): loss for width, loss in figures["predicted_nats_with_ranks"].items()}
    assert max(tried) == 96
    assert figures["width"]["after"] == min(tried, key=tried.get) <= 48
    said = capsys.readouterr().out
    assert f"96 hidden features, ranks to keep 0.6: predicted loss {tried[96]:.4f} nats a token" in said
    # As wide as before, it is what the exact allocation predicts.
    assert tried[96] == pytest.approx(predicted(doubled, 0.6, tmp_path), rel=1e-3)
    # And as wide as chosen, what it predicts on the result, whose moments are nearly the same.
    total = predicted(str(tmp_path / "prune"), 0.6, tmp_path) + figures["predicted_nats"]
    assert tried[figures["width"]["after"]] == pytest.approx(total, rel=0.2)


def predicted(base, keep, folder):
    plan = allocate(base, method="fisher", keep=keep, output=folder / "predicted.json", **TEXT)
    store = FactorStore.existing(plan.origin["store"])
    cut = (store.sigma(name)[module.rank :] for name, module in plan.modules.items() if module.rank is not None)
    return sum(rest.square().sum().item() for rest in cut) / 2


def test_where_nothing_is_gained_ranks_are_to_be_drawn_on_the_base(tmp_path):
    # Half of the features alone would be more than is to be left out.
    with pytest.raises(ValueError, match=r"at keep 0\.9 no narrower MLPs are predicted to lose less: draw ranks on"):
        prune("random:llama", keep=0.9, multiple_of=48, output=tmp_path / "prune", **TEXT)


def test_budgets_and_plans_count_what_was_left_out():
    budget = Budget(keep=0.5, shapes={"a": (8, 8), "b": (8, 8)}, model_parameters=300, left_out=72, storage="factored")
    assert (budget.present, budget.total, budget.limit) == (128, 200, 100)
    assert budget.share == pytest.approx(100 / 128)
    plan = budget.fit({"a": 3.0, "b": 3.0}, method="hand")
    assert plan.kept_parameters <= 100
    assert (plan.targeted_parameters, plan.keep_targeted) == (200, plan.kept_parameters / 200)
    assert plan.kept_model_parameters == 300 - 200 + plan.kept_parameters
    whole = plan.dense()
    assert (whole.kept_parameters, whole.keep_targeted, whole.keep_model) == (128, 0.64, 228 / 300)
    assert RankPlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["parameters"]["left_out"] == 72
    plain = RankPlan("hand", 0.5, {"a": ModulePlan((8, 8), 2)}, 64)
    assert "left_out" not in json.loads(plain.to_json())["parameters"]
    with pytest.raises(ValueError, match=r"keep 0.1 allows 20 parameters, .* need at least 32 \(keep 0.1600\)"):
        Budget(keep=0.1, shapes=budget.shapes, model_parameters=300, left_out=72, storage="factored")


COMPARED = {
    "calibration_length": 32, "calibration_sequences": 8,
    "score_length": 32, "scores": ["docs=python-docs::part=50%-100%"], "score_sequences": {"docs": 6},
}  # fmt: skip


def test_a_comparison_narrows_what_it_is_told_to_and_counts_the_base_that_was_named(doubled, tmp_path, monkeypatch):
    names = ["fisher+pivoted", "fisher+pivoted+narrow", "rescaled+narrow+refit"]
    results = compare(doubled, methods=names, keep=[0.6], run=tmp_path / "run", **COMPARED)
    rows = {row["method"]: row for row in results}
    plain, narrowed, learned = (rows[name] for name in names)
    for row in (plain, narrowed, learned):
        assert 0.58 < row["keep"]["targeted"] <= 0.6
    assert narrowed["bytes"] == pytest.approx(plain["bytes"], rel=0.01)
    assert narrowed["excess"]["docs"] < plain["excess"]["docs"]
    assert narrowed["seconds"]["narrowing"] > 0
    assert narrowed["settings"]["prune"] == {"by_block": False, "share": None, "multiple_of": 8, "damping": 0.1}
    assert "prune" not in plain["settings"]
    plan = RankPlan.load(tmp_path / "run" / "fisher+pivoted+narrow" / "keep-0.6" / "plan.json")
    assert plan.left_out > 0
    assert plan.origin["narrowed"]["base"] == doubled
    # Its base is in the cache, where another comparison finds it.
    monkeypatch.setattr("lowrank_pl.methods.prune.base.apply_pruning", lambda *_, **__: pytest.fail("narrowed again"))
    again = compare(doubled, methods=names[1:2], keep=[0.6], run=tmp_path / "again", **COMPARED)
    assert {row["method"]: row["nats"] for row in again}[names[1]] == narrowed["nats"]
    # And is one to compare on: the dense row says what it is of the first.
    base = plan.origin["base"]
    on_it = compare(base, methods=["fisher+pivoted"], keep=[0.6], run=tmp_path / "on it", **COMPARED)
    by_name = {row["method"]: row for row in on_it}
    assert by_name["dense"]["keep"]["targeted"] == pytest.approx(plan.dense().keep_targeted)
    assert by_name["dense"]["keep"]["model"] == pytest.approx(plan.dense().keep_model)
    assert by_name["fisher+pivoted"]["ranks"] == narrowed["ranks"]


def pruned(model, settings=WidthPruning(share=0.5), *, keep=0.6, sequences=torch.arange(256).view(8, 32)):
    return pruned_base(Subject(model, byte_tokenizer(), sequences, base=Base("random:llama")), settings, keep=keep)


def test_the_model_stays_as_it_was_and_where_nothing_is_gained_so_does_the_base(llama, caplog):
    before, caplog.handler.level = state(llama), 0
    caplog.set_level("INFO", logger="lowrank_pl.methods.prune.base")
    assert pruned(llama, WidthPruning(multiple_of=48), keep=0.9)[0] == "random:llama"
    assert "at keep 0.9 no narrower MLPs are predicted to lose less than those of random:llama" in caplog.text
    folder, spent = pruned(llama)
    assert_untouched(llama, before)
    assert spent > 0
    assert Origin.of(llama) is None
    # Once more it is found, with what it took.
    assert pruned(llama) == (folder, spent)
    # Another text, share or size is another folder.
    others = [
        pruned(llama, WidthPruning(share=0.5, damping=0.5)),
        pruned(llama, WidthPruning(share=0.75)),
        pruned(llama, sequences=torch.arange(256).flip(0).view(8, 32)),
    ]
    assert len({folder, *(place for place, _ in others)}) == 4
    # What is gone is made again.
    (Path(folder) / "config.json").unlink()
    assert pruned(llama)[0] == folder
    assert (Path(folder) / "config.json").exists()


def narrow_together(rank, folder):
    os.environ["LOWRANK_HOME"] = str(folder / "home")
    model = tiny_model("llama")
    with cooperating():
        found = [pruned(model)[0] for _ in range(2)]
    (folder / f"found{rank}").write_text(found[0])
    assert found[0] == found[1]


def test_processes_narrow_once_and_find_the_same(llama, tmp_path):
    alone, _ = pruned(llama)
    in_two_processes(narrow_together, tmp_path)
    first, second = ((tmp_path / f"found{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert Path(first).name == Path(alone).name
    for name, value in load_base(alone).state_dict().items():
        torch.testing.assert_close(load_base(first).state_dict()[name], value)


def test_a_share_that_leaves_less_than_is_to_be_kept_is_refused(llama):
    with pytest.raises(
        ValueError, match=r"a share of 0.5 of their hidden features leave 0\.6\d+ of the targeted param"
    ):
        pruned(llama, keep=0.9)


def test_what_an_earlier_narrowing_left_is_the_most_that_can_be_kept(llama, tmp_path):
    folder, _ = pruned(llama)
    with pytest.raises(
        ValueError,
        match=r"keep is 0.95, and of the targeted parameters of random:llama an earlier narrowing has left 0\.6\d+: l",
    ):
        prune(folder, output=tmp_path / "again", keep=0.95, **TEXT)


@pytest.mark.parametrize(
    ("which", "share"), [({}, r"62\.5 %"), ({"include": ["mlp.*"]}, r"50\.0 %"), ({"exclude": ["mlp.*"]}, r"100\.0 %")]
)
def test_notes_say_what_is_left_of_the_maps_that_are_targeted(llama, which, share):
    folder, _ = pruned(llama)
    model = load_base(folder)
    (note,) = base_notes(Subject(model, byte_tokenizer(), torch.zeros(1, 2), Constraints(**which)))
    assert re.search(f"hidden features of an MLP: {share} of the targeted parameters of random:llama", note)


def test_a_run_that_waited_for_another_one_takes_what_that_made(llama, monkeypatch):
    folder, spent = pruned(llama)
    read = narrow_base._read
    monkeypatch.setattr(narrow_base, "_make", lambda *_: pytest.fail("made again"))
    # As it looks to a run that comes first and then has to wait.
    seen = iter([lambda *_: None, read])
    monkeypatch.setattr(narrow_base, "_read", lambda *words: next(seen)(*words))
    assert pruned(llama) == (folder, spent)


def test_dense_weights_of_several_widths_are_refused_before_learning(llama):
    hidden = find_hidden(llama, find_targets(llama))
    Origin("random:llama", 1, 2, 96, {mlp.parent: 8 * place for place, mlp in enumerate(hidden, 1)}, ()).write(llama)
    learner, finish = RankLearner(Base("random:llama"), keep=0.5), FinishRun(merge=True)
    learner.model, finish.protocol = llama, Protocol("text", torch.arange(64).view(2, 32))
    with pytest.raises(ValueError, match="MLPs of 8 to 16 hidden features, which no plain config of dense weights can"):
        finish.on_fit_start(None, learner)
    finish.merge = False
    finish.on_fit_start(None, learner)


@pytest.mark.parametrize(("mask", "by_block"), [("ARA", False), ("LLRC", True)])
def test_fit_narrows_first_and_scores_the_base_that_was_named(doubled, tmp_path, capsys, mask, by_block):
    words = ["--model.base.name", doubled, "--model.keep", "0.6", "--model.decomposition.kind", "two_sided"]
    words += ["--model.mask", f"lowrank_pl.methods.masks.{mask}", "--model.prune.multiple_of", "4"]
    words += ["--model.prune.by_block", str(by_block).lower()]
    words += ["--trainer.max_steps", "3", "--trainer.accelerator", "cpu"]
    words += ["--data.learning.text", "python-docs::part=0%-5%", "--data.learning.length", "32", "--data.learning.sequences", "8"]
    words += ["--data.validation.sequences", "2", "--finish.baselines", "[fisher]", "--finish.prompts", "[A list]"]
    main(["fit", "--run", str(tmp_path / "run"), "--seed_everything", "0", *words])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = {name: row for name, row in summary.items() if name != "facts"}
    assert list(rows) == ["dense", "narrowed", "fisher", "learned"]
    assert rows["dense"]["kept_targeted"] == 1.0
    plan = RankPlan.load(tmp_path / "run" / "plan.json")
    assert rows["narrowed"]["kept_targeted"] == plan.dense().keep_targeted < 1
    assert rows["narrowed"]["bytes"] == plan.dense().bytes
    for name in ("fisher", "learned"):
        assert 0.56 < rows[name]["kept_targeted"] <= 0.6
    assert summary["facts"]["seconds"]["narrowing"] > 0
    assert load_compressed(tmp_path / "run" / "model").num_parameters() == plan.kept_model_parameters - indices(plan)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"`{doubled}` compressed with" in card
    assert "of the 96 hidden features of every MLP were left" in card
    assert (" to " in plan.origin["narrowed"]["left"]) == by_block
    page = (tmp_path / "run" / "report.html").read_text()
    assert "of it with hidden features that were left out before" in page
    # Scored from its plan it is the same, beside the base that was named.
    main(["evaluate", "--plan", str(tmp_path / "run" / "plan.json"), "--text", "python-docs::part=50%-60%",
          "--length", "32", "--sequences", "4", "--json", str(tmp_path / "scores.json")])  # fmt: skip
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["base"] == doubled
    main(["evaluate", "--model", doubled, "--text", "python-docs::part=50%-60%", "--length", "32", "--sequences", "4",
          "--json", str(tmp_path / "dense.json")])  # fmt: skip
    assert scores["dense"]["perplexity"] == json.loads((tmp_path / "dense.json").read_text())["perplexity"]


# -- widths block by block -----------------------------------------------------------------------------------------


def ragged(family, widths=(40, 56)):
    """A tiny model whose two MLPs have ``widths``, and what it was."""
    model = tiny_model(family)
    hidden = find_hidden(model, find_targets(model))
    eye = {mlp.reader.name: torch.eye(mlp.width) for mlp in hidden}
    prune_model(model, hidden, widths, lambda reader: (eye[reader.name], square_root(torch.eye(reader.shape[0]))))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_by_block_survive_every_way_through_the_disk(family, sequences, tmp_path):
    model = ragged(family)
    with torch.no_grad():
        whole = model(input_ids=sequences[:2]).logits
    report = save_compressed(model, tmp_path / "base", tokenizer=byte_tokenizer())
    assert report.modules == 0
    said = json.loads((report.directory / "config.json").read_text())["quantization_config"]
    assert said["schema"] == 3
    # As a base: dense, of its own class, with nothing to say of a quantisation.
    base = load_base(str(report.directory))
    assert type(base) is type(model)
    assert not hasattr(base.config, "quantization_config")
    # As an export, and compressed on top of it.
    targets = find_targets(base)
    plan, factors = allocate_ranks(Subject(base, byte_tokenizer(), sequences[:4]), allocator="uniform", keep=0.5)
    with torch.no_grad():
        assert torch.equal(base(input_ids=sequences[:2]).logits, whole)
        assert torch.equal(load_compressed(report.directory)(input_ids=sequences[:2]).logits, whole)
        small = compress(base, plan, factors)
        expected = small(input_ids=sequences[:2]).logits
        export = save_compressed(small, tmp_path / "small", tokenizer=byte_tokenizer(), plan=plan)
        assert torch.equal(load_compressed(export.directory)(input_ids=sequences[:2]).logits, expected)
    assert export.modules == len(targets.modules) - len(plan.dense_modules)
    with pytest.raises(
        ValueError, match=r"linear maps have shapes that the plain config of \w+ can't say, e.g. .*: exp"
    ):
        save_compressed(small, tmp_path / "merged", tokenizer=byte_tokenizer(), merge=True)
    assert not (tmp_path / "merged").exists()


def test_a_loader_that_was_taught_nothing_stops(tmp_path):
    folder = save_compressed(ragged("llama"), tmp_path / "base", tokenizer=byte_tokenizer()).directory
    code = f"from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "mismatched" in done.stderr


def test_a_base_of_several_widths_is_walked_and_counted_like_any_other(tmp_path, sequences):
    folder = str(save_compressed(ragged("llama"), tmp_path / "base", tokenizer=byte_tokenizer()).directory)
    model = load_base(folder)
    skeleton = open_skeleton(folder)
    assert {name: p.shape for name, p in skeleton.model.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    whole = build_factors(
        Subject(model, byte_tokenizer(), sequences[:4], known_targets=find_targets(model)), directory=tmp_path / "whole"
    )
    walked = build_factors_by_block(skeleton, Subject(skeleton.model, byte_tokenizer(), sequences[:4], known_targets=skeleton.find_targets()), settings=Decomposition(), directory=tmp_path / "walked")  # fmt: skip
    assert walked.fingerprint == whole.fingerprint
    found = anatomy(folder, length=16)
    assert found.parameters == model.num_parameters()
    assert found.modules == find_targets(model).modules
    with pytest.raises(ValueError, match=r"the MLPs of LlamaForCausalLM are \[40, 56\] wide: expected one width"):
        prune(folder, share=0.5, output=tmp_path / "again", **TEXT)


def test_each_mlp_gets_the_width_that_is_best_for_it(tmp_path, capsys):
    # Half of the features of the first MLP are copies, none of the second.
    model = tiny_model("llama")
    with torch.no_grad():
        mlp = model.model.layers[0].mlp
        mlp.gate_proj.weight[1::2] = mlp.gate_proj.weight[::2]
        mlp.up_proj.weight[1::2] = mlp.up_proj.weight[::2]
    for part in (model, byte_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    base, report = str(tmp_path / "base"), tmp_path / "narrow.json"
    # Copies can be made up for in full, if the text is trusted.
    folder = prune(base, keep=0.7, by_block=True, damping=1e-3, output=tmp_path / "prune", json=report, **TEXT)
    figures = json.loads(report.read_text())
    first, second = figures["width"]["after"]
    assert first < second
    # No one width is predicted to be as good.
    assert figures["predicted_nats_by_block"] < min(figures["predicted_nats_with_ranks"].values())
    assert "widths by block, ranks to keep 0.7: predicted loss" in capsys.readouterr().out
    narrowed = load_base(str(folder))
    assert [layer.mlp.up_proj.out_features for layer in narrowed.model.layers] == [first, second]
    origin = Origin.of(narrowed)
    assert origin.widths == f"{first} to {second}"
    dense = sum(rows * columns for rows, columns in (target.shape for target in find_targets(model).modules))
    left = sum(rows * columns for rows, columns in (target.shape for target in find_targets(narrowed).modules))
    assert origin.left_out(find_targets(narrowed)) == dense - left
    plan = allocate(str(folder), keep=0.7, output=tmp_path / "plan.json", **TEXT)
    assert (plan.targeted_parameters, plan.kept_parameters <= 0.7 * dense) == (dense, True)
    small = export(tmp_path / "plan.json", output=tmp_path / "small")
    assert doctor(small, sequences=2, length=32, prompts=["A list"], max_new_tokens=4).health != "sick"
    # And so does a recipe.
    recipes = {"mine": Recipe(Decomposition("two_sided"), "fisher", storage="auto", prune=WidthPruning(by_block=True))}
    rows = compare(base, methods=["mine"], keep=[0.7], recipes=recipes, run=tmp_path / "run", **COMPARED)
    assert 0.68 < next(row for row in rows if row["method"] == "mine")["keep"]["targeted"] <= 0.7


def test_the_best_widths_are_those_of_a_search_over_all():
    generator = torch.Generator().manual_seed(0)

    def drawn_map(rows, columns):
        return Map((rows, columns), torch.rand(min(rows, columns), generator=generator).sort(descending=True).values)

    options = [
        {
            width: Option(lost * scale, {f"{place}.up": drawn_map(width, 12), f"{place}.down": drawn_map(12, width)})
            for width, lost in ((24, 0.0), (16, 0.4), (10, 1.5))
        }
        for place, scale in enumerate((0.2, 1.0, 3.0))
    ]
    known = Widths({"q": drawn_map(12, 12)}, options)
    for limit in (1200, 900, 600):
        losses = {ways: known.loss(ways, limit) for ways in product((24, 16, 10), repeat=3)}
        assert known.loss(known.best(limit), limit) <= 1.03 * min(losses.values())
        assert known.losses(limit)[24] == losses[24, 24, 24]
    # What leaves fewer than are to be kept is no choice for all.
    assert set(known.losses(1500)) == {24}
