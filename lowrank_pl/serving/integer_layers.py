"""Rounded layers whose products torch's kernels for packed integers compute on a CPU, where they are faster.

torch brings such kernels for 8 bits with one scale a row, and for 4 bits in groups of 32, 64, 128 or 256 columns,
which compute 2 and 3 bits as well. For bfloat16 they read the codes instead of a matrix of floating-point numbers,
which a token of decoding waits for. For float32 they are slower than dequantising, and for many tokens too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm.auto import tqdm

from lowrank_pl.models.hf_quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLowRankLinear,
    QuantizedPivotedLinear,
    Rounded,
    TiedHead,
    unpack,
)

__all__ = ["INTEGER", "IntegerMatrix", "use_integer_kernels"]

_TOKENS = {"one": 1, "few": 16}
"""The numbers of tokens that both are timed with; more tokens are dequantised."""

_TURNS = 3

_FASTER = 0.97
"""The part of the plain path's time that a kernel may take to be chosen."""

_GROUPS = (32, 64, 128, 256)

_MULTIPLE = 32
"""Rows and columns are padded to multiples of this."""


@dataclass(frozen=True, eq=False)
class IntegerMatrix:
    """A rounded matrix as torch's kernels read it.

    Args:
        codes: int8 ``[rows, columns]``, or packed in 4 bits; padded to multiples of what the kernels read.
        scales: ``[rows]``, or ``[groups, rows, 2]`` scales and zeros up to 4 bits, in the type of the inputs.
        group: Columns that share a scale up to 4 bits; None at 8 bits.
        rows: Rows of the matrix.
    """

    codes: Tensor
    scales: Tensor
    group: int | None
    rows: int

    @classmethod
    def of(cls, rounded: Rounded, dtype: torch.dtype) -> IntegerMatrix | None:
        """Return the matrix for inputs of ``dtype``; None where torch has no kernel for its numbers."""
        grid = rounded.grid
        whole = grid.bits == 8 and grid.group is None
        if not whole and not (grid.bits <= 4 and grid.group in _GROUPS):
            return None
        # The kernels read past the edge of other sizes, and may crash.
        more = -rounded.rows % _MULTIPLE, -rounded.columns % (grid.group or _MULTIPLE)
        codes = unpack(rounded.packed, grid.bits, rounded.columns)
        if whole:
            # Codes are symmetric around 128.
            codes = pad((codes.to(torch.int16) - 128).to(torch.int8), (0, more[1], 0, more[0]))
            scales = pad(rounded.scales[:, 0], (0, more[0])).to(dtype)
            return cls(codes.contiguous(), scales, None, rounded.rows)
        assert rounded.zeros is not None
        zeros = unpack(rounded.zeros, grid.bits, rounded.scales.shape[1]).float()
        # The kernel computes (code - 8) * scale + zero.
        pairs = pad(torch.stack([rounded.scales, (8 - zeros) * rounded.scales], -1), (0, 0, 0, 0, 0, more[0]))
        codes = pad(codes, (0, more[1], 0, more[0])).int().contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return cls(packed, pairs.permute(1, 0, 2).contiguous().to(dtype), grid.group, rounded.rows)

    def product(self, input: Tensor) -> Tensor:
        """Return the product of the matrix with ``input`` ``[..., columns]``."""
        rows = input.reshape(-1, input.shape[-1])
        rows = pad(rows, (0, -rows.shape[1] % (self.group or _MULTIPLE))).contiguous()
        output: Tensor
        if self.group is None:
            output = torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scales)
        else:
            output = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.group, self.scales)
        return output[:, : self.rows].view(*input.shape[:-1], self.rows)


def use_integer_kernels(layers: Sequence[nn.Linear]) -> list[dict[str, bool]]:
    """Let torch's kernels compute rounded layers where they are faster; return for each matrix whether they do.

    Each matrix that a kernel computes is in memory a second time, as the kernel reads it.

    Args:
        layers: Layers on a CPU, of the types in ``INTEGER``, in bfloat16.
    """
    chosen: list[dict[str, bool]] = []
    with torch.inference_mode():
        for layer in tqdm(layers, desc="timing products", unit="layer", leave=False):
            for name in ("weight", "right") if hasattr(layer, "right") else ("weight",):
                matrix = IntegerMatrix.of(_rounded(layer, name), layer.get_parameter("weight").dtype)
                found = {
                    count: matrix is not None and _is_faster(layer, name, matrix, tokens)
                    for count, tokens in _TOKENS.items()
                }
                chosen.append(found)
                if matrix is not None and any(found.values()):
                    layer.__class__ = INTEGER.get(type(layer), type(layer))
                    vars(layer).setdefault("integers", {})[name] = (matrix, found)
    return chosen


def _rounded(layer: nn.Module, name: str) -> Rounded:
    source = layer.source[0] if isinstance(layer, TiedHead) else layer
    assert isinstance(source, (QuantizedLinear, QuantizedLowRankLinear, QuantizedPivotedLinear, QuantizedEmbedding))
    return source.rounded(name)


def _is_faster(layer: nn.Module, name: str, matrix: IntegerMatrix, tokens: int) -> bool:
    assert isinstance(layer, (QuantizedLinear, QuantizedLowRankLinear, QuantizedPivotedLinear, TiedHead))
    columns = _rounded(layer, name).columns
    input = torch.ones(tokens, columns, dtype=matrix.scales.dtype)
    seconds = [float("inf")] * 2
    for _ in range(_TURNS):
        for way in range(2):
            begun = time.perf_counter()
            if way:
                matrix.product(input)
            else:
                layer.product(input, name)
            seconds[way] = min(seconds[way], time.perf_counter() - begun)
    return seconds[1] < _FASTER * seconds[0]


class _Integer(nn.Linear):
    """The product of a layer with one of its matrices."""

    integers: dict[str, tuple[IntegerMatrix, dict[str, bool]]]

    def product(self, input: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        """Return the product of the matrix called ``name`` with ``input``, plus ``bias``."""
        matrix, faster = self.integers.get(name, (None, {}))
        # The kernels know no gradients; the code that torch.compile makes dequantises.
        plain = torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if plain or matrix is None or input.dtype != matrix.scales.dtype or input.device.type != "cpu":
            return super().product(input, name, bias)  # type: ignore[misc, no-any-return]
        tokens = input.numel() // input.shape[-1]
        count = next((count for count, most in _TOKENS.items() if tokens <= most), "many")
        if not faster.get(count):
            return super().product(input, name, bias)  # type: ignore[misc, no-any-return]
        output = matrix.product(input)
        return output if bias is None else output + bias


class IntegerLinear(_Integer, QuantizedLinear):
    """A ``QuantizedLinear`` by torch's kernels."""


class IntegerLowRankLinear(_Integer, QuantizedLowRankLinear):
    """A ``QuantizedLowRankLinear`` by torch's kernels."""


class IntegerPivotedLinear(_Integer, QuantizedPivotedLinear):
    """A ``QuantizedPivotedLinear`` by torch's kernels."""


class IntegerHead(_Integer, TiedHead):
    """A ``TiedHead`` by torch's kernels."""


INTEGER: dict[type[nn.Linear], type[nn.Linear]] = {
    QuantizedLinear: IntegerLinear,
    QuantizedLowRankLinear: IntegerLowRankLinear,
    QuantizedPivotedLinear: IntegerPivotedLinear,
    TiedHead: IntegerHead,
}
"""The class of a layer that torch's kernels compute, by that of the layer before."""
