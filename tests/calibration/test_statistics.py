"""Statistics of a few blocks at a time: the same numbers, within a budget, and little lost when killed."""

from __future__ import annotations

import logging

import pytest
import torch

from lowrank_pl.calibration import blockwise, hidden_states
from lowrank_pl.calibration import statistics as collected
from lowrank_pl.calibration.build import statistics_of
from lowrank_pl.calibration.gradients import GradientMoments, collect_gradients
from lowrank_pl.calibration.measures import Passes
from lowrank_pl.calibration.statistics import block_groups
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.models.lazy import NotBlockwiseError
from lowrank_pl.models.targets import Target, decoder_blocks, find_targets
from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.utils.formatting import memory_size
from tests.helpers.unchanged import assert_untouched, state

NEEDS = ("inputs", "output_gradients", "weight_gradients")
KEYS = {"gradient_norms": ("norms",), "weighted_moments": ("inputs", "outputs")}
KEYS |= {"weight_gradients": ("mean",), "weight_fisher": ("outputs", "inputs")}


def maps(*blocks):
    return [Target(f"{place}", block, "map", (1, 1), f"{place}") for place, block in enumerate(blocks)]


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(None, [5]), (100, [5]), (50, [5]), (49, [3, 2]), (30, [3, 2]), (29, [2, 1, 2]), (1, [2, 1, 2])],
)
def test_groups_are_as_many_blocks_as_fit(memory, expected):
    targets = maps(0, 0, 1, 2, 2)
    groups = block_groups(targets, dict.fromkeys(targets, 10), memory)
    assert [len(group) for group in groups] == expected
    assert [target for group in groups for target in group] == targets


def test_a_block_that_is_too_large_is_told(caplog):
    targets = maps(0, 1)
    block_groups(targets, dict.fromkeys(targets, 2 * 10**9), 10**9)
    assert caplog.messages == [
        "one block alone takes 2 GB, more than the 1 GB of the memory budget: going block by block"
    ]


@pytest.mark.parametrize("text", ["", "much", "0", "-1GB", "8XB", "1.2.3"])
def test_no_amount_of_memory(text):
    with pytest.raises(ValueError, match=r"is no amount of memory: expected a positive number and a unit, such as 8GB"):
        memory_size(text)


@pytest.fixture
def measure(sequences, tokenizer, tmp_path):
    """Collect all statistics of a model in a new folder."""

    def run(model, folder, needs=NEEDS, **settings):
        targets = find_targets(model).modules
        statistics = statistics_of(
            Subject(model, tokenizer, sequences[:3]), directory=tmp_path / folder, batch_size=2, **settings
        )
        found = statistics.stores(needs, targets, "sampled")
        if needs != NEEDS:
            found["gradient_norms"] = statistics.collect("gradient_norms", targets, "sampled")
        return found

    return run


def assert_equal_stores(one, other, targets):
    for target in targets:
        for need, store in one.items():
            name = target.group if need == "inputs" else target.name
            assert store.fingerprint == other[need].fingerprint
            for key in KEYS.get(need, ("second_moment",)):
                assert torch.equal(store.read(name, key), other[need].read(name, key)), (need, name, key)


def unable(*_, **__):
    raise NotBlockwiseError("its blocks share more than the hidden state")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("way", ["blocks", "groups", "groups that recompute"])
def test_blocks_and_groups_of_them_give_the_same_numbers(measure, family, way, caplog, monkeypatch):
    model = tiny_model(family, layers=3)
    whole = measure(model, "whole")
    before = state(model)
    if way != "blocks":
        monkeypatch.setattr(collected, "pass_through_blocks", unable)
    with caplog.at_level(logging.INFO, logger="lowrank_pl.calibration.statistics"):
        parts = measure(model, "parts", memory=1, gradient_checkpointing=way == "groups that recompute")
    assert "output gradients are measured block by block, in 1e-09 GB at a time" in caplog.messages
    grouped = "output gradients take 3 passes through the whole model: its blocks share more than the hidden state"
    for said in ("output gradients: blocks 2 to 2, group 3 of 3", grouped):
        assert (said in caplog.messages) == (way != "blocks")
    assert_equal_stores(whole, parts, find_targets(model).modules)
    assert not model.training
    assert_untouched(model, before)


def test_weighted_moments_and_norms_are_the_same_too(measure, llama):
    needs = ("weighted_moments", "weight_fisher")
    whole, parts = measure(llama, "whole", needs), measure(llama, "parts", needs, memory=1)
    assert [*whole] == ["weighted_moments", "weight_fisher", "gradient_norms"]
    assert_equal_stores(whole, parts, find_targets(llama).modules)


def test_what_memory_has_no_room_for_is_measured_block_by_block(measure, llama, monkeypatch):
    asked, kept_from, real = [], [], blockwise.BlockwiseForward
    monkeypatch.setattr(collected, "free_memory", lambda device: asked.append(device) or 40_000)
    monkeypatch.setattr(
        blockwise, "BlockwiseForward", lambda *a, **k: kept_from.append(k["keep_from"]) or real(*a, **k)
    )
    whole = measure(llama, "parts")
    # Sums of inputs, of gradients by outputs and by weights of both blocks take more than three quarters of 40 kB.
    assert kept_from == [None, -1, -1]
    assert asked == 3 * [llama.device]
    monkeypatch.setattr(collected, "free_memory", lambda device: 10**9)
    parts = measure(llama, "whole")
    assert len(kept_from) == 3
    assert_equal_stores(whole, parts, find_targets(llama).modules)
    # The forward passes count as time of what is measured on the way back.
    names = [target.name for target in find_targets(llama).modules]
    assert all(float(whole["output_gradients"].notes(name)["seconds"]) > 0 for name in names)


def test_hidden_states_wait_on_disk_where_they_would_fill_main_memory(measure, llama, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hidden_states, "available_memory", lambda: 1000)
    with caplog.at_level(logging.INFO, logger="lowrank_pl.calibration.blockwise"):
        measure(llama, "parts", memory=1)
    said = [message for message in caplog.messages if message.startswith("hidden states of all sequences")]
    # The output of one block; for gradients the inputs of both blocks, the output of the last, and a gradient.
    one, back = (f"hidden states of all sequences, {count} at a time: 0.00 GB (disk)" for count in (1, 4))
    assert said == [one, back, back]
    assert not list((tmp_path / "home").rglob("*"))


def test_a_block_wise_pass_that_fails_half_way_leaves_the_rest_to_groups(measure, llama, monkeypatch):
    asked, real, at = [], collected.collect_input_moments, blockwise.BlockwiseForward.at

    def stop(self, block):
        if block == 1:
            raise NotBlockwiseError("its blocks share more than the hidden state")
        return at(self, block)

    def collect(model, targets, passes):
        asked.append({target.block for target in targets})
        return real(model, targets, passes)

    monkeypatch.setattr(blockwise.BlockwiseForward, "at", stop)
    monkeypatch.setattr(collected, "collect_input_moments", collect)
    parts = measure(llama, "parts", memory=1)
    assert asked == [{0}, {1}]
    assert_equal_stores(measure(llama, "whole"), parts, find_targets(llama).modules)


@pytest.mark.parametrize("by_block", [False, True])
def test_a_killed_collection_loses_one_group(measure, llama, monkeypatch, by_block):
    asked, real, backward = [], collected.collect_gradients, blockwise.BlockwiseBackward.measure
    block_of = {target.name: target.block for target in find_targets(llama).modules}

    def note(names):
        asked.append({block_of[name] for name in names})
        if len(asked) == 2:
            raise KeyboardInterrupt

    def collect(kind, model, targets, *args, **settings):
        note(target.name for target in targets)
        return real(kind, model, targets, *args, **settings)

    def measured(self, measures, **order):
        note(measures)
        backward(self, measures, **order)

    monkeypatch.setattr(collected, "collect_gradients", collect)
    monkeypatch.setattr(blockwise.BlockwiseBackward, "measure", measured)
    if not by_block:
        monkeypatch.setattr(collected, "pass_through_blocks", unable)
    with pytest.raises(KeyboardInterrupt):
        measure(llama, "s", memory=1)
    measure(llama, "s", memory=1)
    # Moments; after the kill the remaining block in a pass through the whole model; weight gradients.
    assert asked == ([{1}, {0}, {0}, {1}, {0}] if by_block else [{0}, {1}, {1}, {0}, {1}])


@pytest.mark.parametrize("again", [False, True])
def test_blocks_before_the_first_watched_keep_nothing(llama, sequences, again):
    blocks, graphs = decoder_blocks(llama)[1], []
    for block in blocks:
        block.input_layernorm.register_forward_hook(lambda _, __, output: graphs.append(output.requires_grad))
    last = [target for target in find_targets(llama).modules if target.block == 1]
    graphs.clear()
    collect_gradients(GradientMoments, llama, last, Passes(sequences[:1], gradient_checkpointing=again))
    assert graphs == [False, True, *[True] * again]  # run again in the backward pass
