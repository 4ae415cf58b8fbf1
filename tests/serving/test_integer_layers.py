"""Kernels for packed integers compute what the plain path computes; Triton's by its interpreter, on a CPU."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.models.hf_quantized import Grid
from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.serving import integer_layers
from lowrank_pl.serving.integer_layers import INTEGER, IntegerMatrix, PackedMatrix, use_packed_kernels
from lowrank_pl.serving.kernels import Tile
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


@torch.no_grad()
def test_weights_that_are_changed_later_are_taken(monkeypatch, caplog):
    monkeypatch.setattr(integer_layers, "_FASTER", 1e9)
    model = round_model(compress_at_random(tiny_model("llama", hidden=128)).bfloat16(), grids=(Grid(8), Grid(4, 32)))
    tokens = torch.arange(12).view(1, -1)
    optimize_for_inference(model)
    model.load_state_dict(
        {name: 2 * value if value.dtype == torch.bfloat16 else value for name, value in model.state_dict().items()}
    )
    after = model(tokens).logits
    assert "changed after they were optimised" in caplog.text
    restore(model)
    torch.testing.assert_close(model(tokens).logits, after)


def packed(rounded, dtype, tile):
    scales = rounded.scales.to(dtype)
    return PackedMatrix(
        rounded.grid, rounded.columns, rounded.packed, scales, rounded.zeros, {"one": tile, "few": tile}
    )


@pytest.mark.parametrize("group", [None, 8, 32])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_triton_kernel_computes_the_product(bits, group, tokens):
    generator = torch.Generator().manual_seed(0)
    rounded = nearest(torch.randn(37, 149, generator=generator), Grid(bits, group))
    input = torch.randn(tokens, 149, generator=generator)
    output = packed(rounded, torch.float32, Tile(16, 128, 1)).product(input)
    torch.testing.assert_close(output, input @ rounded.dense().mT, atol=1e-4, rtol=1e-4)


def test_the_triton_kernel_sums_half_precision_in_float32():
    rounded = nearest(torch.randn(24, 64), Grid(4, 32))
    input = torch.randn(1, 1, 64).bfloat16()
    output = packed(rounded, torch.bfloat16, Tile(16, 128, 1)).product(input)
    torch.testing.assert_close(output.float(), input.float() @ rounded.dense().mT, atol=0.05, rtol=0.02)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel is taken whatever it takes: the interpreter says nothing of speed."""
    monkeypatch.setattr(integer_layers, "flushing", lambda device: torch.zeros(1))
    monkeypatch.setattr(integer_layers, "launch_seconds", lambda launch, flush: 1.0)
    monkeypatch.setattr(integer_layers, "_FASTER", 2.0)
    monkeypatch.setattr(integer_layers, "TILES", {"one": [Tile(16, 128, 1)], "few": [Tile(16, 128, 1)]})


@pytest.fixture
def rounded_model():
    return round_model(compress_at_random(tiny_model("llama", hidden=128)), grids=(Grid(8), Grid(5, 32)))


def rounded_layers(model):
    return [module for module in model.modules() if type(module) in INTEGER]


@torch.no_grad()
def test_a_model_with_packed_kernels_computes_the_same(interpreted, rounded_model):
    tokens = torch.arange(12).view(1, -1) * 7
    before = rounded_model(tokens).logits
    chosen = use_packed_kernels(rounded_layers(rounded_model))
    assert len(chosen) > 10
    assert all(all(found.values()) for found in chosen)
    torch.testing.assert_close(rounded_model(tokens).logits, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fault", [RuntimeError("no such instruction"), None], ids=["stops", "computes something else"])
@torch.no_grad()
def test_a_kernel_that_does_not_work_is_not_taken(fault, interpreted, rounded_model, monkeypatch, caplog):
    def launch(self, input, tile):
        if fault is not None:
            raise fault
        return torch.ones(len(input), len(self.codes))

    monkeypatch.setattr(PackedMatrix, "launch", launch)
    assert use_packed_kernels(rounded_layers(rounded_model)) == []
    assert type(fault or ValueError()).__name__ in caplog.text
    assert not any(type(module) in INTEGER.values() for module in rounded_model.modules())
