"""The linear layer that learns its rank: a dense weight, its components, and a learnable gate between the factors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lowrank_pl.factors.decomposition import Factors
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.masks.base import Mask, MaskMethod
from lowrank_pl.methods.masks.gated_product import TILE, ActiveComponents, Components, gated_product
from lowrank_pl.models.targets import StandIn, dense_weight, replace_module
from lowrank_pl.plans.storage import Storage
from lowrank_pl.utils.formatting import expert_number

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

    The masks of experts are computed together, if their method can do so: there are many of them, and each is small.

    Args:
        layers: Masked layers by name, whose masks are of one method.
        dense_from: The ratio from which a layer computes densely; so does a layer whose mask gates too few components.
        stride: Use every N-th token for the gradients of inactive gates: unbiased and cheaper. 1 is exact.
        offset: The first of these tokens.

    Returns:
        All ratios ``[layers]``, differentiable.
    """
    stacked = _stacked(layers)
    ratios = torch.stack([
        layer.mask.ratio() if name not in stacked else stacked[name].ratio for name, layer in layers.items()
    ])  # fmt: skip
    bounds = ratios.new_tensor([min(dense_from, layer.mask.dense_beyond) for layer in layers.values()])
    # The masks are of one method: either all of them say what is active or none does.
    said = [layer.mask.active() if name not in stacked else stacked[name].active for name, layer in layers.items()]
    flags = [active for active in said if active is not None]
    # One transfer for all layers: one for each would wait for the device once a layer.
    dense, *active_flags = torch.split(
        torch.cat([ratios.detach() >= bounds, *flags]).cpu(), [len(layers), *(len(active) for active in flags)]
    )
    found: Sequence[Components | None] = [None] * len(layers)
    if flags:
        found = _components(active_flags, ratios.device)
    for (name, layer), is_dense, components in zip(layers.items(), dense.tolist(), found, strict=True):
        layer.gate = stacked[name].gate if name in stacked else None
        layer.computation = "dense" if is_dense else "mask"
        layer.active = None
        if components is not None:
            layer.active = ActiveComponents(components, layer.mask.inactive_learn, stride, offset)
    return ratios


class _State(NamedTuple):
    """What one mask says in a step."""

    ratio: Tensor
    gate: Tensor
    active: Tensor


def _stacked(layers: Mapping[str, MaskedLinear]) -> dict[str, _State]:
    """Return the states of the masks of experts that are computed together, by name of the layer."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        if layer.mask.kin is not None and expert_number(name) is not None:
            groups[layer.mask.kin].append(name)
    found: dict[str, _State] = {}
    for names in groups.values():
        masks = [layers[name].mask for name in names]
        state = type(masks[0]).stacked(masks)
        parts = zip(state.ratios.unbind(), state.gates.unbind(), state.active.unbind(), strict=True)
        found |= {name: _State(*part) for name, part in zip(names, parts, strict=True)}
    return found


def _components(flags: Sequence[Tensor], device: torch.device) -> list[Components]:
    """Return the active components of each layer, with one transfer to the device.

    On a GPU, inactive components fill the active ones up to a multiple of ``TILE``.

    Args:
        flags: Which components are active, bool ``[rank]`` a layer, on the CPU.
        device: The device of the index sets.
    """
    found = [(_filled(part) if device.type == "cuda" else part).nonzero().flatten() for part in flags]
    counts = [len(part) for part in found]
    prefix = [not count or int(part[-1]) == count - 1 for part, count in zip(found, counts, strict=True)]
    if all(prefix):
        return [*counts]
    moved = torch.split(torch.cat(found).to(device), counts)
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
