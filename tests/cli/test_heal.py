"""The command ``heal``: from a plan to a healed model, and one clear sentence for every mistake."""

from __future__ import annotations

import json

# Its loggers keep the stderr of the moment at which it is imported, which must be none that a test captures.
import lightning.pytorch  # noqa: F401
import pytest
import yaml

from lowrank_pl import RankPlan
from lowrank_pl.cli.app import main
from tests.helpers.commands import failing

# The writer of TensorBoard is closed by the garbage collector when a run ends in an error.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
TEXT = "--data.learning.text python-docs --data.learning.length 32 --data.learning.sequences 20"
QUICK = f"-c heal {TEXT} --data.validation.sequences 3 --trainer.accelerator cpu --model.settings.tokens 640".split()


def words(plan, folder, *more):
    return ["heal", *QUICK, "--model.plan", str(plan), "--run", str(folder / "run"), *more]


def test_a_plan_becomes_a_healed_model(plan_file, tmp_path, capsys):
    main(words(plan_file, tmp_path, "--model.settings.lr", "3e-3", "--json", str(tmp_path / "heal.json")))
    found = json.loads((tmp_path / "heal.json").read_text())
    assert found["kept"]
    assert found["after"]["kl"] < found["before"]["kl"]
    assert found["tokens"] == 640
    shown = capsys.readouterr().out
    assert "not healed" in shown
    assert RankPlan.load(tmp_path / "run" / "model" / "plan.json").healed in shown
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["tokenizer"] is None
    # A finished run that is given again trains no further and ends as it did.
    main(words(plan_file, tmp_path, "--model.settings.lr", "3e-3", "--ckpt_path", "last"))
    again = json.loads((tmp_path / "run" / "heal.json").read_text())
    assert (again["before"], again["after"]) == (found["before"], found["after"])
    # Its own plan can't be healed into the same folder, which would lose it.
    assert "another folder with --run" in failing(capsys, *words(tmp_path / "run" / "plan.json", tmp_path))


@pytest.mark.parametrize(
    ("more", "cure"),
    [
        (["--model.settings.tokens", "31"], "give more tokens"),
        (["--trainer.max_steps", "3"], "--model.settings.tokens"),
        (["--trainer.max_epochs", "3"], "--model.settings.tokens"),
        (["--trainer.precision", "bf16-true"], "'bf16-mixed'"),
        (["--model.plan", "random:llama"], "no plan at random:llama"),
        (["--model.store", "none"], "no store at none"),
        (["--model.settings.lora.rank", "0"], "a rank of at least 1"),
    ],
)
def test_mistakes(plan_file, tmp_path, capsys, more, cure):
    assert cure in failing(capsys, *words(plan_file, tmp_path, *more))
    assert not (tmp_path / "run" / "heal.json").exists()


def test_an_unknown_key_of_a_file_is_an_error(tmp_path, capsys):
    (tmp_path / "none.yaml").write_text("none: 1\n")
    assert "none" in failing(capsys, "heal", "-c", tmp_path / "none.yaml", status=2)
