"""The work that commands name, and their dry runs, which load and write nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl.cli.app import main
from lowrank_pl.cli.decompose import decompose
from lowrank_pl.cli.trainer_cli import ForecastingCLI
from lowrank_pl.cli.workloads import compare_workload, decompose_workload, fit_workload
from lowrank_pl.costs.machine import Machine
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.recipes import recipe
from lowrank_pl.methods.refit.settings import Joint
from lowrank_pl.models.base import Base
from lowrank_pl.text.sequences import Calibration
from lowrank_pl.training.data import CalibrationData, ValidationText
from lowrank_pl.training.finish_run import FinishRun
from lowrank_pl.training.module import RankLearner
from tests.helpers import SMOKE
from tests.helpers.commands import failing

TRAINER = {
    "max_steps": -1, "max_epochs": None, "limit_train_batches": None, "accumulate_grad_batches": 1,
    "val_check_interval": None, "check_val_every_n_epoch": 1, "limit_val_batches": None,
}  # fmt: skip
ONE = Machine()
CALIBRATION = Calibration(length=32, sequences=2)


@pytest.fixture
def nothing_loaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was loaded")

    monkeypatch.setattr("lowrank_pl.models.base.load_base", refuse)
    monkeypatch.setattr("lowrank_pl.models.base.load_tokenizer", refuse)


def fit_work(*, base="random:llama", validation=0, machine=ONE, baselines=(), **trainer):
    data = CalibrationData(Calibration(length=64, sequences=8), base, validation=ValidationText(sequences=validation))
    finish = FinishRun(baselines=baselines)
    return fit_workload(RankLearner(Base(base), keep=0.5), data, {**TRAINER, **trainer}, finish, machine)


def test_baselines_need_what_they_allocate_by():
    work = fit_work(baselines=["zs_svd"])
    assert work.preparation.weight_gradients
    assert work.scoring.models == 2
    assert not fit_work().preparation.weight_gradients


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({}, 8),
        ({"max_epochs": 3}, 24),
        ({"max_steps": 5}, 5),
        ({"max_steps": 200, "max_epochs": 2}, 16),
        ({"max_steps": 200, "max_epochs": -1}, 200),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 8),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 6),
    ],
)
def test_the_first_limit_ends_learning(limits, steps):
    assert fit_work(**limits).learners[0].steps == steps


@pytest.mark.parametrize(
    ("interval", "validations"),
    [
        ({}, 3),
        ({"val_check_interval": 6}, 3),
        ({"val_check_interval": 6, "check_val_every_n_epoch": None}, 4),
        ({"check_val_every_n_epoch": 2}, 1),
        ({"val_check_interval": 3, "max_steps": 14}, 4),
        ({"val_check_interval": 3, "accumulate_grad_batches": 3}, 6),
        ({"val_check_interval": "00:00:00:05"}, 0),
        ({"limit_val_batches": 0}, 0),
    ],
)
def test_validations_follow_the_trainers_interval(interval, validations):
    work = fit_work(validation=2, max_epochs=3, **interval)
    assert work.learners[0].validated == 2 * validations


@pytest.mark.parametrize(("base", "shares"), [("shapes:llama-3.2-1b", True), ("random:llama", False)])
def test_a_sharded_base_in_files_is_read_in_shares(base, shares):
    work = fit_work(base=base, machine=Machine("cuda", 8, sharded=True, here=False))
    assert work.reads_shares == work.preparation.by_block == shares


@pytest.mark.parametrize(
    ("settings", "base", "by_block"),
    [
        (Decomposition(), "shapes:llama-3.2-1b", True),
        (Decomposition("two_sided", at_keep=0.5), "shapes:llama-3.2-1b", False),
        (Decomposition(), "random:llama", False),
    ],
)
def test_factors_are_made_by_block_where_the_base_and_the_kind_allow_it(settings, base, by_block):
    assert decompose_workload(base, settings, CALIBRATION).preparation.by_block == by_block


def compared(names, **settings):
    settings = {"keeps": [0.5], "texts": ["t"], "score_length": 32, "score_sequences": {"t": 2}} | settings
    return compare_workload({name: recipe(name) for name in names}, calibration=CALIBRATION, **settings)


def test_compared_methods_share_what_is_pruned_alike():
    assert len(compared(["best+prune", "fisher+prune"]).preparation.prunings) == 1
    assert compared(["best"]).preparation.prunings == ()


def test_joint_refits_are_counted():
    work = compared(["fisher+refit", "fisher+joint"], keeps=[0.5, 0.7])
    assert (work.refits.count, work.refits.joint_passes) == (4, 2 * Joint().passes)


@pytest.mark.parametrize(("limits", "tokens"), [({"t": 2}, 64), ({}, 0)])
def test_a_text_that_is_scored_whole_has_no_known_length(limits, tokens):
    assert compared(["uniform"], score_sequences=limits).scoring.tokens == tokens


# -- dry runs ------------------------------------------------------------------------------------------------------


def test_a_dry_run_of_fit_loads_and_writes_nothing(tmp_path, nothing_loaded, capsys):
    run, figures = tmp_path / "run", tmp_path / "needs.json"
    main(["fit", "-c", SMOKE, "--run", str(run), "--json", str(figures), "--dry_run"])
    assert "measured here" in capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found["phases"][0]["name"] == "load"
    assert found["total"]["seconds"] > 0
    assert not run.exists()


def test_a_dry_run_for_gpus_that_are_not_here_tells_no_time(nothing_loaded, capsys):
    fsdp = str(Path(SMOKE).parent / "strategy" / "fsdp.yaml")
    main([
        "fit", "-c", SMOKE, "-c", fsdp, "--model.base.name", "shapes:llama-3.2-1b", "--trainer.accelerator", "cuda",
        "--trainer.devices", "99", "--dry_run",
    ])  # fmt: skip
    told = capsys.readouterr().out
    assert "99 processes, one a GPU, weights sharded" in told
    assert "time" not in told


@pytest.mark.parametrize(("words", "dry"), [("", True), ("true", True), ("false", False)])
def test_a_dry_run_is_asked_for_with_or_without_a_value(monkeypatch, words, dry):
    monkeypatch.setattr(ForecastingCLI, "instantiate_classes", lambda cli: sys.exit(str(cli.setting("dry_run"))))
    with pytest.raises(SystemExit, match=str(dry)):
        main(["fit", "-c", SMOKE, "--dry_run", *words.split(), "--model.keep", "0.5"])


def test_a_dry_run_of_compare_names_every_phase(tmp_path, nothing_loaded, capsys):
    main([
        "compare", "random:llama", "--methods", "uniform", "best", "--scores", "t=x.txt", "--score_sequences", "{t: 2}",
        "--score_length", "32", "--run", str(tmp_path / "run"), "--dry-run",
    ])  # fmt: skip
    told = capsys.readouterr().out
    for name in ("moments of inputs", "weighted moments", "learning best", "gradient norms", "refit", "scoring"):
        assert name in told
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_decompose_makes_nothing(tmp_path, nothing_loaded, capsys):
    assert decompose(Base("shapes:llama-3.2-1b"), device="cuda:99", store=tmp_path / "store", dry_run=True) is None
    assert "weights of a block" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


def test_a_dry_run_of_decompose_takes_the_place_of_hidden_states():
    work = decompose_workload("shapes:llama-3.2-1b", Decomposition(), CALIBRATION, cache="disk")
    assert work.preparation.cache == "disk"


def test_fit_does_the_multiply_adds_of_its_dry_run(tmp_path, monkeypatch):
    # A dry run takes nothing off for what a cache holds.
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))
    words = ["fit", "-c", SMOKE, "--run", str(tmp_path / "run"), "--model.decomposition.kind", "two_sided"]
    words += ["--trainer.max_steps", "4", "--data.learning.sequences", "4", "--finish.score.sequences", "8"]
    words += ["--finish.prompts", "[]", "--finish.baselines", "[]"]
    main([*words, "--json", str(tmp_path / "needs.json"), "--dry_run"])
    told = {phase["name"]: phase["work"] for phase in json.loads((tmp_path / "needs.json").read_text())["phases"]}
    with FlopCounterMode(display=False) as counter:
        main(words)
    # One of the two models is scored in another process.
    told["scoring"]["model"] /= 2
    expected = sum(work.get(kind, 0) for work in told.values() for kind in ("model", "float32", "float64"))
    assert counter.get_total_flops() / 2 == pytest.approx(expected, rel=0.1)


HEAL = "heal -c heal --data.learning.text python-docs --data.learning.length 32 --data.learning.sequences 20"
QUICK = f"{HEAL} --data.validation.sequences 3 --trainer.accelerator cpu --model.settings.tokens 640".split()


@pytest.mark.parametrize("train", ["factors", "lora"])
def test_healing_does_the_multiply_adds_of_its_dry_run(train, plan_file, tmp_path):
    words = [*QUICK, "--model.plan", str(plan_file), "--run", str(tmp_path / "run"), "--model.settings.train", train]
    main([*words, "--json", str(tmp_path / "needs.json"), "--dry_run"])
    told = {phase["name"]: phase["work"] for phase in json.loads((tmp_path / "needs.json").read_text())["phases"]}
    with FlopCounterMode(display=False) as counter:
        main(words)
    assert counter.get_total_flops() / 2 == pytest.approx(told["healing"]["model"], rel=0.1)


def test_a_dry_run_of_healing_loads_and_writes_nothing(plan_file, tmp_path, nothing_loaded, capsys):
    main([*QUICK, "--model.plan", str(plan_file), "--run", str(tmp_path / "run"), "--dry_run"])
    assert "what is trained, and optimizer" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_healing_refuses_what_the_run_refuses(plan_file, capsys):
    words = [*QUICK, "--model.plan", str(plan_file), "--dry_run"]
    assert "more tokens" in failing(capsys, *words, "--model.settings.tokens", "31")
    fsdp = str(Path(SMOKE).parent / "strategy" / "fsdp.yaml")
    assert "--trainer.strategy ddp" in failing(capsys, *words, "-c", fsdp)
