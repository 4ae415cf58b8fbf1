"""Models that a device has no room for: the same scores a layer at a time, and a run's end that works so."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from lowrank_pl import FinishRun, RankPlan, load_compressed, perplexity
from lowrank_pl.evaluate.generation import generate_samples
from lowrank_pl.factors.compression import compressed
from lowrank_pl.methods.refit.refitting import Refit
from lowrank_pl.models.base import load_base
from lowrank_pl.models.eval_mode import input_device
from lowrank_pl.models.offload import exceeds_memory, streamed, too_large
from lowrank_pl.models.tiny import FAMILIES, byte_tokenizer, tiny_model
from tests.helpers.rounded_models import round_model
from tests.helpers.tiny_training import fit, make_learner, validated
from tests.helpers.unchanged import assert_untouched, state

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
CPU = torch.device("cpu")
WINDOWS = torch.arange(96).view(3, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_computes_the_same_and_is_as_before(family):
    model = tiny_model(family)
    whole, text = perplexity(model, WINDOWS), generate_samples(model, byte_tokenizer(), ["A"], max_new_tokens=3)
    before = state(model)
    with streamed(model, CPU):
        assert all(parameter.is_meta for parameter in model.parameters())
        assert input_device(model) == CPU
        assert perplexity(model, WINDOWS).nats == whole.nats
        assert generate_samples(model, byte_tokenizer(), ["A"], max_new_tokens=3) == text
    assert_untouched(model, before)
    assert perplexity(model, WINDOWS).nats == whole.nats


def test_codes_of_rounded_layers_are_streamed_too():
    model = round_model(tiny_model("llama"))
    whole, before = perplexity(model, WINDOWS), state(model)
    with streamed(model, CPU):
        assert model.lm_head.weight_packed.is_meta
        assert perplexity(model, WINDOWS).nats == whole.nats
    assert_untouched(model, before)


def test_an_error_inside_leaves_the_model_whole_and_no_device_changes_nothing():
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(KeyError), streamed(model, CPU):
        raise KeyError
    assert_untouched(model, before)
    with streamed(model, None):
        assert not model.lm_head.weight.is_meta


def test_there_is_room_for_two_of_a_model_or_none(monkeypatch):
    assert not too_large(40e9, 80e9)
    assert too_large(41e9, 80e9)
    assert not exceeds_memory(1e15, CPU)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=30))
    gpu = torch.device("cuda", 0)
    assert [exceeds_memory(size, gpu) for size in (5, 6)] == [False, True]
    assert [exceeds_memory(size, gpu, ever=True) for size in (15, 16)] == [False, True]


@pytest.mark.parametrize("merge", [False, True])
def test_a_run_that_is_streamed_ends_as_any_other(tmp_path, merge, caplog):
    ends = {}
    for way in (None, True):
        finish = FinishRun(prompts=["A list is"], max_new_tokens=3, baselines=["uniform"], merge=merge, streamed=way)
        with caplog.at_level("WARNING"):
            fit(make_learner(), max_steps=2, default_root_dir=tmp_path / str(way), callbacks=[finish])
        ends[way] = finish.finished
    for one, other in zip(ends[None].rows, ends[True].rows, strict=True):
        assert (one.name, one.kept_targeted, one.bytes) == (other.name, other.kept_targeted, other.bytes)
        assert other.perplexity == pytest.approx(one.perplexity, rel=1e-5)
    assert ends[True].report.verified
    assert len(ends[None].samples) == 1
    assert ends[True].samples == []
    assert "stay in main memory and are scored one layer at a time on cpu" in caplog.text
    summary = json.loads((tmp_path / "True" / "summary.json").read_text())
    load = load_base if merge else load_compressed
    score = perplexity(load(str(tmp_path / "True" / "model")), validated())
    assert summary["learned"]["perplexity"] == pytest.approx(score.perplexity, rel=1e-5)


def test_pivots_can_be_chosen_elsewhere(tmp_path):
    finish = FinishRun(streamed=True)
    learner = make_learner()
    fit(learner, max_steps=1, default_root_dir=tmp_path, callbacks=[finish])
    plan, model = RankPlan.load(tmp_path / "plan.json"), tiny_model("llama")
    assert plan.pivoted_modules
    with compressed(model, plan, learner.store) as here:
        expected = perplexity(here, WINDOWS)
    with compressed(model, plan, learner.store, device=CPU) as there:
        assert perplexity(there, WINDOWS).nats == expected.nats
        # Indices of pivots are no parameters: they move with hooks of their own.
        with streamed(there, CPU):
            assert perplexity(there, WINDOWS).nats == expected.nats


def test_a_refit_that_there_is_no_room_for_is_refused_before_the_base_is_loaded(tmp_path):
    learner = make_learner()
    finish = FinishRun(refit=Refit(sequences=4), streamed=True)
    with pytest.raises(ValueError, match=r"refit .*: leave the refit out with --finish.refit null"):
        fit(learner, max_steps=1, default_root_dir=tmp_path, callbacks=[finish])
    assert learner.model is None


def test_the_plan_is_on_disk_before_the_base_is_loaded_again(tmp_path, monkeypatch):
    def nothing(*_):
        raise MemoryError

    monkeypatch.setattr(FinishRun, "_dense_model", nothing)
    learner = make_learner()
    with pytest.raises(MemoryError):
        fit(learner, max_steps=1, default_root_dir=tmp_path, callbacks=[FinishRun()])
    assert RankPlan.load(tmp_path / "plan.json") == learner.plan()
