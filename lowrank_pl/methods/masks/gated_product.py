"""Gated low-rank product that computes only the active components; inactive gates still receive a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["TILE", "ActiveComponents", "Components", "gated_product"]

Components = int | Tensor
"""How many of the first components, or an index tensor of them, ascending."""

TILE = 8
"""GPUs' matrix units take rows at full speed whose bytes are a multiple of 16, which is 8 numbers of two bytes."""


@dataclass(frozen=True, eq=False)
class ActiveComponents:
    """Which components tokens pass through, and from which tokens the gates of all others get a gradient.

    Args:
        components: The active components; the gates of all others are exactly 0.
        inactive_learn: Whether the inactive gates get a gradient; otherwise it is 0.
        stride: Use every N-th token for the gradients of inactive gates: unbiased and cheaper. 1 is exact.
        offset: The first of these tokens. Drawn anew from 0 to ``stride - 1`` in each step, it reaches every token.
    """

    components: Components
    inactive_learn: bool = True
    stride: int = 1
    offset: int = 0


def gated_product(x: Tensor, left: Tensor, right: Tensor, gate: Tensor, active: ActiveComponents) -> Tensor:
    """Return ``left @ (gate * (right @ x))``, whose gate is 0 at all inactive components.

    The forward pass, and the backward pass to ``x``, compute only the active components and so cost what the compressed
    model does. The gradient of an inactive gate is a sum over tokens; every ``stride``-th token gives an unbiased
    estimate of it. Factors get no gradient.

    Args:
        x: ``[..., in]``.
        left: ``[out, rank]``.
        right: ``[rank, in]``.
        gate: ``[rank]``; any values at the active components, exactly 0 at all others.
        active: The active components, and how the gates of all others learn.

    Example:
        >>> x, left, right = torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 2)
        >>> gate = torch.tensor([1.0, 0.0], requires_grad=True)
        >>> y = gated_product(x, left, right, gate, ActiveComponents(1))
        >>> y.sum().backward()
        >>> y.tolist(), gate.grad.tolist()
        ([[2.0, 2.0, 2.0]], [6.0, 6.0])
    """
    product: Tensor = _GatedProduct.apply(x, left, right, gate, active)  # type: ignore[no-untyped-call]
    return product


class _GatedProduct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor, gate: Tensor, active: ActiveComponents) -> Tensor:
        components = active.components
        inner = x @ _pick(right, 0, components).mT
        # The backward pass slices and gathers the factors again: kept ones would be a second copy.
        ctx.save_for_backward(x, left, right, gate, inner)
        ctx.active = active
        # No view of another shape: FSDP2 hangs its hooks on the output, and those of views may be lost.
        return (inner * _pick(gate, 0, components).to(x.dtype)) @ _pick(left, 1, components).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given = _rows(gradients[0])
        x, left, right, gate, inner = ctx.saved_tensors
        active: ActiveComponents = ctx.active
        components = active.components
        back = given @ _pick(left, 1, components)
        to_gate = None
        if ctx.needs_input_grad[3]:
            inactive, estimate = None, None
            if active.inactive_learn:
                inactive = _inactive(components, gate.shape[0], TILE if gate.is_cuda else 1)
            if inactive is not None:
                tokens = slice(active.offset, None, active.stride)
                inputs, outputs = _rows(x)[tokens], given[tokens]
                estimate = _over_tokens(outputs @ _pick(left, 1, inactive), inputs @ _pick(right, 0, inactive).mT)
                estimate = estimate * active.stride if active.stride > 1 else estimate
            to_gate = _joined(gate, components, _over_tokens(back, _rows(inner)), inactive, estimate)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (back * _pick(gate, 0, components).to(back.dtype)) @ _pick(right, 0, components)
            if x.dim() != 2:
                to_x = to_x.view(x.shape)
        return to_x, None, None, to_gate, None


def _pick(tensor: Tensor, dim: int, which: Components | slice) -> Tensor:
    if isinstance(which, int):
        # Half the time of a slice, which counts where an expert's few tokens meet small factors.
        return tensor.narrow(dim, 0, which)
    if isinstance(which, Tensor):
        # Masked layers store a component as a row of either factor.
        return tensor.index_select(0, which) if dim == 0 else tensor.mT.index_select(0, which).mT
    return tensor[which] if dim == 0 else tensor[:, which]


def _joined(
    gate: Tensor, active: Components, to_active: Tensor, inactive: slice | Tensor | None, estimate: Tensor | None
) -> Tensor:
    """Return the gradient of ``gate`` from those of its active and of its inactive components, 0 where there is none.

    A tile of inactive components may include active ones, whose own gradient counts.
    """
    if isinstance(active, int):
        rest = len(gate) - active
        others = gate.new_zeros(rest) if estimate is None else estimate.narrow(0, len(estimate) - rest, rest)
        # One step where filling a vector of zeros takes three, which counts for an expert's few tokens.
        return torch.cat([to_active, others]).to(gate.dtype)
    to_gate = torch.zeros_like(gate)
    if estimate is not None:
        to_gate[inactive] = estimate.to(gate.dtype)
    to_gate[active] = to_active.to(gate.dtype)
    return to_gate


def _inactive(active: Components, rank: int, tile: int) -> slice | Tensor | None:
    """Return the inactive components, filled up to a multiple of ``tile`` with active ones; None where all are active.

    Args:
        active: The active components.
        rank: How many components there are.
        tile: The number to return a multiple of.
    """
    count = rank - (active if isinstance(active, int) else len(active))
    if not count:
        return None
    count = min(count + -count % tile, rank)
    if isinstance(active, int):
        return slice(rank - count, rank)
    inactive = torch.ones(rank, dtype=torch.bool, device=active.device)
    inactive[active] = False
    # Their number is known, so the host does not wait for the device.
    return inactive.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def _over_tokens(one: Tensor, two: Tensor) -> Tensor:
    """Return the sum over tokens of the products of ``[tokens, components]``, in float32 at least."""
    wide = one.dtype if one.dtype in (torch.float32, torch.float64) else torch.float32
    return (one * two).sum(0, dtype=wide)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
