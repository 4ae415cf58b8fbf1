"""The command ``export``: from a plan to one model or several, with factors that are there or made again."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lowrank_pl import RankPlan, load_compressed, perplexity, token_windows
from lowrank_pl.cli.allocate import AllocatorsDecomposition, allocate
from lowrank_pl.cli.app import main
from lowrank_pl.cli.evaluate import evaluate, evaluate_plan
from lowrank_pl.cli.export import export
from lowrank_pl.cli.plan_parts import PlanParts
from lowrank_pl.models import base
from lowrank_pl.models.base import Base, load_base
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.report import finish
from lowrank_pl.text.sequences import Calibration
from lowrank_pl.utils.json_files import is_figures
from tests.helpers.commands import failing
from tests.helpers.hub_server import logged_in

TEXT = "python-docs::part=0%-10%"


def test_allocate_export_evaluate_is_one_road(plan_file, tmp_path, capsys):
    figures = tmp_path / "export.json"
    folder = export(plan_file, output=tmp_path / "model", json=figures)
    assert folder == tmp_path / "model"
    assert is_figures(figures)
    written = json.loads(figures.read_text())
    assert (written["merged"], written["modules"], written["method"]) == (False, 14, "uniform")
    assert written["bytes"] == (folder / "model.safetensors").stat().st_size
    assert "kept targeted" in capsys.readouterr().out
    score = evaluate(str(folder), text=TEXT, length=32, sequences=2)
    expected = perplexity(load_compressed(folder), token_windows(TEXT, byte_tokenizer(), length=32, sequences=2))
    assert score["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)


def test_factors_that_are_gone_are_made_again_and_merge_writes_dense_weights(plan_file, tmp_path, caplog):
    from transformers import AutoModelForCausalLM

    shutil.rmtree(tmp_path / "store")
    folder = export(plan_file, output=tmp_path / "merged", merge=True)
    assert f"the factors at {tmp_path / 'store'} are gone: building them again from the plan's origin" in caplog.text
    model = AutoModelForCausalLM.from_pretrained(folder)
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear
    rank = RankPlan.load(plan_file).modules["model.layers.0.mlp.up_proj"].rank
    assert torch.linalg.matrix_rank(weight) == rank
    assert "import lowrank_pl" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("weights", [True, False])
def test_two_sided_factors_that_are_gone_are_made_again_with_the_weights_that_they_had(tmp_path, weights):
    plan = tmp_path / "plan.json"
    allocate(
        Base("random:llama"),
        keep=0.5,
        output=plan,
        store=tmp_path / "store",
        decomposition=AllocatorsDecomposition("two_sided", token_weights=weights),
        calibration=Calibration(TEXT, 32, 4),
    )
    first = export(plan, output=tmp_path / "first")
    shutil.rmtree(tmp_path / "store")
    again = export(plan, output=tmp_path / "again")
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_export_refuses_what_does_not_belong_together(plan_file, tmp_path):
    allocate(
        Base("random:qwen2"),
        keep=0.5,
        output=tmp_path / "other.json",
        store=tmp_path / "other",
        calibration=Calibration(TEXT, 32, 8),
    )
    with pytest.raises(ValueError, match=r"other factors than those in .*other: .*model differ"):
        export(plan_file, output=tmp_path / "model", parts=PlanParts(store=tmp_path / "other"))
    with pytest.raises(ValueError, match="no store at"):
        export(plan_file, output=tmp_path / "model", parts=PlanParts(store=tmp_path / "nothing"))
    with pytest.raises(ValueError, match="no plan at"):
        export(tmp_path / "nothing.json", output=tmp_path / "model")
    data = json.loads(plan_file.read_text())
    plan_file.write_text(json.dumps({**data, "origin": {}}))
    with pytest.raises(ValueError, match="does not say which base it is for: name it with --base"):
        export(plan_file, output=tmp_path / "model")
    plan_file.write_text(json.dumps({**data, "origin": {**data["origin"], "base": "./base"}}))
    with pytest.raises(ValueError, match=r"base model '\./base': no such file .* where the plan was made: give --base"):
        export(plan_file, output=tmp_path / "model")
    plan_file.write_text(json.dumps({**data, "origin": {}}))
    with pytest.raises(ValueError, match="does not say what its factors were made from: name their folder with --st"):
        export(plan_file, output=tmp_path / "model", parts=PlanParts(base="random:llama"))
    assert not (tmp_path / "model").exists()


def test_a_plan_edited_by_hand_is_exported(plan_file, tmp_path):
    data = json.loads(plan_file.read_text())
    data["modules"]["model.layers.0.mlp.up_proj"]["rank"] = 3
    data["modules"]["model.layers.1.mlp.up_proj"]["rank"] = "dense"
    plan_file.write_text(json.dumps(data))
    model = load_compressed(export(plan_file, output=tmp_path / "model"))
    assert model.get_submodule("model.layers.0.mlp.up_proj").rank == 3
    assert torch.equal(
        model.get_submodule("model.layers.1.mlp.up_proj").weight,
        tiny_model("llama").get_submodule("model.layers.1.mlp.up_proj").weight,
    )


def test_a_plan_of_any_components_scores_the_same_from_its_file_and_exported(plan_file, tmp_path, capsys):
    data = json.loads(plan_file.read_text())
    del data["order"]
    for place, entry in enumerate(data["modules"].values()):
        if entry["rank"] != "dense" and place % 3:
            # Every other component, and not the first one.
            entry["indices"] = list(range(1, 2 * entry["rank"], 2)) if place % 3 == 1 else [0, 2, 5]
            entry["rank"] = len(entry["indices"])
    made = tmp_path / "any.json"
    made.write_text(json.dumps(data))
    plan = RankPlan.load(made)
    assert len(plan.any_k_modules) > 6
    main(["export", "--plan", str(made), "--output", str(tmp_path / "model")])
    assert RankPlan.load(tmp_path / "model" / "plan.json").modules == plan.modules
    assert "(any-k)" in (tmp_path / "model" / "README.md").read_text()
    text = ["--text", TEXT, "--length", "32", "--sequences", "3"]
    main(["evaluate", str(tmp_path / "model"), *text, "--json", str(tmp_path / "model.json")])
    main(["evaluate-plan", str(made), *text, "--json", str(tmp_path / "plan-scores.json")])
    capsys.readouterr()
    exported = json.loads((tmp_path / "model.json").read_text())
    in_memory = json.loads((tmp_path / "plan-scores.json").read_text())
    (size,) = in_memory["sizes"]
    assert size["nats"] == pytest.approx(exported["nats"], rel=1e-6)
    assert size["nats"] != pytest.approx(in_memory["dense"]["nats"], rel=1e-6)
    # Neither is what the first components give.
    for entry in data["modules"].values():
        entry.pop("indices", None)
    made.write_text(json.dumps(data))
    assert evaluate_plan(made, text=TEXT, length=32, sequences=3)["sizes"][0]["nats"] != pytest.approx(
        exported["nats"], rel=1e-6
    )


def components(plan):
    return {
        name: None if entry.rank is None else set(entry.indices or range(entry.rank))
        for name, entry in plan.modules.items()
    }


def test_one_plan_is_exported_in_several_sizes_one_inside_the_other(plan_file, tmp_path, capsys, monkeypatch):
    loaded = []
    monkeypatch.setattr(base, "load_base", lambda *args, **kwargs: loaded.append(args) or load_base(*args, **kwargs))
    figures = tmp_path / "figures.json"
    output = export(plan_file, keep=[0.4, 1.0, 0.5, 0.625], output=tmp_path / "sizes", json=figures)
    assert len(loaded) == 1
    names = ["keep-1.00", "keep-0.625", "keep-0.50", "keep-0.40"]
    assert output == tmp_path / "sizes"
    assert sorted(path.name for path in output.iterdir()) == sorted(names)
    written = json.loads(figures.read_text())
    assert [Path(entry["model"]).name for entry in written] == names
    assert [entry["keep"] for entry in written] == [1.0, 0.625, 0.5, 0.4]
    assert all(entry["verified"] for entry in written)
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[2:6]] == names
    assert f"models {output}" in shown
    plans = [RankPlan.load(output / name / "plan.json") for name in names]
    assert plans[2] == RankPlan.load(plan_file)
    for large, small in pairwise(plans):
        for name, kept in components(small).items():
            assert components(large)[name] is None or kept <= components(large)[name]
    for name, plan in zip(names, plans, strict=True):
        model = load_compressed(output / name)
        low_rank = (LowRankLinear, PivotedLinear)
        ranks = {key: m.rank for key, m in model.named_modules() if isinstance(m, low_rank)}
        assert ranks == {key: entry.rank for key, entry in plan.modules.items() if entry.rank is not None}
        card = (output / name / "README.md").read_text()
        resized = "This size was resized from the plan of uniform at keep 0.5, by its component order" in card
        assert resized == (name != "keep-0.50")
    alone = load_compressed(export(plan_file, output=tmp_path / "alone"))
    one = load_compressed(output / "keep-0.50")
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), one.parameters(), strict=True))


def test_what_is_exported_stays_when_a_later_size_fails(plan_file, tmp_path, monkeypatch, caplog):
    real = finish.save_compressed

    def failing(model, directory, **kwargs):
        if directory.name == "keep-0.40":
            raise OSError(28, "No space left on device")
        return real(model, directory, **kwargs)

    monkeypatch.setattr(finish, "save_compressed", failing)
    with pytest.raises(OSError, match="No space left on device"):
        export(plan_file, keep=[0.4, 0.5], output=tmp_path / "sizes", json=tmp_path / "figures.json")
    assert [path.name for path in (tmp_path / "sizes").iterdir()] == ["keep-0.50"]
    assert f"whole and checked are: {tmp_path / 'sizes' / 'keep-0.50'}" in caplog.text
    assert load_compressed(tmp_path / "sizes" / "keep-0.50").num_parameters() > 0
    assert not (tmp_path / "figures.json").exists()


def test_sizes_that_can_not_be_are_refused_before_anything_is_loaded(plan_file, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "load_base", None)
    with pytest.raises(ValueError, match="no size was given: expected one or more fractions"):
        export(plan_file, keep=[], output=tmp_path / "model")
    with pytest.raises(ValueError, match=r"keep is 1.2: expected the fraction of parameters to keep"):
        export(plan_file, keep=[0.5, 1.2], output=tmp_path / "model")
    with pytest.raises(ValueError, match=r"keep 0.01 allows .* need at least"):
        export(plan_file, keep=[0.01], output=tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model' is itself a model: name another folder for the models of several"):
        export(plan_file, keep=[0.4], output=tmp_path / "model")
    with monkeypatch.context() as inside:
        inside.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"'\.' is the current folder, .*: name another"):
            export(plan_file, output=Path())
    (tmp_path / "narrowed").mkdir()
    (tmp_path / "narrowed" / "config.json").write_text('{"lowrank_narrowed": {}}')
    with pytest.raises(ValueError, match=r"narrowed' is the model that this is made from, .*: name another"):
        export(plan_file, output=tmp_path / "narrowed", parts=PlanParts(base=str(tmp_path / "narrowed")))
    data = json.loads(plan_file.read_text())
    del data["order"]
    plan_file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"method uniform.* no component order.*: .*`lowrank allocate`"):
        export(plan_file, keep=[0.4], output=tmp_path / "sizes")
    assert not (tmp_path / "sizes").exists()


def test_the_command_line_of_several_sizes(plan_file, tmp_path, capsys):
    main(["export", "--plan", str(plan_file), "--keep", "0.6", "0.4", "--output", str(tmp_path / "sizes")])
    main(["export", str(plan_file), "--keep=0.45", "--output", str(tmp_path / "sizes")])
    assert {path.name for path in (tmp_path / "sizes").iterdir()} == {"keep-0.60", "keep-0.40", "keep-0.45"}
    capsys.readouterr()


def test_an_export_of_any_size_serves_sizes_to_every_command(plan_file, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    main(["export", str(plan_file), "--any_size", "true", "--output", str(tmp_path / "any"), "--json", str(figures)])
    size = sum(file.stat().st_size for file in (tmp_path / "any" / "nested").iterdir())
    assert json.loads(figures.read_text())["nested_bytes"] == size
    assert "of components for smaller sizes, beside the weights" in capsys.readouterr().out
    assert "`lowrank_pl.load_compressed(FOLDER, keep=...)`" in (tmp_path / "any" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"--any_size needs .*: give the plan, .*any/plan.json"):
        export(tmp_path / "any", keep=[0.3], any_size=True, output=tmp_path / "cut")
    cut = export(tmp_path / "any", keep=[0.3], output=tmp_path / "cut") / "keep-0.30"
    made = export(plan_file, keep=[0.3], output=tmp_path / "made") / "keep-0.30"
    assert (cut / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    text = {"text": TEXT, "length": 32, "sequences": 2}
    assert evaluate(str(tmp_path / "any"), keep=0.3, **text)["nats"] == evaluate(str(made), **text)["nats"]


def test_any_size_says_what_it_needs_before_anything_is_loaded(plan_file, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "load_base", None)
    with pytest.raises(ValueError, match="which smaller sizes are not cut from: leave out any_size"):
        export(plan_file, any_size=True, merge=True, output=tmp_path / "model")
    data = json.loads(plan_file.read_text())
    plan_file.write_text(json.dumps({**data, "fingerprint": {**data["fingerprint"], "refit": {"keep": 0.5}}}))
    with pytest.raises(ValueError, match=r"the factors have a refit for keep 0\.5"):
        export(plan_file, any_size=True, output=tmp_path / "model")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_an_export_goes_to_the_hub_or_its_one_sentence_says_how_it_would(plan_file, tmp_path, monkeypatch, capsys):
    with logged_in(monkeypatch) as hub:
        words = ["export", str(plan_file), "--output", str(tmp_path / "model"), "--push_to_hub", "me/small"]
        main([*words, "--private", "--revision", "half"])
        assert hub.private == {"me/small": True}
        arrived = hub.branches["me/small", "half"]
        assert arrived == {".gitattributes": b""} | {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
        assert f"hub    {hub.url}/me/small/commit/" in capsys.readouterr().out
        hub.refuse = (403, "create")
        said = failing(capsys, *words)
    assert f"This uploads it: hf upload me/small {tmp_path / 'model'} . --delete model.safetensors --delete" in said
    assert load_compressed(tmp_path / "model").num_parameters() > 0
