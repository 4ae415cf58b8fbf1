"""Layers of a compressed model whose numbers are rounded to a few bits: packed integers, scales and zero points.

This file needs only torch. Every exported folder holds a copy beside hf_format.py, as part of the remote code.

A matrix is cut into groups of neighbouring columns. Each row of a group has one scale and, below 8 bits, one zero
point, and a number is ``(code - zero) * scale``. At 8 bits codes are symmetric, ``(code - 128) * scale``, because an
offset gains nothing there.

Layers call the scales ``weight``: they are floating-point numbers of the layer's type, as PEFT and others expect of
``weight``, and never have the dense shape, so that a loader that does not know these layers stops at a size mismatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hf_layers import (
    LowRankEmbedding,
    LowRankLinear,
    PivotedLinear,
    blank_embedding,
    copy_attributes,
    loaded_by_hook,
    low_rank_embedding,
)

__all__ = [
    "FIELDS",
    "SCALE_TYPE",
    "Grid",
    "LowRankTiedHead",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedLowRankEmbedding",
    "QuantizedLowRankLinear",
    "QuantizedPivotedLinear",
    "Rounded",
    "TiedHead",
    "dequantize",
    "grid_of_entry",
    "is_quantized",
    "pack",
    "packed_width",
    "quantized_embedding",
    "quantized_layer",
    "quantized_low_rank_embedding",
    "stored_shapes",
    "stored_state",
    "tie_head",
    "unpack",
]

SCALE_TYPE = torch.bfloat16
"""The type of scales in files. It holds every scale exactly, since scales are rounded to it before codes are chosen."""

FIELDS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""The widths of the fields that a code of so many bits is cut into, lowest bits first. Each packs evenly into bytes."""


@dataclass(frozen=True)
class Grid:
    """The numbers that a matrix is rounded to.

    Args:
        bits: Bits of a code, 2 to 8.
        group: How many neighbouring columns share a scale; None for a whole row. The last group of a row may be
            smaller.

    Raises:
        ValueError: Other bits, or a group that is no multiple of 8.

    >>> Grid(4, 32).bytes(576, 168)
    57024
    """

    bits: int
    group: int | None = None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in FIELDS:
            raise ValueError(f"{self.bits!r} bits were given: expected a whole number from 2 to 8")
        if self.group is not None and (type(self.group) is not int or self.group < 8 or self.group % 8):
            raise ValueError(f"the group {self.group!r} was given: expected a multiple of 8, or None for a whole row")

    @property
    def has_zeros(self) -> bool:
        """Whether there are zero points."""
        return self.bits < 8

    def groups(self, columns: int) -> int:
        """Return into how many groups a row of ``columns`` numbers is cut."""
        return 1 if self.group is None else -(-columns // self.group)

    def bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a rounded matrix on disk: codes, scales and zero points."""
        groups = self.groups(columns)
        zeros = packed_width(groups, self.bits) if self.has_zeros else 0
        return rows * (packed_width(columns, self.bits) + zeros + groups * SCALE_TYPE.itemsize)

    def to_json(self) -> dict[str, int]:
        """Return the fields as JSON values; a group of None is left out."""
        return {"bits": self.bits} if self.group is None else {"bits": self.bits, "group": self.group}


def grid_of_entry(entry: Any) -> Grid | None:
    """Return the numbers that a module is rounded to by its entry in ``quantization_config``; None if it is not."""
    return Grid(entry["bits"], entry.get("group")) if isinstance(entry, dict) and "bits" in entry else None


def stored_shapes(name: str, rows: int, columns: int, grid: Grid) -> dict[str, tuple[int, int]]:
    """Return the shapes of the tensors that store a rounded matrix called ``name``, by their names."""
    groups = grid.groups(columns)
    shapes = {name: (rows, groups), f"{name}_packed": (rows, packed_width(columns, grid.bits))}
    return {**shapes, f"{name}_zeros": (rows, packed_width(groups, grid.bits))} if grid.has_zeros else shapes


def packed_width(columns: int, bits: int) -> int:
    """Return the bytes that a row of ``columns`` codes takes."""
    return sum(-(-columns * width // 8) for width in FIELDS[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes ``[rows, columns]``, uint8 below ``2 ** bits``, as bytes ``[rows, packed_width]``.

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
    [[33, 3]]
    """
    parts, shift = [], 0
    for width in FIELDS[bits]:
        each = 8 // width
        field = (codes >> shift) & (2**width - 1)
        field = F.pad(field, (0, -codes.shape[1] % each)).view(codes.shape[0], -1, each)
        parts.append((field << torch.arange(0, 8, width, device=codes.device)).sum(-1).to(torch.uint8))
        shift += width
    return torch.cat(parts, 1)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes ``[rows, columns]``, uint8, that :func:`pack` made bytes of."""
    codes: Tensor | None = None
    start = shift = 0
    for width in FIELDS[bits]:
        count = -(-columns * width // 8)
        field = packed[:, start : start + count]
        if width < 8:
            shifts = torch.arange(0, 8, width, device=packed.device, dtype=torch.uint8)
            field = ((field.unsqueeze(-1) >> shifts) & (2**width - 1)).flatten(1)[:, :columns]
        codes = field if codes is None else codes | (field << shift)
        start, shift = start + count, shift + width
    assert codes is not None
    return codes


def dequantize(packed: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid, columns: int) -> Tensor:
    """Return the matrix ``[rows, columns]`` in the type of the scales, computed in float32.

    Args:
        packed: Codes, uint8 ``[rows, packed_width]``.
        scales: ``[rows, groups]``.
        zeros: Packed zero points, uint8; None at 8 bits.
        grid: How the matrix was rounded.
        columns: Numbers in a row.
    """
    codes = unpack(packed, grid.bits, columns).float()
    groups = scales.shape[1]
    wide = scales.float()
    offset = 128.0 if zeros is None else unpack(zeros, grid.bits, groups).float()
    if groups == 1:
        return ((codes - offset) * wide).to(scales.dtype)
    size = grid.group or columns
    codes = F.pad(codes, (0, groups * size - columns)).view(len(codes), groups, size)
    offset = offset.unsqueeze(-1) if isinstance(offset, Tensor) else offset
    matrix = ((codes - offset) * wide.unsqueeze(-1)).view(len(codes), -1)
    return matrix[:, :columns].to(scales.dtype)


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix that was rounded.

    Args:
        grid: The numbers that it was rounded to.
        columns: Numbers in a row.
        packed: Codes, uint8 ``[rows, packed_width]``.
        scales: ``[rows, groups]``, float32, exact in :data:`SCALE_TYPE`.
        zeros: Packed zero points, uint8; None at 8 bits.
    """

    grid: Grid
    columns: int
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.packed.shape[0]

    def to(self, device: torch.device) -> Rounded:
        """Return the matrix on another device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return Rounded(self.grid, self.columns, self.packed.to(device), self.scales.to(device), zeros)

    def dense(self) -> Tensor:
        """Return the matrix ``[rows, columns]`` in float32."""
        return dequantize(self.packed, self.scales, self.zeros, self.grid, self.columns)


class _Stored(nn.Module):
    """A module that stores matrices as packed codes, scales and zero points.

    The scales of the matrix ``name`` are the parameter ``name``. Codes and zero points are the buffers ``name_packed``
    and ``name_zeros``.
    """

    grid: Grid

    def _add_matrix(
        self, name: str, rows: int, columns: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        for tensor, shape in stored_shapes(name, rows, columns, self.grid).items():
            if tensor == name:
                self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)))
            else:
                self.register_buffer(tensor, torch.zeros(shape, device=device, dtype=torch.uint8))

    def put(self, name: str, part: Rounded) -> None:
        """Take the codes, scales and zero points of ``part`` for the matrix ``name``, in the type of the scales."""
        like = self.get_parameter(name)
        sizes = [part.rows, part.columns]
        if part.grid != self.grid or sizes != [like.shape[0], self.columns(name)]:
            raise ValueError(
                f"{name}: a matrix of {sizes} with {part.grid} was given, expected "
                f"{[like.shape[0], self.columns(name)]} with {self.grid}"
            )
        # A layer on the meta device takes the place of the part.
        device = part.packed.device if like.is_meta else like.device
        with torch.no_grad():
            setattr(self, name, nn.Parameter(part.scales.to(device, like.dtype)))
        self._buffers[f"{name}_packed"] = part.packed.to(device).contiguous()
        if part.zeros is not None:
            self._buffers[f"{name}_zeros"] = part.zeros.to(device).contiguous()

    def rounded(self, name: str) -> Rounded:
        """Return the matrix ``name`` as it is stored."""
        packed = self.get_buffer(f"{name}_packed")
        scales = self.get_parameter(name).detach().float()
        return Rounded(self.grid, self.columns(name), packed, scales, getattr(self, f"{name}_zeros", None))

    def matrix(self, name: str) -> Tensor:
        """Return the matrix called ``name`` in the layer's type."""
        zeros = getattr(self, f"{name}_zeros", None)
        return dequantize(getattr(self, f"{name}_packed"), getattr(self, name), zeros, self.grid, self.columns(name))

    def matrix_rows(self, name: str, ids: Tensor) -> Tensor:
        """Return the rows ``[..., columns]`` of the matrix called ``name`` at ``ids``; no other is computed.

        Args:
            name: The matrix.
            ids: ``[...]`` indices of rows.
        """
        flat, zeros, columns = ids.flatten(), getattr(self, f"{name}_zeros", None), self.columns(name)
        rows = dequantize(
            self.get_buffer(f"{name}_packed")[flat],
            self.get_parameter(name)[flat],
            None if zeros is None else zeros[flat],
            self.grid,
            columns,
        )
        return rows.view(*ids.shape, columns)

    def columns(self, name: str) -> int:
        """Return how many numbers a row of the matrix ``name`` has."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Leave all numbers 0: rounded numbers come from a file or from :meth:`put`."""


class QuantizedLinear(_Stored, nn.Linear):
    """A dense linear layer with rounded weights.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        grid: The numbers that the weight is rounded to.
        bias: Whether there is a bias.
        device: Device of the parameters.
        dtype: Type of the scales, of the bias and of the computation.

    Attributes:
        weight: Scales, ``[out, groups]``.
        weight_packed: Codes, uint8.
        weight_zeros: Zero points, uint8, below 8 bits.
        bias: ``[out]`` or None.

    >>> QuantizedLinear(64, 6, grid=Grid(4, 32), bias=False)
    QuantizedLinear(in_features=64, out_features=6, bits=4, group=32, bias=False)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        grid: Grid,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_features < 2:
            # Its scales would have the dense shape: loaders that do not know the format would not stop.
            raise ValueError(f"a layer with {in_features} input was given to round: leave it as it is")
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.grid = in_features, out_features, grid
        self._add_matrix("weight", out_features, in_features, device, dtype)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    def columns(self, name: str) -> int:
        """Return how many numbers a row of the weight has."""
        return self.in_features

    def product(self, input: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        """Return the product of the matrix called ``name`` with ``input``, plus ``bias``."""
        return F.linear(input, self.matrix(name), bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., out]`` for an input ``[..., in]``."""
        return self.product(input, "weight", self.bias)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the weight ``[out, in]``."""
        return self.matrix("weight")

    # As in LowRankLinear: PEFT asks quantised layers for their weight by these names.
    W_q = property(lambda self: self.weight)
    dequantize = dense

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {_shown(self.grid)}, bias={self.bias is not None}"


class QuantizedLowRankLinear(_Stored, LowRankLinear):
    """A linear layer of low rank with rounded factors; arguments are those of ``LowRankLinear``, and ``grid``.

    Attributes:
        weight: Scales of the left factor, ``[out, groups]``.
        right: Scales of the right factor, ``[rank, groups]``.
        weight_packed: Codes of the left factor, uint8; ``right_packed`` has those of the right one.
        weight_zeros: Zero points of the left factor, uint8, below 8 bits; ``right_zeros`` has those of the right one.
        bias: ``[out]`` or None.

    >>> QuantizedLowRankLinear(64, 48, 16, grid=Grid(8), bias=False)
    QuantizedLowRankLinear(in_features=64, out_features=48, rank=16, bits=8, bias=False)
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, grid: Grid, **kind: Any) -> None:
        self.grid = grid
        super().__init__(in_features, out_features, rank, **kind)

    def columns(self, name: str) -> int:
        """Return how many numbers a row of a factor has."""
        return self.rank if name == "weight" else self.in_features

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        return super().extra_repr().replace(", bias", f", {_shown(self.grid)}, bias")


class QuantizedPivotedLinear(_Stored, PivotedLinear):
    """A linear layer stored as rounded pivots and coefficients; arguments are those of ``PivotedLinear``, and ``grid``.

    Attributes are those of ``QuantizedLowRankLinear``, with the parts of ``PivotedLinear`` in place of the factors.

    >>> QuantizedPivotedLinear(64, 48, 16, side="out", grid=Grid(8), bias=False)
    QuantizedPivotedLinear(in_features=64, out_features=48, rank=16, side=out, bits=8, bias=False)
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, grid: Grid, **kind: Any) -> None:
        self.grid = grid
        super().__init__(in_features, out_features, rank, **kind)

    def columns(self, name: str) -> int:
        """Return how many numbers a row of a part has."""
        if name == "weight":
            return self.rank
        return self.in_features - (self.rank if self.side == "in" else 0)

    def reset_parameters(self) -> None:
        """Leave all numbers 0; the first rows or columns are pivots."""
        self.pivots = torch.arange(self.rank, device=self.pivots.device, dtype=torch.int32)

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        return super().extra_repr().replace(", bias", f", {_shown(self.grid)}, bias")


class QuantizedEmbedding(_Stored, nn.Embedding):
    """An embedding with rounded rows, of which only those that are looked up are computed.

    It is made of the embedding that it replaces by :func:`quantized_embedding`, so that subclasses keep what they add,
    such as Gemma's factor.

    Attributes:
        weight: Scales, ``[embeddings, groups]``.
        weight_packed: Codes, uint8.
        weight_zeros: Zero points, uint8, below 8 bits.
    """

    _kind: type[nn.Embedding] = nn.Embedding

    def columns(self, name: str) -> int:
        """Return the size of an embedding."""
        return self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """Return the embeddings ``[..., size]`` of token ids."""
        return self.matrix_rows("weight", input)

    def multiply(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the products ``[..., embeddings]`` of all embeddings with ``input`` ``[..., size]``, plus ``bias``."""
        return F.linear(input, self.matrix("weight").to(input.device), bias)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return all embeddings ``[embeddings, size]``."""
        return self.matrix("weight")

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {_shown(self.grid)}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make a copy: pickle does not find classes that were made at run time."""
        return _blank_embedding, (self._kind,), vars(self)


class QuantizedLowRankEmbedding(_Stored, LowRankEmbedding):
    """An embedding of low rank with rounded factors, of whose left one only the rows that are looked up are computed.

    It is made by :func:`quantized_low_rank_embedding`. Attributes are those of ``QuantizedLowRankLinear``.
    """

    def columns(self, name: str) -> int:
        """Return how many numbers a row of a factor has."""
        return self.rank if name == "weight" else self.embedding_dim

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows ``[..., rank]`` of the left factor at token ``ids``."""
        return self.matrix_rows("weight", ids)

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        return f"{super().extra_repr()}, {_shown(self.grid)}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make a copy: pickle does not find classes that were made at run time."""
        return _blank_quantized_low_rank, (self._kind,), vars(self)


class TiedHead(nn.Linear):
    """A head that multiplies by the rows of the compressed embedding it is tied to, and stores nothing of its own.

    Attributes:
        weight: The parameter ``weight`` of the embedding, such as its scales: transformers ties what is called so.
    """

    source: tuple[QuantizedEmbedding | LowRankEmbedding]

    def product(self, input: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        """Return the product of the embeddings with ``input``, plus ``bias``; ``name`` is ``weight``."""
        return self._of_source(lambda embedding: embedding.multiply(input, bias))

    def forward(self, input: Tensor) -> Tensor:
        """Return logits ``[..., embeddings]`` for hidden states ``[..., size]``."""
        return self.product(input, "weight", self.bias)

    def _of_source(self, compute: Callable[[QuantizedEmbedding | LowRankEmbedding], Tensor]) -> Tensor:
        with loaded_by_hook(self.source[0]):
            return compute(self.source[0])

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the weight ``[embeddings, size]``."""
        return self._of_source(lambda embedding: embedding.dense())

    W_q = property(lambda self: self.weight)  # as in LowRankLinear
    dequantize = dense


class LowRankTiedHead(TiedHead):
    """A ``TiedHead`` of an embedding of low rank: it multiplies by one factor after the other."""


def is_quantized(module: nn.Module) -> bool:
    """Tell whether a module stores rounded numbers of its own."""
    return isinstance(module, _Stored)


def stored_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model as files hold them: scales are in :data:`SCALE_TYPE`, all others as they are.

    Scales that it does not hold exactly, as after training them, stay in their own type. Tensors that share memory
    still do so.

    Args:
        state: The ``state_dict`` of the model.
    """
    stored: dict[tuple[int, torch.dtype, torch.Size], Tensor] = {}
    for name, scales in state.items():
        if f"{name}_packed" in state and not scales.is_meta:
            short = scales.to(SCALE_TYPE)
            if torch.equal(short.to(scales.dtype), scales):
                stored[_place(scales)] = short
    # A tied head has the scales of its embedding.
    return {name: tensor if tensor.is_meta else stored.get(_place(tensor), tensor) for name, tensor in state.items()}


def _place(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape


def quantized_layer(layer: nn.Linear, parts: Mapping[str, Rounded]) -> nn.Linear:
    """Return a layer that stores the rounded ``parts`` of a linear layer, and has its bias and pivots.

    Args:
        layer: A dense layer, a ``LowRankLinear`` or a ``PivotedLinear``, for its sizes, type and bias.
        parts: The rounded ``weight``, and ``right`` of a layer of low rank, with the same grid.

    >>> codes = torch.full((6, 8), 130, dtype=torch.uint8)
    >>> part = Rounded(Grid(8), 8, codes, torch.full((6, 1), 0.5))
    >>> quantized_layer(nn.Linear(8, 6, bias=False), {"weight": part})(torch.ones(8)).tolist()
    [8.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    """
    grid = parts["weight"].grid
    sizes = layer.in_features, layer.out_features
    kind: dict[str, Any] = {
        "grid": grid, "bias": layer.bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype,
    }  # fmt: skip
    new: QuantizedLinear | QuantizedLowRankLinear | QuantizedPivotedLinear
    if isinstance(layer, PivotedLinear):
        new = QuantizedPivotedLinear(*sizes, layer.rank, side=layer.side, **kind)
        new.pivots = layer.pivots
    elif isinstance(layer, LowRankLinear):
        new = QuantizedLowRankLinear(*sizes, layer.rank, **kind)
    else:
        new = QuantizedLinear(*sizes, **kind)
    for name, part in parts.items():
        new.put(name, part)
    new.bias = layer.bias
    return new


def quantized_embedding(embedding: nn.Embedding, grid: Grid) -> QuantizedEmbedding:
    """Return an empty rounded embedding with the sizes and the type of ``embedding``, of a subclass of its class.

    The embedding itself is not changed.
    """
    new = blank_embedding(type(embedding), QuantizedEmbedding)
    copy_attributes(embedding, new)
    new.grid = grid
    weight = embedding.weight
    new._add_matrix("weight", embedding.num_embeddings, embedding.embedding_dim, weight.device, weight.dtype)
    return new


def quantized_low_rank_embedding(embedding: nn.Embedding, rank: int, grid: Grid) -> QuantizedLowRankEmbedding:
    """Return an empty embedding of low rank with rounded factors, in the place of ``embedding``, which is not changed.

    Args:
        embedding: The dense embedding.
        rank: Inner size of the factors.
        grid: The numbers that both factors are rounded to.
    """
    new = low_rank_embedding(embedding, rank, stored=QuantizedLowRankEmbedding, grid=grid)
    assert isinstance(new, QuantizedLowRankEmbedding)
    return new


def _blank_embedding(kind: type[nn.Embedding]) -> QuantizedEmbedding:
    """Return a rounded embedding without any attribute, in place of embeddings of the class ``kind``."""
    return blank_embedding(kind, QuantizedEmbedding)


def _blank_quantized_low_rank(kind: type[nn.Embedding]) -> QuantizedLowRankEmbedding:
    return blank_embedding(kind, QuantizedLowRankEmbedding)


def tie_head(head: nn.Linear, embedding: QuantizedEmbedding | LowRankEmbedding) -> TiedHead:
    """Return a head tied to a compressed ``embedding``, with the sizes and the bias of ``head``."""
    kind = LowRankTiedHead if isinstance(embedding, LowRankEmbedding) else TiedHead
    new = kind(head.in_features, head.out_features, bias=False, device="meta")
    new.weight, new.bias = embedding.weight, head.bias
    # In a tuple, so that the embedding is not a submodule of the head as well.
    new.source = (embedding,)
    return new


def _shown(grid: Grid) -> str:
    return ", ".join(f"{key}={value}" for key, value in grid.to_json().items())
