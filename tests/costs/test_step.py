"""Learning steps beside the frozen model's step: what is measured, never how fast."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.costs.speed import random_tokens
from lowrank_pl.costs.step import StepTest, measure_step
from lowrank_pl.methods.masks.llrc import LLRC
from lowrank_pl.methods.masks.masked_linear import MaskedLinear
from lowrank_pl.models.base import load_base
from lowrank_pl.plans.storage import Storage


@pytest.mark.parametrize("recompute", [False, True])
def test_the_model_is_as_it_was(recompute, monkeypatch):
    model = load_base("random:llama")
    calls = []
    monkeypatch.setattr(
        model.model.layers[0].mlp, "forward", lambda x, f=model.model.layers[0].mlp.forward: (calls.append(1), f(x))[1]
    )
    tokens = random_tokens(model, 16)
    before = model(tokens).logits
    calls.clear()
    test = StepTest(Storage("pivoted"), 0.6, 4, gradient_checkpointing=recompute, method=LLRC())
    row = measure_step(model, tokens, test, repeats=1)
    # Targets are found by one pass; then two turns of four steps, of which those that learn compute the block twice.
    assert len(calls) == 1 + 2 * (4 + 3 * recompute)
    assert row["step_peak_memory"] > 0
    assert not model.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert torch.equal(model(tokens).logits, before)
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())
