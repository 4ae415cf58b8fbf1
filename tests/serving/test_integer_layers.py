"""torch's kernels for packed integers compute what the plain path computes."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.models.hf_quantized import Grid
from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.serving import integer_layers
from lowrank_pl.serving.integer_layers import INTEGER, IntegerMatrix
from lowrank_pl.serving.optimize import optimize_for_inference, restore
from tests.helpers.low_rank_models import compress_at_random
from tests.helpers.rounded_models import nearest, round_model


@pytest.mark.parametrize("grid", [Grid(8), Grid(4, 32), Grid(4, 64), Grid(3, 32)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(48, 128), (17, 40), (261, 33), (5, 7)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_kernels_compute_the_product(grid, rows, columns, tokens):
    generator = torch.Generator().manual_seed(0)
    rounded = nearest(torch.randn(rows, columns, generator=generator), grid)
    input = torch.randn(2, tokens, columns, generator=generator).bfloat16()
    output = IntegerMatrix.of(rounded, torch.bfloat16).product(input).float()
    torch.testing.assert_close(output, input.float() @ rounded.dense().mT, atol=0.2, rtol=2e-2)


@pytest.mark.parametrize("grid", [Grid(5, 32), Grid(4, 8), Grid(8, 32)], ids=str)
def test_numbers_without_a_kernel_stay(grid):
    assert IntegerMatrix.of(nearest(torch.ones(48, 64), grid), torch.bfloat16) is None


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_in_bfloat16_computes_the_same(family, monkeypatch):
    # Tiny layers may be faster by the plain path.
    monkeypatch.setattr(integer_layers, "_FASTER", 1e9)
    model = round_model(compress_at_random(tiny_model(family, hidden=128)).bfloat16(), grids=(Grid(8), Grid(4, 32)))
    tokens = torch.arange(12).view(1, -1) * 7
    with torch.inference_mode():
        before = model(tokens).logits.float()
        chosen = optimize_for_inference(model)
        after = model(tokens).logits.float()
    assert chosen.few_tokens > 10
    assert any(type(module) in INTEGER.values() for module in model.modules())
    assert (after - before).norm() < 0.03 * before.norm()
    restore(model)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits.float(), before)


def test_gradients_flow_through_the_plain_path(monkeypatch):
    monkeypatch.setattr(integer_layers, "_FASTER", 1e9)
    model = round_model(compress_at_random(tiny_model("llama", hidden=128)).bfloat16(), grids=(Grid(8),))
    optimize_for_inference(model)
    inputs = model.get_input_embeddings()(torch.arange(6)[None]).detach().requires_grad_()
    model(inputs_embeds=inputs).logits.float().logsumexp(-1).sum().backward()
    assert inputs.grad.abs().sum() > 0
