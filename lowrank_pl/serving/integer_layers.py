"""Rounded layers whose products kernels for packed integers compute for few tokens, where they are faster.

They read the codes instead of a matrix of floating-point numbers, which a token of decoding waits for.

torch brings such kernels for a CPU: for 8 bits with one scale a row, and for 4 bits in groups of 32, 64, 128 or 256
columns, which compute 2 and 3 bits as well. For float32 they are slower than dequantising, and for many tokens too. On
a GPU a Triton kernel reads the numbers of all bits and groups as they are stored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm.auto import tqdm

from lowrank_pl.models.hf_quantized import (
    FIELDS,
    Grid,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLowRankLinear,
    QuantizedPivotedLinear,
    Rounded,
    TiedHead,
    unpack,
)
from lowrank_pl.serving.kernels import MAX_TOKENS, Count, Tile, check_triton, flushing, launch_seconds

__all__ = ["INTEGER", "TILES", "IntegerMatrix", "PackedMatrix", "use_integer_kernels", "use_packed_kernels"]

_log = logging.getLogger(__name__)

_TOKENS: dict[Count, int] = {"one": 1, "few": MAX_TOKENS}
"""The numbers of tokens that both are timed with; more tokens are dequantised."""

_TURNS = 3

_FASTER = 0.97
"""The part of the plain path's time that a kernel may take to be chosen."""

_ALIKE = 0.02
"""The relative difference of two products that is taken as rounding, in half precision."""

_GROUPS = (32, 64, 128, 256)

_MULTIPLE = 32
"""Rows and columns are padded to multiples of this."""

TILES: dict[Count, list[Tile]] = {
    "one": [Tile(4, 1024, 4), Tile(8, 512, 4), Tile(16, 256, 4), Tile(4, 512, 2)],
    "few": [Tile(16, 256, 4, 2), Tile(32, 128, 4, 3), Tile(32, 256, 4, 2)],
}
"""The ways to divide a launch of the Triton kernel that are tried."""


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


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A rounded matrix as the Triton kernel reads it: the tensors of its layer.

    Args:
        grid: The numbers that it was rounded to.
        columns: Numbers in a row.
        codes: uint8 ``[rows, packed_width]``.
        scales: ``[rows, groups]``, in the type of the inputs.
        zeros: Packed zero points, uint8; None at 8 bits.
        tiles: How a launch is divided, for one token and for a few.
    """

    grid: Grid
    columns: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    tiles: Mapping[Count, Tile]

    def random_input(self, tokens: int) -> Tensor:
        """Return random inputs ``[tokens, columns]``."""
        return torch.randn(tokens, self.columns, device=self.codes.device, dtype=self.scales.dtype)

    def product(self, input: Tensor) -> Tensor:
        """Return the product of the matrix with ``input`` ``[..., columns]``, of up to ``MAX_TOKENS`` tokens."""
        # Places in the input are 32-bit numbers.
        rows = input.reshape(-1, self.columns).contiguous()
        output = self.launch(rows, self.tiles["one" if len(rows) == 1 else "few"])
        return output.view(*input.shape[:-1], len(self.codes))

    def launch(self, input: Tensor, tile: Tile) -> Tensor:
        """Return the product with ``input`` ``[tokens, columns]`` by one launch.

        Args:
            input: Up to ``MAX_TOKENS`` tokens, contiguous.
            tile: How the work is divided.
        """
        from lowrank_pl.serving.triton_rows import rounded_kernel

        height, groups = self.scales.shape
        zeros = self.codes if self.zeros is None else self.zeros
        first, second, third = (*FIELDS[self.grid.bits], 0, 0)[:3]
        output = input.new_empty(len(input), height)
        # Triton launches on the current device.
        with torch.cuda.device(input.device) if input.is_cuda else nullcontext():
            rounded_kernel[(-(-height // tile.rows),)](
                input,
                output,
                self.codes,
                self.scales,
                zeros,
                height,
                self.columns,
                groups,
                self.grid.group or self.columns + -self.columns % 8,
                len(input),
                input.stride(0),
                self.codes.stride(0),
                zeros.stride(0),
                HAS_ZEROS=self.grid.has_zeros,
                FIRST=first,
                SECOND=second,
                THIRD=third,
                TOKENS=1 if len(input) == 1 else MAX_TOKENS,
                ROWS=tile.rows,
                UNITS=tile.columns // 8,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        return output


def use_packed_kernels(layers: Sequence[nn.Linear]) -> list[dict[str, bool]]:
    """Let the Triton kernel compute rounded layers where it is faster; return for each matrix whether it does.

    Args:
        layers: Layers on a GPU, of the types in ``INTEGER``.

    Raises:
        ValueError: Triton isn't installed.
    """
    check_triton()
    chosen: list[dict[str, bool]] = []
    # Equal matrices take equal times.
    timed: dict[tuple[object, ...], tuple[dict[Count, Tile], dict[str, bool]]] = {}
    with torch.inference_mode():
        for layer, name in tqdm(_matrices(layers), desc="choosing kernels", unit="matrix", leave=False):
            source = _source(layer)
            codes, scales = source.get_buffer(f"{name}_packed"), source.get_parameter(name)
            zeros, columns = getattr(source, f"{name}_zeros", None), source.columns(name)
            matrix = PackedMatrix(source.grid, columns, codes, scales, zeros, {})
            kind = source.grid, columns, len(codes), scales.dtype, codes.device
            try:
                if kind not in timed:
                    timed[kind] = _choose(layer, name, matrix)
                matrix = replace(matrix, tiles=timed[kind][0])
                _check(layer, name, matrix)
            except Exception as error:  # of Triton, its compiler and the driver: what they raise has no common class
                _log.warning(
                    "the kernel of rounded layers does not run on %s, and they are dequantised: %s: %s",
                    *(codes.device, type(error).__name__, error),
                )
                break
            found = timed[kind][1]
            chosen.append(found)
            if any(found.values()):
                _compute_by(layer, name, matrix, found)
    return chosen


def _choose(layer: Any, name: str, matrix: PackedMatrix) -> tuple[dict[Count, Tile], dict[str, bool]]:
    """Return the fastest ways to divide a launch, and whether they are faster than the plain path."""
    tiles: dict[Count, Tile] = {}
    found: dict[str, bool] = {}
    flush = flushing(matrix.codes.device)
    for count, tokens in _TOKENS.items():
        input = matrix.random_input(tokens)
        times = [launch_seconds(partial(matrix.launch, input, tile), flush) for tile in TILES[count]]
        tiles[count] = TILES[count][times.index(min(times))]
        found[count] = min(times) < _FASTER * launch_seconds(partial(layer.product, input, name), flush)
    return tiles, found


def _check(layer: Any, name: str, matrix: PackedMatrix) -> None:
    """Raise a ``ValueError`` if the kernel and the plain path compute different products."""
    for tokens in _TOKENS.values():
        input = matrix.random_input(tokens)
        wanted = layer.product(input, name).float()
        difference, size = (matrix.product(input).float() - wanted).norm(), wanted.norm()
        if not difference <= _ALIKE * size:
            raise ValueError(f"a product of the size {size:.3g} differs from that of torch by {difference:.3g}")


def _matrices(layers: Sequence[nn.Linear]) -> list[tuple[Any, str]]:
    """Return each layer with the names of its matrices."""
    return [(layer, name) for layer in layers for name in ("weight", "right") if hasattr(layer, name)]


def _compute_by(layer: nn.Linear, name: str, matrix: IntegerMatrix | PackedMatrix, found: Mapping[str, bool]) -> None:
    """Let a kernel compute the matrix called ``name`` of a layer for the numbers of tokens for which it is faster."""
    layer.__class__ = INTEGER.get(type(layer), type(layer))
    vars(layer).setdefault("integers", {})[name] = _Kernel(matrix, found, _state(layer, name))


@dataclass(frozen=True, eq=False)
class _Kernel:
    """A matrix that a kernel computes.

    Args:
        matrix: The matrix as the kernel reads it.
        faster: For which numbers of tokens it is faster.
        made_from: The state of the layer's tensors that ``matrix`` was made from.
    """

    matrix: IntegerMatrix | PackedMatrix
    faster: Mapping[str, bool]
    made_from: tuple[tuple[int, int], ...]


def _state(layer: nn.Module, name: str) -> tuple[tuple[int, int], ...]:
    """Return where the tensors of a matrix are and how often they were changed, so that changed ones are noticed."""
    source = _source(layer)
    tensors = (source.get_buffer(f"{name}_packed"), source.get_parameter(name), getattr(source, f"{name}_zeros", None))
    return tuple(
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors if tensor is not None
    )


def use_integer_kernels(layers: Sequence[nn.Linear]) -> list[dict[str, bool]]:
    """Let torch's kernels compute rounded layers where they are faster; return for each matrix whether they do.

    Each matrix that a kernel computes is in memory a second time, as the kernel reads it.

    Args:
        layers: Layers on a CPU, of the types in ``INTEGER``, in bfloat16.
    """
    chosen: list[dict[str, bool]] = []
    with torch.inference_mode():
        for layer, name in tqdm(_matrices(layers), desc="timing products", unit="matrix", leave=False):
            matrix = IntegerMatrix.of(_source(layer).rounded(name), layer.get_parameter("weight").dtype)
            found: dict[str, bool] = {
                count: matrix is not None and _is_faster(layer, name, matrix, tokens)
                for count, tokens in _TOKENS.items()
            }
            chosen.append(found)
            if matrix is not None and any(found.values()):
                _compute_by(layer, name, matrix, found)
    return chosen


def _source(layer: nn.Module) -> QuantizedLinear | QuantizedLowRankLinear | QuantizedPivotedLinear | QuantizedEmbedding:
    """Return the module that stores the matrices of a layer."""
    source = layer.source[0] if isinstance(layer, TiedHead) else layer
    assert isinstance(source, (QuantizedLinear, QuantizedLowRankLinear, QuantizedPivotedLinear, QuantizedEmbedding))
    return source


def _is_faster(layer: Any, name: str, matrix: IntegerMatrix, tokens: int) -> bool:
    input = torch.ones(tokens, _source(layer).columns(name), dtype=matrix.scales.dtype)
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

    integers: dict[str, _Kernel]

    def product(self, input: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        """Return the product of the matrix called ``name`` with ``input``, plus ``bias``."""
        kernel = self.integers.get(name)
        # The kernels know no gradients; the code that torch.compile makes dequantises.
        kind = input.device.type
        plain = torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled(kind)
        if plain or kernel is None or not self._serves(kernel, input):
            return super().product(input, name, bias)  # type: ignore[misc, no-any-return]
        if kernel.made_from != _state(self, name):
            _log.warning("rounded weights were changed after they were optimised: they are dequantised from here on")
            del self.integers[name]
            return super().product(input, name, bias)  # type: ignore[misc, no-any-return]
        output = kernel.matrix.product(input)
        return output if bias is None else output + bias

    @staticmethod
    def _serves(kernel: _Kernel, input: Tensor) -> bool:
        matrix, tokens = kernel.matrix, input.numel() // input.shape[-1]
        if input.dtype != matrix.scales.dtype or input.device != matrix.codes.device or not tokens:
            return False
        return kernel.faster.get(next((count for count, most in _TOKENS.items() if tokens <= most), "many"), False)


class IntegerLinear(_Integer, QuantizedLinear):
    """A ``QuantizedLinear`` by kernels."""


class IntegerLowRankLinear(_Integer, QuantizedLowRankLinear):
    """A ``QuantizedLowRankLinear`` by kernels."""


class IntegerPivotedLinear(_Integer, QuantizedPivotedLinear):
    """A ``QuantizedPivotedLinear`` by kernels."""


class IntegerHead(_Integer, TiedHead):
    """A ``TiedHead`` by kernels."""


INTEGER: dict[type[nn.Linear], type[nn.Linear]] = {
    QuantizedLinear: IntegerLinear,
    QuantizedLowRankLinear: IntegerLowRankLinear,
    QuantizedPivotedLinear: IntegerPivotedLinear,
    TiedHead: IntegerHead,
}
"""The class of a layer that kernels compute, by that of the layer before."""
