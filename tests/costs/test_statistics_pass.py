"""The statistics pass beside the frozen step: what is measured, never how fast."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.costs.statistics_pass import measure_statistics


def test_both_passes_go_through_the_same_sequences(llama):
    seen = []
    handle = llama.model.layers[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:2]))
    row = measure_statistics(llama, torch.arange(48).view(3, 16), batch_size=2, repeats=1)
    handle.remove()
    # The pass that finds the targets, then two turns of both, each two batches.
    assert [tuple(shape) for shape in seen[1:]] == [(2, 16), (1, 16)] * 4
    assert (row["sequences"], row["length"], row["batch_size"]) == (3, 16, 2)


def test_the_ratio_is_that_of_the_fastest_turns(llama):
    row = measure_statistics(llama, torch.arange(32).view(2, 16), repeats=1)
    assert row["ratio_to_frozen"] == pytest.approx(row["statistics_seconds"] / row["frozen_seconds"])


def test_the_model_is_as_it_was(llama):
    llama.train()
    measure_statistics(llama, torch.arange(32).view(2, 16), repeats=1)
    assert llama.training
    assert all(parameter.grad is None for parameter in llama.parameters())
