"""A run that is killed or interrupted goes on to exactly the masks of one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from lowrank_pl.cli.main import main
from lowrank_pl.training.checkpointing import read_checkpoint
from tests.helpers import SMOKE

# The writer of TensorBoard is closed by the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
# Three epochs of 53 batches, checkpoints at steps that divide neither.
SETTINGS = ["--trainer.max_epochs", "3", "--trainer.max_steps", "-1", "--data.learning.sequences", "53"]
SETTINGS += ["--checkpoint.every_n_train_steps", "7", "--finish.baselines", "[]", "--finish.prompts", "[]"]
STEPS = 3 * 53


def words(run, *more):
    return ["fit", "-c", SMOKE, "--run", str(run), *SETTINGS, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    main(words(folder))
    return folder


def stopped(run, number):
    """Start a run, send it a signal after its first checkpoint, return exit status and stderr."""
    last = run / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(
        [sys.executable, "-m", "lowrank_pl", *words(run)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    try:
        shown = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    return process.returncode, shown


def assert_same_end(run, whole):
    mine, theirs = (json.loads((folder / "plan.json").read_text()) for folder in (run, whole))
    assert mine == theirs
    mine, theirs = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, whole))
    assert mine["global_step"] == theirs["global_step"] == STEPS // 7 * 7
    for name, value in theirs["state_dict"].items():
        assert torch.equal(mine["state_dict"][name], value)
    moments, expected = (end["optimizer_states"][0]["state"] for end in (mine, theirs))
    assert all(torch.equal(moments[i]["exp_avg_sq"], expected[i]["exp_avg_sq"]) for i in expected)
    assert len(moments) == 14


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, whole):
    status, _ = stopped(tmp_path, signal.SIGKILL)
    assert status == -signal.SIGKILL
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert 0 < read_checkpoint(last)["global_step"] < STEPS
    assert not (tmp_path / "plan.json").exists()
    main(words(tmp_path, "--ckpt_path", str(last)))
    assert_same_end(tmp_path, whole)


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path, whole):
    status, shown = stopped(tmp_path, signal.SIGINT)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert status == 130
    assert shown.splitlines()[-1] == (
        f"lowrank: interrupted: go on with --ckpt_path {last}, nothing half-written is left"
    )
    assert "Traceback" not in shown
    assert "Detected KeyboardInterrupt" not in shown
    # The step under way is done, not torn.
    assert "step/s" in shown
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp" or path.name == "plan.json"]
    assert 0 < read_checkpoint(last)["global_step"] < STEPS
    main(words(tmp_path, "--ckpt_path", str(last)))
    assert_same_end(tmp_path, whole)
