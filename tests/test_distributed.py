"""Two processes: DDP and FSDP2 learn the same masks, bit for bit, and export them at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank_pl import RankPlan, load_compressed
from lowrank_pl.checkpointing import read_checkpoint
from lowrank_pl.cli import main

# The writer of TensorBoard is closed by the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
SMOKE = str(Path(__file__).parents[1] / "configs" / "smoke.yaml")
SETTINGS = "--trainer.max_steps 4 --trainer.val_check_interval 2 --trainer.gradient_clip_val 1.0 --finish.prompts [] "
SETTINGS += "--checkpoint.every_n_train_steps 2 --checkpoint.save_top_k -1 --finish.baselines [] "
SETTINGS += "--trainer.accumulate_grad_batches 2 --model.data_terms.kl 0.5 --model.data_terms.divergence 0.1"
FSDP2 = "--trainer.strategy ModelParallelStrategy --trainer.strategy.data_parallel_size 2 "
FSDP2 += "--trainer.strategy.tensor_parallel_size 1"


def run(folder, *options):
    """Run ``lowrank fit``; Lightning starts the second process itself."""
    words = ["fit", "-c", SMOKE, "--run", str(folder), *SETTINGS.split(), *" ".join(options).split()]
    ended = subprocess.run(
        [sys.executable, "-m", "lowrank_pl", *words], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Warning" not in ended.stderr
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ddp"), "--trainer.devices 2 --trainer.strategy ddp")


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    whole = "--trainer.strategy.save_distributed_checkpoint false"
    return run(tmp_path_factory.mktemp("fsdp"), "--trainer.devices 2", FSDP2, whole)


def masks(folder, name="last.ckpt"):
    return read_checkpoint(folder / "checkpoints" / name)["state_dict"]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_fsdp2_learns_the_masks_of_ddp_bit_for_bit(ddp, fsdp):
    assert len(masks(ddp)) == 14
    assert_equal(masks(fsdp), masks(ddp))
    moved = [not torch.equal(value, masks(ddp, "epoch=0-step=2.ckpt")[name]) for name, value in masks(ddp).items()]
    assert all(moved)


def test_both_are_close_to_one_process_with_the_same_batches(ddp, tmp_path):
    alone = tmp_path / "alone"
    main(["fit", "-c", SMOKE, "--run", str(alone), *SETTINGS.split(), "--data.batch_size", "2"])
    for name, value in masks(alone).items():
        torch.testing.assert_close(masks(ddp)[name], value, rtol=1e-3, atol=2e-3)


def test_both_export_and_score_at_the_end(ddp, fsdp):
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (ddp, fsdp)]
    plans = [RankPlan.load(folder / "plan.json") for folder in (ddp, fsdp)]
    assert plans[0] == plans[1]
    assert summaries[0]["learned"]["perplexity"] == summaries[1]["learned"]["perplexity"]
    weights = [load_compressed(folder / "model").state_dict() for folder in (ddp, fsdp)]
    assert_equal(*weights)


def test_fsdp2_goes_on_from_a_sharded_checkpoint_bit_for_bit(ddp, tmp_path):
    first = run(tmp_path / "first", "--trainer.devices 2", FSDP2, "--trainer.max_steps 2")
    last = first / "checkpoints" / "last.ckpt"
    assert last.is_dir()
    again = run(tmp_path / "again", "--trainer.devices 2", FSDP2, f"--ckpt_path {last}")
    assert RankPlan.load(again / "plan.json") == RankPlan.load(ddp / "plan.json")
