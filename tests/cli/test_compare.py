"""``lowrank compare``: one protocol for all methods, results that add up, resume, and refusals."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import yaml

from lowrank_pl import Calibration, RankPlan, Subject
from lowrank_pl.cli import comparison
from lowrank_pl.cli.app import main
from lowrank_pl.cli.compare import ComparisonText, compare
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.healing import Healing
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.prune.settings import LLMPruner
from lowrank_pl.methods.recipes import RECIPES, Learning, Recipe, recipe
from lowrank_pl.models.base import Base
from lowrank_pl.report.comparison import _spread, comparison_plot, comparison_table, read_results
from lowrank_pl.training import short_run
from tests.helpers import ROOT
from tests.helpers.run_folder import comparison_results

QUICK = Recipe(Decomposition("two_sided"), learning=Learning(ARA(), steps=3, sequences=4, start="fisher"))
SETTINGS = {
    "calibration": ComparisonText(length=32, sequences=8),
    "score_length": 32,
    "scores": ["docs=python-docs::part=50%-100%"],
    "score_sequences": {"docs": 6},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run = tmp_path_factory.mktemp("compare") / "run"
    compare(
        Base("random:llama"),
        methods=["uniform", "fisher", "quick"],
        keep=[0.8, 0.5],
        recipes={"quick": QUICK},
        run=run,
        **SETTINGS,
    )
    return run


def test_text_that_a_refit_sees_is_known_text(caplog):
    text = Calibration("python-docs::part=0%-50%", 32, 4)
    subject = Subject.load(Base("random:llama"), text)
    scored = {"docs": replace(text, sequences=8).tokens(subject.tokenizer)[4:]}
    for method, warned in (("fisher", False), ("fisher+refit", True)):
        comparison.warn_of_known_text(scored, subject, {method: recipe(method)})
        assert ("4 of 4 sequences of docs hold text that methods are calibrated on" in caplog.text) == warned


def test_every_method_and_size_has_a_result(folder):
    results = read_results(folder)
    asked = [(row["method"], row["keep"]["asked"]) for row in results]
    assert sorted(asked) == sorted(
        [("dense", 1.0), *((name, keep) for name in ("uniform", "fisher", "quick") for keep in (0.8, 0.5))]
    )
    dense = next(row for row in results if row["method"] == "dense")
    assert dense["excess"] == {"docs": 0.0}
    for row in results:
        assert row["perplexity"]["docs"] == pytest.approx(math.exp(row["nats"]["docs"]))
        assert row["excess"]["docs"] == pytest.approx(row["nats"]["docs"] - dense["nats"]["docs"])
        assert row["peak_memory"] > 1e6
        assert row["machine"]["torch"]
        if row is dense:
            continue
        assert 0.97 * row["keep"]["asked"] < row["keep"]["targeted"] <= row["keep"]["asked"]
        plan = RankPlan.load(folder / row["method"] / f"keep-{row['keep']['asked']:g}" / "plan.json")
        assert {name: module.rank for name, module in plan.modules.items()} == row["ranks"]
        assert (plan.bytes, plan.keep_model) == (row["bytes"], row["keep"]["model"])
        assert plan.order is not None
    table = (folder / "results.md").read_text()
    assert table.count("\n| ") == 7
    assert "excess docs" in table
    assert (folder / "excess-docs.png").stat().st_size > 5000


def test_variants_of_a_recipe(tmp_path):
    names = ["uniform", "uniform+pivoted", "uniform+pivoted+refit"]
    results = compare(Base("random:llama"), methods=names, keep=[0.5], run=tmp_path, **SETTINGS)
    plain, pivoted, refitted = (next(row for row in results if row["method"] == name) for name in names)
    assert "storage" not in plain["settings"]
    assert pivoted["settings"]["storage"] == refitted["settings"]["storage"] == "auto"
    assert all(pivoted["ranks"][name] > rank for name, rank in plain["ranks"].items())
    assert pivoted["ranks"] == refitted["ranks"]
    assert refitted["settings"]["refit"]["hold_back"] == 0.2
    assert refitted["seconds"]["refit"] > 0
    assert any(note.startswith("refitted ") for note in refitted["notes"])
    for row in (plain, pivoted, refitted):
        assert 0.97 * 0.5 < row["keep"]["targeted"] <= 0.5


def test_nothing_finished_is_made_again(folder, monkeypatch):
    before = read_results(folder)
    monkeypatch.setattr(comparison.__name__ + ".perplexity", lambda *_, **__: pytest.fail("scored again"))
    again = compare(Base("random:llama"), methods=["uniform"], keep=[0.5], run=folder, **SETTINGS)
    assert sorted(again, key=str) == sorted(before, key=str)


def test_a_changed_recipe_is_made_anew(folder, tmp_path):
    other = {"quick": Recipe(Decomposition("svd"))}
    again = compare(Base("random:llama"), methods=["quick"], keep=[0.5], recipes=other, run=folder, **SETTINGS)
    row = next(row for row in again if (row["method"], row["keep"]["asked"]) == ("quick", 0.5))
    assert row["settings"]["decomposition"] == {"kind": "svd"}
    assert len(again) == 7


def test_rows_of_other_settings_that_stay_are_warned_of(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "run")
    other = {"quick": Recipe(Decomposition("svd"), "energy")}
    with caplog.at_level("WARNING"):
        compare(Base("random:llama"), methods=["quick"], keep=[0.8], recipes=other, run=tmp_path / "run", **SETTINGS)
    (said,) = [message for message in caplog.messages if "--keep" in message]
    assert "quick at keep 0.5" in said
    assert "uniform" not in said


def test_a_row_that_another_run_made_meanwhile_is_kept(tmp_path, monkeypatch):
    arguments = {"keep": [0.5], "run": tmp_path, **SETTINGS}
    old, new = ({"own": Recipe(Decomposition(kind))} for kind in ("svd", "two_sided"))
    compare(Base("random:llama"), methods=["own"], recipes=old, **arguments)
    real = comparison.Comparison._result

    def beside_another(self, name, *rest):
        monkeypatch.setattr(comparison.Comparison, "_result", real)
        compare(Base("random:llama"), methods=["own"], recipes=new, **arguments)
        return real(self, name, *rest)

    monkeypatch.setattr(comparison.Comparison, "_result", beside_another)
    rows = compare(Base("random:llama"), methods=["uniform"], **arguments)
    assert {row["method"]: row["settings"] for row in rows}["own"]["decomposition"]["kind"] == "two_sided"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    real = short_run.RankLearner.training_step

    def killed(self, tokens, batch_idx):
        if self.global_step == 26:
            raise SystemError("killed")
        return real(self, tokens, batch_idx)

    long = Recipe(learning=Learning(ARA(), steps=28, sequences=4))
    arguments = {"methods": ["long"], "keep": [0.5], "recipes": {"long": long}, **SETTINGS}
    whole = compare(Base("random:llama"), run=tmp_path / "whole", **arguments)
    monkeypatch.setattr(short_run.RankLearner, "training_step", killed)
    with pytest.raises(SystemError, match="killed"):
        compare(Base("random:llama"), run=tmp_path / "killed", **arguments)
    steps = []
    monkeypatch.setattr(
        short_run.RankLearner, "training_step", lambda self, *args: (steps.append(1), real(self, *args))[1]
    )
    resumed = compare(Base("random:llama"), run=tmp_path / "killed", **arguments)
    assert len(steps) == 3  # from step 25 to 28
    find = lambda rows: next(row for row in rows if row["method"] == "long")  # noqa: E731
    assert find(resumed)["nats"] == find(whole)["nats"]
    assert find(resumed)["ranks"] == find(whole)["ranks"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_method_and_its_refit_learn_once(tmp_path, monkeypatch):
    real, steps = short_run.RankLearner.training_step, []
    monkeypatch.setattr(
        short_run.RankLearner, "training_step", lambda self, *args: (steps.append(1), real(self, *args))[1]
    )
    long = Recipe(learning=Learning(ARA(), steps=25, sequences=4))
    results = compare(
        Base("random:llama"),
        run=tmp_path,
        methods=["long", "long+refit"],
        keep=[0.5],
        recipes={"long": long},
        **SETTINGS,
    )
    plain, refitted = results[1:]
    assert len(steps) == 25
    assert refitted["ranks"] == plain["ranks"]
    assert refitted["nats"] != plain["nats"]
    assert refitted["seconds"]["plan"] > plain["seconds"]["plan"] / 2  # of the checkpoint, not of the moment
    assert refitted["seconds"]["refit"] > 0


def test_the_command_line_and_the_shipped_configuration(tmp_path, capsys):
    words = ["compare", "--config", str(ROOT / "configs" / "compare" / "smoke.yaml"), "--run", str(tmp_path / "run")]
    main([*words, "--methods", "uniform", "quick", "--keep", "0.6", "--json", str(tmp_path / "out.json")])
    shown = capsys.readouterr().out
    assert "quick" in shown
    assert "uniform" in shown
    assert {row["method"] for row in json.loads((tmp_path / "out.json").read_text())} == {"dense", "uniform", "quick"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_comparisons_name_recipes_that_exist(path):
    settings = yaml.safe_load(path.read_text())
    for name in settings["methods"]:
        own = dict.fromkeys(settings.get("recipes", {}), RECIPES["uniform"])
        assert recipe(name, own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["better"]}, r"no method is called 'better': expected one of svd, fwsvd"),
        ({"methods": ["../a"]}, r"a method is called '../a': expected letters, digits and _.\+-, other than dense"),
        ({"methods": ["dense"]}, r"a method is called 'dense'"),
        ({"scores": ["a/test.txt", "b/test.txt"]}, r"called 'test': .*as NAME=TEXT"),
        ({"keep": [1.5]}, r"keep is 1.5: expected the fraction of parameters to keep"),
        ({"score_sequences": {"c4": 3}}, r"score_sequences names 'c4', which is none of the texts to score: docs"),
        ({"scores": ["docs=nowhere.txt"]}, r"nowhere.txt"),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path, changes, message):
    arguments = {"methods": ["uniform"], "keep": [0.5], "run": tmp_path / "run", **SETTINGS, **changes}
    with pytest.raises(ValueError, match=message):
        compare(Base("random:llama"), **arguments)
    assert not (tmp_path / "run").exists()


def test_damaged_results_are_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text('[{"method": "x"}]')
    with pytest.raises(ValueError, match=r"results.json .*\[0\].keep is missing.*: delete it or name another"):
        compare(Base("random:llama"), methods=["uniform"], keep=[0.5], run=tmp_path, **SETTINGS)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"bytes": "3"}, r"\[1\].bytes"), ({"seconds": None}, r"\[1\].seconds"), ({"excess": {}}, "a at keep 0.8 is not")],
)
def test_a_wrong_row_of_results_is_named(tmp_path, change, field):
    rows = comparison_results()
    rows[1] |= change
    (tmp_path / "results.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=f"results.json .*{field}"):
        read_results(tmp_path)


def test_a_damaged_protocol_is_named(tmp_path):
    (tmp_path / "protocol.json").write_text("[]")
    with pytest.raises(ValueError, match=r"protocol.json .* name another folder"):
        compare(Base("random:llama"), methods=["uniform"], keep=[0.5], run=tmp_path, **SETTINGS)


def test_a_folder_of_another_comparison_is_refused(folder):
    with pytest.raises(ValueError, match=r"holds a comparison made with other settings \(calibration differ\)"):
        compare(
            Base("random:llama"),
            methods=["uniform"],
            keep=[0.5],
            run=folder,
            **{**SETTINGS, "calibration": ComparisonText(length=32, sequences=7)},
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Learning(ARA(), steps=0), r"steps of a recipe's learning is 0: expected a whole number of at least 1"),
        (lambda: Learning(ARA(), lr=0.0), r"lr of a recipe's learning is 0.0: expected a finite number above 0"),
        (lambda: Learning(ARA(), start="best"), r"no allocator is called 'best'"),
        (lambda: Recipe(allocator="best"), r"no allocator is called 'best'"),
        (lambda: Recipe(settings={"x": 1}), r"the allocator uniform has no setting 'x': expected none"),
        (lambda: recipe("better", {"own": Recipe()}), r"expected one of svd, .*, own"),
    ],
)
def test_impossible_recipes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "changes", [{"steps": 9}, {"lr": 0.5}, {"sequences": 5}, {"batch_size": 2}, {"start": "fisher"}, {"cosine": True}]
)
def test_every_setting_of_learning_tells_recipes_apart(changes):
    factors = Decomposition("two_sided")
    for mask in (ARA(), RECIPES["ars"].learning.mask):
        one, other = Recipe(factors, learning=Learning(mask)), Recipe(factors, learning=Learning(mask, **changes))
        assert one.describe() != other.describe()
        assert other.describe()["learning"][next(iter(changes))] == next(iter(changes.values()))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_describe_themselves_as_json(name):
    described = json.loads(json.dumps(RECIPES[name].describe()))
    assert described["prune"]["method"] if RECIPES[name].only_prunes else described["decomposition"]["kind"]


def test_table_and_plot(folder):
    results = read_results(folder)
    lines = comparison_table(results).splitlines()
    assert lines[2].split("|")[1].strip() == "dense"
    names = {row["method"] for row in results} - {"dense"}
    (axes,) = comparison_plot(results, "docs").axes
    assert {text.get_text() for text in axes.texts} == names
    assert len(axes.lines) == len(names)
    (axes,) = comparison_plot(results, "docs", methods=["uniform"]).axes
    assert [text.get_text() for text in axes.texts] == ["uniform"]
    with pytest.raises(ValueError, match="ara9"):
        comparison_plot(results, "docs", methods=["ara9"])


def test_names_of_lines_keep_apart_and_near_to_where_lines_end():
    wanted = {"a": 0.5, "b": 0.5, "c": 0.1, "d": 0.52, "e": 0.99}
    places = _spread(wanted, gap=0.1)
    assert sorted(places, key=places.get) == ["c", "a", "b", "d", "e"]
    # The three that are too near share what they are moved by.
    assert [round(places[name], 3) for name in "cabde"] == [0.1, 0.407, 0.507, 0.607, 0.99]
    assert list(_spread(dict.fromkeys("abc", 1.0), gap=0.25).values()) == pytest.approx([0.5, 0.75, 1.0])
    assert list(_spread(dict.fromkeys("abc", 0.0), gap=0.5).values()) == pytest.approx([0.0, 0.5, 1.0])


# -- healing -------------------------------------------------------------------------------------------------------


def healed(lr):
    return Recipe(Decomposition("two_sided"), "fisher", heal=Healing(tokens=40 * 32, lr=lr))


def test_rows_whose_weights_were_trained_are_marked(tmp_path, caplog):
    recipes = {"trained": healed(3e-3), "in_vain": healed(0.3)}
    results = compare(
        Base("random:llama"),
        methods=["fisher", *recipes],
        keep=[0.5],
        recipes=recipes,
        run=tmp_path / "run",
        **SETTINGS,
    )
    rows = {row["method"]: row for row in results}
    # Excess of a random model is noise; whether held-back KL fell is what `Healed.kept` decides.
    assert rows["trained"]["nats"] != rows["fisher"]["nats"]
    assert rows["trained"]["ranks"] == rows["fisher"]["ranks"]
    assert rows["in_vain"]["excess"] == rows["fisher"]["excess"]
    assert "healing did not help" in caplog.text
    table = (tmp_path / "run" / "results.md").read_text()
    assert "| trained (trained) " in table
    assert "| in_vain " in table
    assert "trained at keep 0.5 was trained after the compression: the factors were trained on 1,280 tokens" in table
    again = compare(
        Base("random:llama"), methods=["trained"], keep=[0.5], recipes=recipes, run=tmp_path / "run", **SETTINGS
    )
    assert {row["method"]: row for row in again} == rows


def test_a_pruned_model_is_healed_by_an_adapter_as_llm_pruner_does(tmp_path):
    pruned = Recipe(prune=LLMPruner(skip_first=0, skip_last=0))
    recipes = {"pruned": pruned, "healed": replace(pruned, heal=Healing(tokens=40 * 32, train="lora", lr=1e-2))}
    run = tmp_path / "run"
    results = compare(Base("random:llama"), methods=[*recipes], keep=[0.6], recipes=recipes, run=run, **SETTINGS)
    rows = {row["method"]: row for row in results}
    assert rows["healed"]["nats"] != rows["pruned"]["nats"]
    assert rows["healed"]["parameters"] == rows["pruned"]["parameters"]
    assert "healed at keep 0.6 was trained after the compression: a LoRA adapter" in (run / "results.md").read_text()


def test_factors_of_a_base_in_half_precision_are_healed(tmp_path):
    base, recipes = Base("random:llama", dtype="bfloat16"), {"healed": healed(3e-3)}
    rows = compare(base, methods=[*recipes], keep=[0.5], recipes=recipes, run=tmp_path / "run", **SETTINGS)
    assert any(note.startswith("healed: ") for note in rows[-1]["notes"])


def test_a_budget_below_one_step_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(Base, "load", lambda _: pytest.fail("a model was loaded"))
    recipes = {"healed": replace(healed(3e-3), heal=Healing(tokens=10))}
    with pytest.raises(ValueError, match="budget of 10 tokens is below the 32 tokens of one optimizer step"):
        compare(Base("random:llama"), methods=[*recipes], recipes=recipes, run=tmp_path / "run", **SETTINGS)


@pytest.mark.parametrize(("prune", "train"), [(LLMPruner(), "factors"), (None, "lora")])
def test_a_recipe_heals_what_it_has(prune, train):
    with pytest.raises(ValueError, match=f"heal.train is {train}, where a recipe like this has"):
        Recipe(prune=prune, heal=Healing(tokens=100, train=train))


@pytest.mark.parametrize("method", ["ara", "svdllm_v2", "bytes", "fisher+prune"])
def test_methods_that_know_no_embeddings_refuse_them_before_anything_is_loaded(method, tmp_path):
    with pytest.raises(ValueError, match=f"{re.escape(method)} can't give embeddings a rank"):
        compare(Base("no/such/model"), methods=[method], include=["*", "embeddings"], run=tmp_path / "run")


def test_experts_are_dropped_in_a_comparison_and_dense_models_are_refused_before_it(tmp_path):
    names = ["fisher", "fisher+drop"]
    compare(Base("random:mixtral"), methods=names, keep=[0.3], run=tmp_path / "run", **SETTINGS)
    rows = {row["method"]: row for row in read_results(tmp_path / "run")}
    assert rows["fisher+drop"]["dropped_experts"] > 0
    assert "dropped_experts" not in rows["fisher"]
    assert all(0.29 < rows[name]["keep"]["targeted"] <= 0.3 for name in names)
    with pytest.raises(ValueError, match="leave drop_experts out"):
        compare(Base("random:llama"), methods=["uniform", "fisher+drop"], keep=[0.3], run=tmp_path / "no", **SETTINGS)
