"""Compressed layers on a GPU, for few tokens: two launches for all layers that read the same input.

When a model decodes, each weight is read once and multiplied with one token or a few, so the time is that of reading
the weights and of starting kernels. A library's product takes one launch a matrix, and pivots take some more to gather
and place values. Here a :class:`Stage` computes several matrices, each with its own size and with its inputs and
outputs anywhere, in one launch of a Triton kernel, and a :class:`FusedGroup` computes several layers in two stages.

This file imports Triton only when a kernel runs, so that it can be imported everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import count
from typing import Literal
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_pl.models.hf_layers import Side

__all__ = [
    "MAX_MATRICES",
    "MAX_TOKENS",
    "Count",
    "FusedGroup",
    "Part",
    "Product",
    "Stage",
    "Tile",
    "check_triton",
    "flushing",
    "launch_seconds",
    "padded",
]

Count = Literal["one", "few"]
"""One token, or 2 to ``MAX_TOKENS`` of them: kernels are chosen for both."""

MAX_MATRICES = 4
"""Matrices of one stage: query, key and value, or gate and up, and one to spare."""

MAX_TOKENS = 16
"""Tokens that a launch takes at once: the smallest side of a tensor core's product."""

_ALIGNED = 8
"""Rows of weights begin at multiples of so many numbers, so that a thread reads 16 bytes of bfloat16 at once."""


@dataclass(frozen=True)
class Tile:
    """How a launch is divided among the GPU's processors.

    Args:
        rows: Rows of a matrix that one program computes, a power of 2.
        columns: Columns that it reads at a time, a power of 2.
        warps: Groups of 32 threads of a program.
        stages: Reads that are on their way while it computes; several tokens only.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1


# The fastest ones on an H200, for the matrices of a block of Llama-3-8B; some of them was fastest everywhere.
TILES: dict[Count, list[Tile]] = {
    "one": [Tile(4, 1024, 8), Tile(8, 512, 8), Tile(4, 512, 4), Tile(8, 256, 4), Tile(4, 256, 2), Tile(16, 128, 4)],
    "few": [Tile(16, 512, 4, 2), Tile(32, 256, 4, 3), Tile(64, 128, 4, 3)],
}
"""The ways to divide a launch that are tried."""


@dataclass(frozen=True)
class Product:
    """A matrix that is multiplied with a part of the input, and where its results go.

    Args:
        weight: The matrix, ``[rows, columns]``; see :func:`padded`.
        reads: The input that each column is multiplied with: the first of them, or the index of each, ``[columns]``.
        adds: Index of the input that is added to each row's result, ``[rows]``; None to add nothing.
        outputs: Place of each row's result in the output, ``[rows]``; None where it is no output.
        keeps: Place of the first row's result among the values that are kept for the next stage, the others follow;
            None to keep none.
    """

    weight: Tensor
    reads: int | Tensor = 0
    adds: Tensor | None = None
    outputs: Tensor | None = None
    keeps: int | None = None


def padded(weight: Tensor) -> Tensor:
    """Return ``weight`` in memory whose rows begin at multiples of 16 bytes or more, zeros behind them.

    It is returned itself where its rows need nothing behind them.

    >>> weight = padded(torch.ones(3, 5))
    >>> weight.shape, weight.stride()
    (torch.Size([3, 5]), (8, 1))
    """
    rows, columns = weight.shape
    if weight.is_contiguous() and columns % _ALIGNED == 0:
        return weight
    room = weight.new_zeros(rows, columns + -columns % _ALIGNED)
    room[:, :columns] = weight
    return room[:, :columns]


class Stage:
    """Matrices that are multiplied at the same time.

    Args:
        products: The matrices, all of one type, on one device; at most ``MAX_MATRICES``.

    Raises:
        ValueError: There are too many matrices or none, or a weight isn't :func:`padded`.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        if not 1 <= len(products) <= MAX_MATRICES:
            raise ValueError(f"{len(products)} matrices in a stage: expected 1 to {MAX_MATRICES}")
        for product in products:
            if product.weight.stride(1) != 1 or product.weight.stride(0) % _ALIGNED:
                raise ValueError(
                    f"a weight of strides {tuple(product.weight.stride())}: expected rows that begin at multiples of "
                    f"{_ALIGNED}; see padded"
                )
        self.products = list(products)
        device = self.device
        stored = [product.reads for product in products if isinstance(product.reads, Tensor)]
        self._reads = torch.cat(stored or [torch.zeros(1)]).to(device, torch.int32)
        self._adds = _by_row(products, [product.adds for product in products])
        self._outputs = _by_row(products, [product.outputs for product in products])
        weights = [product.weight for product in products]
        self._weights = weights + weights[:1] * (MAX_MATRICES - len(weights))
        self._kinds = {"GATHERS": bool(stored), "ADDS": any(product.adds is not None for product in products)}
        self._tables: dict[int, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return self.products[0].weight.device

    def table(self, rows: int) -> Tensor:
        """Return what each program computes if it has ``rows`` rows: ``[programs, 9]``, int32.

        The columns are the number of the matrix, the program's first row, the number of the matrix's rows, of its
        columns and of the numbers from one row to the next; where the reads begin, and whether they are a range of
        inputs (0) or of stored indices (1); the place that keeps the first row's result, or -1; and how many rows
        the matrices before have.
        """
        if rows not in self._tables:
            entries, indices, base = [], 0, 0
            for number, product in enumerate(self.products):
                height, width = product.weight.shape
                stored = isinstance(product.reads, Tensor)
                begin = indices if stored else product.reads
                kept = -1 if product.keeps is None else product.keeps
                step = product.weight.stride(0)
                entries += [
                    (number, first, height, width, step, begin, int(stored), kept, base)
                    for first in range(0, height, rows)
                ]
                indices += width if stored else 0
                base += height
            self._tables[rows] = torch.tensor(entries, dtype=torch.int32, device=self.device)
        return self._tables[rows]

    def compute(self, input: Tensor, output: Tensor, kept: Tensor, bias: Tensor | None) -> None:
        """Write the results of all matrices, each as a library computes it; for any number of tokens.

        Args:
            input: ``[tokens, inputs]``.
            output: ``[tokens, outputs]``, of which the places of this stage are written.
            kept: ``[tokens, values]``, likewise.
            bias: Added to outputs, ``[outputs]``.
        """
        for product in self.products:
            rows, columns = product.weight.shape
            if isinstance(product.reads, Tensor):
                part = input.index_select(1, product.reads)
            else:
                part = input.narrow(1, product.reads, columns)
            found = F.linear(part, product.weight)
            if product.adds is not None:
                found = found + input.index_select(1, product.adds)
            if product.keeps is not None:
                kept[:, product.keeps : product.keeps + rows] = found
            if product.outputs is not None:
                output[:, product.outputs] = found if bias is None else found + bias[product.outputs]

    def launch(self, input: Tensor, output: Tensor, kept: Tensor, bias: Tensor | None, tile: Tile) -> None:
        """Write what :meth:`compute` writes, in one launch; for up to ``MAX_TOKENS`` tokens.

        Args:
            input: ``[tokens, inputs]``, rows contiguous.
            output: ``[tokens, outputs]``, rows contiguous.
            kept: ``[tokens, values]``, rows contiguous.
            bias: Added to outputs, ``[outputs]``.
            tile: How the work is divided.
        """
        from lowrank_pl.serving.triton_rows import rows_kernel

        table = self.table(tile.rows)
        tokens = len(input)
        overlaps = _can_overlap(input.device)
        # Triton launches on the current device.
        with torch.cuda.device(input.device) if input.is_cuda else nullcontext():
            rows_kernel[(len(table),)](
                input,
                output,
                kept,
                output if bias is None else bias,
                *self._weights,
                table,
                self._reads,
                self._adds,
                self._outputs,
                tokens,
                input.stride(0),
                output.stride(0),
                kept.stride(0),
                HAS_BIAS=bias is not None,
                TOKENS=1 if tokens == 1 else MAX_TOKENS,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                OVERLAPS=overlaps,
                **self._kinds,
                num_warps=tile.warps,
                num_stages=tile.stages,
                **({"launch_pdl": True} if overlaps else {}),
            )


@cache
def _can_overlap(device: torch.device) -> bool:
    """Tell whether a kernel can start before the one before it has ended, which Hopper and later GPUs can."""
    from lowrank_pl.serving.triton_rows import CAN_OVERLAP

    if device.type != "cuda" or torch.version.cuda is None or not CAN_OVERLAP:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _by_row(products: Sequence[Product], indices: Sequence[Tensor | None]) -> Tensor:
    """Return an index for each row of all matrices, -1 for the rows of those that have none."""
    device = products[0].weight.device
    parts = [
        torch.full((len(product.weight),), -1) if index is None else index.cpu()
        for product, index in zip(products, indices, strict=True)
    ]
    return torch.cat(parts).to(device, torch.int32)


@dataclass(frozen=True)
class Part:
    """A linear layer of a group, or what one process computes of it.

    Args:
        left: Left factor or coefficients, ``[rows, rank]``; of a dense layer its matrix.
        right: Right factor or coefficients, ``[rank, columns]``; None for a dense layer.
        side: Whether pivots are outputs or inputs; None without pivots.
        pivots: Their indices, ``[rank]``, ascending; None without pivots.
    """

    left: Tensor
    right: Tensor | None = None
    side: Side | None = None
    pivots: Tensor | None = None

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return len(self.left) + (self.left.shape[1] if self.side == "out" else 0)


class FusedGroup:
    """Linear layers that read the same input, computed in two launches where that is faster than a library.

    First come the products with the input, then those with the values that are kept of the first.

    Args:
        parts: The layers, whose matrices are :func:`padded`; at most ``MAX_MATRICES``.
        bias: Biases of all outputs, ``[outputs]``, or None.

    Attributes:
        sizes: Number of outputs of each layer.
        tiles: How both stages are divided, for one token and for a few; nothing where a library is faster.
        otherwise: Asked first by calls: returns the outputs where the layers are no longer what they were, else None.
    """

    def __init__(self, parts: Sequence[Part], bias: Tensor | None = None) -> None:
        first: list[Product] = []
        second: list[Product] = []
        begin = kept = 0
        for part in parts:
            device = part.left.device
            outputs = torch.arange(begin, begin + part.outputs, device=device)
            begin += part.outputs
            if part.right is None:
                first.append(Product(part.left, outputs=outputs))
                continue
            if part.pivots is None:
                first.append(Product(part.right, keeps=kept))
            elif part.side == "out":
                pivots, others = _divided(part.pivots, part.outputs)
                first.append(Product(part.right, outputs=outputs[pivots], keeps=kept))
                outputs = outputs[others]
            else:
                pivots, others = _divided(part.pivots, sum(part.right.shape))
                first.append(Product(part.right, reads=others, adds=pivots, keeps=kept))
            second.append(Product(part.left, reads=kept, outputs=outputs))
            # Values of one layer begin at a multiple of 16, wherever those of another end.
            kept += len(part.right) + -len(part.right) % 16
        self.sizes = [part.outputs for part in parts]
        self.stages = [Stage(products) for products in (first, second) if products]
        self.bias = bias
        self.tiles: dict[Count, list[Tile]] = {}
        self.otherwise: Callable[[Tensor], Tensor | None] = lambda _: None
        self._kept = kept
        self._handle = next(_HANDLES)
        _GROUPS[self._handle] = self

    def __call__(self, input: Tensor) -> Tensor:
        """Return the outputs of all layers beside each other, ``[tokens, outputs]``, for ``[tokens, inputs]``."""
        found = self.otherwise(input)
        if found is not None:
            return found
        tiles = self.tiles_for(len(input))
        return self.launch(input, tiles) if tiles else self.compute(input)

    def operation(self, input: Tensor) -> Tensor:
        """Return what calling returns, as one operation for ``torch.compile``."""
        found: Tensor = _fused(input, sum(self.sizes), self._handle)
        return found

    def tiles_for(self, tokens: int) -> list[Tile]:
        """Return how the stages are divided for so many tokens; nothing if a library computes them."""
        return [] if tokens > MAX_TOKENS else self.tiles.get("one" if tokens == 1 else "few", [])

    def launch(self, input: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """Return what calling returns, by kernels; for up to ``MAX_TOKENS`` tokens."""
        # Places in the input are 32-bit numbers.
        input = input.contiguous()
        output, kept = self._room(input)
        for stage, tile in zip(self.stages, tiles, strict=True):
            stage.launch(input, output, kept, self.bias, tile)
            input = kept
        return output

    def compute(self, input: Tensor) -> Tensor:
        """Return what calling returns, by products of torch; for any number of tokens."""
        output, kept = self._room(input)
        for stage in self.stages:
            stage.compute(input, output, kept, self.bias)
            input = kept
        return output

    def choose(self, inputs: int, otherwise: Callable[[Tensor], object] | None = None) -> None:
        """Time the kernels and take the fastest where they are faster.

        Args:
            inputs: Size of the input.
            otherwise: What computes the layers without kernels; by default :meth:`compute`.
        """
        weight = self.stages[0].products[0].weight
        other = otherwise or self.compute
        with torch.inference_mode():
            flush = flushing(weight.device)
            for number, candidates in TILES.items():
                tokens = 1 if number == "one" else MAX_TOKENS
                input = torch.randn(tokens, inputs, device=weight.device, dtype=weight.dtype)
                output, kept = self._room(input)
                kept.normal_()
                best = []
                for stage, given in zip(self.stages, (input, kept), strict=False):
                    times = [
                        launch_seconds(partial(stage.launch, given, output, kept, self.bias, tile), flush)
                        for tile in candidates
                    ]
                    best.append(candidates[times.index(min(times))])
                ours, others = partial(self.launch, input, best), partial(other, input)
                self.tiles[number] = best if launch_seconds(ours, flush) < launch_seconds(others, flush) else []

    def _room(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return empty tensors for the outputs and for the values that are kept."""
        return input.new_empty(len(input), sum(self.sizes)), input.new_empty(len(input), self._kept)


_GROUPS: WeakValueDictionary[int, FusedGroup] = WeakValueDictionary()
"""All groups by the number under which compiled code knows them; code that is kept on disk finds equal numbers."""

_HANDLES = count()


@torch.library.custom_op("lowrank_pl::fused", mutates_args=())
def _fused(input: Tensor, outputs: int, handle: int) -> Tensor:
    return _GROUPS[handle](input)


@_fused.register_fake
def _(input: Tensor, outputs: int, handle: int) -> Tensor:
    return input.new_empty(len(input), outputs)


_FLUSHED = 2**29
"""Bytes that are read before a kernel is timed: several times a GPU's cache, and it takes longer than to launch."""


def _divided(pivots: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the pivots and all other indices below ``size``, ascending."""
    is_other = torch.ones(size, dtype=torch.bool, device=pivots.device)
    is_other[pivots.long()] = False
    return pivots.long(), is_other.nonzero().flatten()


def check_triton() -> None:
    """Raise a ``ValueError`` if Triton, in whose language the kernels are written, isn't installed."""
    if find_spec("triton") is None:
        raise ValueError("Triton isn't installed, in whose language the kernels are written: pip install triton")


def flushing(device: torch.device) -> Tensor:
    """Return what is read to empty a GPU's cache; from zeros it might compute faster."""
    return torch.randn(_FLUSHED // 4, device=device)


def launch_seconds(launch: Callable[[], object], flush: Tensor, turns: int = 5) -> float:
    """Return the median of the seconds that a GPU takes for some launches with weights that are not in its cache.

    Args:
        launch: Starts the kernels.
        flush: What :func:`flushing` has made on that GPU.
        turns: How often they are timed.
    """
    launch()  # compiles kernels
    found: list[float] = []
    with torch.cuda.device(flush.device):
        for _ in range(turns):
            begin, end = (torch.Event(flush.device, enable_timing=True) for _ in range(2))
            # While the GPU is busy with this, what follows is queued, so that its launching takes no time.
            flush.sum()
            begin.record()
            launch()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
    return sorted(found)[turns // 2]
