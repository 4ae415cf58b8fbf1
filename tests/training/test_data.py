"""CalibrationData: the order of batches, which sequences are where, and the batches that a resumed run sees."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lowrank_pl.models.tiny import byte_tokenizer
from lowrank_pl.text.sequences import Calibration
from lowrank_pl.training.data import CalibrationData, SequenceLoader, StatisticsText, ValidationText
from tests.helpers import tiny_training
from tests.helpers.fork_server import OURS
from tests.helpers.two_processes import as_torchrun_says, in_two_processes

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",  # of ModelCheckpoint, where a test resumes into another folder
    "ignore:.*isinstance.treespec, LeafSpec:FutureWarning",  # Lightning 2.6 on torch 2.13
)
LENGTH = 16
SEQUENCES = 11  # two in a batch: five batches an epoch, and a tail


def make_data(text="python-docs", **changes):
    settings = {"length": LENGTH, "sequences": SEQUENCES, "batch_size": 2, "validation_sequences": 3, "seed": 5}
    return tiny_training.make_data(text, **{**settings, **changes})


class Recorder(pl.LightningModule):
    """Notes the sequences of every training step, also in a file that outlives the process."""

    def __init__(self, file=None, *, kill_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.file = file
        self.kill_at = kill_at
        self.seen = []

    def training_step(self, batch, batch_idx):
        assert batch.dtype == torch.int64
        self.seen.append(batch.tolist())
        if self.file:
            with Path(self.file).open("a") as file:
                file.write(json.dumps([self.global_rank, *batch.tolist()]) + "\n")
        return self.weight * batch.float().mean()

    def on_train_batch_start(self, batch, batch_idx):
        if self.kill_at is not None and self.trainer.fit_loop.total_batch_idx == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def validation_step(self, batch, batch_idx):
        self.log("validation", batch.float().mean(), sync_dist=True, batch_size=len(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAlsoAtEnds(pl.Callback):
    """Saves at the other places where ``ModelCheckpoint`` may: after validation and at the end of an epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"validation={trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / f"epoch={trainer.global_step}.ckpt")


def fit(folder, *, data=None, module=None, ckpt_path=None, **settings):
    module = module or Recorder()
    callback = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu", devices=settings.pop("devices", 1), logger=False,
        callbacks=[callback, SaveAlsoAtEnds(Path(folder))],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1, **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=data or make_data(), ckpt_path=ckpt_path, weights_only=False)
    return module.seen


# -- the order of batches -----------------------------------------------------------------------------------------

ELEVEN = torch.arange(22).view(11, 2)


def test_order_follows_from_seed_and_epoch():
    loaders = [SequenceLoader(ELEVEN, batch_size=2, seed=seed) for seed in (1, 1, 2)]
    first, same, other = ([[b.tolist() for b in loader] for _ in range(3)] for loader in loaders)
    assert first == same != other
    assert first[0] != first[1] != first[2]
    assert all(len(epoch) == 5 for epoch in first)
    assert loaders[0].batches(2)[0] == [row[0] // 2 for row in first[2][0]]


def test_processes_share_every_step_and_leave_the_same_tail(caplog):
    whole = SequenceLoader(ELEVEN, batch_size=4, seed=3).batches(7)
    caplog.clear()
    halves = [SequenceLoader(ELEVEN, batch_size=2, seed=3, rank=rank, world_size=2).batches(7) for rank in range(2)]
    assert [one + two for one, two in zip(*halves, strict=True)] == whole
    assert "3 of 11 sequences are left out, different ones in each epoch: 4 are taken at a time" in caplog.text
    assert len(caplog.records) == 1


def test_validation_keeps_its_tail_and_gives_every_process_as_many(caplog):
    assert SequenceLoader(ELEVEN, batch_size=4, seed=None, drop_tail=False).batches(0)[-1] == [8, 9, 10]
    assert not caplog.records
    shares = [
        SequenceLoader(ELEVEN, batch_size=4, seed=None, drop_tail=False, rank=rank, world_size=2) for rank in range(2)
    ]
    assert [[len(batch) for batch in share] for share in shares] == [[4, 1], [4, 1]]
    assert [len(share) for share in shares] == [2, 2]
    assert sorted(n for share in shares for batch in share.batches(0) for n in batch) == list(range(10))
    assert "1 of 11 sequences are left out: 2 are taken at a time" in caplog.text


def test_too_few_sequences_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="11 sequences of text are fewer than one batch of 6 for each of 2 processes"):
        SequenceLoader(ELEVEN, batch_size=6, seed=None, world_size=2)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    list(SequenceLoader(ELEVEN, batch_size=2, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


# -- which sequences ------------------------------------------------------------------------------------------------


def test_sequences_held_out_for_validation_follow_all_others(caplog):
    caplog.set_level(logging.INFO)
    data = make_data(statistics_sequences=5, statistics_length=64)
    text = "".join(bytes(sequence.tolist()).decode() for sequence in data.train_sequences)
    statistics = b"".join(bytes(sequence.tolist()) for sequence in data.statistics_sequences).decode()
    validation = b"".join(bytes(sequence.tolist()) for sequence in data.validation_sequences).decode()
    assert data.train_sequences.shape == (SEQUENCES, LENGTH)
    assert data.statistics_sequences.shape == (5, 64)
    assert data.validation_sequences.shape == (3, LENGTH)
    assert statistics.startswith(text)
    assert text not in validation
    assert validation not in statistics
    assert "11 sequences of 16 tokens of 'python-docs' to learn from, 5 of 64 of 'python-docs' for stat" in caplog.text
    assert "3 of 16 of 'python-docs' (held out, after those) for validation" in caplog.text


def test_defaults_of_statistics_are_those_of_learning():
    data = make_data()
    assert torch.equal(data.statistics_sequences, data.train_sequences)


def test_held_out_sequences_are_taken_from_a_short_text_too(tmp_path, caplog):
    path = tmp_path / "short.txt"
    path.write_text("".join(f"{n:04d}" for n in range(40)))
    data = CalibrationData(
        Calibration(str(path), length=17, sequences=20), byte_tokenizer(bos=True),
        statistics=StatisticsText(length=33), validation=ValidationText(sequences=2),
    )  # fmt: skip
    assert data.train_sequences.shape == (8, 17)
    assert data.statistics_sequences.shape == (4, 33)
    assert bytes(data.validation_sequences[0, 1:].tolist()) == b"0032003300340035"
    assert "42 sequences of 17 tokens were asked for" in caplog.text
    assert "statistics use 4 sequences instead of 20" in caplog.text


def test_too_short_a_text_to_hold_out_from(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("x" * 50)
    data = make_data(str(path), sequences=4)
    with pytest.raises(ValueError, match="has 3 sequences of 16 tokens, too few to hold out 3 for validation"):
        data.setup()


def test_own_texts_for_statistics_and_validation(tmp_path, caplog):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{n:03d}" for n in range(200)))
    data = make_data(
        statistics_text=str(tmp_path / "a.txt"), statistics_sequences=2, validation_text=str(tmp_path / "b.txt")
    )
    assert bytes(data.statistics_sequences[0].tolist()) == b"a000a001a002a003"
    assert bytes(data.validation_sequences[0].tolist()) == b"b000b001b002b003"
    assert not caplog.records


def test_validation_text_that_is_learned_from_is_warned_of(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{n:04d}" for n in range(400)))
    validation = {"validation_sequences": 4, "validation_text": f"{path}::part=0%-90%"}
    data = make_data(str(path), length=50, sequences=10, **validation)
    data.setup()
    assert "4 of 4 validation sequences" in caplog.text


def test_a_validation_text_of_the_same_name_is_held_out(caplog):
    data = make_data(validation_text="python-docs")
    assert torch.equal(data.validation_sequences, make_data().validation_sequences)
    assert not caplog.records


def test_statistics_of_the_learning_text_are_not_read_again():
    data = make_data(sequences=10, statistics_sequences=6)
    assert data.statistics_sequences.data_ptr() == data.train_sequences.data_ptr()
    assert len(data.statistics_sequences) == 6


def test_a_mixture_of_other_shares_is_another_text(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 4000)
    with pytest.raises(ValueError, match=r"shares a text with .*another part="):
        make_data(f"python-docs + {tmp_path}/a.txt::share=2", validation_text=f"python-docs + {tmp_path}/a.txt").setup()


def test_a_part_of_the_mixture_that_is_learned_from_is_no_validation_text(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 4000)
    with pytest.raises(ValueError, match=r"a\.txt' shares a text with 'python-docs.*another part="):
        make_data(f"python-docs + {tmp_path}/a.txt::share=2", validation_text=f"{tmp_path}/a.txt").setup()


def test_no_validation():
    data = make_data(validation_sequences=0)
    assert data.val_dataloader() == []
    assert data.validation_sequences.shape == (0, LENGTH)


def test_sequences_are_built_once(monkeypatch):
    data = make_data()
    data.prepare_data()
    monkeypatch.setattr(data, "_build", None)
    data.setup("fit")
    data.setup("validate")
    assert len(data.train_sequences) == SEQUENCES


def test_tokenizer_by_name_of_the_base_and_none():
    data = CalibrationData(Calibration("python-docs", LENGTH, 2), "random:llama")
    assert data.train_sequences.max() < 256
    assert data.tokenizer is data.tokenizer
    with pytest.raises(ValueError, match="tokenizer=None: give the base model's tokenizer, or the model's name"):
        CalibrationData().setup()


@pytest.mark.parametrize(
    ("setting", "named", "value", "least"),
    [
        ("length", "learning.length", 1, 2),
        ("sequences", "learning.sequences", 0, 1),
        ("statistics_length", "statistics.length", 1, 2),
        ("statistics_sequences", "statistics.sequences", 0, 1),
        ("batch_size", "batch_size", 0, 1),
        ("validation_sequences", "validation.sequences", -1, 0),
        ("validation_batch_size", "validation.batch_size", 0, 1),
        ("num_workers", "num_workers", -1, 0),
    ],
)
def test_numbers_out_of_range_are_refused(setting, named, value, least):
    with pytest.raises(ValueError, match=f"{named} is {value}: expected a whole number of at least {least}"):
        make_data(**{setting: value})


def test_after_a_fit_the_loader_starts_anew(tmp_path):
    data = make_data()
    fit(tmp_path, data=data, max_steps=3)
    assert len(list(data.train_dataloader())) == 5


# -- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 13},
        {"max_epochs": 3},
        {"max_epochs": 3, "limit_val_batches": 0},
        {"max_epochs": 3, "accumulate_grad_batches": 2},
        {"max_steps": 7, "accumulate_grad_batches": 2, "val_check_interval": 2},
        {"max_epochs": 3, "limit_train_batches": 4},
    ],
    ids=str,
)
def test_every_checkpoint_is_followed_by_the_batches_that_would_have_come(tmp_path, settings):
    whole = fit(tmp_path / "whole", **settings)
    checkpoints = sorted((tmp_path / "whole").glob("*=*.ckpt"))
    assert len(checkpoints) >= 9
    for checkpoint in checkpoints:
        loops = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]
        done = loops["epoch_loop.batch_progress"]["total"]["ready"]
        assert fit(tmp_path / checkpoint.stem, ckpt_path=checkpoint, **settings) == whole[done:], checkpoint.name


def test_workers_that_fetch_ahead_do_not_shift_the_place(tmp_path):
    whole = fit(tmp_path / "whole", max_steps=8)
    assert fit(tmp_path / "part", max_steps=8, data=make_data(num_workers=1)) == whole
    resumed = fit(
        tmp_path / "more", max_steps=8, data=make_data(num_workers=1), ckpt_path=tmp_path / "part/step=3.ckpt"
    )
    assert resumed == whole[3:]


def test_a_checkpoint_of_other_data_is_refused(tmp_path, caplog):
    fit(tmp_path / "whole", max_steps=4)
    last = tmp_path / "whole" / "last.ckpt"
    with pytest.raises(ValueError, match=r"other data \(seed 5 there and 6 here\).* or start a new run"):
        fit(tmp_path / "part", max_steps=8, data=make_data(seed=6), ckpt_path=last)
    with pytest.raises(ValueError, match=r"\(sequences [0-9a-f]{64} there .* length"):
        fit(tmp_path / "part", max_steps=8, data=make_data(length=32), ckpt_path=last)
    fit(tmp_path / "part", max_steps=8, data=make_data(batch_size=1), ckpt_path=last)
    assert "with other batches than in the checkpoint's run: batch_size 2 there and 1" in caplog.text


def test_overfitting_repeats_the_same_batches(tmp_path):
    seen = fit(tmp_path, max_epochs=2, overfit_batches=2, limit_val_batches=0)
    assert seen[:2] == seen[2:]


def recorded(folder, rank=0):
    rows = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    return [row[1:] for row in rows if row[0] == rank]


def train(folder, kill_at=None):
    """Train to step 8: from the start, dying at the step given, or on from the last checkpoint."""
    last = None if kill_at else f"{folder}/last.ckpt"
    fit(folder, module=Recorder(f"{folder}/seen.jsonl", kill_at=kill_at), max_steps=8, ckpt_path=last)


def train_as_one_of_two(rank, folder):
    """Train to step 3 and, from the checkpoint, on to step 7."""
    with as_torchrun_says(rank):
        for steps, last in ((3, None), (7, f"{folder}/last.ckpt")):
            module = Recorder(f"{folder}/seen.jsonl")
            fit(folder, module=module, max_steps=steps, ckpt_path=last, devices=2, strategy="ddp")


def test_a_killed_run_goes_on_in_another_process(tmp_path):
    whole = fit(tmp_path / "whole", max_steps=8)
    code = f"from tests.training.test_data import train; train({str(tmp_path)!r}, {{}})"
    killed = OURS.run([sys.executable, "-c", code.format(3)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert recorded(tmp_path) == whole[:3]
    resumed = OURS.run([sys.executable, "-c", code.format(None)], capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    assert recorded(tmp_path) == whole


def test_two_processes_share_the_batches_and_resume(tmp_path):
    in_two_processes(train_as_one_of_two, tmp_path)
    both = [one + two for one, two in zip(*(recorded(tmp_path, rank) for rank in range(2)), strict=True)]
    assert both == fit(tmp_path / "whole", max_steps=7, data=make_data(batch_size=4))
