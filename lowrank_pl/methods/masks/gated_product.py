"""Multiplying by gated components at the price of those that are on: the others are only asked what they are worth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["TILE", "Components", "gated_product"]

Components = int | Tensor
"""How many of the first components, or an index tensor of them, ascending."""


TILE = 8
"""Matrix units of GPUs take rows at full speed whose bytes are a multiple of 16: so many numbers of two bytes."""


def gated_product(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    gate: Tensor,
    lit: Components,
    *,
    inactive_learn: bool = True,
    every: int = 1,
    offset: int = 0,
) -> Tensor:
    """Return ``left @ (gate * (right @ x))`` where the gate is 0 at all components that are not ``lit``.

    Forward, and backward to ``x``, these others are not multiplied by: it costs what the compressed model does. Their
    gates' gradients are sums over tokens, of which every so many-th one is an unbiased estimate, and exact if it is
    every one. Factors get no gradient.

    Args:
        x: ``[..., in]``.
        left: ``[out, rank]``.
        right: ``[rank, in]``.
        gate: ``[rank]``; any values at the lit components, exactly 0 at all others.
        lit: The components that all tokens go through.
        inactive_learn: Whether the gates of the others have a gradient to be known; else they get 0.
        every: Take every so many-th token for these.
        offset: The first of these tokens; drawn anew each step from those below ``every``, nothing is left out.

    Example:
        >>> x, left, right = torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 2)
        >>> gate = torch.tensor([1.0, 0.0], requires_grad=True)
        >>> y = gated_product(x, left, right, gate, 1)
        >>> y.sum().backward()
        >>> y.tolist(), gate.grad.tolist()
        ([[2.0, 2.0, 2.0]], [6.0, 6.0])
    """
    product: Tensor = _GatedProduct.apply(x, left, right, gate, lit, inactive_learn, every, offset)  # type: ignore[no-untyped-call]
    return product


class _GatedProduct(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        gate: Tensor,
        lit: Components,
        inactive_learn: bool,
        every: int,
        offset: int,
    ) -> Tensor:
        inner = x @ _pick(right, 0, lit).mT
        # Slices and gathers of the factors are made again in the backward pass: kept ones would be a second copy.
        ctx.save_for_backward(x, left, right, gate, inner)
        ctx.lit, ctx.inactive_learn, ctx.every, ctx.offset = lit, inactive_learn, every, offset
        return (inner * _pick(gate, 0, lit).to(x.dtype)) @ _pick(left, 1, lit).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (given,) = gradients
        x, left, right, gate, inner = ctx.saved_tensors
        lit = ctx.lit
        back = given @ _pick(left, 1, lit)
        to_gate = None
        if ctx.needs_input_grad[3]:
            to_gate = torch.zeros_like(gate)
            rest = _others(lit, len(gate), TILE if gate.is_cuda else 1) if ctx.inactive_learn else None
            if rest is not None:
                some = slice(ctx.offset, None, ctx.every)
                inputs, outputs = _rows(x)[some], _rows(given)[some]
                worth = _over_tokens(outputs @ _pick(left, 1, rest), inputs @ _pick(right, 0, rest).mT)
                _put(to_gate, rest, worth * ctx.every)
            # Last, because some of these may have gone along with the rest.
            _put(to_gate, lit, _over_tokens(back, inner))
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (back * _pick(gate, 0, lit).to(back.dtype)) @ _pick(right, 0, lit)
        return to_x, None, None, to_gate, None, None, None, None


def _pick(tensor: Tensor, dim: int, which: Components | slice) -> Tensor:
    if isinstance(which, Tensor):
        # Masked layers keep a component's part of either factor as a row.
        return tensor.index_select(0, which) if dim == 0 else tensor.mT.index_select(0, which).mT
    part = slice(which) if isinstance(which, int) else which
    return tensor[part] if dim == 0 else tensor[:, part]


def _put(tensor: Tensor, which: Components | slice, values: Tensor) -> None:
    tensor[slice(which) if isinstance(which, int) else which] = values.to(tensor.dtype)


def _others(lit: Components, rank: int, tile: int) -> slice | Tensor | None:
    """Return the components that are not lit, with lit ones up to a multiple of ``tile``; None where all are lit."""
    count = rank - (lit if isinstance(lit, int) else len(lit))
    if not count:
        return None
    count = min(count + -count % tile, rank)
    if isinstance(lit, int):
        return slice(rank - count, rank)
    dark = torch.ones(rank, dtype=torch.bool, device=lit.device)
    dark[lit] = False
    # Their number is known, so that no device has to be waited for.
    return dark.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def _over_tokens(one: Tensor, two: Tensor) -> Tensor:
    """Return the sum over tokens of the products of ``[..., components]``, in float32 whatever their type is."""
    return _rows(one * two).sum(0, dtype=torch.promote_types(one.dtype, torch.float32))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
