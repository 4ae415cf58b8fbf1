"""The layers of a transformers model that kernels compute on a GPU: those that read the same input, at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.targets import shared_inputs
from lowrank_pl.serving.kernels import MAX_MATRICES, FusedGroup, Part, check_triton, padded

__all__ = ["FUSED", "TYPES", "Member", "SharedGroup", "fuse"]

logger = logging.getLogger(__name__)

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that kernels compute with."""


def fuse(model: PreTrainedModel, layers: dict[str, nn.Linear]) -> list[dict[str, bool]]:
    """Let kernels compute layers on a GPU where they are faster; return for each group whether they are.

    Args:
        model: The model.
        layers: Layers of it by name, all on a GPU, of the types in ``FUSED`` and with weights of the ``TYPES``.

    Raises:
        ValueError: Triton isn't installed.
    """
    check_triton()
    groups = [group for group in _groups(model, layers) if any(type(layer) is not nn.Linear for layer in group)]
    faster: list[dict[str, bool]] = []
    for members in tqdm(groups, desc="choosing kernels", unit="group", leave=False):
        group = SharedGroup(members)
        assert group.kernels is not None
        faster.append({count: bool(tiles) for count, tiles in group.kernels.tiles.items()})
        if any(group.kernels.tiles.values()):
            for number, layer in enumerate(members):
                layer.__class__ = FUSED[type(layer)]
                vars(layer).update(group=group, number=number)
    return faster


def _groups(model: PreTrainedModel, layers: dict[str, nn.Linear]) -> list[list[nn.Linear]]:
    """Return the layers that have the same input, on one device and of one type."""
    found: dict[tuple[object, ...], list[nn.Linear]] = {}
    with torch.inference_mode(False):  # it keeps no count of changes in place
        shared = shared_inputs(model, layers)
    for name, first in shared.items():
        layer = layers[name]
        found.setdefault((first, layer.weight.device, layer.weight.dtype), []).append(layer)
    size = MAX_MATRICES
    return [group[start : start + size] for group in found.values() for start in range(0, len(group), size)]


_TENSORS = ("weight", "right", "bias", "pivots")
"""What the layers consist of."""


class SharedGroup:
    """The layers of a group, which ask it one after the other for what it has computed at once.

    A copy of it, as ``deepcopy`` and ``pickle`` make them, leaves everything to torch.

    Args:
        layers: Layers that read the same input; none for a group that computes nothing.
    """

    def __init__(self, layers: Sequence[nn.Linear] = ()) -> None:
        self.kernels: FusedGroup | None = None
        self._layers = [ref(layer) for layer in layers]
        self._input: Tensor | None = None
        self._version: int | None = None
        self._waiting: list[Tensor | None] = []
        if not layers:
            return
        # Tensors that are made in inference mode can't be trained later.
        with torch.inference_mode(False), torch.no_grad():
            for layer in layers:
                for matrix in _matrices(layer):
                    matrix.data = padded(matrix.data)
            self.kernels = FusedGroup([_part(layer) for layer in layers], _shared_bias(layers))
        self.kernels.choose(layers[0].in_features, lambda input: [layer(input) for layer in layers])
        self._places = self._now()
        mine = ref(self)
        self.kernels.otherwise = lambda input: None if (group := mine()) is None else group._by_torch(input)

    def __reduce__(self) -> tuple[type[SharedGroup], tuple[()]]:
        """Return how a copy is made: without layers."""
        return SharedGroup, ()

    def output(self, number: int, input: Tensor) -> Tensor | None:
        """Return the output of layer ``number``; None if torch has to compute it."""
        kernels = self.kernels
        if kernels is None or torch.is_grad_enabled() or torch.is_autocast_enabled(input.device.type):
            return None
        weight, tokens = kernels.stages[0].products[0].weight, input.numel() // input.shape[-1]
        unlike = input.dtype != weight.dtype or input.device != weight.device
        tiles = kernels.tiles_for(tokens)
        if unlike or tokens == 0 or not tiles:
            return None
        compiling = torch.compiler.is_compiling()
        version = None if compiling or input.is_inference() else input._version
        if self._input is not input or self._version != version or self._waiting[number] is None:
            flat = input.reshape(tokens, -1)
            if compiling:
                output = kernels.operation(flat)
            elif self._places != self._now():
                self.forget()
                return None
            else:
                output = kernels.launch(flat, tiles)
            parts = output.split(kernels.sizes, 1)  # type: ignore[no-untyped-call]
            self._input, self._version = input, version
            self._waiting = [part.view(*input.shape[:-1], -1) for part in parts]
        found, self._waiting[number] = self._waiting[number], None
        if all(other is None for other in self._waiting):
            self._input = None
        return found

    def check(self) -> None:
        """Leave everything to torch if the layers are no longer where they were."""
        if self.kernels is not None and self._places != self._now():
            self.forget()

    def forget(self) -> None:
        """Leave everything to torch, since the layers are no longer what the kernels were made for."""
        if self.kernels is not None:
            logger.warning(
                "layers were changed after optimize_for_inference: torch computes them until it is called again"
            )
        self.kernels, self._input, self._waiting = None, None, []

    def _members(self) -> list[nn.Linear]:
        return [layer for found in self._layers if (layer := found()) is not None]

    def _now(self) -> list[int]:
        """Return where matrices, biases and pivots lie in memory."""
        tensors = (getattr(layer, name, None) for layer in self._members() for name in _TENSORS)
        return [tensor.data_ptr() for tensor in tensors if tensor is not None]

    def _by_torch(self, input: Tensor) -> Tensor | None:
        """Return the outputs by torch's products if the layers have changed; compiled code asks for it."""
        if self._places == self._now():
            return None
        return torch.cat([_KINDS[type(layer)].forward(layer, input) for layer in self._members()], -1)


def _matrices(layer: nn.Linear) -> list[Tensor]:
    return [layer.weight, layer.right] if isinstance(layer, LowRankLinear | PivotedLinear) else [layer.weight]


def _part(layer: nn.Linear) -> Part:
    right = layer.right.detach() if isinstance(layer, LowRankLinear | PivotedLinear) else None
    if isinstance(layer, PivotedLinear):
        return Part(layer.weight.detach(), right, layer.side, layer.pivots)
    return Part(layer.weight.detach(), right)


def _shared_bias(layers: Sequence[nn.Linear]) -> Tensor | None:
    """Return the biases of all outputs, of which those of the layers become parts, so that both change together."""
    if all(layer.bias is None for layer in layers):
        return None
    biases = torch.cat([
        layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers
    ])  # fmt: skip
    parts = biases.split([layer.out_features for layer in layers])  # type: ignore[no-untyped-call]
    for layer, part in zip(layers, parts, strict=True):
        if layer.bias is not None:
            layer.bias.data = part
    return biases


class Group(Protocol):
    """Layers that are computed together from weights that it knows in another form too."""

    def check(self) -> None:
        """Give up if the weights are not where they were."""

    def forget(self) -> None:
        """Give up: the weights have changed."""


class Member:
    """A module of a group, which it tells when its weights are loaded or moved."""

    group: Group

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load parameters in place; pivots and biases are known to the group in another form."""
        super()._load_from_state_dict(*args)  # type: ignore[misc]
        self.group.forget()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        """Convert or move the module; memory of the old weights is released."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.group.check()
        return self  # type: ignore[return-value]


class _Fused(Member):
    """The forward pass of a layer in a group."""

    group: SharedGroup
    number: int

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., out]`` for an input ``[..., in]``."""
        found = self.group.output(self.number, input)
        return super().forward(input) if found is None else found  # type: ignore[misc]


class FusedLowRankLinear(_Fused, LowRankLinear):
    """A ``LowRankLinear`` in a group."""


class FusedPivotedLinear(_Fused, PivotedLinear):  # type: ignore[misc]
    """A ``PivotedLinear`` in a group."""


class FusedDense(_Fused, nn.Linear):
    """A dense layer that reads the same input as compressed ones."""


FUSED: dict[type[nn.Linear], type[nn.Linear]] = {
    LowRankLinear: FusedLowRankLinear,
    PivotedLinear: FusedPivotedLinear,
    nn.Linear: FusedDense,
}

_KINDS = {kind: own for own, kind in FUSED.items()} | {own: own for own in FUSED}
"""The class whose forward pass torch computes, by that of a layer in a group."""
