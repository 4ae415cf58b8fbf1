"""The gated product: the value and the gradients of the plain formula, at a lower cost."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl.methods.masks import gated_product as gated
from lowrank_pl.methods.masks.gated_product import ActiveComponents, gated_product

TOKENS, IN, OUT, RANK = 24, 10, 7, 6
PREFIX, SCATTERED = 4, torch.tensor([0, 2, 5])


def pieces(active, *, dtype=torch.float64, tokens=(2, TOKENS // 2)):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    gate = torch.zeros(RANK, dtype=torch.float64)
    gate[slice(active) if isinstance(active, int) else active] = torch.rand(
        RANK, generator=generator, dtype=torch.float64
    )[: active if isinstance(active, int) else len(active)]
    return draw(*tokens, IN).requires_grad_(), draw(OUT, RANK), draw(RANK, IN), gate.float().requires_grad_()


def plain(x, left, right, gate):
    return functional.linear(functional.linear(x, right) * gate.to(x.dtype), left)


def run(function, x, gate, direction):
    """Return value and gradients of x and gate."""
    y = function()
    return (y, *torch.autograd.grad((y * direction).sum(), [x, gate]))


@pytest.mark.parametrize("active", [PREFIX, 0, RANK, SCATTERED, torch.arange(RANK)], ids=str)
@pytest.mark.parametrize("tokens", [(2, TOKENS // 2), (TOKENS,), ()], ids=str)
def test_exact_is_the_plain_formula(active, tokens):
    x, left, right, gate = pieces(active, tokens=tokens)
    direction = torch.randn(*tokens, OUT, dtype=torch.float64)
    expected = run(lambda: plain(x, left, right, gate), x, gate, direction)
    measured = run(lambda: gated_product(x, left, right, gate, ActiveComponents(active)), x, gate, direction)
    for one, two in zip(measured, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("active", [PREFIX, SCATTERED], ids=str)
@pytest.mark.parametrize("stride", [2, 5, 24])
def test_the_estimate_of_inactive_gates_is_unbiased(active, stride):
    x, left, right, gate = pieces(active)
    direction = torch.randn(2, TOKENS // 2, OUT, dtype=torch.float64)
    _, to_x, to_gate = run(lambda: plain(x, left, right, gate), x, gate, direction)
    found = [
        run(
            lambda o=offset: gated_product(x, left, right, gate, ActiveComponents(active, stride=stride, offset=o)),
            x,
            gate,
            direction,
        )
        for offset in range(stride)
    ]
    # Every token is in the sample of one offset, so the mean over offsets is exact.
    torch.testing.assert_close(torch.stack([part[2] for part in found]).mean(0), to_gate, rtol=1e-5, atol=1e-5)
    on = torch.zeros(RANK, dtype=torch.bool)
    on[slice(active) if isinstance(active, int) else active] = True
    for _, estimated_x, estimated in found:
        torch.testing.assert_close(estimated_x, to_x)
        torch.testing.assert_close(estimated[on], to_gate[on])
        assert not torch.allclose(estimated[~on], to_gate[~on])


def test_inactive_gates_need_not_learn():
    x, left, right, gate = pieces(PREFIX)
    _, _, to_gate = run(
        lambda: gated_product(x, left, right, gate, ActiveComponents(PREFIX, inactive_learn=False)),
        x,
        gate,
        torch.ones(2, 12, OUT),
    )
    assert (to_gate[:PREFIX] != 0).all()
    assert (to_gate[PREFIX:] == 0).all()


def test_numerical_gradients():
    x, left, right, _ = pieces(RANK)
    gate = torch.rand(RANK, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, gate: gated_product(x, left, right, gate, ActiveComponents(RANK)), (x, gate)
    )


def test_bfloat16_has_a_float32_gradient():
    x, left, right, gate = pieces(PREFIX, dtype=torch.bfloat16)
    direction = torch.randn(2, TOKENS // 2, OUT).bfloat16()
    y, to_x, to_gate = run(lambda: gated_product(x, left, right, gate, ActiveComponents(PREFIX)), x, gate, direction)
    wide = run(lambda: plain(x.double(), left.double(), right.double(), gate), x, gate, direction.double())
    assert (y.dtype, to_x.dtype, to_gate.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(to_gate, wide[2], rtol=0.05, atol=0.3)


@pytest.mark.parametrize("active", [0, 1, PREFIX, 5, RANK, SCATTERED], ids=str)
@pytest.mark.parametrize("tile", [1, 2, 4, 8])
def test_tiles(active, tile):
    inactive = gated._inactive(active, RANK, tile)
    on = set(range(active)) if isinstance(active, int) else set(active.tolist())
    if len(on) == RANK:
        assert inactive is None
        return
    found = torch.arange(RANK)[inactive].tolist()
    assert set(range(RANK)) - on <= set(found)
    assert len(set(found)) == len(found) == min(RANK, -(-(RANK - len(on)) // tile) * tile)


def test_active_components_in_a_tile_of_inactive_ones_keep_their_own_gradient(monkeypatch):
    x, left, right, gate = pieces(PREFIX)
    direction = torch.randn(2, TOKENS // 2, OUT, dtype=torch.float64)
    expected = run(lambda: gated_product(x, left, right, gate, ActiveComponents(PREFIX, stride=3)), x, gate, direction)
    whole = gated._inactive
    monkeypatch.setattr(gated, "_inactive", lambda active, rank, tile: whole(active, rank, 4))
    found = run(lambda: gated_product(x, left, right, gate, ActiveComponents(PREFIX, stride=3)), x, gate, direction)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_without_a_gradient_for_x_none_is_computed():
    x, left, right, gate = pieces(PREFIX)
    with FlopCounterMode(display=False) as counter:
        gated_product(x.detach(), left, right, gate, ActiveComponents(PREFIX, stride=TOKENS)).sum().backward()
    # Forward both products, backward one of them, and one token for the inactive components.
    assert counter.get_total_flops() == 2 * (TOKENS * PREFIX * (IN + 2 * OUT) + (RANK - PREFIX) * (IN + OUT))


@pytest.mark.parametrize("active", [PREFIX, SCATTERED], ids=str)
def test_it_costs_what_the_compressed_model_does(active):
    x, left, right, gate = pieces(active)
    count = active if isinstance(active, int) else len(active)
    with FlopCounterMode(display=False) as counter:
        gated_product(x, left, right, gate, ActiveComponents(active, stride=8)).sum().backward()
    rest = (RANK - count) * (IN + OUT) * TOKENS // 8
    assert counter.get_total_flops() == 2 * (2 * TOKENS * count * (IN + OUT) + rest)


def test_no_copy_of_a_factor_is_kept():
    x, left, right, gate = pieces(SCATTERED)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        gated_product(x, left, right, gate, ActiveComponents(SCATTERED))
    owners = {tensor.untyped_storage().data_ptr() for tensor in (x, left, right, gate)}
    copies = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in owners]
    assert [tuple(tensor.shape) for tensor in copies] == [(2, TOKENS // 2, len(SCATTERED))]
