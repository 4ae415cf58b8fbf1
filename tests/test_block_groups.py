"""Statistics of a few blocks at a time: the same numbers, within a budget, and little lost when killed."""

from __future__ import annotations

import logging

import pytest
import torch

from lowrank_pl import collected, gradients
from lowrank_pl.block_groups import block_groups, memory_size
from lowrank_pl.prepare import statistics_of
from lowrank_pl.targets import Target, decoder_blocks, find_targets
from lowrank_pl.tiny_models import tiny_model

NEEDS = ("inputs", "output_gradients", "weight_gradients")


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
def measure(windows, tokenizer, tmp_path):
    """Collect all statistics of a model in a new folder."""

    def run(model, folder, **settings):
        targets = find_targets(model).modules
        statistics = statistics_of(model, windows[:3], tokenizer, directory=tmp_path / folder, **settings)
        return statistics.stores(NEEDS, targets, "sampled")

    return run


def assert_equal_stores(one, other, targets):
    for target in targets:
        for need, store in one.items():
            name = target.group if need == "inputs" else target.name
            keys = ("mean", "mean_squares") if need == "weight_gradients" else ("second_moment",)
            assert store.fingerprint == other[need].fingerprint
            for key in keys:
                assert torch.equal(store.read(name, key), other[need].read(name, key)), (need, name, key)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("again", [False, True])
def test_groups_and_recomputed_blocks_give_the_same_numbers(measure, family, again, caplog):
    model = tiny_model(family, layers=3)
    whole = measure(model, "whole")
    with caplog.at_level(logging.INFO, logger="lowrank_pl.collected"):
        parts = measure(model, "parts", memory=1, gradient_checkpointing=again)
    assert "output gradients: blocks 2 to 2, group 3 of 3" in caplog.messages
    assert_equal_stores(whole, parts, find_targets(model).modules)
    assert not model.training
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_killed_collection_loses_one_group(measure, llama, monkeypatch):
    real, asked = collected.measure_gradients, []

    def collect(model, windows, outputs, weights, **settings):
        asked.append({target.block for target in (*outputs, *weights)})
        if len(asked) == 2:
            raise KeyboardInterrupt
        real(model, windows, outputs, weights, **settings)

    monkeypatch.setattr(collected, "measure_gradients", collect)
    with pytest.raises(KeyboardInterrupt):
        measure(llama, "s", memory=1)
    measure(llama, "s", memory=1)
    assert asked == [{0}, {1}, {1}, {0}, {1}]  # moments; after the kill only block 1; weight gradients


@pytest.mark.parametrize("again", [False, True])
def test_blocks_before_the_first_watched_keep_nothing(llama, windows, again):
    blocks, graphs = decoder_blocks(llama)[1], []
    for block in blocks:
        block.input_layernorm.register_forward_hook(lambda _, __, output: graphs.append(output.requires_grad))
    last = [target for target in find_targets(llama).modules if target.block == 1]
    graphs.clear()
    gradients.collect_gradients(llama, windows[:1], moments=last, gradient_checkpointing=again)
    assert graphs == [False, True, *[True] * again]  # run again in the backward pass
