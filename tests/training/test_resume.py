"""A run that is killed or interrupted goes on to exactly the masks of one that was not."""

from __future__ import annotations

import json
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from lowrank_pl.cli.app import main
from lowrank_pl.training.checkpointing import read_checkpoint
from tests.helpers import SMOKE
from tests.helpers.fork_server import OURS

# The writer of TensorBoard is closed by the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
# Three epochs of 23 batches, checkpoints at steps that divide neither.
SETTINGS = """
    --trainer.max_epochs 3 --trainer.max_steps -1 --data.learning.sequences 23 --checkpoint.every_n_train_steps 7
    --finish.baselines [] --finish.prompts []
"""
STEPS = 3 * 23


def words(run, *more):
    return ["fit", "-c", SMOKE, "--run", str(run), *SETTINGS.split(), *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    main(words(folder))
    return folder


def stopped_by(number, folder):
    """Send a run a signal after its first checkpoint; return exit status, stderr, its last step and what it left."""
    run, printed = folder / "run", folder / "printed"
    printed.mkdir()
    last = run / "checkpoints" / "last.ckpt"
    process = OURS.start([sys.executable, "-m", "lowrank_pl", *words(run)], output=printed)
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    try:
        status = process.wait(60)
    finally:
        process.kill()
    left = {path.name if path.name == "plan.json" else path.suffix for path in run.rglob("*")}
    step = read_checkpoint(last)["global_step"]
    return SimpleNamespace(run=run, last=last, status=status, printed=process.printed()[1], step=step, left=left)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return stopped_by(signal.SIGKILL, tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    return stopped_by(signal.SIGINT, tmp_path_factory.mktemp("interrupted"))


def assert_same_end(run, whole):
    mine, theirs = (json.loads((folder / "plan.json").read_text()) for folder in (run, whole))
    assert mine == theirs
    mine, theirs = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, whole))
    assert mine["global_step"] == theirs["global_step"] == STEPS
    for name, value in theirs["state_dict"].items():
        assert torch.equal(mine["state_dict"][name], value)
    moments, expected = (end["optimizer_states"][0]["state"] for end in (mine, theirs))
    assert all(torch.equal(moments[i]["exp_avg_sq"], expected[i]["exp_avg_sq"]) for i in expected)
    assert len(moments) == 14


def test_a_killed_run_leaves_a_checkpoint_and_no_plan(killed):
    assert killed.status == -signal.SIGKILL
    assert 0 < killed.step < STEPS
    assert "plan.json" not in killed.left


def test_an_interrupted_run_leaves_a_checkpoint_and_nothing_half_written(interrupted):
    assert 0 < interrupted.step < STEPS
    assert not interrupted.left & {"plan.json", ".tmp"}


def test_an_interrupted_run_says_how_to_go_on(interrupted):
    assert interrupted.status == 130
    assert interrupted.printed.splitlines()[-1] == (
        f"lowrank: interrupted: go on with --ckpt_path {interrupted.last}, nothing half-written is left"
    )
    assert "Traceback" not in interrupted.printed
    assert "Detected KeyboardInterrupt" not in interrupted.printed


def test_an_interrupted_run_ends_the_step_that_was_under_way(interrupted):
    assert "step/s" in interrupted.printed


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_stopped_run_goes_on_to_the_same_bits(how, whole, request):
    stopped = request.getfixturevalue(how)
    main(words(stopped.run, "--ckpt_path", str(stopped.last)))
    assert_same_end(stopped.run, whole)
