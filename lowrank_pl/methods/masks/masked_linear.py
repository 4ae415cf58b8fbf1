"""The linear layer that learns its rank: a dense weight, its components, and a learnable gate between the factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lowrank_pl.factors.decomposition import Factors
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.masks.base import Mask, MaskMethod, stacks
from lowrank_pl.methods.masks.gated_product import TILE, ActiveComponents, Components, gated_product
from lowrank_pl.models.targets import StandIn, dense_weight, replace_module
from lowrank_pl.plans.storage import Storage

__all__ = [
    "Computation",
    "MaskedLinear",
    "choose_computation",
    "component_rows",
    "computing_with",
    "insert_masks",
    "masked_layers",
    "planned_computation",
]

Computation = Literal["mask", "dense"] | Components
"""What a masked layer computes with: its mask, its dense weight, its first components, or an index set of them."""


class MaskedLinear(StandIn, nn.Linear):
    """A frozen linear layer that computes ``left @ (gate * (right @ x)) + bias``, or with its dense weight.

    Args:
        dense: The layer that this one replaces: ``nn.Linear`` or GPT-2's ``Conv1D``. Its bias is kept.
        factors: Its first ``mask.rank`` components, cast to the weight's type. Factors on the meta device stay there
            until their values are read.
        mask: The gate; its parameters are the only ones that learn.

    Attributes:
        computation: What ``forward`` computes with.
        active: The active components while it computes with its mask; None multiplies by all components.
        gate: The mask's gate in this step, if it was computed together with those of other masks.
    """

    def __init__(self, dense: nn.Module, factors: Factors, mask: Mask) -> None:
        weight = dense_weight(dense).detach()
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        # Contiguous because FSDP2 refuses strided parameters, such as slices and transposes.
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        bias = getattr(dense, "bias", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        # A component is a row on both sides. The rows of any choice of components then have addresses and strides that
        # a GPU's matrix units take at full speed, however many they are.
        left_rows, right = component_rows(factors, weight)
        self.left_rows = nn.Parameter(left_rows, requires_grad=False)
        self.right = nn.Parameter(right, requires_grad=False)
        self.mask = mask
        self.computation: Computation = "mask"
        self.active: ActiveComponents | None = None
        self.gate: Tensor | None = None
        self.was_conv1d = isinstance(dense, Conv1D)

    @property
    def left(self) -> Tensor:
        """``[out, rank]``, a view."""
        return self.left_rows.mT

    def original(self) -> nn.Module:
        """Return the layer that this one stands in for; it shares the bias and, but for ``Conv1D``, the weight."""
        if self.was_conv1d:
            conv = Conv1D(self.out_features, 0)
            conv.nx, conv.bias = self.in_features, self.bias
            conv.weight = nn.Parameter(self.weight.mT.contiguous(), requires_grad=False)
            new: nn.Module = conv
            return new
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output ``[..., out]`` for ``x`` ``[..., in]``, by the present ``computation``."""
        computation = self.computation
        if isinstance(computation, str):
            if computation == "dense":
                return functional.linear(x, self.weight, self.bias)
            return self._gated(x)
        pick = slice(computation) if isinstance(computation, int) else computation
        return functional.linear(functional.linear(x, self.right[pick]), self.left[:, pick], self.bias)

    def _gated(self, x: Tensor) -> Tensor:
        gate = self.mask() if self.gate is None else self.gate
        # Mixed precision casts the inputs of its own list of operations, and the gated product is not on that list.
        if self.active is None or torch.is_autocast_enabled(x.device.type):
            return functional.linear(functional.linear(x, self.right) * gate.to(x.dtype), self.left, self.bias)
        y = gated_product(x, self.left, self.right, gate, self.active)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, components={self.mask.rank}"


def component_rows(factors: Factors, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``left_rows`` ``[rank, out]`` and ``right`` ``[rank, in]`` of a layer, of the type of its weight ``like``.

    They are on the device of ``like``, or on the meta device where ``factors`` are.
    """
    place = factors.left.device if factors.left.is_meta else like.device
    left, right = (part.to(place, like.dtype) for part in (factors.left, factors.right))
    return left.mT.contiguous(), right.contiguous()


def insert_masks(
    model: nn.Module,
    store: FactorStore,
    method: MaskMethod,
    starts: Mapping[str, float],
    *,
    storage: Storage,
    kept: Mapping[str, Tensor] | None = None,
    empty: bool = False,
) -> None:
    """Replace linear layers of ``model`` by masked ones, in place.

    Args:
        model: The dense base.
        store: The factors of its layers.
        method: Makes the masks.
        starts: The layers to replace by name, and the fraction of parameters that each one's mask starts at.
        storage: How finished modules are stored, which decides what a rank costs.
        kept: Component indices to start from, for layers that start from a plan.
        empty: Leave the factors on the meta device, for ``lowrank_pl.training.sharding.shard_frozen`` to read.
    """
    for name, keep in starts.items():
        dense = model.get_submodule(name)
        weight = dense_weight(dense)
        out_features, in_features = weight.shape
        shape = (out_features, in_features)
        sigma = store.sigma(name)
        mask = method.create(shape, sigma, keep, storage=storage, kept=(kept or {}).get(name))
        if not weight.is_meta:
            mask.to(weight.device)
        factors = _empty_factors(shape, sigma[: mask.rank]) if empty else store.factors(name, mask.rank)
        replace_module(model, name, MaskedLinear(dense, factors, mask))


def _empty_factors(shape: tuple[int, int], sigma: Tensor) -> Factors:
    """Return factors without values, on the meta device, of a layer of ``shape`` ``(out, in)``."""
    out_features, in_features = shape
    left = torch.empty(out_features, len(sigma), device="meta")
    return Factors(left, torch.empty(len(sigma), in_features, device="meta"), sigma)


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """Return the masked layers of ``model`` by name, in its order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MaskedLinear)}


def choose_computation(
    layers: Mapping[str, MaskedLinear], dense_from: float, *, stride: int = 1, offset: int = 0
) -> Tensor:
    """Choose what each layer computes with in this step: its dense weight, or the active components of its mask.

    The masks of a mixture are computed together (``stacks``): there are many of them, and each is small.

    Args:
        layers: Masked layers by name, whose masks are of one method.
        dense_from: The ratio from which a layer computes densely; so does a layer whose mask gates too few components.
        stride: Use every N-th token for the gradients of inactive gates: unbiased and cheaper. 1 is exact.
        offset: The first of these tokens.

    Returns:
        All ratios ``[layers]``, differentiable.
    """
    masks = {name: layer.mask for name, layer in layers.items()}
    ratios: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}
    flags: list[tuple[list[str], Tensor]] = []
    for names, mask in stacks(masks):
        ratio, active = mask.ratio(), mask.active()
        if len(names) == 1:
            ratios[names[0]] = ratio
        else:
            ratios |= zip(names, ratio.unbind(), strict=True)
            gates |= zip(names, mask().unbind(), strict=True)
        if active is not None:
            flags.append((names, active))
    every = torch.stack([ratios[name] for name in layers])
    bounds = every.new_tensor([min(dense_from, mask.dense_beyond) for mask in masks.values()])
    # One transfer for all layers: one for each would wait for the device once a layer.
    dense, *moved = torch.split(
        torch.cat([every.detach() >= bounds, *(active.flatten() for _, active in flags)]).cpu(),
        [len(layers), *(active.numel() for _, active in flags)],
    )
    rows = [part.view(len(names), -1) for (names, _), part in zip(flags, moved, strict=True)]
    found = dict(zip([name for names, _ in flags for name in names], _components(rows, every.device), strict=True))
    for (name, layer), is_dense in zip(layers.items(), dense.tolist(), strict=True):
        components = found.get(name)
        # nn.Module looks for a parameter in every attribute that is set, which takes longer than all else here.
        layer.__dict__.update(
            gate=gates.get(name),
            computation="dense" if is_dense else "mask",
            active=None
            if components is None
            else ActiveComponents(components, layer.mask.inactive_learn, stride, offset),
        )
    return every


def _components(flags: Sequence[Tensor], device: torch.device) -> list[Components]:
    """Return the active components of each layer, with one transfer to the device.

    On a GPU, inactive components fill the active ones up to a multiple of ``TILE``.

    Args:
        flags: Which components are active, bool ``[layers, rank]`` for layers of as many components, on the CPU.
        device: The device of the index sets.
    """
    if device.type == "cuda":
        flags = [torch.stack([_filled(row) for row in rows]) for rows in flags]
    counts = [count for rows in flags for count in rows.sum(1).tolist()]
    # In a prefix no component is active whose predecessor is not.
    prefix = [is_prefix for rows in flags for is_prefix in (rows[:, 1:] <= rows[:, :-1]).all(1).tolist()]
    if all(prefix):
        return [*counts]
    moved = torch.split(torch.cat([rows.nonzero()[:, 1] for rows in flags]).to(device), counts)
    return [count if first else part for count, first, part in zip(counts, prefix, moved, strict=True)]


def _filled(active: Tensor) -> Tensor:
    """Return ``active`` with the first inactive components up to a multiple of ``TILE``, whose gates stay 0."""
    others = (~active).nonzero().flatten()[: -int(active.sum()) % TILE]
    return active.index_fill(0, others, True)


@contextmanager
def computing_with(
    layers: dict[str, MaskedLinear], computations: dict[str, Computation] | Computation
) -> Iterator[None]:
    """Let layers compute with something else inside the block, and with what they had before afterwards.

    Args:
        layers: The layers by name.
        computations: One for all layers, or one for each name.
    """
    before = {name: layer.computation for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.computation = computations[name] if isinstance(computations, dict) else computations
        yield
    finally:
        for name, layer in layers.items():
            layer.computation = before[name]


def planned_computation(layer: MaskedLinear, rank: int | None, indices: tuple[int, ...] | None) -> Computation:
    """Return the computation that makes ``layer`` the module of a plan's entry.

    A rank above the stored components is nearly the whole rank, so the dense weight is the nearest computation.
    """
    if rank is None or rank > layer.mask.rank:
        return "dense"
    return rank if indices is None else torch.tensor(indices, device=layer.right.device)
