"""Linear layers in float32 whose products oneDNN computes on a CPU, where it is faster than what torch calls.

For float32, torch calls MKL or OpenBLAS, which compute a product with one token on one core, and are slow on some
processors; oneDNN comes with torch as well, and torch uses it for half precision.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear

__all__ = ["ONEDNN", "use_onednn"]

_TOKENS = {"one": 1, "few": 16, "many": 64}
"""The numbers of tokens that both are timed with; each stands for those up to it, the last for all others too."""

_TURNS = 4

_FASTER = 0.97
"""The part of torch's time that oneDNN may take to be chosen: what is less sure stays as it is."""


def use_onednn(layers: Sequence[nn.Linear]) -> list[dict[str, bool]]:
    """Let oneDNN compute layers where it is faster; return for each matrix whether it is.

    Each turn goes through all matrices, so that they are read from memory as when the model runs.

    Args:
        layers: Layers on a CPU, of the types in ``ONEDNN`` and with weights in float32.
    """
    matrices = [(layer, name) for layer in layers for name in ("weight", "right") if hasattr(layer, name)]
    seconds = {
        (place, count, way): float("inf") for place in range(len(matrices)) for count in _TOKENS for way in (0, 1)
    }
    steps = [(count, way) for _ in range(_TURNS) for count in _TOKENS for way in (0, 1)]
    with torch.inference_mode():
        for count, way in tqdm(steps, desc="timing products", unit="pass", leave=False):
            product = (F.linear, _onednn)[way]
            for place, (layer, name) in enumerate(matrices):
                matrix = getattr(layer, name)
                input = torch.ones(_TOKENS[count], matrix.shape[1])
                begun = time.perf_counter()
                product(input, matrix, None)
                key = (place, count, way)
                seconds[key] = min(seconds[key], time.perf_counter() - begun)
    faster = [
        {count: seconds[place, count, 1] < _FASTER * seconds[place, count, 0] for count in _TOKENS}
        for place in range(len(matrices))
    ]
    for (layer, name), found in zip(matrices, faster, strict=True):
        if any(found.values()):
            layer.__class__ = ONEDNN.get(type(layer), type(layer))
            vars(layer).setdefault("faster", {})[name] = found
    return faster


def _onednn(input: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, matrix, bias, "none", [], "")
    return output


class _OneDNN(nn.Linear):
    """The product of a layer with one of its matrices."""

    faster: dict[str, dict[str, bool]]

    def product(self, input: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        """Return the product of the matrix called ``name`` with ``input``, plus ``bias``."""
        matrix: Tensor = getattr(self, name)
        # It knows no gradients; the code that torch.compile makes calls what it has chosen itself.
        plain = torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        other = {tensor.dtype for tensor in (input, matrix)} != {torch.float32} or matrix.device.type != "cpu"
        if plain or other or input.device != matrix.device:
            return F.linear(input, matrix, bias)
        tokens = input.numel() // input.shape[-1]
        count = next((count for count, most in _TOKENS.items() if tokens <= most), "many")
        chosen = self.faster.get(name, {})
        return _onednn(input, matrix, bias) if chosen.get(count) else F.linear(input, matrix, bias)


class OneDNNLowRankLinear(_OneDNN, LowRankLinear):
    """A ``LowRankLinear`` by oneDNN."""


class OneDNNPivotedLinear(_OneDNN, PivotedLinear):
    """A ``PivotedLinear`` by oneDNN."""


class OneDNNLinear(_OneDNN, nn.Linear):
    """A dense layer by oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., out]`` for an input ``[..., in]``."""
        return self.product(input, "weight", self.bias)


ONEDNN: dict[type[nn.Linear], type[nn.Linear]] = {
    LowRankLinear: OneDNNLowRankLinear,
    PivotedLinear: OneDNNPivotedLinear,
    nn.Linear: OneDNNLinear,
}
"""The class of a layer that oneDNN computes, by that of the layer before."""
