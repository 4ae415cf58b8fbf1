"""Two processes: DDP and FSDP2 learn the same masks, bit for bit, and export them at the end."""

from __future__ import annotations

import json
import signal
import sys

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lowrank_pl import Decomposition, RankPlan, build_factors, find_targets, load_compressed
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.cli.app import main
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.masked_linear import insert_masks, masked_layers
from lowrank_pl.methods.masks.objectives import DataTerms
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.storage import Storage
from lowrank_pl.training.checkpointing import read_checkpoint
from lowrank_pl.training.sharding import shard_frozen
from tests.helpers import ROOT, SMOKE
from tests.helpers.fork_server import OURS
from tests.helpers.tiny_training import fit, make_data, make_learner
from tests.helpers.two_processes import as_torchrun_says, ended, in_two_processes, torchrun_environments

# The writer of TensorBoard is closed by the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
SETTINGS = """
    --trainer.devices 2 --trainer.max_steps 4 --trainer.val_check_interval 2 --trainer.gradient_clip_val 1.0
    --trainer.accumulate_grad_batches 2 --model.data_terms.kl 0.5 --model.data_terms.divergence 0.1
    --checkpoint.every_n_train_steps 2 --checkpoint.save_top_k -1 --finish.prompts [] --finish.baselines []
"""
SHARDED_CHECKPOINTS = "--trainer.strategy.init_args.save_distributed_checkpoint true"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "lowrank_pl"]


def words(folder, strategy, options=""):
    """Return the words after ``lowrank`` of a run in two processes."""
    files = ["-c", SMOKE, "-c", str(ROOT / "configs" / "strategy" / f"{strategy}.yaml")]
    return ["fit", *files, "--run", str(folder), *SETTINGS.split(), *options.split()]


def launched(folder, strategy, options="", *, launcher=("-m", "lowrank_pl")):
    """Run ``lowrank fit`` as a user does, whose processes Lightning or ``torchrun`` starts; return how it ended."""
    command = [sys.executable, *launcher, *words(folder, strategy, options)]
    return OURS.run(command, capture_output=True, timeout=600, cwd=ROOT)


def run(folder, strategy, options=""):
    """Run ``lowrank fit`` in two processes that are there already, to its good end, and return its folder."""
    commands = 2 * [["-m", "lowrank_pl", *words(folder, strategy, options)]]
    for code, printed in ended(commands, folder / "printed", environments=torchrun_environments()):
        assert_good_end(code, printed)
    return folder


def assert_good_end(code, printed):
    assert code == 0, printed[-3000:]
    assert "Warning" not in printed


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """The folder of a run with DDP whose second process Lightning starts."""
    folder = tmp_path_factory.mktemp("ddp")
    end = launched(folder, "ddp")
    assert_good_end(end.returncode, end.stderr)
    return folder


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """The folder of a run with FSDP2 whose processes ``torchrun`` starts."""
    folder = tmp_path_factory.mktemp("fsdp")
    end = launched(folder, "fsdp", launcher=TORCHRUN)
    assert_good_end(end.returncode, end.stderr)
    return folder


def learned_by_both(rank, folder, count, base="random:llama"):
    """Learn with DDP and with FSDP2 in the same processes, and compare the masks."""
    found = []
    for strategy in (DDPStrategy(), ModelParallelStrategy(save_distributed_checkpoint=False)):
        learner = make_learner(base, lr_scheduler="cosine", data_terms=DataTerms(kl=0.5, divergence=0.1))
        with as_torchrun_says(rank, count):
            settings = {"max_steps": 3, "accumulate_grad_batches": 2, "limit_val_batches": 0, "gradient_clip_val": 1.0}
            fit(learner, make_data(sequences=24, length=16), strategy=strategy, devices=count, **settings)
        found.append(learner.state_dict())
    assert_equal(*found)


@pytest.mark.parametrize("count", [3, 4])
def test_fsdp2_learns_the_masks_of_ddp_bit_for_bit_with_any_number_of_processes(count, tmp_path):
    in_two_processes(learned_by_both, tmp_path, count, count=count)


def test_masks_of_experts_are_learned_by_both_though_a_process_may_have_no_token_for_one(tmp_path):
    in_two_processes(learned_by_both, tmp_path, 2, "random:mixtral", count=2)


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
    main(
        ["fit", "-c", SMOKE, "--run", str(alone), *SETTINGS.split(), "--trainer.devices", "1", "--data.batch_size", "2"]
    )
    for name, value in masks(alone).items():
        torch.testing.assert_close(masks(ddp)[name], value, rtol=1e-3, atol=2e-3)


def test_both_export_and_score_at_the_end(ddp, fsdp):
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (ddp, fsdp)]
    plans = [RankPlan.load(folder / "plan.json") for folder in (ddp, fsdp)]
    assert plans[0] == plans[1]
    assert summaries[0]["learned"]["perplexity"] == summaries[1]["learned"]["perplexity"]
    weights = [load_compressed(folder / "model").state_dict() for folder in (ddp, fsdp)]
    assert_equal(*weights)


def test_fsdp2_reads_shares_of_files_and_learns_and_exports_the_same(ddp, tmp_path):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(base)
    # In a store of its own, so that factors are made anew.
    own = f"--model.base.name {base} --model.store {tmp_path / 'factors'}"
    # As where no device has room for the whole base.
    folder = run(tmp_path / "run", "fsdp", f"{own} --finish.streamed true")
    assert_equal(masks(folder), masks(ddp))
    assert RankPlan.load(folder / "plan.json").modules == RankPlan.load(ddp / "plan.json").modules
    assert_equal(*(load_compressed(one / "model").state_dict() for one in (folder, ddp)))


def test_fsdp2_goes_on_from_a_sharded_checkpoint_bit_for_bit(ddp, tmp_path):
    first = run(tmp_path / "first", "fsdp", f"{SHARDED_CHECKPOINTS} --trainer.max_steps 2")
    last = first / "checkpoints" / "last.ckpt"
    assert last.is_dir()
    again = run(tmp_path / "again", "fsdp", f"{SHARDED_CHECKPOINTS} --ckpt_path {last}")
    assert RankPlan.load(again / "plan.json") == RankPlan.load(ddp / "plan.json")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run whose second process was killed in the third step, and how it ended."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, launched(folder, "ddp", "--trainer.callbacks+ tests.helpers.kill_callback.Killed")


def test_the_end_of_a_killed_process_ends_the_run_and_says_how_to_go_on(killed):
    folder, end = killed
    assert end.returncode == 1
    assert "lowrank: error: another process of this run has ended or can't be reached" in end.stderr
    assert f"go on with --ckpt_path {folder / 'checkpoints' / 'last.ckpt'}" in end.stderr
    assert not (folder / "plan.json").exists()


HANGING = """
import os, subprocess, sys, time
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lowrank_pl.training.interrupt import explain_kill
explain_kill(lambda: "go on with it", grace=0.1)
ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
ended.wait()
_ChildProcessObserver(os.getpid(), [ended], sleep_period=0).start()
time.sleep(600)
"""


def test_a_process_that_hangs_since_another_has_ended_says_how_to_go_on_before_it_is_killed():
    end = OURS.run([sys.executable, "-c", HANGING], capture_output=True)
    assert end.returncode == -signal.SIGKILL
    assert "(exit code 3): see its last message; go on with it" in end.stderr


def test_a_run_whose_process_was_killed_goes_on_to_the_same_bits(ddp, killed):
    folder, _ = killed
    run(folder, "ddp", f"--ckpt_path {folder / 'checkpoints' / 'last.ckpt'}")
    assert_equal(masks(folder), masks(ddp))


def test_processes_with_different_settings_are_refused(tmp_path):
    commands = [["-m", "lowrank_pl", *words(tmp_path, "ddp", f"--trainer.max_steps {steps}")] for steps in (4, 5)]
    for code, printed in ended(commands, tmp_path / "printed", environments=torchrun_environments()):
        assert code == 1
        assert "trainer.max_steps is 4 in process 0 and 5 in process 1: start all processes" in printed


def sharded(rank, folder):
    """Write what this process holds of a sharded model, and whether it computes what the whole one does."""
    tokens = torch.arange(64).view(1, 64)
    model = tiny_model("llama")
    store = build_factors(
        Subject(model, byte_tokenizer(), tokens, known_targets=find_targets(model)),
        settings=Decomposition("svd"),
        directory=folder / f"{rank}",
    )
    logits = []
    for empty in (False, True):
        model = tiny_model("llama")
        starts = {target.name: 0.5 for target in find_targets(model).modules}
        insert_masks(model, store, ARA(), starts, storage=Storage("factored"), empty=empty)
        layers = masked_layers(model)
        if empty:
            learning = [parameter for layer in layers.values() for parameter in layer.mask.parameters()]
            shard_frozen(model, store, learning, torch.device("cpu"))
        logits.append(model(input_ids=tokens).logits)
    assert torch.equal(*logits)
    for name, layer in layers.items():
        whole = store.factors(name, layer.mask.rank)
        assert torch.equal(layer.left_rows.full_tensor(), whole.left.mT)
        assert torch.equal(layer.right.full_tensor(), whole.right)
    held = {name: [len(part.to_local()) for part in (p.weight, p.left_rows, p.right)] for name, p in layers.items()}
    ranks = {name: [layer.out_features, layer.mask.rank, layer.mask.rank] for name, layer in layers.items()}
    (folder / f"held{rank}.json").write_text(json.dumps([held, ranks]))


def test_weights_and_factors_are_shared_out_to_the_last_row(tmp_path):
    in_two_processes(sharded, tmp_path)
    (first, ranks), (second, _) = (json.loads((tmp_path / f"held{rank}.json").read_text()) for rank in (0, 1))
    assert any(rank % 2 for _, rank, _ in ranks.values())
    for name, sizes in ranks.items():
        assert first[name] == [-(-size // 2) for size in sizes]
        assert second[name] == [size // 2 for size in sizes]
