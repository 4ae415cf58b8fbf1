"""A linear layer of an inference server: several layers of the checkpoint, each dense, factored or pivoted, in one.

Servers fuse linear layers that read the same input, such as query, key and value, and split them across processes
(tensor parallelism). A :class:`Member` is one layer of the checkpoint and knows which part of it this process needs.
:class:`FusedLinear` computes all members. This file needs no server, so that it is tested without one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear, SharedLowRankLinear, Side
from lowrank_pl.models.hf_quantized import Grid, dequantize, grid_of_entry, stored_shapes
from lowrank_pl.serving.kernels import FusedGroup, Part, padded

__all__ = ["FusedLinear", "Member", "Span"]

Span = tuple[int, int]
"""Start and length of a range of rows or columns."""


@dataclass
class Member:
    """One linear layer of the checkpoint, or the part of it that this process computes.

    Args:
        name: Name of the layer.
        outputs: Size of the whole layer's output.
        inputs: Size of the whole layer's input.
        entry: How the layer is stored: None for dense, else its entry in ``quantization_config`` (see
            ``lowrank_pl.models.hf_format.LowRankConfig``).
        rows: The outputs that this process computes.
        columns: The inputs that this process has.

    Attributes:
        sizes: Rows and columns of each matrix of the layer, by its name in the layer.
        grid: The numbers that the matrices are rounded to; None if they are as they are.
        shapes: Shape of each tensor that the checkpoint holds for the layer, by its name in the layer.
        loaded: The matrices and pivots that were loaded, cut to what this process needs. Rounded matrices are
            dequantised.

    Raises:
        ValueError: The rank or the bits are impossible for the layer's size.
    """

    name: str
    outputs: int
    inputs: int
    entry: int | dict[str, Any] | None
    rows: Sequence[Span]
    columns: Span
    sizes: dict[str, tuple[int, int]] = field(init=False)
    grid: Grid | None = field(init=False)
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    loaded: dict[str, Tensor] = field(init=False, default_factory=dict)
    _packed: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        outputs, inputs, rank = self.outputs, self.inputs, self.rank
        self.grid = grid_of_entry(self.entry)
        if rank is None:
            self.sizes = {"weight": (outputs, inputs)}
        else:
            if self.side is not None and not rank < min(outputs, inputs):
                raise ValueError(
                    f"{self.name}: rank {rank} of a layer of shape [{outputs}, {inputs}] can't be stored pivoted: "
                    f"expected 1 to {min(outputs, inputs) - 1}"
                )
            rows, columns = outputs - rank * (self.side == "out"), inputs - rank * (self.side == "in")
            self.sizes = {"weight": (rows, rank), "right": (rank, columns)}
        if self.owner is not None:
            del self.sizes["right"]
        self.shapes = dict(self.sizes)
        if self.grid is not None:
            stored = [stored_shapes(name, *sizes, self.grid) for name, sizes in self.sizes.items()]
            self.shapes = {tensor: shape for shapes in stored for tensor, shape in shapes.items()}
        if rank is not None and self.side is not None:
            self.shapes["pivots"] = (rank,)

    @property
    def rank(self) -> int | None:
        """The rank of the layer; None if it is dense."""
        rank: int | None = self.entry.get("rank") if isinstance(self.entry, dict) else self.entry
        return rank

    @property
    def side(self) -> Side | None:
        """Whether pivots are outputs (``"out"``) or inputs (``"in"``); None without pivots."""
        return self.entry.get("side") if isinstance(self.entry, dict) else None

    @property
    def owner(self) -> str | None:
        """Name of the layer whose right factor this one reads; None if it has its own."""
        return self.entry.get("right") if isinstance(self.entry, dict) else None

    @property
    def unpivoted(self) -> bool:
        """Whether the layer is split along its pivots, which are spread over all of it: it becomes two factors."""
        if self.side == "out":
            return sum(length for _, length in self.rows) < self.outputs
        return self.side == "in" and self.columns[1] < self.inputs

    def load(self, part: str, tensor: Tensor, dtype: torch.dtype) -> None:
        """Keep a copy of what this process needs of a tensor of the checkpoint.

        Args:
            part: Name of the tensor in the layer: ``weight``, ``right`` or ``pivots``, and for rounded matrices, whose
                scales have these names, also ``weight_packed`` and the like.
            tensor: The tensor as the checkpoint holds it.
            dtype: Type that weights are kept in.

        Raises:
            ValueError: The layer has no such tensor, or its shape differs from what the entry says.
        """
        expected = self.shapes.get(part)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{self.name}.{part} has the shape {list(tensor.shape)} in the weight files: quantization_config says "
                f"{'no such tensor' if expected is None else list(expected)}; the folder is damaged, copy or export it "
                "again"
            )
        if part == "pivots":
            self.loaded[part] = tensor.to("cpu", torch.int64, copy=True)
        elif self.grid is None:
            self._keep(part, tensor, dtype)
        else:
            self._packed[part] = tensor.to("cpu", copy=True)
            matrix = part.removesuffix("_packed").removesuffix("_zeros")
            parts = [name for name in self.shapes if name == matrix or name.startswith(f"{matrix}_")]
            if all(name in self._packed for name in parts):
                codes, scales, zeros = (self._packed.get(f"{matrix}{kind}") for kind in ("_packed", "", "_zeros"))
                assert codes is not None
                assert scales is not None
                self._keep(matrix, dequantize(codes, scales.to(dtype), zeros, self.grid, self.sizes[matrix][1]), dtype)

    def _keep(self, matrix: str, values: Tensor, dtype: torch.dtype) -> None:
        kept = values if self.unpivoted else self._cut(matrix, values)
        # Some loaders use the memory of a tensor again for the next one.
        self.loaded[matrix] = kept.to("cpu", dtype, copy=True)

    def check(self) -> None:
        """Raise ``ValueError`` unless all tensors are loaded and pivots are ascending indices."""
        missing = [part for part in self.shapes if part not in {**self.loaded, **self._packed}]
        if missing:
            raise ValueError(
                f"the weight files hold no {self.name}.{missing[0]}: the folder is damaged, copy or export it again"
            )
        pivots = self.loaded.get("pivots")
        size = self.outputs if self.side == "out" else self.inputs
        if pivots is not None and (pivots[0] < 0 or pivots[-1] >= size or not (pivots.diff() > 0).all()):
            raise ValueError(
                f"{self.name}: the pivots {pivots[:4].tolist()}... are not {len(pivots)} ascending indices below "
                f"{size}; the folder is damaged, copy or export it again"
            )

    def release(self) -> None:
        """Forget all tensors."""
        self.loaded.clear()
        self._packed.clear()

    def matrices(self) -> tuple[Tensor, Tensor | None, Side | None]:
        """Return what this process computes: left and right matrix, or the dense one and None, and the pivots' side."""
        if self.unpivoted:
            return *self.factors(), None
        return self.loaded["weight"], self.loaded.get("right"), self.side

    def layer(self, device: torch.device, owner: LowRankLinear | None = None) -> nn.Linear:
        """Return what this process computes as a layer without bias.

        Args:
            device: Where to put its tensors.
            owner: The layer on that device whose right factor it reads, if it has none of its own.

        Raises:
            ValueError: Tensors are missing or pivots are damaged.
        """
        self.check()
        weight, right, side = self.matrices()
        weight = weight.to(device)
        layer: nn.Linear
        if owner is not None:
            layer = SharedLowRankLinear.from_owner(weight, owner)
        elif right is None:
            with torch.device("meta"):
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight, requires_grad=False)
        elif side is None:
            layer = LowRankLinear.from_factors(weight, right.to(device))
        else:
            layer = PivotedLinear.from_parts(weight, right.to(device), self.loaded["pivots"].to(device), side=side)
        return layer.requires_grad_(False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the left and the right factor of this process's part of an :attr:`unpivoted` layer."""
        weight, right, pivots = (self.loaded[part] for part in ("weight", "right", "pivots"))
        others, identity = self.others(), torch.eye(len(pivots), dtype=weight.dtype)
        if self.side == "out":
            whole = weight.new_empty(self.outputs, len(pivots))
            whole[pivots], whole[others] = identity, weight
            return self._cut("weight", whole), self._cut("right", right)
        whole = right.new_empty(len(pivots), self.inputs)
        whole[:, pivots], whole[:, others] = identity, right
        return self._cut("weight", weight), self._cut("right", whole)

    def others(self) -> Tensor:
        """Return the ascending indices of the outputs or inputs that are no pivots."""
        is_other = torch.ones(self.outputs if self.side == "out" else self.inputs, dtype=torch.bool)
        is_other[self.loaded["pivots"]] = False
        return is_other.nonzero().flatten()

    def _cut(self, part: str, tensor: Tensor) -> Tensor:
        """Return the rows and columns of a matrix that this process needs."""
        if part == "weight" and (self.side != "out" or self.unpivoted):
            tensor = torch.cat([tensor.narrow(0, *span) for span in self.rows])
        if (part == "right" or self.rank is None) and (self.side != "in" or self.unpivoted):
            tensor = tensor.narrow(1, *self.columns)
        return tensor


class FusedLinear(nn.Module):
    """Several linear layers that read the same input, without bias: ``y = cat([member(x) for member in members])``.

    The matrices that are multiplied with the whole input lie below each other in one buffer, so that they are one
    product. All shapes and indices are fixed here: ``forward`` makes none, as CUDA graphs require. On a GPU, kernels
    compute few tokens where they are faster (see :class:`~lowrank_pl.serving.kernels.FusedGroup`).

    Args:
        members: The layers, all of whose tensors are loaded; their tensors are released.
        device: Device of the weights.
        make_product: Returns a module that multiplies with the given matrix ``[out, in]``.

    Attributes:
        kernels: The same layers for kernels, on a GPU with Triton, unless the environment has ``LOWRANK_KERNELS=0``.

    Raises:
        ValueError: Tensors of a member are missing or its pivots are damaged.
    """

    places: Tensor | None

    def __init__(
        self, members: Sequence[Member], *, device: torch.device, make_product: Callable[[Tensor], nn.Module]
    ) -> None:
        super().__init__()
        for member in members:
            member.check()
        self.kernels = _kernels(members, device) if _has_kernels(device) else None
        if self.kernels is None:
            self._make_branches(members, device, make_product)
        for member in members:
            member.release()

    def _make_branches(
        self, members: Sequence[Member], device: torch.device, make_product: Callable[[Tensor], nn.Module]
    ) -> None:
        shared: list[Tensor] = []
        places: list[Tensor] = []
        self.branches = nn.ModuleList()
        for member in members:
            branch = _Branch()
            left, right, side = member.matrices()
            if right is None:  # dense
                shared.append(left)
            else:
                branch.left = make_product(left.to(device))
                if side == "in":
                    branch.right = make_product(right.to(device))
                    branch.register_buffer("pivots", member.loaded["pivots"].to(device), persistent=False)
                    branch.register_buffer("others", member.others().to(device), persistent=False)
                else:
                    shared.append(right)
            begin = sum(map(len, places))
            branch.keeps_first = side == "out"
            order = torch.arange(sum(length for _, length in member.rows))
            if side == "out":
                order = torch.cat([member.loaded["pivots"], member.others()]).argsort()
            places.append(begin + order)
            self.branches.append(branch)
        self.sizes = [len(matrix) for matrix in shared]
        self.shared = make_product(torch.cat(shared).to(device)) if shared else None
        moved = any(branch.keeps_first for branch in self.branches)
        self.register_buffer("places", torch.cat(places).to(device) if moved else None, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., out]`` for an input ``[..., in]``."""
        if self.kernels is not None:
            output = self.kernels.operation(input.flatten(0, -2))
            return output.reshape(*input.shape[:-1], output.shape[-1])
        firsts = list(self.shared(input).split(self.sizes, -1)) if self.shared is not None else []
        pieces: list[Tensor] = []
        for branch in self.branches:
            pieces += branch(input) if branch.right is not None else branch(firsts.pop(0))
        together = torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]
        return together if self.places is None else together.index_select(-1, self.places)


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and os.environ.get("LOWRANK_KERNELS") != "0" and find_spec("triton") is not None


def _kernels(members: Sequence[Member], device: torch.device) -> FusedGroup:
    parts = []
    for member in members:
        left, right, side = member.matrices()
        pivots = None if side is None else member.loaded["pivots"].to(device)
        parts.append(Part(padded(left.to(device)), None if right is None else padded(right.to(device)), side, pivots))
    group = FusedGroup(parts)
    group.choose(members[0].columns[1])
    return group


class _Branch(nn.Module):
    """What one member computes, from the whole input if its pivots are inputs, otherwise from its shared product."""

    pivots: Tensor
    others: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.left: nn.Module | None = None
        self.right: nn.Module | None = None
        self.keeps_first = False

    def forward(self, input: Tensor) -> list[Tensor]:
        """Return the outputs in one piece, or the outputs at pivots and all others."""
        if self.right is not None:
            input = input.index_select(-1, self.pivots) + self.right(input.index_select(-1, self.others))
        if self.left is None:
            return [input]
        output: Tensor = self.left(input)
        return [input, output] if self.keeps_first else [output]
