"""The command ``lowrank``: flags, help, figures, and one clear sentence for every mistake."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.accelerators import CPUAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lowrank_pl import RankPlan
from lowrank_pl.cli.main import CHATTER, FUNCTIONS, RankCLI, main, usage
from tests.helpers import ROOT

SMOKE = str(ROOT / "configs" / "smoke.yaml")
ROWS = {"dense", "uniform", "learned"}
FIGURES = {"perplexity", "excess_nats", "kept_targeted", "kept_model", "bytes", "seconds"}

# The writer of TensorBoard is closed by the garbage collector when a run ends in an error.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def _logging_as_before():
    levels = {name: logging.getLogger(name).level for name in ("httpx", "lowrank_pl.plans.budget")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).filters.clear()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run by the shipped configuration, through the installed program."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    words = [
        "fit",
        "-c",
        SMOKE,
        "--run",
        str(folder),
        "--json",
        str(folder / "figures.json"),
        "--trainer.max_steps",
        "8",
    ]
    words += ["--trainer.val_check_interval", "4", "--checkpoint.every_n_train_steps", "4"]
    ended = subprocess.run([sys.executable, "-m", "lowrank_pl", *words], capture_output=True, text=True, check=True)
    return folder, ended


def failing(capsys, *words, status=1):
    """Run a command that must fail; return its one sentence."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == status
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "usage:" not in shown.err
    said = [line for line in shown.err.splitlines() if line.startswith("lowrank: ")]
    assert len(said) == 1
    assert shown.err.splitlines()[-1] == said[0]
    return said[0].removeprefix("lowrank: error: ")


def failing_fit(capsys, tmp_path, *words, status=1):
    """Run a fit that must fail and leave no result."""
    said = failing(capsys, "fit", "-c", SMOKE, "--run", tmp_path / "run", *words, status=status)
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    # What was asked for is written whole before the work begins.
    assert {name for name in left if not name.startswith("events.out.tfevents")} <= {"config.yaml", "hparams.yaml"}
    return said


# -- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(capsys, words):
    main(words)
    shown = capsys.readouterr().out
    assert shown == usage() + "\n"
    for name in ("fit", *FUNCTIONS):
        assert f"\n  {name} " in shown


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fit", ["--model.keep KEEP", "Fraction of the targeted parameters to keep", "--run RUN", "--ckpt_path"]),
        (
            "fit",
            [
                "--data.validation.text",
                "--finish.score.text",
                "--checkpoint.every_n_train_steps",
                "--model.constraints.floors",
            ],
        ),
        ("fit", ["--model.data_terms.divergence_kind", "How activations are compared", "--model.optimizer", "--json"]),
        ("evaluate", ["--model MODEL", "--text TEXT", "Windows per forward", "--json JSON"]),
        ("allocate", ["--decomposition.kind", "Every rank is a multiple of this", "--output", "--json JSON"]),
        ("export", ["--merge", "Write dense weights for runtimes that know no factors", "--json JSON"]),
        ("doctor", ["--directory DIRECTORY", "the one that the folder's plan names", "--prompts", "--json JSON"]),
        ("report", ["--run RUN", "Folder of `lowrank fit`, `export` or `compare`", "--output OUTPUT", "--scores"]),
        ("refit", ["--plan PLAN", "--settings.sequences", "--json JSON"]),
        ("prune", ["--base BASE", "--keep KEEP", "Fraction of the hidden features to keep instead", "--json JSON"]),
        ("bench", ["What to measure: step, statistics, decode, prefill", "--storage", "--repeats", "--json JSON"]),
    ],
)
def test_every_argument_is_a_flag_with_its_docstring(capsys, command, words):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for word in words:
        assert word in shown


def test_unsafe_loading_is_no_option(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "--weights_only" not in capsys.readouterr().out


# -- a run ---------------------------------------------------------------------------------------------------------


def test_a_runs_folder_and_figures(run):
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    assert {name for name in summary if name != "facts"} == ROWS
    assert all(set(summary[name]) == FIGURES for name in ROWS)
    assert json.loads((folder / "figures.json").read_text()) == summary
    names = {path.name for path in folder.iterdir()}
    expected = {"plan.json", "model", "summary.json", "rank_map.png", "config.yaml", "checkpoints", "tensorboard"}
    assert names == expected | {"figures.json", "report.html"}
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert RankPlan.load(folder / "plan.json").keep_targeted <= 0.5


def test_report_of_a_run(run, tmp_path, capsys):
    folder, _ = run
    scores = tmp_path / "a, b: c.json"
    scores.write_text(json.dumps({"results": {"piqa": {"acc,none": 0.625}}}))
    main(["report", str(folder), "--output", str(tmp_path / "page.html"), "--scores", str(scores)])
    assert f"page     {tmp_path / 'page.html'}" in capsys.readouterr().out
    learned = json.loads((folder / "summary.json").read_text())["learned"]["perplexity"]
    for text in ((folder / "report.html").read_text(), (tmp_path / "page.html").read_text()):
        assert f"<td>{learned:.2f}</td>" in text
        assert "the same logits" in text
        assert "Singular values of every weight" in text
    assert "0.625" in text
    assert "| piqa | acc | 0.625 |" in " ".join((folder / "model" / "README.md").read_text().split())
    assert "expected plan.json" in failing(capsys, "report", tmp_path)


def test_what_the_terminal_shows(run):
    folder, ended = run
    for row in ROWS:
        assert f"\n{row} " in ended.stdout
    assert f"model        {folder / 'model'}" in ended.stdout
    assert "8/8" in ended.stderr
    assert "val/excess=" in ended.stderr
    assert ended.stderr.count("wished ranks scaled by") == 1
    for noise in (*CHATTER, "Warning", "eval mode", "LeafSpec", "workers", "v_num", "args parameter", "not empty"):
        assert noise not in ended.stderr
    assert ended.stdout.count("Params") == 0


def test_config_yaml_repeats_the_run(run, tmp_path, capsys):
    folder, _ = run
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["base"] == "random:llama"
    assert config["trainer"]["max_steps"] == 8
    main(["fit", "-c", str(folder / "config.yaml"), "--run", str(tmp_path / "again"), "--finish.baselines", "[]"])
    first, again = (RankPlan.load(path / "plan.json") for path in (folder, tmp_path / "again"))
    assert again.modules == first.modules
    assert "learned" in capsys.readouterr().out


def test_allocate_export_evaluate(tmp_path, capsys):
    plan, model = tmp_path / "plan.json", tmp_path / "model"
    text = ["--text", "python-docs::part=0%-10%", "--length", "32", "--sequences", "4"]
    main(
        [
            "allocate",
            "--base",
            "random:llama",
            "--keep",
            "0.6",
            *text,
            "--output",
            str(plan),
            "--json",
            f"{plan}.figures",
        ]
    )
    assert json.loads(Path(f"{plan}.figures").read_text())["plan"] == str(plan)
    main(["export", "--plan", str(plan), "--output", str(model), "--json", str(tmp_path / "export.json")])
    assert json.loads((tmp_path / "export.json").read_text())["kept_targeted"] <= 0.6
    main(["evaluate", "--model", str(model), *text, "--json", str(tmp_path / "scores.json")])
    figures = json.loads((tmp_path / "scores.json").read_text())
    assert f" {figures['perplexity']:.4f} " in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--config={}", "-c={}", "--config {}", "-c {}"])
def test_a_command_reads_its_settings_from_yaml(tmp_path, capsys, flag):
    config = tmp_path / "evaluate.yaml"
    config.write_text("model: random:llama\ntext: python-docs\nlength: 16\nwindows: 2\n")
    main(["evaluate", *flag.format(config).split(), "--sequences", "3"])
    assert " 45 " in capsys.readouterr().out
    config.write_text("model: random:llama\ntxt: python-docs\n")
    assert "txt" in failing(capsys, "evaluate", "--config", config, status=2)


@pytest.mark.parametrize("command", sorted(FUNCTIONS))
def test_every_command_takes_c(command, tmp_path, capsys):
    config = tmp_path / "none.yaml"
    config.write_text("none: 1\n")
    assert "none" in failing(capsys, command, "-c", config, status=2)


def test_bench_writes_figures(tmp_path, capsys):
    main(
        ["bench", "--base", "random:llama", "--length", "16", "--repeats", "1", "--json", str(tmp_path / "bench.json")]
    )
    assert json.loads((tmp_path / "bench.json").read_text())["random:llama"]["step_seconds"] > 0
    assert "ratio_to_frozen" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["decode", "prefill"])
def test_bench_names_its_case_in_front(case, tmp_path, capsys):
    words = ["bench", case, "--base", "random:llama", "--length", "4", "--repeats", "1", "--keep", "0.8", "0.5"]
    words += ["--batch-size", "1", "2", "--dtype", "bfloat16", "--storage", "pivoted"]
    main([*words, "--json", str(tmp_path / "speed.json")])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["case"], row["dtype"], row["batch"], row["storage"], row["keep"]) for row in rows] == [
        (case, "bfloat16", batch, *kind)
        for batch in (1, 2)
        for kind in (("dense", 1.0), ("pivoted", 0.8), ("pivoted", 0.5))
    ]
    shown = capsys.readouterr()
    assert "of limit" in shown.out
    assert f"bench {case}: 100%" in shown.err


def test_bench_settings_from_yaml_and_unknown_cases(tmp_path, capsys):
    config = tmp_path / "bench.yaml"
    config.write_text(
        "case: decode\nbase: random:llama\nkeep: 0.5\nlength: 4\nrepeats: 1\nbatch_size: 1\ndtype: float32\n"
    )
    main(["bench", "-c", str(config)])
    assert capsys.readouterr().out.count("50.0 %") == 2
    assert "decod" in failing(capsys, "bench", "decod", status=2)
    assert "unrecognized arguments: more" in failing(capsys, "bench", "decode", "more", status=2)


def test_the_smoke_configuration_of_a_callback_by_name(tmp_path, capsys):
    words = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/excess"]
    words += ["--trainer.callbacks.min_delta", "100", "--trainer.callbacks.patience", "1"]
    words += [
        "--trainer.max_epochs",
        "4",
        "--data.learning.sequences",
        "4",
        "--trainer.max_steps",
        "-1",
        "--finish.baselines",
        "[]",
    ]
    main(["fit", "-c", SMOKE, "--run", str(tmp_path / "run"), *words])
    assert "8/16" in capsys.readouterr().err


# -- mistakes ------------------------------------------------------------------------------------------------------


def test_words_that_mean_nothing(capsys, tmp_path):
    said = failing(capsys, "fitt", status=2)
    known = "fit, evaluate, decompose, allocate, refit, narrow, export, doctor, report, compare, bench"
    assert said == f"there is no command 'fitt': expected one of {known}"
    assert "--model.kep" in failing_fit(capsys, tmp_path, "--model.kep", "0.5", status=2)
    assert "File does not exist" in failing(capsys, "fit", "-c", "none.yaml", status=2)
    assert "`lowrank evaluate --help` lists" in failing(capsys, "evaluate", "--length", "many", status=2)
    assert "model.base" in failing(capsys, "fit", "--run", tmp_path, status=2)
    config = tmp_path / "typo.yaml"
    config.write_text("model:\n  base: random:llama\n  keeep: 0.5\n")
    assert "keeep" in failing(capsys, "fit", "-c", config, status=2)


@pytest.mark.parametrize("keep", ["0", "1.5", "-0.1"])
def test_an_impossible_keep(capsys, tmp_path, keep):
    said = failing_fit(capsys, tmp_path, "--model.keep", keep)
    assert said == f"keep is {float(keep)}: expected the fraction of parameters to keep, above 0 and at most 1"
    with pytest.raises(SystemExit):
        main(["allocate", "--base", "random:llama", "--keep", keep, "--output", str(tmp_path / "plan.json")])
    assert "expected the fraction of parameters to keep" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def test_an_unknown_model(capsys, tmp_path):
    assert "unknown family; expected one of llama" in failing_fit(capsys, tmp_path, "--model.base.name", "random:lama")
    assert "no such file or folder" in failing(capsys, "evaluate", "--model", "./none", "--text", "python-docs")
    assert "no/such-model" in failing_fit(capsys, tmp_path, "--model.base.name", "no/such-model")


def test_unfit_texts(capsys, tmp_path):
    text = tmp_path / "text.txt"
    assert f"text '{text}'" in failing_fit(capsys, tmp_path, "--data.learning.text", text)
    text.write_text("")
    assert f"text '{text}' is empty" in failing_fit(capsys, tmp_path, "--data.learning.text", text)
    text.write_text("short")
    assert "has 5 tokens, but one sequence needs 64" in failing_fit(capsys, tmp_path, "--data.learning.text", text)
    assert "has 5 tokens, but one sequence needs 64" in failing_fit(capsys, tmp_path, "--finish.score.text", text)
    text.write_bytes(b"\xff\xfe\xfa" * 100)
    assert str(text) in failing(capsys, "evaluate", "--model", "random:llama", "--text", text)


def test_impossible_floors(capsys, tmp_path):
    said = failing_fit(capsys, tmp_path, "--model.constraints.floors", '{"*": 0.9}')
    assert "keep 0.5 allows" in said
    assert "raise keep or lower them" in said
    said = failing_fit(capsys, tmp_path, "--model.constraints.floors", '{"*.none": 0.9}')
    assert said == "the floor pattern '*.none' matches none of the 14 modules"


def test_a_store_of_another_model(capsys, tmp_path):
    words = [
        "--length",
        "16",
        "--sequences",
        "4",
        "--output",
        str(tmp_path / "plan.json"),
        "--store",
        str(tmp_path / "store"),
    ]
    main(["allocate", "--base", "random:qwen2", *words])
    said = failing_fit(capsys, tmp_path, "--model.store", tmp_path / "store")
    assert f"the factors store at {tmp_path / 'store'} was made from something else" in said


def test_checkpoints_that_do_not_fit(capsys, tmp_path, run):
    last = run[0] / "checkpoints" / "last.ckpt"
    said = failing_fit(capsys, tmp_path, "--ckpt_path", last, "--model.base.name", "random:qwen2")
    assert "the checkpoint does not fit this run: factors is" in said
    said = failing_fit(capsys, tmp_path, "--ckpt_path", last, "--model.mask.init_args.steps", "50")
    assert "14 of 14 masks differ" in said
    said = failing_fit(capsys, tmp_path, "--ckpt_path", last, "--model.keep", "0.7")
    assert "the checkpoint does not fit this run: keep is 0.5 there and 0.7 here" in said
    assert "learning from other data" in failing_fit(capsys, tmp_path, "--ckpt_path", last, "--data.seed", "9")
    assert "no checkpoint at" in failing_fit(capsys, tmp_path, "--ckpt_path", tmp_path / "none.ckpt")
    assert "README.md is damaged or no checkpoint" in failing_fit(capsys, tmp_path, "--ckpt_path", ROOT / "README.md")
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"keep": 0.9}, "loops": {}}, foreign)
    said = failing_fit(capsys, tmp_path, "--ckpt_path", foreign)
    assert said == "the checkpoint was not written by this version of lowrank_pl: expected one that was"


def test_other_mistakes_of_users(capsys, tmp_path):
    assert "casts the masks too" in failing_fit(capsys, tmp_path, "--trainer.precision", "bf16-true")
    said = failing_fit(capsys, tmp_path, "--finish.baselines", "uniform", "fisher")
    assert said == (
        "the baseline fisher can't be drawn beside what is learned: the allocator fisher was given factors of the kind "
        "'whitened': expected two_sided (decomposition.kind)"
    )
    assert "no allocator is called 'best'" in failing_fit(capsys, tmp_path, "--finish.baselines", "[best]")
    assert "no allocator is called 'best'" in failing_fit(capsys, tmp_path, "--finish.baselines", "best")
    assert "no plan at" in failing_fit(capsys, tmp_path, "--model.start.plan", tmp_path / "none.json")
    assert "the weights of the data terms" in failing_fit(capsys, tmp_path, "--model.data_terms.cross_entropy", "0")
    assert "no plan at" in failing(capsys, "export", "--plan", tmp_path / "none.json")
    if not torch.cuda.is_available():
        assert "gpu" in failing_fit(capsys, tmp_path, "--trainer.accelerator", "gpu").lower()


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Makes what ``lowrank fit`` would run, and runs nothing."""
    monkeypatch.setattr(RankCLI, "_run_subcommand", lambda *_: None)
    return lambda *words: RankCLI(["fit", "-c", str(SMOKE), "--run", str(tmp_path / "run"), *words])


@pytest.mark.parametrize(
    ("words", "limits"),
    [([], (1, -1)), (["--trainer.max_steps", "7"], (-1, 7)), (["--trainer.max_epochs", "3"], (3, -1))],
)
def test_one_epoch_is_the_end_where_there_is_no_other(tmp_path, monkeypatch, words, limits):
    monkeypatch.setattr(RankCLI, "_run_subcommand", lambda *_: None)
    given = ["--model.base.name", "random:llama", "--data.learning.text", "python-docs", "--model.keep", "0.5"]
    trainer = RankCLI(["fit", "--run", str(tmp_path), "--trainer.accelerator", "cpu", *given, *words]).trainer
    assert (trainer.max_epochs, trainer.max_steps) == limits


def test_processes_wait_for_the_first_one_whatever_the_strategy_is(built):
    trainer = built("--trainer.accelerator", "cpu", "--trainer.devices", "2").trainer
    assert type(trainer.strategy) is DDPStrategy
    assert trainer.strategy._timeout == timedelta(hours=12)
    words = ["-c", str(ROOT / "configs" / "strategy" / "ddp.yaml"), "--trainer.strategy.init_args.timeout", "0:05:00"]
    assert built("--trainer.accelerator", "cpu", "--trainer.devices", "2", *words).trainer.strategy._timeout == (
        timedelta(minutes=5)
    )


@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_apples_gpus_are_not_chosen(built, monkeypatch, caplog):
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    assert type(built("--trainer.accelerator", "auto").trainer.accelerator) is CPUAccelerator
    assert "running on the CPU: Apple's GPUs lack float64" in caplog.text


@pytest.mark.parametrize(
    ("written", "given", "advice"),
    [
        ("run/checkpoints/last.ckpt", None, "go on with --ckpt_path run/checkpoints/last.ckpt"),
        ("", "old/last.ckpt", "go on with --ckpt_path old/last.ckpt"),
        ("", None, "there is no checkpoint of this run yet"),
    ],
)
def test_an_interrupted_run_names_its_own_checkpoint(tmp_path, written, given, advice):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("of another run")
    saving = ModelCheckpoint(tmp_path / "checkpoints")
    saving.last_model_path = written

    def interrupted(*_, **__):
        raise SystemExit

    trainer = SimpleNamespace(
        interrupted=True, fit=interrupted, checkpoint_callbacks=[saving], default_root_dir=tmp_path
    )
    with pytest.raises(KeyboardInterrupt, match=f"^{advice}$"):
        RankCLI.fit(SimpleNamespace(trainer=trainer), None, ckpt_path=given)


def test_a_full_disk(capsys, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    main(["evaluate", "--model", "random:llama", "--text", "python-docs", "--length", "16", "--sequences", "2"])
    capsys.readouterr()
    monkeypatch.setattr("os.fsync", full)
    said = failing(
        capsys, "evaluate", "--model", "random:llama", "--text", "python-docs", "--length", "16", "--sequences", "2",
        "--json", tmp_path / "scores.json",
    )  # fmt: skip
    assert "No space left on device" in said
    assert [*tmp_path.iterdir()] == []
    assert "No space left on device" in failing_fit(capsys, tmp_path)


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("LOWRANK_DEBUG", "1")
    with pytest.raises(ValueError, match="no plan at"):
        main(["export", "--plan", "none.json"])


def test_only_expected_warnings_are_silenced():
    main([])
    with pytest.warns(UserWarning, match="something else"):
        warnings.warn("something else", UserWarning, stacklevel=1)
