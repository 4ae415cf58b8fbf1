"""RankMonitor and TextSamples: what TensorBoard finds in a run's files, and that looking changes nothing."""

from __future__ import annotations

import html
import re
import shutil
import struct

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

from lowrank_pl import FinishRun, RankMonitor, TextSamples
from lowrank_pl.evaluate.generation import generate_samples
from lowrank_pl.factors.compression import compressed
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.ars import ARS
from lowrank_pl.methods.masks.objectives import DataTerms
from lowrank_pl.methods.masks.rescaled import Rescaled
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.report.rank_history import MOST, RankHistory, kept_by_group
from lowrank_pl.training.rank_monitor import _charts, _scalars
from tests.helpers.tiny_training import fit, make_data, make_learner

# Its writer's thread and file are closed by the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
KINDS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
PROMPTS = ["A list is", "a | b"]


def board(folder):
    return TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)


def read(folder):
    everything = {"images": 0, "tensors": 0, "scalars": 0, "histograms": 0}
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=everything).Reload()


def learn(folder, *, steps=6, ckpt_path=None, **changes):
    """Learn with everything that looks on; checkpoints of step 3 and of every third one are kept."""
    monitor = RankMonitor(every_n_steps=2, map_every_n_steps=3, histogram_every_n_steps=4)
    saving = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=3, save_top_k=0 if ckpt_path else -1)
    learner = make_learner(data_terms=DataTerms(cross_entropy=1.0, kl=0.5), **changes)
    fit(
        learner, max_steps=steps, val_check_interval=2, check_val_every_n_epoch=None, default_root_dir=folder,
        logger=[board(folder), CSVLogger(folder)], enable_checkpointing=True, ckpt_path=ckpt_path,
        callbacks=[monitor, TextSamples(PROMPTS, max_new_tokens=5), saving],
    )  # fmt: skip
    return learner, monitor


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *learn(folder)


@pytest.fixture(scope="module")
def events(run):
    return read(run[0])


def steps_of(points):
    return [point.step for point in points]


def test_every_scalar_is_there_at_the_steps_that_it_is_of(events):
    every_step = {"loss/total", "loss/cross_entropy", "loss/kl", "loss/budget", "keep/target", "keep/overshoot"}
    every_second = {f"{group}/{kind}" for group in ("kept by type", "share of budget") for kind in KINDS}
    every_second |= {"kept by block/000", "kept by block/001", "keep/dense modules"}
    for tag in every_step | {"learning/gradient norm"}:
        assert steps_of(events.Scalars(tag)) == [1, 2, 3, 4, 5, 6], tag
    for tag in every_second:
        assert steps_of(events.Scalars(tag)) == [0, 2, 4, 6], tag
    for tag in ("val/excess", "val/perplexity", "learning/rate", "learning/seconds a step"):
        assert steps_of(events.Scalars(tag)) == [2, 4, 6], tag
    assert steps_of(events.Scalars("keep/plan")) == [0, 3, 6]
    assert "epoch" not in events.Tags()["scalars"]


def test_what_scalars_say(events, run):
    _, learner, _ = run
    sizes = {name: layer.weight.numel() for name, layer in learner.layers.items()}
    ratios = {name: mask.ratio().clamp(max=1).item() for name, mask in learner.masks.items()}
    kept = {name: sizes[name] * ratios[name] for name in sizes}
    for group, names in {
        "kept by block/001": [name for name in sizes if ".1." in name],
        "kept by type/mlp.up_proj": [name for name in sizes if name.endswith("up_proj")],
    }.items():
        expected = sum(kept[name] for name in names) / sum(sizes[name] for name in names)
        assert events.Scalars(group)[-1].value == pytest.approx(expected, rel=1e-5)
    shares = [events.Scalars(f"share of budget/{kind}")[-1].value for kind in KINDS]
    assert sum(shares) == pytest.approx(1, rel=1e-5)
    assert events.Scalars("keep/plan")[-1].value == pytest.approx(learner.plan().keep_targeted)
    over = events.Scalars("keep/expected")[-1].value - events.Scalars("keep/target")[-1].value
    assert events.Scalars("keep/overshoot")[-1].value == pytest.approx(over, abs=1e-6)
    assert events.Scalars("learning/rate")[-1].value == pytest.approx(0.05)
    assert events.Scalars("learning/gradient norm")[-1].value > 0


def layout_of(events):
    (only,) = events.Tensors("custom_scalars__config__")
    return Layout.FromString(only.tensor_proto.string_val[0])


def test_masks_that_follow_from_the_budget_are_at_it_from_the_first_point_on(tmp_path):
    two_sided = {"mask": Rescaled(warmup=1), "decomposition": Decomposition("two_sided"), "keep": 0.6}
    learner, monitor = learn(tmp_path, steps=2, **two_sided)
    assert monitor.history.steps[0] == 0
    first = read(tmp_path).Scalars("keep/dense modules")[0]
    assert first.step == 0
    # All of them, before the learner has drawn an allocation.
    assert first.value <= len(learner.masks) / 2


def test_the_page_of_charts_shows_tags_that_exist_and_all_loss_terms_and_types(events):
    layout, tags = layout_of(events), events.Tags()["scalars"]
    shown = {}
    for group in layout.category:
        for chart in group.chart:
            patterns = list(chart.multiline.tag)
            assert patterns, chart.title
            shown[chart.title] = [tag for tag in tags if re.match("|".join(f"({p})" for p in patterns), tag)]
            assert len(shown[chart.title]) == len(patterns), chart.title
    groups = [group.title for group in layout.category]
    assert groups[1:] == ["Budget", "Ranks by type", "Ranks by block", "Loss", "Learning"]
    assert {*shown["kept fraction of each type"]} == {f"kept by type/{kind}" for kind in KINDS}
    terms = {tag for tag in tags if tag.startswith("loss/")}
    assert {*shown["total"], *shown["data terms"], *shown["penalties"]} == terms
    assert {*shown["data terms"]} == {"loss/cross_entropy", "loss/kl"}


def test_blocks_beyond_what_a_chart_can_show_become_a_band(run):
    _, learner, _ = run

    class Many:
        masks = dict.fromkeys([f"layers.{block}.mlp.up_proj" for block in range(13)])

    kind, tags = _charts(learner.trainer, Many)["Ranks by block"]["kept fraction of each block"]
    assert kind == "Margin"
    kept = kept_by_group(dict.fromkeys(Many.masks, 10), [block / 12 for block in range(13)])
    assert [_scalars(kept)[tag] for tag in tags] == pytest.approx([0.5, 0.1, 0.9])


def test_pictures_decode_and_come_when_due(events):
    assert steps_of(events.Images("ranks/map")) == [0, 3, 6]
    assert steps_of(events.Images("ranks/history")) == [3, 6]
    for tag in ("ranks/map", "ranks/history"):
        for image in events.Images(tag):
            picture = image.encoded_image_string
            assert picture.startswith(b"\x89PNG")
            width, height = struct.unpack(">II", picture[16:24])
            assert width > 400
            assert height > 200


def test_histograms_hold_every_gate_of_a_type(events, run):
    _, learner, _ = run
    for kind in KINDS:
        points = events.Histograms(f"soft masks/{kind}")
        assert steps_of(points) == [0, 4, 6]
        gates = torch.cat([mask.soft() for name, mask in learner.masks.items() if name.endswith(kind)])
        last = points[-1].histogram_value
        assert last.num == len(gates)
        assert last.sum == pytest.approx(gates.sum().item(), rel=1e-4)
        assert 0 <= last.min <= last.max <= 1


def cells(text):
    """Prompt, dense and compressed continuation of each row, without what Markdown needs."""
    rows = [[html.unescape(cell).split() for cell in row.strip("|").split("|")] for row in text.splitlines()[2:]]
    assert all(len(row) == 3 for row in rows)
    return rows


def test_texts_are_what_the_dense_model_and_the_hard_plan_say(events, run):
    learner, plan = run[1], run[1].plan()
    points = events.Tensors("samples/while learning/text_summary")
    assert steps_of(points) == [0, 2, 4, 6]
    texts = [point.tensor_proto.string_val[0].decode() for point in points]
    for step, text in zip(steps_of(points), texts, strict=True):
        assert f"hard plan after {step} steps" in text.splitlines()[0]
    model = tiny_model("llama")
    dense = generate_samples(model, byte_tokenizer(), PROMPTS, max_new_tokens=5)
    with compressed(model, plan, learner.store):
        small = generate_samples(model, byte_tokenizer(), PROMPTS, max_new_tokens=5)
    expected = [
        [text.replace("\n", " <br> ").split() for text in row] for row in zip(PROMPTS, dense, small, strict=True)
    ]
    assert cells(texts[-1].replace("<br>", " <br> ")) == expected
    assert [row[:2] for row in cells(texts[0])] == [row[:2] for row in cells(texts[-1])]


def test_settings_stand_in_the_runs_own_file_with_the_metrics_that_it_logs(events, run):
    folder, *_ = run
    assert [path.name for path in (folder / "tensorboard").iterdir() if path.is_dir()] == []
    found = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = parse_session_start_info_plugin_data(found).hparams
    assert settings["keep"].number_value == 0.5
    assert settings["mask"].string_value == ARA.name
    assert settings["steps"].number_value == 6
    assert "_hparams_/session_end_info" in events.summary_metadata
    assert (folder / "lightning_logs" / "version_0" / "metrics.csv").is_file()
    written = yaml.safe_load((folder / "tensorboard" / "hparams.yaml").read_text())
    assert (written["keep"], written["prepare.prune"]) == (0.5, "none")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # it is a copy of the folder
def test_a_resumed_run_has_every_point_once(run, events, tmp_path):
    # As one that was killed after step 6, with a checkpoint of step 3.
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    learner, monitor = learn(folder, ckpt_path=folder / "checkpoints" / "epoch=0-step=3.ckpt")
    assert all(torch.equal(mask.logits, run[1].masks[name].logits) for name, mask in learner.masks.items())
    again = read(folder)
    for tag in events.Tags()["scalars"]:
        assert steps_of(again.Scalars(tag)) == steps_of(events.Scalars(tag)), tag
    for tag in events.Tags()["images"]:
        assert steps_of(again.Images(tag)) == steps_of(events.Images(tag)), tag
    for tag in events.Tags()["histograms"]:
        assert steps_of(again.Histograms(tag)) == steps_of(events.Histograms(tag)), tag
    samples = "samples/while learning/text_summary"
    # The reader of the programming interface keeps void texts; the one that TensorBoard itself has does not.
    shown = plugin_event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert steps_of(shown.Tensors(samples)) == steps_of(events.Tensors(samples))
    assert monitor.history.steps == [0, 2, 4, 6]


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"mask": ARS()},
        {"mask": Rescaled(warmup=1), "decomposition": Decomposition("two_sided")},
    ],
    ids=["staircase", "ars", "rescaled"],
)
def test_looking_changes_nothing(tmp_path, changes):
    ends = []
    for looking in (True, False):
        torch.manual_seed(0)
        learner = make_learner(**changes)
        callbacks = [RankMonitor(1, 1, 1), TextSamples(max_new_tokens=3, every_n_steps=1)] if looking else []
        fit(
            learner, make_data(sequences=4), max_steps=3, default_root_dir=tmp_path,
            logger=board(tmp_path) if looking else False, callbacks=callbacks,
        )  # fmt: skip
        modes = [module.training for module in learner.model.modules()]
        ends.append((learner.state_dict(), torch.get_rng_state(), modes))
    (with_it, state, modes), (without, other_state, other_modes) = ends
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    assert torch.equal(state, other_state)
    assert modes == other_modes
    assert steps_of(read(tmp_path).Tensors("samples/while learning/text_summary")) == [0, 1, 2, 3]


class Endless(FinishRun):
    """One that exports nothing."""

    def on_fit_end(self, trainer, pl_module):
        pass


@pytest.mark.parametrize(
    ("finish", "sequences", "expected"), [(["A list is"], 3, ["A list is"]), ((), 3, None), ((), 0, [])]
)
def test_prompts_are_those_of_the_end_or_else_the_beginnings_of_windows(tmp_path, finish, sequences, expected):
    samples, data = TextSamples(max_new_tokens=2), make_data(validation_sequences=sequences)
    ending = [Endless(prompts=finish)] if sequences else []
    fit(
        make_learner(),
        data,
        max_steps=1,
        limit_val_batches=sequences,
        default_root_dir=tmp_path,
        logger=board(tmp_path),
        callbacks=[samples, *ending],
    )
    if expected is None:
        heads = data.validation_sequences[:, :12].tolist()
        expected = [data.tokenizer.decode(head, skip_special_tokens=True).strip() for head in heads]
    assert list(samples.state_dict()["dense"]) == expected


def test_mistakes_surface_before_learning(tmp_path):
    for make, name in ((RankMonitor, "histogram_every_n_steps"), (TextSamples, "max_new_tokens")):
        with pytest.raises(ValueError, match=f"{name} is 0: expected a whole number of at least 1"):
            make(**{name: 0})
    learner = make_learner()
    with pytest.raises(ValueError, match="the prompt '' has no token: expected a text to continue"):
        fit(learner, max_steps=1, logger=board(tmp_path), callbacks=[TextSamples([""])])
    message = r"'A list' .* 4096, .* 2048 positions: give a shorter prompt or fewer max_new_tokens"
    with pytest.raises(ValueError, match=message):
        fit(learner, max_steps=1, logger=board(tmp_path), callbacks=[TextSamples(["A list"], max_new_tokens=4096)])


def test_a_long_record_is_thinned_and_no_record_can_not_be_drawn():
    history = RankHistory()
    with pytest.raises(ValueError, match="no point: expected at least one"):
        history.figure()
    for step in range(3 * MOST):
        history.add(step, kept_by_group({"h.0.up": 1, "lm_head": 1}, [step / 3 / MOST, 1.0]))
        history.add(step, kept_by_group({"h.0.up": 1, "lm_head": 1}, [0.0, 0.0]))  # a step is recorded once
    assert MOST / 2 <= len(history.steps) <= MOST
    assert history.rows["kinds"]["up"] == [step / 3 / MOST for step in history.steps]
    assert [axis.get_ylabel() for axis in history.figure().axes[:2]] == ["module type", "block"]


def test_experts_are_charted_by_type_with_the_ones_that_keep_least_and_most():
    kept = kept_by_group({"h.0.experts.0.up": 10, "h.0.experts.1.up": 10, "h.1.q": 10}, [0.2, 2.0, 0.5])
    found = {tag: value for tag, value in _scalars(kept).items() if "expert" in tag and "budget" not in tag}
    assert found == {
        "kept by type/experts.up": 0.6,
        "kept by expert/experts.up least": 0.2,
        "kept by expert/experts.up most": 1.0,
    }
