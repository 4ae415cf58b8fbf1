"""``lowrank prune``, and what the other commands make of a pruned base."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from lowrank_pl import Decomposition, RankPlan, load_compressed, save_compressed
from lowrank_pl.cli.allocate import allocate
from lowrank_pl.cli.app import main
from lowrank_pl.cli.compare import ComparisonText, compare
from lowrank_pl.cli.doctor import doctor
from lowrank_pl.cli.export import export
from lowrank_pl.cli.prune import prune
from lowrank_pl.cli.rotate import rotate
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.prune.settings import LLMPruner, WidthPruning
from lowrank_pl.methods.recipes import Recipe
from lowrank_pl.models.base import Base, load_base
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.targets import find_targets, targeted_parameters
from lowrank_pl.models.tiny import byte_tokenizer
from lowrank_pl.plans.resize import nested
from tests.helpers.pruned_models import TEXT, indices_of_pivots, ragged, save_with_copies, width_of


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def healthy(folder):
    return doctor(folder, sequences=2, length=32, prompts=["A list"], max_new_tokens=4).health != "sick"


# -- half of the hidden neurons ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["random:llama", "random:gpt2"])
def half(request, tmp_path_factory):
    """A base with half of its hidden neurons: its name before, its folder, its figures, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("half"), StringIO()
    with redirect_stdout(printed):
        made = prune(
            Base(request.param),
            output=folder / "pruned",
            json=folder / "figures.json",
            pruning=WidthPruning(share=0.5),
            calibration=TEXT,
        )
    figures = json.loads((folder / "figures.json").read_text())
    return SimpleNamespace(
        base=request.param, folder=made, figures=figures, printed=printed.getvalue(), width=width_of(request.param),
        targeted=SimpleNamespace(**figures["parameters"]["targeted"]),
        whole=SimpleNamespace(**figures["parameters"]["model"]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def plan_file(half):
    """A plan at keep 0.5 on the pruned base."""
    path = half.folder.parent / "plan.json"
    allocate(Base(str(half.folder)), keep=0.5, output=path, calibration=TEXT)
    return path


def test_plain_transformers_loads_it_with_half_of_the_neurons(half):
    AutoModelForCausalLM.from_pretrained(half.folder)
    assert half.figures["width"] == {"before": half.width, "after": half.width // 2}
    assert width_of(str(half.folder)) == half.width // 2


def test_figures_count_parameters_and_bytes(half):
    dense, model = load_base(half.base), AutoModelForCausalLM.from_pretrained(half.folder)
    assert half.whole.dense == sum(p.numel() for p in dense.parameters())
    assert half.whole.kept == sum(p.numel() for p in model.parameters())
    assert 0 < half.targeted.dense - half.targeted.kept <= half.whole.dense - half.whole.kept
    assert half.figures["bytes"] >= 4 * half.whole.kept


def test_the_terminal_says_how_far_it_was_pruned_and_what_keep_will_count(half):
    assert f"pruned to {half.width // 2} of {half.width} hidden neurons in each MLP:" in half.printed
    assert f"counts what {half.base} had" in half.printed


def test_the_config_remembers_what_the_base_was(half):
    model = AutoModelForCausalLM.from_pretrained(half.folder)
    origin = Origin.of(model)
    assert (origin.base, origin.targeted, origin.parameters) == (half.base, half.targeted.dense, half.whole.dense)
    assert (origin.width, [*origin.left.values()]) == (half.width, 2 * [half.width // 2])
    assert origin.left_out(find_targets(model)) == half.targeted.dense - half.targeted.kept


def test_one_block_alone_lost_half_of_what_two_lost(half):
    model = load_base(str(half.folder))
    origin = Origin.of(model)
    assert origin.left_out(find_targets(model, include=["*.0.*"])) == origin.left_out(find_targets(model)) // 2


def test_the_card_says_how_far_it_was_pruned(half):
    card = (half.folder / "README.md").read_text()
    assert f"{half.width // 2} of {half.width} hidden neurons are left" in card


def test_a_plan_on_it_counts_what_the_base_had(half, plan_file):
    plan = RankPlan.load(plan_file)
    assert (plan.targeted_parameters, plan.left_out) == (half.targeted.dense, half.targeted.dense - half.targeted.kept)
    assert 0.49 < plan.keep_targeted <= 0.5
    assert plan.kept_model_parameters == half.whole.kept - half.targeted.kept + plan.kept_parameters


def test_a_plan_on_it_remembers_the_base(half, plan_file):
    plan = RankPlan.load(plan_file)
    assert plan.origin["narrowed"] == {"base": half.base, "width": half.width, "left": f"{half.width // 2:,}"}
    share = f"{half.targeted.kept / half.targeted.dense:.1%}".replace("%", " %")
    pruned = (
        f"pruned to {half.width // 2} of {half.width} hidden neurons in each MLP: {share} of the targeted parameters"
    )
    assert any(pruned in note for note in plan.notes)


def test_an_export_of_a_plan_on_it_has_as_many_parameters_as_the_plan_says(plan_file, tmp_path):
    plan, small = RankPlan.load(plan_file), export(plan_file, output=tmp_path / "small")
    assert load_compressed(small).num_parameters() == plan.kept_model_parameters - indices_of_pivots(plan)
    assert healthy(small)


def test_a_merged_export_of_a_plan_on_it_is_healthy(plan_file, tmp_path):
    assert healthy(export(plan_file, output=tmp_path / "merged", merge=True))


def test_a_plan_on_it_has_other_sizes(plan_file):
    assert 0.44 < nested(RankPlan.load(plan_file), [0.45])[0.45].keep_targeted <= 0.45


def test_all_that_is_left_stays_where_that_is_less_than_may_be_kept(half, tmp_path):
    most = allocate(Base(str(half.folder)), keep=1.0, output=tmp_path / "most.json", calibration=TEXT)
    assert most.keep_targeted == pytest.approx(half.targeted.kept / half.targeted.dense)
    assert len(most.dense_modules) == len(most.modules)


def test_what_was_pruned_twice_remembers_the_first_base(half, tmp_path):
    again = prune(
        Base(str(half.folder)),
        output=tmp_path / "again",
        pruning=WidthPruning(share=0.75, multiple_of=4),
        calibration=TEXT,
    )
    origin = Origin.of(load_base(str(again)))
    assert (origin.base, origin.width, origin.widths) == (half.base, half.width, f"{3 * half.width // 8:,}")


def test_what_was_pruned_before_limits_what_can_be_kept(half, tmp_path):
    with pytest.raises(ValueError, match=rf"keep is 0\.95, .* 0\.6\d+ .*: lower keep, or prune {half.base} itself"):
        prune(Base(str(half.folder)), output=tmp_path / "again", keep=0.95, calibration=TEXT)


# -- settings and folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.0}, "share is 1.0: expected a fraction above 0 and below 1"),
        ({"keep": 0.0}, "keep is 0.0: expected a fraction above 0 and below 1"),
        ({}, "give one of keep, .* and share"),
        ({"keep": 0.6, "share": 0.5}, "give one of keep, .* and share"),
        ({"share": 0.5, "multiple_of": 0}, "multiple_of is 0: expected a whole number of at least 1"),
        ({"share": 0.5, "damping": 0.0}, "damping is 0.0: expected a finite number of at least 0.0001"),
        ({"share": 0.5, "damping": float("inf")}, "damping is inf: expected a finite number of at least 0.0001"),
        ({"keep": 0.001}, r"keep 0\.001 allows .* need at least"),
        ({"share": 0.99}, r"share=0\.99 .* 96 .*multiple_of=8.*: lower share or multiple_of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prune(
            Base("random:llama"), keep=changes.get("keep"),
            pruning=WidthPruning(**{name: value for name, value in changes.items() if name != "keep"}),
            output=tmp_path / "pruned", calibration=TEXT,
        )  # fmt: skip
    assert not (tmp_path / "pruned").exists()


def test_a_folder_of_something_else_is_left_alone_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "thesis.txt").write_text("all of it")
    monkeypatch.setattr(Base, "load", lambda _: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"holds other files .*: name a new folder or empty"):
        prune(Base("random:llama"), output=tmp_path / "pruned", pruning=WidthPruning(share=0.5), calibration=TEXT)
    assert (tmp_path / "pruned" / "thesis.txt").read_text() == "all of it"


def test_an_earlier_pruned_folder_is_replaced(tmp_path):
    for share, width in ((0.5, 48), (0.75, 72)):
        folder = prune(
            Base("random:llama"), output=tmp_path / "pruned", pruning=WidthPruning(share=share), calibration=TEXT
        )
        assert load_base(str(folder)).config.intermediate_size == width


@pytest.mark.parametrize("write", [
    lambda folder: prune(Base(str(folder)), output=folder, pruning=WidthPruning(share=0.5), calibration=TEXT),
    lambda folder: rotate(Base(str(folder)), output=folder),
])  # fmt: skip
def test_the_base_is_not_replaced_by_what_is_made_from_it(write, tmp_path, monkeypatch):
    folder = save_compressed(ragged("llama"), tmp_path / "base", tokenizer=byte_tokenizer()).directory
    monkeypatch.setattr(Base, "load", lambda _: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"base' is the model that this is made from, .*: name another folder"):
        write(folder)


def test_mlps_of_several_widths_are_not_pruned_again(tmp_path):
    folder = save_compressed(ragged("llama"), tmp_path / "base", tokenizer=byte_tokenizer()).directory
    with pytest.raises(ValueError, match=r"\[40, 56\] wide: expected one width"):
        prune(Base(str(folder)), output=tmp_path / "again", pruning=WidthPruning(share=0.5), calibration=TEXT)


# -- the width that loses least ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doubled(tmp_path_factory):
    """A base whose every other hidden neuron is nearly the one before it."""
    return save_with_copies(tmp_path_factory.mktemp("doubled") / "base")


@pytest.fixture(scope="module")
def best(doubled, tmp_path_factory):
    """The base pruned to the best width at keep 0.6, its figures, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("best"), StringIO()
    with redirect_stdout(printed):
        # Copies can be compensated nearly in full, if the text is trusted.
        prune(
            Base(doubled),
            keep=0.6,
            output=folder / "pruned",
            json=folder / "figures.json",
            pruning=WidthPruning(damping=0.01),
            calibration=TEXT,
        )
    return folder / "pruned", json.loads((folder / "figures.json").read_text()), printed.getvalue()


def tried_widths(figures):
    return {int(width): loss for width, loss in figures["predicted_nats_with_ranks"].items()}


def predicted(base, keep, folder):
    """Return the nats that the exact allocation on ``base`` predicts to lose."""
    plan = allocate(Base(base), method="fisher", keep=keep, output=folder / "predicted.json", calibration=TEXT)
    store = FactorStore.existing(plan.origin["store"])
    cut = (store.sigma(name)[module.rank :] for name, module in plan.modules.items() if module.rank is not None)
    return sum(rest.square().sum().item() for rest in cut) / 2


def test_the_width_is_the_one_that_is_predicted_to_lose_least(best):
    _, figures, printed = best
    tried = tried_widths(figures)
    assert max(tried) == 96
    assert figures["width"]["after"] == min(tried, key=tried.get) <= 48
    assert f"ranks to keep 0.6: predicted loss {tried[96]:.4f} nats a token" in printed


def test_at_the_present_width_the_prediction_is_that_of_the_exact_allocation(best, doubled, tmp_path):
    assert tried_widths(best[1])[96] == pytest.approx(predicted(doubled, 0.6, tmp_path), rel=1e-3)


def test_at_the_chosen_width_the_prediction_holds_on_the_result(best, tmp_path):
    folder, figures, _ = best
    # Moments of the result are nearly the same.
    total = predicted(str(folder), 0.6, tmp_path) + figures["predicted_nats"]
    assert tried_widths(figures)[figures["width"]["after"]] == pytest.approx(total, rel=0.2)


def test_where_nothing_is_gained_ranks_are_to_be_allocated_on_the_base(tmp_path):
    # Half of the neurons alone would be more than is to be pruned.
    with pytest.raises(ValueError, match=r"at keep 0\.9 .*: allocate ranks on 'random:llama' itself"):
        prune(
            Base("random:llama"),
            keep=0.9,
            output=tmp_path / "pruned",
            pruning=WidthPruning(multiple_of=48),
            calibration=TEXT,
        )


# -- a width for every MLP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_doubled(tmp_path_factory):
    """A base of whose first MLP half of the neurons are copies, and none of the second."""
    return save_with_copies(tmp_path_factory.mktemp("half doubled") / "base", blocks=(0,), scale=1.0)


@pytest.fixture(scope="module")
def by_block(half_doubled, tmp_path_factory):
    """The base with a width of its own for every MLP, its figures, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("by block"), StringIO()
    with redirect_stdout(printed):
        # Copies can be compensated in full, if the text is trusted.
        prune(
            Base(half_doubled),
            keep=0.7,
            output=folder / "pruned",
            json=folder / "f.json",
            pruning=WidthPruning(by_block=True, damping=0.001),
            calibration=TEXT,
        )
    return folder / "pruned", json.loads((folder / "f.json").read_text()), printed.getvalue()


def test_the_mlp_with_copies_gets_the_smaller_width(by_block):
    folder, figures, _ = by_block
    first, second = figures["width"]["after"]
    assert first < second
    assert [layer.mlp.up_proj.out_features for layer in load_base(str(folder)).model.layers] == [first, second]


def test_no_one_width_is_predicted_to_be_as_good(by_block):
    _, figures, printed = by_block
    assert figures["predicted_nats_by_block"] < min(figures["predicted_nats_with_ranks"].values())
    assert "widths by block, ranks to keep 0.7: predicted loss" in printed


def test_the_config_remembers_what_several_widths_left_out(by_block, half_doubled):
    folder, figures, _ = by_block
    model, origin = load_base(str(folder)), Origin.of(load_base(str(folder)))
    assert origin.widths == "{} to {}".format(*figures["width"]["after"])
    before, left = (targeted_parameters(find_targets(one)) for one in (load_base(half_doubled), model))
    assert origin.left_out(find_targets(model)) == before - left


def test_plans_on_several_widths_count_what_the_base_had(by_block, half_doubled, tmp_path):
    plan = allocate(Base(str(by_block[0])), keep=0.7, output=tmp_path / "plan.json", calibration=TEXT)
    dense = targeted_parameters(find_targets(load_base(half_doubled)))
    assert plan.targeted_parameters == dense
    assert plan.kept_parameters <= 0.7 * dense
    assert healthy(export(tmp_path / "plan.json", output=tmp_path / "small"))


COMPARED = {
    "calibration": ComparisonText(length=32, sequences=8),
    "score_length": 32, "scores": ["docs=python-docs::part=50%-100%"], "score_sequences": {"docs": 6},
}  # fmt: skip


def test_a_recipe_prunes_by_block(half_doubled, tmp_path):
    recipes = {"mine": Recipe(Decomposition("two_sided"), "fisher", storage="auto", prune=WidthPruning(by_block=True))}
    rows = compare(Base(half_doubled), methods=["mine"], keep=[0.7], recipes=recipes, run=tmp_path / "run", **COMPARED)
    assert 0.68 < next(row for row in rows if row["method"] == "mine")["keep"]["targeted"] <= 0.7


# -- comparisons ---------------------------------------------------------------------------------------------------

NAMES = ("fisher+pivoted", "fisher+pivoted+prune", "rescaled+prune+refit")


@pytest.fixture(scope="module")
def compared(doubled, tmp_path_factory):
    """The rows by method of a comparison of pruned and whole bases, and its folder."""
    folder = tmp_path_factory.mktemp("compared")
    rows = compare(Base(doubled), methods=[*NAMES], keep=[0.6], run=folder, **COMPARED)
    return {row["method"]: row for row in rows}, folder


def plan_of(compared):
    return RankPlan.load(compared[1] / NAMES[1] / "keep-0.6" / "plan.json")


@pytest.mark.parametrize("name", NAMES)
def test_a_comparison_counts_the_base_that_was_named(compared, name):
    assert 0.58 < compared[0][name]["keep"]["targeted"] <= 0.6


def test_at_the_same_size_pruning_first_loses_less_where_neurons_are_copies(compared):
    plain, pruned, _ = (compared[0][name] for name in NAMES)
    assert pruned["bytes"] == pytest.approx(plain["bytes"], rel=0.01)
    assert pruned["excess"]["docs"] < plain["excess"]["docs"]


def test_a_comparison_notes_how_and_how_long_it_pruned(compared):
    plain, pruned, _ = (compared[0][name] for name in NAMES)
    assert pruned["seconds"]["narrowing"] > 0
    assert pruned["settings"]["prune"] == {"by_block": False, "share": None, "multiple_of": 8, "damping": 0.1}
    assert "prune" not in plain["settings"]


def test_the_plan_of_a_comparison_remembers_the_base_that_was_named(compared, doubled):
    plan = plan_of(compared)
    assert plan.left_out > 0
    assert plan.origin["narrowed"]["base"] == doubled


def test_another_comparison_finds_the_pruned_base(compared, doubled, tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank_pl.methods.prune.base.apply_pruning", lambda *_, **__: pytest.fail("pruned again"))
    again = compare(Base(doubled), methods=[NAMES[1]], keep=[0.6], run=tmp_path, **COMPARED)
    assert {row["method"]: row["nats"] for row in again}[NAMES[1]] == compared[0][NAMES[1]]["nats"]


def test_a_pruned_base_is_one_to_compare_on(compared, tmp_path):
    plan = plan_of(compared)
    rows = compare(Base(plan.origin["base"]), methods=[NAMES[0]], keep=[0.6], run=tmp_path, **COMPARED)
    by_name = {row["method"]: row for row in rows}
    # The dense row says what it has of the base before.
    assert by_name["dense"]["keep"]["targeted"] == pytest.approx(plan.dense().keep_targeted)
    assert by_name["dense"]["keep"]["model"] == pytest.approx(plan.dense().keep_model)
    assert by_name[NAMES[0]]["ranks"] == compared[0][NAMES[1]]["ranks"]


# -- learning ------------------------------------------------------------------------------------------------------

FIT = """
    --trainer.max_steps 3 --trainer.accelerator cpu --seed_everything 0
    --model.keep 0.6 --model.decomposition.kind two_sided --model.prune.multiple_of 4
    --data.learning.text python-docs::part=0%-5% --data.learning.length 32 --data.learning.sequences 8
    --data.validation.sequences 2 --finish.baselines [fisher]
"""
SCORED = "--text python-docs::part=50%-60% --length 32 --sequences 4"


@pytest.fixture(scope="module", params=["ARA by one width", "LLRC by block"])
def fitted(request, doubled, tmp_path_factory):
    """The folder of a run that prunes before it learns, whether by block, and its plan."""
    folder, mask, by_block = tmp_path_factory.mktemp("run"), request.param.split()[0], "block" in request.param
    words = ["--model.base.name", doubled, "--model.mask", f"lowrank_pl.methods.masks.{mask}"]
    words += ["--model.prune.by_block", str(by_block).lower(), "--finish.prompts", "[A list]"]
    main(["fit", "--run", str(folder), *words, *FIT.split()])
    return folder, by_block, RankPlan.load(folder / "plan.json")


# TensorBoard's writer is closed by the garbage collector.
unclosed = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@unclosed
def test_a_run_scores_the_base_before_and_after_pruning(fitted):
    folder, _, plan = fitted
    summary = json.loads((folder / "summary.json").read_text())
    rows = {name: row for name, row in summary.items() if name != "facts"}
    assert list(rows) == ["dense", "pruned", "fisher", "learned"]
    assert rows["dense"]["kept_targeted"] == 1.0
    assert rows["pruned"]["kept_targeted"] == plan.dense().keep_targeted < 1
    assert rows["pruned"]["bytes"] == plan.dense().bytes
    for name in ("fisher", "learned"):
        assert 0.56 < rows[name]["kept_targeted"] <= 0.6
    assert summary["facts"]["seconds"]["narrowing"] > 0


@unclosed
def test_the_export_of_a_run_has_as_many_parameters_as_its_plan_says(fitted):
    folder, _, plan = fitted
    assert load_compressed(folder / "model").num_parameters() == plan.kept_model_parameters - indices_of_pivots(plan)


@unclosed
def test_card_and_page_of_a_run_say_what_was_pruned(fitted, doubled):
    folder, by_block, plan = fitted
    card, page = (folder / "model" / "README.md").read_text(), (folder / "report.html").read_text()
    assert f"`{doubled}` compressed with" in card
    assert "of 96 hidden neurons remain in each" in card
    assert "by pruning hidden neurons" in page
    assert (" to " in plan.origin["narrowed"]["left"]) == by_block


@unclosed
def test_evaluate_scores_the_plan_of_a_run_beside_the_base_that_was_named(fitted, doubled, tmp_path):
    main(["evaluate-plan", str(fitted[0] / "plan.json"), *SCORED.split(), "--json", str(tmp_path / "plan.json")])
    main(["evaluate", doubled, *SCORED.split(), "--json", str(tmp_path / "dense.json")])
    scores, dense = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plan", "dense"))
    assert scores["base"] == doubled
    assert scores["dense"]["perplexity"] == dense["perplexity"]


# -- LLM-Pruner ----------------------------------------------------------------------------------------------------

WORDS = "--method llm_pruner --keep 0.7 --llm_pruner.skip_first 1 --llm_pruner.skip_last 0"
TEXT_WORDS = "--text python-docs::part=0%-5% --length 32 --sequences 8"
PRUNED = LLMPruner(skip_first=1, skip_last=0)


@pytest.fixture(scope="module")
def structured(tmp_path_factory):
    """The folder of a model pruned by LLM-Pruner, its figures, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("structured"), StringIO()
    with redirect_stdout(printed):
        words = ["--output", str(folder / "pruned"), "--json", str(folder / "f.json"), *TEXT_WORDS.split()]
        main(["prune", "random:llama", *WORDS.split(), *words])
    return folder / "pruned", json.loads((folder / "f.json").read_text()), printed.getvalue()


def test_llm_pruner_reports_what_the_reloaded_model_has(structured):
    folder, figures, printed = structured
    model, dense = load_base(str(folder)), load_base("random:llama")
    targeted = {"dense": targeted_parameters(find_targets(dense)), "kept": targeted_parameters(find_targets(model))}
    assert figures["parameters"] == {
        "targeted": targeted,
        "model": {"dense": dense.num_parameters(), "kept": model.num_parameters()},
    }
    assert 0.695 < targeted["kept"] / targeted["dense"] <= 0.7
    assert (figures["heads"], figures["width"]["after"][0]) == ({"before": 2, "after": [2, 1]}, 96)
    assert model.model.layers[1].mlp.up_proj.out_features == figures["width"]["after"][1]
    assert "1 to 2 of 2 key/value heads in each attention module: 69." in printed


def test_the_card_of_llm_pruner_says_that_nothing_compensates(structured):
    card = (structured[0] / "README.md").read_text()
    assert "1 to 2 of 2 key/value heads" in card
    assert "nothing was fine-tuned. It loads with `import lowrank_pl`" in card
    assert healthy(structured[0])


def test_ranks_are_allocated_on_top_of_llm_pruner(structured, tmp_path):
    plan = allocate(Base(str(structured[0])), keep=0.6, output=tmp_path / "plan.json", calibration=TEXT)
    assert plan.targeted_parameters == structured[1]["parameters"]["targeted"]["dense"]
    assert 0.58 < plan.keep_targeted <= 0.6
    assert any("pruned by llm_pruner to" in note and "69.9 % of the targeted" in note for note in plan.notes)
    small = export(tmp_path / "plan.json", output=tmp_path / "small")
    assert load_compressed(small).num_parameters() == plan.kept_model_parameters - indices_of_pivots(plan)
    assert "pruned by `llm_pruner` to" in (small / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method llm_pruner", "prunes to the size that keep says: give --keep"),
        ("--method llm_pruner --keep 1.2", r"keep is 1\.2: expected a fraction"),
        ("--method llm_pruner --keep 0.8 --llm_pruner.keep 0.9", r"no --llm_pruner\.keep"),
        ("--method llm_pruner --keep 0.8 --share 0.5", "settings of --method width"),
        ("--keep 0.8 --llm_pruner.mlp false", "add --method llm_pruner"),
        ("--method llm_pruner --keep 0.8", "leave none of the 2 blocks"),
        ("--share 0.5 --constraints.storage factored", r"constraints\.storage .*: expected exclude, include"),
        (
            "--keep 0.8 --constraints.drop_experts true",
            r"drop_experts .*: expected exclude, floors, include",
        ),
        ("--keep 0.8 --constraints.include * embeddings", "include has embeddings"),
    ],
)
def test_words_that_do_not_go_together(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["prune", "random:llama", *words.split(), *TEXT_WORDS.split(), "--output", str(tmp_path / "pruned")])
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "pruned").exists()


def test_a_comparison_scores_what_llm_pruner_leaves_beside_ranks(tmp_path):
    recipes = {
        "pruned": Recipe(prune=PRUNED),
        "ranks": Recipe(Decomposition("two_sided"), "fisher", prune=replace(PRUNED, keep=0.9)),
    }
    names = ["uniform", *recipes]
    rows = compare(Base("random:llama"), methods=names, keep=[0.7], recipes=recipes, run=tmp_path / "run", **COMPARED)
    by_name = {row["method"]: row for row in rows}
    for name in names:
        assert 0.68 < by_name[name]["keep"]["targeted"] <= 0.7
    row = by_name["pruned"]
    assert row["settings"] == {"prune": PRUNED.describe()}
    assert set(row["ranks"].values()) == {None}
    assert row["parameters"] < by_name["dense"]["parameters"]
    assert row["bytes"] == 4 * row["parameters"]
    assert row["excess"]["docs"] == row["nats"]["docs"] - by_name["dense"]["nats"]["docs"]
