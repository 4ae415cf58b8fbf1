"""Models for tests of pruned MLPs."""

from __future__ import annotations

import torch

from lowrank_pl.factors.decomposition import square_root
from lowrank_pl.methods.prune.mlp import find_hidden_neurons, prune_model
from lowrank_pl.models.base import load_base
from lowrank_pl.models.targets import find_targets
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.text.settings import Calibration

TEXT = Calibration("python-docs::part=0%-5%", length=32, sequences=8)


def ragged(family, widths=(40, 56)):
    """Return a tiny model whose two MLPs have ``widths`` hidden neurons; its config says what it was."""
    model = tiny_model(family)
    hidden = find_hidden_neurons(model, find_targets(model))
    eye = {mlp.reader.name: torch.eye(mlp.width) for mlp in hidden}
    prune_model(model, hidden, widths, lambda reader: (eye[reader.name], square_root(torch.eye(reader.shape[0]))))
    return model


def save_with_copies(folder, blocks=(0, 1), scale=1.01):
    """Save a tiny model in whose ``blocks`` every other hidden neuron is nearly the one before it; return its name."""
    model = tiny_model("llama")
    for block in blocks:
        mlp = model.model.layers[block].mlp
        with torch.no_grad():
            mlp.gate_proj.weight[1::2] = mlp.gate_proj.weight[::2]
            mlp.up_proj.weight[1::2] = mlp.up_proj.weight[::2] * scale
    for part in (model, byte_tokenizer()):
        part.save_pretrained(folder)
    return str(folder)


def width_of(base):
    """Return the hidden neurons of the MLPs of the base called ``base``."""
    model = load_base(base)
    return find_hidden_neurons(model, find_targets(model))[0].width


def indices_of_pivots(plan):
    """Return the numbers that the indices of pivots take room for, which are no parameters."""
    return sum(plan.modules[name].numbers(4) - plan.modules[name].parameters for name in plan.pivoted_modules)
