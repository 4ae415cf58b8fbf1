"""The linear layer that learning runs on: a dense weight, its components and a learnable gate between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lowrank_pl.factors.decomposition import Factors
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.masks.base import Mask, MaskMethod
from lowrank_pl.methods.masks.gated_product import TILE, Components, gated_product
from lowrank_pl.models.targets import StandIn, dense_weight, replace_module
from lowrank_pl.plans.storage import Storage

__all__ = [
    "Choice",
    "MaskedLinear",
    "Work",
    "choose_computation",
    "chosen",
    "component_rows",
    "insert_masks",
    "masked_layers",
]

Choice = Literal["mask", "dense"] | int | Tensor
"""What a masked layer computes with: its mask, its dense weight, its first components, or an index set of them."""


@dataclass(frozen=True)
class Work:
    """What a masked layer multiplies by in a step while it computes with its mask.

    Args:
        lit: The components that every token goes through, the gates of all others being 0; None multiplies by all.
        every: The others' gates get their gradient from every so many-th token.
        offset: The first of these.
    """

    lit: Components | None = None
    every: int = 1
    offset: int = 0


class MaskedLinear(StandIn, nn.Linear):
    """A frozen linear map that computes ``left @ (gate * (right @ x)) + bias`` or, told so, with its dense weight.

    Args:
        dense: The layer to stand in for; ``nn.Linear`` or GPT-2's ``Conv1D``. Its bias is kept.
        factors: Its first ``mask.rank`` components, cast to the weight's type; those on the meta device stay there, for
            values that come later.
        mask: The gate, whose parameters are the only ones that learn.
    """

    def __init__(self, dense: nn.Module, factors: Factors, mask: Mask) -> None:
        weight = dense_weight(dense).detach()
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        # Contiguous because FSDP2 refuses strided parameters, which slices and transposes are.
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        bias = getattr(dense, "bias", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        # A component is a row on both sides, so that those of any choice lie together, at addresses and in steps that
        # the matrix units of a GPU take at full speed, however many they are.
        left_rows, right = component_rows(factors, weight)
        self.left_rows = nn.Parameter(left_rows, requires_grad=False)
        self.right = nn.Parameter(right, requires_grad=False)
        self.mask = mask
        self.choice: Choice = "mask"
        self.work = Work()
        self.was_conv1d = isinstance(dense, Conv1D)

    @property
    def left(self) -> Tensor:
        """``[out, rank]``, a view."""
        return self.left_rows.mT

    def dense(self) -> nn.Module:
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
        """Return the layer's output ``[..., out]`` for ``x`` ``[..., in]`` under the present choice."""
        choice = self.choice
        if isinstance(choice, str):
            if choice == "dense":
                return functional.linear(x, self.weight, self.bias)
            return self._gated(x)
        pick = slice(choice) if isinstance(choice, int) else choice
        return functional.linear(functional.linear(x, self.right[pick]), self.left[:, pick], self.bias)

    def _gated(self, x: Tensor) -> Tensor:
        gate, work = self.mask(), self.work
        # Mixed precision casts what its own list of operations is given, which the product is not on.
        if work.lit is None or torch.is_autocast_enabled(x.device.type):
            return functional.linear(functional.linear(x, self.right) * gate.to(x.dtype), self.left, self.bias)
        y = gated_product(
            x, self.left, self.right, gate, work.lit, inactive_learn=self.mask.inactive_learn, every=work.every,
            offset=work.offset,
        )  # fmt: skip
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, components={self.mask.rank}"


def component_rows(factors: Factors, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``left_rows`` ``[rank, out]`` and ``right`` ``[rank, in]`` of a layer, of the type of its weight ``like``.

    They are on its device, or on the meta device where ``factors`` are.
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
    prices: Storage,
    kept: Mapping[str, Tensor] | None = None,
    empty: bool = False,
) -> None:
    """Replace linear maps of ``model`` by masked ones, in place.

    Args:
        model: The dense base.
        store: Their factors.
        method: Makes the masks.
        starts: Which maps, by name, and the fraction of parameters that the mask of each starts at.
        prices: What ranks cost in the finished model.
        kept: Component indices to start from, for maps that start from a plan.
        empty: Leave the factors on the meta device, for ``lowrank_pl.sharding.shard_frozen`` to read.
    """
    for name, keep in starts.items():
        dense = model.get_submodule(name)
        weight = dense_weight(dense)
        out_features, in_features = weight.shape
        shape = (out_features, in_features)
        sigma = store.sigma(name)
        mask = method.create(shape, sigma, keep, prices=prices, kept=(kept or {}).get(name))
        if not weight.is_meta:
            mask.to(weight.device)
        factors = _empty_factors(shape, sigma[: mask.rank]) if empty else store.factors(name, mask.rank)
        replace_module(model, name, MaskedLinear(dense, factors, mask))


def _empty_factors(shape: tuple[int, int], sigma: Tensor) -> Factors:
    """Return factors of a map of ``shape`` ``(out, in)`` without values, on the meta device."""
    out_features, in_features = shape
    left = torch.empty(out_features, len(sigma), device="meta")
    return Factors(left, torch.empty(len(sigma), in_features, device="meta"), sigma)


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """Return the masked layers of ``model`` by name, in its order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MaskedLinear)}


def choose_computation(
    layers: Mapping[str, MaskedLinear], dense_from: float, *, every: int = 1, offset: int = 0
) -> Tensor:
    """Let layers compute densely whose ratio has come to ``dense_from`` or beyond their masks, the others with masks.

    Those multiply by what their masks need.

    Args:
        layers: By name.
        dense_from: The ratio.
        every: Gates of components that are off get their gradient from every so many-th token; 1 is exact.
        offset: The first of these.

    Returns:
        All ratios ``[layers]``, differentiable.
    """
    ratios = torch.stack([layer.mask.ratio() for layer in layers.values()])
    bounds = ratios.new_tensor([min(dense_from, layer.mask.covered) for layer in layers.values()])
    # Masks of one method, which all say what is lit or none.
    flags = [lit for layer in layers.values() if (lit := layer.mask.lit()) is not None]
    # One transfer for all layers: asking each for itself would wait for the device once a layer.
    dense, *lit_flags = torch.split(
        torch.cat([ratios.detach() >= bounds, *flags]).cpu(), [len(layers), *(len(lit) for lit in flags)]
    )
    multiplied: Sequence[Components | None] = [None] * len(layers)
    if flags:
        multiplied = _active_components(lit_flags, ratios.device)
    for layer, is_dense, components in zip(layers.values(), dense.tolist(), multiplied, strict=True):
        layer.choice = "dense" if is_dense else "mask"
        layer.work = Work(components, every, offset)
    return ratios


def _active_components(flags: Sequence[Tensor], device: torch.device) -> list[Components]:
    """Return the lit components of each layer, with one transfer to the device.

    On a GPU some that are off go along where that fills up a multiple of ``TILE``.

    Args:
        flags: What is lit, on the CPU.
        device: Where index sets go.
    """
    found = [(_filled(part) if device.type == "cuda" else part).nonzero().flatten() for part in flags]
    counts = [len(part) for part in found]
    prefix = [not count or int(part[-1]) == count - 1 for part, count in zip(found, counts, strict=True)]
    if all(prefix):
        return [*counts]
    moved = torch.split(torch.cat(found).to(device), counts)
    return [count if first else part for count, first, part in zip(counts, prefix, moved, strict=True)]


def _filled(lit: Tensor) -> Tensor:
    """Return ``lit`` with the first others up to a multiple of ``TILE``; their gates are 0, which changes no result."""
    others = (~lit).nonzero().flatten()[: -int(lit.sum()) % TILE]
    return lit.index_fill(0, others, True)


@contextmanager
def chosen(layers: dict[str, MaskedLinear], choices: dict[str, Choice] | Choice) -> Iterator[None]:
    """Let layers compute with other choices inside the block, then with those from before.

    Args:
        layers: Whose choices change.
        choices: One for all, or one for each name.
    """
    before = {name: layer.choice for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.choice = choices[name] if isinstance(choices, dict) else choices
        yield
    finally:
        for name, layer in layers.items():
            layer.choice = before[name]


def plan_choice(layer: MaskedLinear, rank: int | None, indices: tuple[int, ...] | None) -> Choice:
    """Return the choice with which ``layer`` computes what a plan's entry says.

    A rank of more components than it holds is nearly the whole one, and the dense weight what comes nearest.
    """
    if rank is None or rank > layer.mask.rank:
        return "dense"
    return rank if indices is None else torch.tensor(indices, device=layer.right.device)
