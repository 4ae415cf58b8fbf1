"""Narrower MLPs: elimination against a slow search, every family, and a folder that plain transformers loads."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from untouched import assert_untouched, state

from lowrank_pl import leaving_out
from lowrank_pl.base_model import load_base
from lowrank_pl.commands import allocate, export
from lowrank_pl.decompose import square_root
from lowrank_pl.factor_store import FactorStore
from lowrank_pl.leaving_out import leave_out
from lowrank_pl.narrow import narrow
from lowrank_pl.narrowing import Origin, find_hidden, narrow_model, narrowed_config
from lowrank_pl.targets import dense_weight, find_targets
from lowrank_pl.tiny_models import FAMILIES, byte_tokenizer, tiny_model

TEXT = {"text": "python-docs::part=0%-5%", "length": 32, "windows": 8}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


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
def test_every_family(family, windows):
    model = tiny_model(family)
    before, targets = state(model), find_targets(model)
    hidden = find_hidden(model, targets)
    assert [mlp.reader.block for mlp in hidden] == [0, 1]
    fed = {}
    for mlp in hidden:
        model.get_submodule(mlp.reader.name).register_forward_pre_hook(
            lambda _, args, name=mlp.reader.name: fed.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    config = narrowed_config(model, hidden, 40)
    with torch.no_grad():
        whole = model(input_ids=windows[:4]).logits
    for mlp in hidden:
        model.get_submodule(mlp.reader.name)._forward_pre_hooks.clear()
    assert_untouched(model, before)
    moments = {name: torch.cat(parts).T @ torch.cat(parts) for name, parts in fed.items()}

    def weights(reader):
        return moments[reader.name], square_root(torch.eye(reader.shape[0]))

    nats = narrow_model(model, hidden, 40, weights)
    assert nats > 0
    assert model.config.to_dict() == config.to_dict()
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        part = model(input_ids=windows[:4]).logits
        torch.testing.assert_close(fresh.eval()(input_ids=windows[:4]).logits, part)
    # More is left than of a model whose last maps were not told.
    plain = tiny_model(family)
    for mlp in hidden:
        weight = dense_weight(plain.get_submodule(mlp.reader.name))
        with torch.no_grad():
            weight[:, 40:] = 0
    with torch.no_grad():
        cut = plain(input_ids=windows[:4]).logits
    assert (part - whole).norm() < 0.7 * (cut - whole).norm()


def test_what_is_no_mlp_or_has_no_setting_is_told(llama):
    # What its maps compute is not looked at.
    llama.model.layers[0].mlp.forward = lambda x: x
    hidden = find_hidden(llama, find_targets(tiny_model("llama")))
    assert [mlp.reader.block for mlp in hidden] == [1]
    with pytest.raises(ValueError, match="no setting of LlamaConfig makes the MLPs 40 wide and leaves all else as it"):
        narrowed_config(llama, hidden, 40)
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
        narrow_model(model, find_hidden(model, find_targets(model)), 97, lambda _: None)


@pytest.mark.parametrize("base", ["random:llama", "random:gpt2"])
def test_the_folder_is_a_checkpoint_like_any_other(base, tmp_path, capsys):
    folder = narrow(base, share=0.5, output=tmp_path / "narrow", json=tmp_path / "narrow.json", **TEXT)
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
    assert "plans on it count what is left: --keep 0.9 keeps " in said
    assert Origin.of(model) == Origin(base, targeted["dense"], whole["dense"], dense_width(base))
    card = (folder / "README.md").read_text()
    assert f"`{base}` narrowed with `lowrank narrow`" in card
    # It is a base: its plans say what it was.
    plan = allocate(str(folder), keep=0.8, output=tmp_path / "plan.json", **TEXT)
    share = targeted["kept"] / targeted["dense"]
    note = next(note for note in plan.notes if note.startswith("the base was narrowed"))
    assert note.startswith(
        f"the base was narrowed: {share:.1%} of the targeted parameters of {base} ".replace("%", " %")
    )
    small = export(tmp_path / "plan.json", output=tmp_path / "small")
    assert (small / "config.json").exists()
    # What was narrowed once keeps its origin.
    again = narrow(str(folder), share=0.75, output=tmp_path / "again", **TEXT)
    assert Origin.of(load_base(str(again))) == Origin.of(model)


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
        (
            {"share": 0.99},
            "of 96 hidden features none would be left out at a share of 0.99, in multiples of 8: lower one of both",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        narrow("random:llama", output=tmp_path / "narrow", **{**TEXT, **changes})
    assert not (tmp_path / "narrow").exists()


def test_a_folder_of_something_else_is_left_alone_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "narrow").mkdir()
    (tmp_path / "narrow" / "thesis.txt").write_text("all of it")
    monkeypatch.setattr("lowrank_pl.narrow.statistics_of", lambda *_: pytest.fail("text was read"))
    with pytest.raises(ValueError, match="holds other files than an earlier export: name a new folder or empty it"):
        narrow("random:llama", share=0.5, output=tmp_path / "narrow", **TEXT)
    assert (tmp_path / "narrow" / "thesis.txt").read_text() == "all of it"


def test_the_width_is_the_one_that_is_predicted_to_lose_least(tmp_path, capsys):
    # Features of which every other one is nearly the sum of two others.
    model = tiny_model("llama")
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.gate_proj.weight[1::2] = layer.mlp.gate_proj.weight[::2]
            layer.mlp.up_proj.weight[1::2] = layer.mlp.up_proj.weight[::2] * 1.01
    base = tmp_path / "base"
    model.save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    narrow(str(base), keep=0.6, output=tmp_path / "narrow", json=tmp_path / "narrow.json", **TEXT)
    figures = json.loads((tmp_path / "narrow.json").read_text())
    tried = {int(width): loss for width, loss in figures["predicted_nats_with_ranks"].items()}
    assert max(tried) == 96
    assert figures["width"]["after"] == min(tried, key=tried.get) <= 48
    left = figures["parameters"]["targeted"]["kept"] / figures["parameters"]["targeted"]["dense"]
    said = capsys.readouterr().out
    assert f"96 hidden features, ranks to keep 0.6: predicted loss {tried[96]:.4f} nats a token" in said
    keep = float(re.search(r"--keep ([\d.]+) keeps 60.0 % of the base's", said)[1])
    assert keep * left == pytest.approx(0.6, abs=1e-3)
    # As wide as before, it is what the exact allocation predicts.
    assert tried[96] == pytest.approx(predicted(str(base), 0.6, tmp_path), rel=1e-3)
    # And as wide as chosen, what it predicts on the result, whose moments are nearly the same.
    total = predicted(str(tmp_path / "narrow"), keep, tmp_path) + figures["predicted_nats"]
    assert tried[figures["width"]["after"]] == pytest.approx(total, rel=0.2)


def predicted(base, keep, folder):
    plan = allocate(base, method="fisher", keep=keep, output=folder / "predicted.json", **TEXT)
    store = FactorStore.existing(plan.origin["store"])
    cut = (store.sigma(name)[module.rank :] for name, module in plan.modules.items() if module.rank is not None)
    return sum(rest.square().sum().item() for rest in cut) / 2


def test_where_nothing_is_gained_ranks_are_to_be_drawn_on_the_base(tmp_path):
    # Half of the features alone would be more than is to be left out.
    with pytest.raises(ValueError, match=r"at keep 0\.9 no narrower MLPs are predicted to lose less: draw ranks on"):
        narrow("random:llama", keep=0.9, multiple_of=48, output=tmp_path / "narrow", **TEXT)
