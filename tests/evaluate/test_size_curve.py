"""Perplexity against size: every nested size of a plan scored in memory, as a table, JSON and a picture."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from matplotlib._pylab_helpers import Gcf

from lowrank_pl import RankPlan, build_factors, find_targets, perplexity
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.cli import evaluate as scoring
from lowrank_pl.cli.allocate import allocate
from lowrank_pl.cli.app import main
from lowrank_pl.cli.evaluate import evaluate, evaluate_plan
from lowrank_pl.evaluate.likelihood import Score
from lowrank_pl.evaluate.size_curve import KEEPS, Curve, CurvePoint, curve_plot, curve_table, score_curve
from lowrank_pl.factors.compression import compress
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.base import Problem
from lowrank_pl.methods.quantize import Rounding, quantize
from lowrank_pl.models.base import Base
from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.plan import ModulePlan
from lowrank_pl.plans.resize import nested
from lowrank_pl.text.sequences import Calibration
from lowrank_pl.utils.json_files import unsealed

TEXT = "python-docs::part=0%-10%"


@pytest.fixture
def made(llama, sequences, tokenizer):
    targets = find_targets(llama)
    store = build_factors(Subject(llama, tokenizer, sequences, known_targets=targets))
    return make_allocator("uniform").plan(Problem(Constraints().budget(llama, targets, 0.5), store, targets)), store


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve")
    allocate(
        Base("random:llama"),
        method="uniform",
        keep=0.5,
        output=folder / "plan.json",
        store=folder / "store",
        calibration=Calibration(TEXT, 32, 8),
    )
    return folder / "plan.json"


def test_every_size_is_scored_as_the_compressed_model_is(llama, sequences, made):
    plan, store = made
    before = {name: type(module) for name, module in llama.named_modules()}
    curve = score_curve(llama, plan, list(nested(plan, [1.0, 0.7, 0.3]).values()), store, sequences[:3], batch_size=2)
    assert {name: type(module) for name, module in llama.named_modules()} == before
    dense = perplexity(tiny_model("llama"), sequences[:3])
    assert curve.dense.nats == pytest.approx(dense.nats, rel=1e-6)
    assert [point.plan.keep for point in curve.points] == [1.0, 0.7, 0.5, 0.3]
    assert [point.own for point in curve.points] == [False, False, True, False]
    assert curve.points[0].score is curve.dense, "all modules dense: not scored twice"
    for point in curve.points[1:]:
        score = perplexity(compress(tiny_model("llama"), point.plan, store), sequences[:3])
        assert point.score.nats == pytest.approx(score.nats, rel=1e-6)
        assert point.excess == pytest.approx(score.nats - dense.nats, rel=1e-3, abs=1e-6)


def test_a_plan_without_other_sizes_is_scored_as_it_is(llama, sequences, made):
    plan, store = made
    curve = score_curve(llama, replace(plan, order=None), [], store, sequences[:1])
    assert [(point.plan.keep, point.own) for point in curve.points] == [(0.5, True)]


def test_rounded_dense_modules_are_scored_as_they_are_rounded(llama, sequences, tokenizer, made):
    plan, store = made
    subject = Subject(llama, tokenizer, sequences)
    rounded, matrices = quantize(nested(plan, [1.0])[1.0], store, subject, settings=Rounding(bits=4))
    curve = score_curve(llama, rounded, [], matrices, sequences[:2])
    score = perplexity(compress(tiny_model("llama"), rounded, matrices), sequences[:2])
    assert curve.points[0].score.nats == pytest.approx(score.nats, rel=1e-6) != curve.dense.nats


def test_a_size_whose_logits_are_not_finite_is_named(llama, sequences, made, monkeypatch):
    plan, store = made
    good = store.factors

    def damaged(name, components=None):
        factors = good(name, components)
        return replace(factors, left=factors.left * 1e35)

    monkeypatch.setattr(store, "factors", damaged)
    with pytest.raises(ValueError, match=r"at keep 0\.5: the logits of sequence 0"):
        score_curve(llama, plan, [], store, sequences[:1])
    assert type(llama.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear, "put back all the same"


def curve_of(*figures, own=None):
    """A curve of one module of 100 x 100 with (rank, excess)."""
    points = []
    for rank, excess in figures:
        plan = RankPlan(
            method="hand", keep=rank / 50, modules={"a": ModulePlan((100, 100), rank)}, model_parameters=20_000
        )
        points.append(CurvePoint(plan, Score(20.0 + rank, 3.0 + excess, 10, 1.0), excess, rank == own))
    return Curve("hand", Score(20.0, 3.0, 10, 1.0), points)


def test_the_table():
    assert curve_table(curve_of((40, 0.05), (25, 0.61234), own=40)).splitlines() == [
        "keep asked      kept targeted    kept model    MB    perplexity    excess nats",
        "------------  ---------------  ------------  ----  ------------  -------------",
        "dense                100.00 %      100.00 %   0.1         20.00         0.0000",
        "0.8 *                 80.00 %       90.00 %   0.1         60.00         0.0500",
        "0.5                   50.00 %       75.00 %   0.1         45.00         0.6123",
        "* the plan's own size",
    ]
    assert "own size" not in curve_table(curve_of((25, 0.6)))


def test_the_picture():
    figure = curve_plot(curve_of((45, 0.01), (40, 0.05), (25, 0.6), own=40))
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    line, ring = axes.lines[:2]
    assert line.get_xdata().tolist() == [90.0, 80.0, 50.0]
    assert line.get_ydata().tolist() == [0.01, 0.05, 0.6]
    assert (ring.get_xdata().tolist(), ring.get_ydata().tolist()) == ([80.0], [0.05])
    assert [text.get_text() for text in axes.texts] == ["65.00", "60.00", "45.00"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["the plan's own size"]
    assert Gcf.figs == {}
    figure.savefig(BytesIO())


@pytest.mark.parametrize("figures", [[(45, -0.01), (25, 0.6)], [(25, 0.0)], []])
def test_a_logarithm_is_taken_only_of_what_has_one(figures):
    figure = curve_plot(curve_of(*figures))
    assert figure.axes[0].get_yscale() == "linear"
    assert figure.axes[0].get_legend() is None
    figure.savefig(BytesIO())


def test_evaluate_draws_the_curve_of_a_plan(plan_file, tmp_path, capsys):
    figures = evaluate_plan(plan_file, text=TEXT, length=32, sequences=2, keep_curve=[], json=tmp_path / "curve.json")
    assert unsealed(json.loads((tmp_path / "curve.json").read_text())) == figures
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [size["keep"]["asked"] for size in figures["sizes"]] == list(KEEPS)
    assert [size["own"] for size in figures["sizes"]] == [False] * 5 + [True]
    assert figures["sizes"][0]["excess"] == 0.0
    assert figures["dense"]["perplexity"] == evaluate("random:llama", text=TEXT, length=32, sequences=2)["perplexity"]
    assert (figures["base"], figures["method"], figures["windows"]) == ("random:llama", "uniform", 2)
    shown = capsys.readouterr().out
    assert f"\npicture  {tmp_path / 'curve.png'}" in shown
    assert "\n0.5 * " in shown


@pytest.mark.parametrize("flag", ["--keep-curve", "--keep_curve"])
def test_the_command_line_of_a_curve(plan_file, tmp_path, capsys, flag):
    words = ["evaluate-plan", str(plan_file), "--text", TEXT, "--length", "32", "--sequences", "1"]
    main([*words, flag, "0.9", "0.6", "--output", str(tmp_path / "picture.png")])
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[2:6]] == ["dense", "0.9", "0.6", "0.5"]
    assert (tmp_path / "picture.png").exists()
    main([*words, flag])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + len(KEEPS) + 1
    main(words)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["dense", "0.5"]


def test_an_impossible_size_is_refused(plan_file):
    with pytest.raises(ValueError, match=r"keep is 2.0: expected"):
        evaluate_plan(plan_file, text=TEXT, length=32, sequences=1, keep_curve=[0.5, 2.0])


def test_a_plan_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"no plan at none.json"):
        evaluate_plan(Path("none.json"), text=TEXT, length=32, sequences=1)


def test_a_plan_without_an_order_has_no_curve(plan_file, tmp_path):
    data = json.loads(plan_file.read_text())
    del data["order"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"no component order.*: .*`lowrank allocate`"):
        evaluate_plan(tmp_path / "plan.json", text=TEXT, length=32, sequences=1, keep_curve=[])
    assert len(evaluate_plan(tmp_path / "plan.json", text=TEXT, length=32, sequences=1)["sizes"]) == 1


def test_the_curve_of_a_corrected_plan_ends_at_its_own_size(tmp_path, caplog, capsys):
    words = ["--text", TEXT, "--length", "32"]
    method = ["--method", "zs_svd", "--settings.rounds", "1", "--keep", "0.65", "--store", str(tmp_path / "store")]
    output = ["--output", str(tmp_path / "plan.json")]
    main(["allocate", "random:llama", *method, *words, "--sequences", "4", *output])
    with caplog.at_level("INFO", logger="lowrank_pl.cli.evaluate"):
        figures = evaluate_plan(tmp_path / "plan.json", text=TEXT, length=32, sequences=1, keep_curve=[])
    assert [size["keep"]["asked"] for size in figures["sizes"]] == [0.65, 0.6, 0.5]
    assert "the weights were changed for keep 0.65: the curve has no larger sizes" in caplog.text
    capsys.readouterr()
    command = ["evaluate-plan", str(tmp_path / "plan.json"), *words, "--sequences", "1"]
    with pytest.raises(SystemExit):
        main([*command, "--keep-curve", "0.8", "0.6"])
    assert re.search("keep is 0.8, .* keep 0.65: .*lowrank allocate", capsys.readouterr().err)


def test_a_corrected_plan_below_the_usual_sizes_is_scored_at_its_own(plan_file):
    plan = replace(RankPlan.load(plan_file), keep=0.45, fingerprint={"correction": {"keep": 0.45}})
    assert [size.keep for size in scoring._sizes(plan, [])] == [0.45]
