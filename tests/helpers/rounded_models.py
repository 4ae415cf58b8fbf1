"""Matrices, layers and whole models rounded to the nearest of their grid's numbers."""

from __future__ import annotations

from itertools import cycle

import torch
from torch import nn

from lowrank_pl.models.hf_format import tied_weights
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.hf_quantized import (
    SCALE_TYPE,
    Grid,
    Rounded,
    pack,
    quantized_embedding,
    quantized_layer,
    tie_head,
)
from lowrank_pl.models.targets import dense_weight

GRIDS = (Grid(4, 8), Grid(8), Grid(3, 16), Grid(2, 32))


@torch.no_grad()
def nearest(matrix, grid):
    """Return ``matrix`` rounded; each group's scale follows from its range."""
    rows, columns = matrix.shape
    size = grid.group or columns
    cells = nn.functional.pad(matrix.float(), (0, -columns % size)).view(rows, -1, size)
    low, high, levels = cells.amin(-1), cells.amax(-1), 2**grid.bits - 1
    spread = high - low if grid.has_zeros else 2 * cells.abs().amax(-1)
    scales = (spread / levels).to(SCALE_TYPE).float().clamp_min(2**-20)
    zeros = (-low / scales).round().clamp(0, levels) if grid.has_zeros else torch.full_like(scales, 128)
    codes = (cells / scales[..., None] + zeros[..., None]).round().clamp(0, levels).view(rows, -1)[:, :columns]
    packed_zeros = pack(zeros.byte(), grid.bits) if grid.has_zeros else None
    return Rounded(grid, columns, pack(codes.byte(), grid.bits), scales, packed_zeros)


def rounded_layer(layer, grid):
    """Return a rounded layer in place of a dense or low-rank one."""
    if not isinstance(layer, (LowRankLinear, PivotedLinear)):
        weight = dense_weight(layer)
        plain = nn.Linear(*weight.shape[::-1], bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight.contiguous()), layer.bias
        layer = plain
    names = ["weight", "right"] if hasattr(layer, "right") else ["weight"]
    return quantized_layer(layer, {name: nearest(getattr(layer, name), grid) for name in names})


def round_model(model, names=None, grids=GRIDS):
    """Round the modules ``names`` of a model, by default all linear layers and the embedding, to ``grids`` in turn."""
    tied = {
        name.removesuffix(".weight"): source.removesuffix(".weight") for name, source in tied_weights(model).items()
    }
    every = [name for name, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() == 2]
    chosen = [name for name in (every if names is None else names) if name not in tied]
    for name, grid in zip([name for name in chosen if "wpe" not in name], cycle(grids)):
        old = model.get_submodule(name)
        if not isinstance(old, nn.Embedding):
            model.set_submodule(name, rounded_layer(old, grid))
            continue
        new = quantized_embedding(old, grid)
        new.put("weight", nearest(old.weight, grid))
        model.set_submodule(name, new)
        for head in [head for head, source in tied.items() if source == name]:
            model.set_submodule(head, tie_head(model.get_submodule(head), new))
    return model
