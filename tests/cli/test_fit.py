"""``lowrank fit``: its words, a run's folder and figures, and one clear sentence for every mistake."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
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
from lowrank_pl.cli.app import UNWANTED_LINES, main
from lowrank_pl.cli.fit import RankCLI
from lowrank_pl.utils.files import LOCK, locked
from tests.helpers import ROOT, SMOKE
from tests.helpers.commands import failing

ROWS = {"dense", "uniform", "learned"}
FIGURES = {"perplexity", "excess_nats", "kept_targeted", "kept_model", "bytes", "seconds"}

# The writer of TensorBoard is closed by the garbage collector when a run ends in an error.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run by the shipped configuration, through the installed program."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    words = ["fit", "-c", "smoke", "--run", str(folder), "--json", str(folder / "figures.json")]
    words += ["--trainer.max_steps", "8", "--trainer.val_check_interval", "4", "--checkpoint.every_n_train_steps", "4"]
    words += ["--model.lr_scheduler", "cosine"]
    ended = subprocess.run([sys.executable, "-m", "lowrank_pl", *words], capture_output=True, text=True, check=True)
    return folder, ended


def failing_fit(capsys, tmp_path, *words, status=1):
    """Run a fit that must fail and leave no result."""
    message = failing(capsys, "fit", "-c", SMOKE, "--run", tmp_path / "run", *words, status=status)
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    # What was asked for is written whole before the work begins.
    assert {name for name in left if not name.startswith("events.out.tfevents")} <= {
        *("config.yaml", "hparams.yaml", LOCK)
    }
    return message


def test_a_run_that_goes_well_warns_of_nothing(run):
    _, ended = run
    assert [line for line in ended.stderr.splitlines() if "Warning" in line] == []


# -- help ----------------------------------------------------------------------------------------------------------


def fit_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "words",
    [
        ["--model.keep KEEP", "Fraction of the targeted parameters to keep", "--run RUN", "--ckpt_path"],
        [
            "--data.validation.text",
            "--finish.score.text",
            "--checkpoint.every_n_train_steps",
            "--model.constraints.floors",
        ],
        ["--model.data_terms.divergence_kind", "--model.optimizer", "--json", "--dry_run"],
    ],
)
def test_every_argument_is_a_flag_with_its_docstring(capsys, words):
    shown = fit_help(capsys)
    for word in words:
        assert word in shown


def test_unsafe_loading_is_no_option(capsys):
    assert "--weights_only" not in fit_help(capsys)


# -- a run ---------------------------------------------------------------------------------------------------------


def test_a_runs_folder_and_figures(run):
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    assert {name for name in summary if name != "facts"} == ROWS
    assert all(set(summary[name]) == FIGURES for name in ROWS)
    assert json.loads((folder / "figures.json").read_text()) == summary
    names = {path.name for path in folder.iterdir()}
    expected = {"plan.json", "model", "summary.json", "rank_map.png", "config.yaml", "checkpoints", "tensorboard"}
    assert names == expected | {"figures.json", "report.html", LOCK}
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
    assert ended.stderr.count("requested ranks scaled by") == 1
    noises = ("Warning", "eval mode", "LeafSpec", "workers", "v_num", "args parameter", "not empty")
    for noise in (*UNWANTED_LINES, *noises):
        assert noise not in ended.stderr
    assert ended.stdout.count("Params") == 0


def test_config_yaml_repeats_the_run(run, tmp_path, capsys):
    folder, _ = run
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["base"]["name"] == "random:llama"
    assert config["trainer"]["max_steps"] == 8
    main(["fit", "-c", str(folder / "config.yaml"), "--run", str(tmp_path / "again"), "--finish.baselines", "[]"])
    first, again = (RankPlan.load(path / "plan.json") for path in (folder, tmp_path / "again"))
    assert again.modules == first.modules
    assert "learned" in capsys.readouterr().out


def test_the_smoke_configuration_of_a_callback_by_name(tmp_path, capsys):
    words = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/excess"]
    words += ["--trainer.callbacks.min_delta", "100", "--trainer.callbacks.patience", "1"]
    words += ["--trainer.max_epochs", "4", "--data.learning.sequences", "4", "--trainer.max_steps", "-1"]
    words += ["--finish.baselines", "[]"]
    main(["fit", "-c", SMOKE, "--run", str(tmp_path / "run"), *words])
    assert "8/16" in capsys.readouterr().err


# -- mistakes ------------------------------------------------------------------------------------------------------


def test_words_that_mean_nothing(capsys, tmp_path):
    assert "--model.kep" in failing_fit(capsys, tmp_path, "--model.kep", "0.5", status=2)
    assert "none.yaml" in failing(capsys, "fit", "-c", "none.yaml", status=2)
    assert "model.base" in failing(capsys, "fit", "--run", tmp_path, status=2)


def test_an_unknown_key_of_a_file_is_an_error(capsys, tmp_path):
    config = tmp_path / "typo.yaml"
    config.write_text("model:\n  base: {name: random:llama}\n  keeep: 0.5\n")
    assert "keeep" in failing(capsys, "fit", "-c", config, status=2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--model.dtype bfloat16", "--model.base.dtype"),
        ("--model.cosine true", "--model.lr_scheduler, with the value cosine"),
        ("--model.start fisher", "--model.start.plan"),
        ("--model.narrow.by_block true", "--model.prune"),
        ("--data.windows 4", "--data.learning.sequences"),
        ("--model.mask lowrank_pl.masks.Staircase", "lowrank_pl.methods.masks.ARA"),
    ],
)
def test_an_old_flag_is_told_its_new_name(capsys, tmp_path, old, new):
    assert new in failing_fit(capsys, tmp_path, *old.split(), status=2)


def test_an_old_key_of_a_file_is_told_its_new_name(capsys, tmp_path):
    (tmp_path / "old.yaml").write_text("model: {base: random:llama}\ndata: {text: python-docs}\n")
    message = failing(capsys, "fit", "-c", tmp_path / "old.yaml", status=2)
    assert "model.base is model.base.name now" in message
    assert "data.text is data.learning.text now" in message


@pytest.mark.parametrize("keep", ["0", "1.5", "-0.1"])
def test_an_impossible_keep(capsys, tmp_path, keep):
    assert f"keep is {float(keep)}: expected" in failing_fit(capsys, tmp_path, "--model.keep", keep)


def test_an_unknown_model(capsys, tmp_path):
    assert "unknown family; expected one of llama" in failing_fit(capsys, tmp_path, "--model.base", "random:lama")
    assert "no/such-model" in failing_fit(capsys, tmp_path, "--model.base", "no/such-model")


def test_unfit_texts(capsys, tmp_path):
    text = tmp_path / "text.txt"
    assert f"text '{text}'" in failing_fit(capsys, tmp_path, "--data.learning.text", text)
    text.write_text("")
    assert f"text '{text}' is empty" in failing_fit(capsys, tmp_path, "--data.learning.text", text)
    text.write_text("short")
    assert "has 5 tokens, but one sequence needs 64" in failing_fit(capsys, tmp_path, "--data.learning.text", text)
    assert "has 5 tokens, but one sequence needs 64" in failing_fit(capsys, tmp_path, "--finish.score.text", text)


def test_impossible_floors(capsys, tmp_path):
    said = failing_fit(capsys, tmp_path, "--model.constraints.floors", '{"*": 0.9}')
    assert "keep 0.5 allows" in said
    assert "raise keep or lower them" in said
    said = failing_fit(capsys, tmp_path, "--model.constraints.floors", '{"*.none": 0.9}')
    assert said == "the floor pattern '*.none' matches none of the 14 modules"


def test_a_store_of_another_model(capsys, tmp_path):
    store = tmp_path / "store"
    words = ["--length", "16", "--sequences", "4", "--output", str(tmp_path / "plan.json"), "--store", str(store)]
    main(["allocate", "random:qwen2", *words])
    message = failing_fit(capsys, tmp_path, "--model.store", store)
    assert f"the factors store at {store} was made from something else" in message


def test_a_refused_start_leaves_the_configuration_of_the_run(capsys, tmp_path, run):
    folder = tmp_path / "copy"
    shutil.copytree(run[0], folder)
    before = (folder / "config.yaml").read_bytes()
    last = folder / "checkpoints" / "last.ckpt"
    for refused in (["--model.keep", "0.01"], ["--ckpt_path", last, "--model.base.name", "random:qwen2"]):
        failing(capsys, "fit", "-c", "smoke", "--run", folder, *refused)
    assert (folder / "config.yaml").read_bytes() == before


def test_checkpoints_that_do_not_fit(capsys, tmp_path, run):
    last = run[0] / "checkpoints" / "last.ckpt"
    said = failing_fit(capsys, tmp_path, "--ckpt_path", last, "--model.base.name", "random:qwen2")
    assert "the checkpoint does not fit this run: factors is" in said
    said = failing_fit(capsys, tmp_path, "--ckpt_path", last, "--model.mask.init_args.steps", "50")
    assert "14 of 14 masks differ" in said
    said = failing_fit(capsys, tmp_path, "--ckpt_path", last, "--model.keep", "0.7")
    assert "the checkpoint does not fit this run: keep is 0.5 there and 0.7 here" in said
    said = failing_fit(capsys, tmp_path, "--ckpt_path", last, "--model.optimizer.init_args.lr", "0.5")
    assert "lr_scheduler is 'cosine' there and None here; optimizer lr is 0.05 there and 0.5 here" in said
    words = ["--ckpt_path", last, "--model.lr_scheduler", "cosine", "--data.seed", "9"]
    assert "learning from other data" in failing_fit(capsys, tmp_path, *words)
    assert "no checkpoint at" in failing_fit(capsys, tmp_path, "--ckpt_path", tmp_path / "none.ckpt")
    assert "README.md is damaged or no checkpoint" in failing_fit(capsys, tmp_path, "--ckpt_path", ROOT / "README.md")
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"keep": 0.9}, "loops": {}}, foreign)
    said = failing_fit(capsys, tmp_path, "--ckpt_path", foreign)
    assert said == "the checkpoint was not written by this version of lowrank_pl: expected one that was"


def test_other_mistakes_of_users(capsys, tmp_path):
    assert "--model.base.dtype bfloat16" in failing_fit(capsys, tmp_path, "--trainer.precision", "bf16-true")
    said = failing_fit(capsys, tmp_path, "--finish.baselines", "uniform", "fisher")
    assert re.search("baseline fisher .* 'whitened': expected two_sided", said)
    assert "no allocator is called 'best'" in failing_fit(capsys, tmp_path, "--finish.baselines", "[best]")
    assert "no allocator is called 'best'" in failing_fit(capsys, tmp_path, "--finish.baselines", "best")
    assert "no plan at" in failing_fit(capsys, tmp_path, "--model.start.plan", tmp_path / "none.json")
    assert "the weights of the data terms" in failing_fit(capsys, tmp_path, "--model.data_terms.cross_entropy", "0")
    assert "use precision '32-true'" in failing_fit(capsys, tmp_path, "--trainer.precision", "64")
    if not torch.cuda.is_available():
        assert "gpu" in failing_fit(capsys, tmp_path, "--trainer.accelerator", "gpu").lower()


WATCHED = "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor"


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        ("--trainer.callbacks LearningRateFinder", "--model.optimizer.init_args.lr"),
        (f"{WATCHED} nope", "name one of keep/expected, .*, val/excess$"),
        (f"{WATCHED} loss/nope", "name one of loss/cross_entropy, .*, loss/total$"),
        (f"{WATCHED} val/excess --trainer.max_steps 4", "ends with step 4: lower --trainer.val_check_interval"),
        (f"{WATCHED} val/excess --trainer.limit_val_batches 0", "set --data.validation.sequences"),
    ],
)
def test_callbacks_that_can_not_work_are_refused_before_the_first_step(capsys, tmp_path, words, cure):
    assert re.search(cure, failing_fit(capsys, tmp_path, *words.split()))
    assert not (tmp_path / "run" / "plan.json").exists()


def test_what_lightning_refuses_with_a_runtime_error_is_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert "--ntasks-per-node" in failing_fit(capsys, tmp_path)


def test_a_folder_that_another_run_writes_to_is_refused(capsys, tmp_path):
    with locked(tmp_path / "run" / LOCK, "writing"):
        assert "another folder with --run" in failing(capsys, "fit", "-c", SMOKE, "--run", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Makes what ``lowrank fit`` would run, and runs nothing."""
    monkeypatch.setattr(RankCLI, "runs", lambda _: False)
    return lambda *words: RankCLI(["fit", "--config", SMOKE, "--run", str(tmp_path / "run"), *words])


@pytest.mark.parametrize(
    ("words", "limits"),
    [([], (1, -1)), (["--trainer.max_steps", "7"], (-1, 7)), (["--trainer.max_epochs", "3"], (3, -1))],
)
def test_one_epoch_is_the_end_where_there_is_no_other(tmp_path, monkeypatch, words, limits):
    monkeypatch.setattr(RankCLI, "runs", lambda _: False)
    given = ["--seed_everything", "0", "--model.base.name", "random:llama", "--model.keep", "0.5"]
    given += ["--data.learning.text", "python-docs"]
    trainer = RankCLI(["fit", "--run", str(tmp_path), "--trainer.accelerator", "cpu", *given, *words]).trainer
    assert (trainer.max_epochs, trainer.max_steps) == limits


def test_a_tilde_is_the_home_folder(built, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "checkpoint").mkdir()
    names = {"run": "runs", "json": "figures.json", "model.store": "store", "ckpt_path": "checkpoint"}
    given = built(*(f"--{option}=~/{name}" for option, name in names.items())).config.fit
    assert {option: Path(given[option]) for option in names} == {key: tmp_path / name for key, name in names.items()}


def test_checkpoints_can_be_switched_off(built):
    assert built("--trainer.enable_checkpointing", "false").trainer.checkpoint_callbacks == []


def test_processes_wait_for_the_first_one_whatever_the_strategy_is(built):
    trainer = built("--trainer.accelerator", "cpu", "--trainer.devices", "2").trainer
    assert type(trainer.strategy) is DDPStrategy
    assert trainer.strategy._timeout == timedelta(hours=12)
    words = [
        "--config",
        str(ROOT / "configs" / "strategy" / "ddp.yaml"),
        "--trainer.strategy.init_args.timeout",
        "0:05:00",
    ]
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
        interrupted=True,
        fit=interrupted,
        checkpoint_callbacks=[saving],
        default_root_dir=tmp_path,
        is_global_zero=True,
    )
    with pytest.raises(KeyboardInterrupt, match=f"^{advice}$"):
        RankCLI.fit(SimpleNamespace(trainer=trainer), None, ckpt_path=given)


def test_a_full_disk(capsys, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "No space left on device" in failing_fit(capsys, tmp_path)
