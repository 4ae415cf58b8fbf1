"""Tiny models whose linear layers are of random low rank, in every storage."""

from __future__ import annotations

from itertools import cycle

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.targets import find_targets

STORAGES = ("factored", "out", "in", "dense")
"""How layers are stored: as factors, pivoted with rows or columns, or not compressed.

With ``shorter`` they are pivoted with whichever are fewer, as ``lowrank_pl.factors.pivoting`` does.
"""


def low_rank_layer(outputs, inputs, rank, storage, *, bias=None):
    """Return a random layer of low rank with outputs about as large as its inputs."""
    rows, columns = outputs - rank * (storage == "out"), inputs - rank * (storage == "in")
    weight, right = torch.randn(rows, rank) / rank**0.5, torch.randn(rank, columns) / inputs**0.5
    if storage == "factored":
        return LowRankLinear.from_factors(weight, right, bias)
    pivots = torch.randperm(outputs if storage == "out" else inputs)[:rank].sort().values
    return PivotedLinear.from_parts(weight, right, pivots, side=storage, bias=bias)


def compress_at_random(model, storages=STORAGES):
    """Give the linear layers of ``model`` unequal ranks and each of ``storages`` in turn; return the model."""
    torch.manual_seed(1)
    for number, (target, storage) in enumerate(zip(find_targets(model).modules, cycle(storages), strict=False)):
        old = model.get_submodule(target.name)
        if storage != "dense":
            outputs, inputs = old.weight.shape[::-1] if isinstance(old, Conv1D) else old.weight.shape
            if storage == "shorter":
                storage = "out" if outputs <= inputs else "in"
            new = low_rank_layer(outputs, inputs, 16 + number % 7, storage, bias=old.bias)
            model.set_submodule(target.name, new)
    return model


def cut_hidden_neurons(mlp, names, width):
    """Keep the first ``width`` hidden neurons: outputs of all layers ``names`` of ``mlp`` but the last, its inputs."""
    for name in names:
        old = getattr(mlp, name)
        last = name == names[-1]
        new = nn.Linear(width if last else old.in_features, old.out_features if last else width, old.bias is not None)
        with torch.no_grad():
            new.weight.copy_(old.weight[:, :width] if last else old.weight[:width])
            if old.bias is not None:
                new.bias.copy_(old.bias if last else old.bias[:width])
        setattr(mlp, name, new)
