"""RankMonitor, FinishRun and the progress bar: what is logged, what a run's folder holds, what surfaces early."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowrank_pl import FinishRun, RankMonitor, RankPlan, load_compressed, perplexity
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.compression import compressed
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.run import allocate_on
from lowrank_pl.methods.quantize import Rounding
from lowrank_pl.methods.refit.refitting import Refit
from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.training.checkpointing import read_checkpoint
from lowrank_pl.training.finish_run import ScoreText
from lowrank_pl.training.interrupt import StopBetweenBatches
from lowrank_pl.training.lightning_internals import RunCheckpoint
from lowrank_pl.training.progress import LearningBar
from tests.helpers.hub_server import logged_in
from tests.helpers.tiny_training import fit, make_data, make_learner

ROWS = ["dense", "uniform", "learned"]
FIGURES = {"perplexity", "excess_nats", "kept_targeted", "kept_model", "bytes", "seconds"}

# Its writer's thread and file are closed by the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps with all callbacks, and what it printed is left to others."""
    folder = tmp_path_factory.mktemp("run")
    logger = TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)
    finish = FinishRun(prompts=["A list is"], max_new_tokens=4, json=folder / "figures.json")
    saving = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_top_k=0, save_last=True)
    learner, data = make_learner(), make_data()
    monitor = RankMonitor(every_n_steps=2, map_every_n_steps=3)
    trainer = fit(
        learner, data, max_steps=4, accumulate_grad_batches=2, logger=logger, default_root_dir=folder,
        enable_checkpointing=True, callbacks=[monitor, finish, saving],
    )  # fmt: skip
    return folder, learner, data, finish, trainer


@pytest.fixture(scope="module")
def events(run):
    accumulator = EventAccumulator(str(run[0] / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    return accumulator.Reload()


class Failing(Callback):
    """Fails once an epoch is over, as early stopping without its metric does."""

    def on_train_epoch_end(self, trainer, pl_module):
        raise RuntimeError("no such metric")


def test_what_fails_after_the_last_step_leaves_a_checkpoint_and_a_plan(tmp_path):
    saving = RunCheckpoint(tmp_path / "checkpoints", every_n_train_steps=50, save_last=True)
    learner = make_learner()
    with pytest.raises(RuntimeError, match="no such metric"):
        fit(
            learner, max_steps=3, default_root_dir=tmp_path, enable_checkpointing=True,
            callbacks=[FinishRun(), saving, Failing()],
        )  # fmt: skip
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert RankPlan.load(tmp_path / "plan.json") == learner.plan()


def test_checkpoints_of_lightnings_own_callback_go_on():
    assert RunCheckpoint(every_n_train_steps=2).state_key == ModelCheckpoint(every_n_train_steps=2).state_key


def test_ranks_by_type_and_block_are_logged_once_a_step(events):
    tags = events.Tags()["scalars"]
    assert {
        "kept by type/self_attn.q_proj",
        "kept by type/mlp.down_proj",
        "kept by block/000",
        "kept by block/001",
    } <= {*tags}
    assert {"keep/dense modules", "keep/expected", "keep/target", "loss/total", "loss/budget", "val/perplexity"} <= {
        *tags
    }
    # Two batches make a step: both end with the same number of steps, one point is enough.
    assert [event.step for event in events.Scalars("kept by block/000")] == [0, 2, 4]
    values = [event.value for event in events.Scalars("kept by block/000")]
    assert all(0 < value <= 1 for value in values)


def test_rank_maps_are_drawn_at_the_start_when_due_and_at_the_end(events):
    images = events.Images("ranks/map")
    assert [image.step for image in images] == [0, 3, 4]
    assert images[0].encoded_image_string.startswith(b"\x89PNG")


def test_settings_final_scores_and_samples_reach_the_board(events, run):
    final = events.Scalars("final/perplexity")[-1].value
    learned = next(row for row in run[3].finished.rows if row.name == "learned")
    assert final == pytest.approx(learned.perplexity, rel=1e-5)
    assert any(tag.startswith("_hparams_") for tag in events.Tags()["tensors"] + [*events.summary_metadata])
    assert any("samples" in tag for tag in events.Tags()["tensors"])


@pytest.fixture(scope="module")
def summary(run):
    return json.loads((run[0] / "summary.json").read_text())


def test_the_summary_has_figures_of_every_model(summary):
    assert [name for name in summary if name != "facts"] == ROWS
    assert all(set(summary[name]) == FIGURES for name in ROWS)
    assert summary["dense"]["excess_nats"] == 0


def test_the_summary_says_how_models_were_scored_and_what_took_how_long(summary):
    assert summary["facts"]["protocol"] == {"text": "validation sequences of python-docs", "windows": 3, "length": 32}
    assert set(summary["facts"]["seconds"]) == {"factors", "learning"}


def test_the_figures_are_written_where_they_were_asked_for(run, summary):
    assert json.loads((run[0] / "figures.json").read_text()) == summary


def test_the_plan_in_the_folder_is_the_learned_one(run, summary):
    plan = RankPlan.load(run[0] / "plan.json")
    assert plan.modules == run[1].plan().modules
    assert summary["learned"]["kept_targeted"] == pytest.approx(plan.keep_targeted)
    assert plan.keep_targeted <= 0.5


def test_the_model_in_the_folder_is_the_one_that_was_scored(run, summary):
    score = perplexity(load_compressed(run[0] / "model"), run[2].validation_sequences)
    assert summary["learned"]["perplexity"] == pytest.approx(score.perplexity, rel=1e-6)


def test_the_folder_holds_a_picture_and_nothing_half_written(run):
    assert (run[0] / "rank_map.png").read_bytes().startswith(b"\x89PNG")
    assert not [*run[0].rglob("*.tmp")]


def test_the_terminal_is_told_what_and_where(run):
    folder, _, _, finish, _ = run
    text = finish.finished.text(folder)
    assert text.splitlines()[0].split()[:2] == ["model", "perplexity"]
    for place in ("model", "plan.json", "summary.json", "rank_map.png", "report.html"):
        assert str(folder / place) in text
    assert "'A list is'" in text
    assert "| A list is |" in " ".join((folder / "model" / "README.md").read_text().split())


@pytest.fixture(scope="module")
def finished_again(run, tmp_path_factory):
    """The folder and the end of a run that goes on from the checkpoint of one that had come to its end."""
    saving = ModelCheckpoint(run[0] / "checkpoints", every_n_train_steps=2, save_top_k=0, save_last=True)
    folder, finish = tmp_path_factory.mktemp("again"), FinishRun(merge=True)
    fit(
        make_learner(), max_steps=4, accumulate_grad_batches=2, default_root_dir=folder, enable_checkpointing=True,
        callbacks=[finish, RankMonitor(), saving], ckpt_path=run[0] / "checkpoints" / "last.ckpt",
    )  # fmt: skip
    return folder, finish.finished


def test_a_finished_run_is_finished_again_from_its_checkpoint(run, finished_again):
    folder, finished = finished_again
    assert RankPlan.load(folder / "plan.json").modules == RankPlan.load(run[0] / "plan.json").modules
    assert "import lowrank_pl" not in (folder / "model" / "README.md").read_text()
    assert finished.report.merged


def test_seconds_of_learning_are_counted_on_from_a_checkpoint(summary, finished_again):
    again = json.loads((finished_again[0] / "summary.json").read_text())["facts"]["seconds"]["learning"]
    assert 0 < again <= summary["facts"]["seconds"]["learning"]


def test_baselines_that_measure_and_differentiate_are_allocated_on_the_runs_own_factors(tmp_path):
    finish = FinishRun(baselines=["zs_svd", "strs", "svdllm_v2"])
    learner, data = make_learner(), make_data(statistics_length=48, statistics_sequences=5)
    fit(learner, data, max_steps=1, default_root_dir=tmp_path, callbacks=[finish])
    rows = {row.name: row for row in finish.finished.rows}
    assert list(rows) == ["dense", "zs_svd", "strs", "svdllm_v2", "learned"]
    model = tiny_model("llama")
    subject = Subject(model, data.tokenizer, data.statistics_sequences)
    for name in ("zs_svd", "strs", "svdllm_v2"):
        plan = allocate_on(learner.store, subject, learner.budget, make_allocator(name))
        with compressed(model, plan, learner.store):
            score = perplexity(model, data.validation_sequences)
        assert rows[name].perplexity == pytest.approx(score.perplexity, rel=1e-5)
        assert rows[name].kept_targeted == plan.keep_targeted
        assert rows[name].seconds > learner.seconds["factors"]


def test_a_baseline_of_two_sided_factors_goes_with_two_sided_factors(tmp_path):
    finish = FinishRun(baselines=["fisher"])
    learner = make_learner(decomposition=Decomposition("two_sided"), store=tmp_path / "store")
    fit(learner, max_steps=1, default_root_dir=tmp_path / "run", callbacks=[finish])
    assert [row.name for row in finish.finished.rows] == ["dense", "fisher", "learned"]


def test_a_baseline_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no allocator is called 'unifrom': expected one of uniform"):
        FinishRun(baselines=["unifrom"])


@pytest.mark.parametrize("name", ["every_n_steps", "map_every_n_steps"])
def test_a_monitor_needs_a_step_to_look_at(name):
    with pytest.raises(ValueError, match=f"{name} is 0: expected a whole number of at least 1"):
        RankMonitor(**{name: 0})


@pytest.mark.parametrize(
    ("finish", "data", "message"),
    [
        ({"baselines": ["uniform", "fisher"]}, {}, "baseline fisher .* 'whitened': expected two_sided"),
        ({"score": ScoreText("./none.txt")}, {}, r"text '\./none\.txt'"),
        ({}, {"validation_sequences": 0}, r"--finish\.score\.text or --data\.validation\.sequences"),
        ({"prompts": ["A", ""]}, {}, "the prompt '' has no token"),
    ],
    ids=["baseline", "absent text", "no text", "prompt"],
)
def test_a_mistake_surfaces_before_the_base_is_loaded(finish, data, message):
    learner = make_learner()
    with pytest.raises(ValueError, match=message):
        fit(learner, make_data(**data), max_steps=1, callbacks=[FinishRun(**finish)])
    assert learner.model is None


def test_a_folder_of_other_files_is_refused_before_the_base_is_loaded(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    learner = make_learner()
    with pytest.raises(ValueError, match=f"{tmp_path.name}/model' holds other files .*: name a new folder"):
        fit(learner, max_steps=1, default_root_dir=tmp_path, callbacks=[FinishRun()])
    assert learner.model is None


@pytest.mark.parametrize(
    ("finish", "message"),
    [
        (FinishRun(ScoreText("python-docs", length=4096)), r"4096 tokens .* 2048 positions: use shorter"),
        (FinishRun(prompts=["A"], max_new_tokens=2048), r"2048 positions: give a shorter prompt or fewer max_new"),
    ],
)
def test_text_too_long_for_the_model_is_refused_before_learning(finish, message):
    learner = make_learner()
    with pytest.raises(ValueError, match=message):
        fit(learner, max_steps=1, callbacks=[finish])
    assert learner.global_step == 0


def test_settings_of_a_text_need_the_text():
    with pytest.raises(ValueError, match=r"score.length is 2048 .* without a score.text: name one"):
        ScoreText(length=2048)


def test_text_to_score_that_is_learned_from_is_warned_of(caplog):
    data = make_data()
    FinishRun(ScoreText(data.learning.text, data.learning.length, sequences=2))._protocol(data)
    assert caplog.messages[-1].startswith("2 of 2 sequences to score hold text")


def test_factors_are_made_where_there_is_float64():
    learner = make_learner()
    learner._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("mps")), precision="32-true")
    with pytest.raises(ValueError, match=r"Apple's GPUs lack float64, .*: use --trainer.accelerator cpu"):
        learner.setup("fit")


def test_the_bar_counts_the_steps_of_the_whole_run(capsys):
    fit(make_learner(), max_epochs=2, limit_train_batches=4, enable_progress_bar=True, callbacks=[LearningBar()])
    shown = capsys.readouterr().err
    assert "8/8" in shown
    assert "val/excess=" in shown
    assert "v_num" not in shown


def test_nothing_is_finished_after_an_error(tmp_path):
    class Broken(FinishRun):
        def on_train_batch_end(self, *_):
            raise torch.cuda.OutOfMemoryError("no memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        fit(make_learner(), max_steps=2, default_root_dir=tmp_path, callbacks=[Broken()])
    assert [*tmp_path.iterdir()] == []


class Pressing(Callback):
    """Presses Ctrl-C in the middle of a step, and notes what still happens."""

    def __init__(self, times):
        self.times, self.seen = times, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for _ in range(self.times):
            signal.raise_signal(signal.SIGINT)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(trainer.global_step)


@pytest.mark.parametrize(("times", "steps"), [(1, [1]), (2, [])])
def test_ctrl_c_waits_for_the_end_of_the_step_and_a_second_one_does_not(times, steps):
    before, pressing = signal.getsignal(signal.SIGINT), Pressing(times)
    try:
        with pytest.raises(SystemExit):
            fit(make_learner(), max_steps=4, callbacks=[pressing, StopBetweenBatches()])
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressing.seen == steps


def test_ctrl_c_in_the_last_step_still_stops_and_the_handler_is_put_back():
    before, stopping = signal.getsignal(signal.SIGINT), StopBetweenBatches()
    try:
        with pytest.raises(SystemExit):
            fit(make_learner(), max_steps=1, callbacks=[Pressing(1), stopping])
    finally:
        signal.signal(signal.SIGINT, before)
    fit(make_learner(), max_steps=1, callbacks=[stopping])
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_finished_model_goes_to_the_hub_with_its_scores(tmp_path, monkeypatch, capsys):
    with logged_in(monkeypatch) as hub:
        finish = FinishRun(push_to_hub="me/small", baselines=(), any_size=True)
        fit(make_learner(), max_steps=1, default_root_dir=tmp_path, callbacks=[finish])
    arrived = hub.branches["me/small", "main"]
    assert arrived["README.md"] == (tmp_path / "model" / "README.md").read_bytes()
    assert b"model-index:" in arrived["README.md"]
    assert f"hub          {hub.url}/me/small/commit/" in capsys.readouterr().out
    nested = {f"nested/{file.name}" for file in (tmp_path / "model" / "nested").iterdir()}
    assert nested
    assert nested <= arrived.keys()
    assert b"The subfolder `nested` holds" in arrived["README.md"]
    assert load_compressed(tmp_path / "model", keep=0.3).num_parameters() > 0


def test_a_run_rounds_at_its_end(tmp_path, caplog):
    finish = FinishRun(baselines=[], rounding=Rounding(bits=4))
    fit(make_learner(), max_steps=1, default_root_dir=tmp_path, callbacks=[finish])
    rows = {row.name: row for row in finish.finished.rows}
    assert rows["learned"].bits == (4, 8)
    assert rows["learned"].bytes < 0.4 * rows["learned, not rounded"].bytes
    model = load_compressed(tmp_path / "model")
    assert perplexity(model, finish.protocol.sequences).perplexity == pytest.approx(rows["learned"].perplexity)
    # The page finds the singular values of the factors that were rounded.
    assert "damaged" not in caplog.text


OTHERS = {"merge": {"merge": True}, "refit": {"refit": Refit()}, "rounding": {"rounding": Rounding()}}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_does_not_go_with_any_size_is_refused_before_the_run(other):
    with pytest.raises(ValueError, match="leave out any_size"):
        FinishRun(any_size=True, **other)


def test_a_name_that_is_no_repository_is_refused_before_the_run():
    with pytest.raises(ValueError, match="can't be a repository of the hub"):
        FinishRun(push_to_hub="a/b/c")
