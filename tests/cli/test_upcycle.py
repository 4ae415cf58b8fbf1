"""The command ``upcycle``, and what the mixture that it writes is good for."""

from __future__ import annotations

import json

# Its loggers keep the stderr of the moment at which it is imported, which must be none that a test captures.
import lightning.pytorch  # noqa: F401
import pytest
import torch

from lowrank_pl.cli.app import main
from lowrank_pl.models.base import load_base
from lowrank_pl.models.settings import Base
from lowrank_pl.models.targets import find_targets
from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.training.upcycle import Upcycler
from tests.helpers.commands import failing

WORDS = ["upcycle", "-c", "upcycle", "--model.base", "random:llama", "--trainer.accelerator", "cpu"]
WORDS += ["--data.learning.text", "python-docs::part=0%-10%", "--data.learning.length", "32"]
WORDS += ["--data.learning.sequences", "16", "--data.validation.sequences", "4", "--trainer.val_check_interval", "2"]


def test_experts_are_trained_apart_and_the_mixture_is_a_base_like_any_other(tmp_path, capsys):
    main([*WORDS, "--trainer.max_steps", "4", "--model.mixture.lr", "0.01", "--run", str(tmp_path)])
    figures = json.loads((tmp_path / "upcycle.json").read_text())
    assert figures["perplexity"]["mixture"] < figures["perplexity"]["dense"]
    assert figures["expert_distance"] > 0.01
    assert f"{figures['perplexity']['dense']:.2f}" in capsys.readouterr().out
    targets = find_targets(load_base(str(tmp_path / "model")))
    assert "model.layers.1.mlp.experts.3.down_proj" in {target.name for target in targets.modules}


def test_a_base_in_bfloat16_is_trained_in_float32(tmp_path, capsys):
    words = [*WORDS, "--model.base.dtype", "bfloat16", "--trainer.max_steps", "2", "--run", str(tmp_path)]
    assert "--trainer.precision bf16-mixed" in failing(capsys, *words)
    main([*words, "--trainer.precision", "bf16-mixed"])
    assert load_base(str(tmp_path / "model"), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_resumed_run_keeps_the_text_that_the_dense_model_was_scored_on(tmp_path, capsys):
    main([*WORDS, "--trainer.max_steps", "2", "--run", str(tmp_path)])
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    words = [*WORDS, "--trainer.max_steps", "4", "--run", str(tmp_path), "--ckpt_path", last]
    assert "validation sequences" in failing(capsys, *words, "--data.validation.text", "python-docs::part=50%-60%")


def test_a_run_without_an_end_is_refused(tmp_path, capsys):
    words = [*WORDS, "--trainer.max_steps", "-1", "--trainer.max_epochs", "-1", "--run", str(tmp_path)]
    assert "give the trainer max_steps or max_epochs" in failing(capsys, *words)


def test_a_mixture_needs_text_to_be_judged_on(tmp_path, capsys):
    words = [*WORDS, "--data.validation.sequences", "0", "--run", str(tmp_path)]
    assert "there are no validation sequences" in failing(capsys, *words)


def test_what_watches_a_validation_that_never_comes_is_refused(tmp_path, capsys):
    stop = ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val/perplexity"]
    words = [*WORDS, *stop, "--trainer.max_steps", "2", "--trainer.val_check_interval", "3", "--run", str(tmp_path)]
    assert "the first validation would come with step 3 and learning ends with step 2" in failing(capsys, *words)


def test_a_validation_that_is_not_finite_is_an_error():
    upcycler = Upcycler(Base("random:llama"))
    upcycler.model = tiny_model("llama")
    upcycler.model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="is nan: lower the rates"):
        upcycler.validation_step(torch.ones(1, 8, dtype=torch.long), 0)


@pytest.mark.parametrize("flags", [["--model.mixture.chosen", "4"], ["--model.mixture.lr", "0"]])
def test_settings_out_of_range_are_refused(flags, tmp_path, capsys):
    said = failing(capsys, *WORDS, "--run", str(tmp_path), *flags)
    assert "expected" in said


def test_devices_that_are_no_number_are_named(tmp_path, capsys):
    said = failing(capsys, *WORDS, "--run", str(tmp_path), "--trainer.devices", "many")
    assert "trainer.devices is 'many': expected a number" in said


@pytest.mark.parametrize("command", ["fit", "upcycle"])
def test_a_group_of_options_that_is_null_is_named(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    group = {"fit": "compute", "upcycle": "mixture"}[command]
    (tmp_path / "made.yaml").write_text(f"model:\n  {group}: null\n")
    with pytest.raises(SystemExit):
        main([command, "--model.base", "random:llama", "--data.learning.text", "python-docs", "-c", "made.yaml"])
    assert f"model.{group} is null: expected its options" in capsys.readouterr().err
