"""Coupled structures of a block: the weights that only make sense together, such as those of an attention head.

No model family is known by name. Key/value heads can be removed from an attention module if removing one gives the same
output as ignoring it, with the number of heads in the config unchanged.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_pl.methods.prune.mlp import HiddenNeurons, resized_layer
from lowrank_pl.models.eval_mode import evaluating, input_device
from lowrank_pl.models.identity import parent_name
from lowrank_pl.models.targets import Target, Targets, dense_weight, replaced

__all__ = ["Structures", "find_heads", "neurons_of", "without"]


@dataclass(frozen=True)
class Structures:
    """The coupled structures of one module, any of which can be removed: rows of writers and columns of the reader.

    Args:
        reader: The linear layer that reads them: the output projection of attention, the down-projection of an MLP.
        writers: The linear layers that compute them.
        count: Number of structures.
        consecutive: Whether the channels of a structure are neighbours, as those of a head are. Otherwise a layer has
            one channel of each structure in each of its parts, as a fused layer of an MLP has.
    """

    reader: Target
    writers: tuple[Target, ...]
    count: int
    consecutive: bool

    @property
    def layers(self) -> tuple[Target, ...]:
        """The linear layers of the structures, the reader last."""
        return (*self.writers, self.reader)

    @property
    def parent(self) -> str:
        """Name of the module that contains these linear layers."""
        return parent_name(self.reader)

    @property
    def parameters(self) -> int:
        """Parameters of one structure, without biases."""
        return sum(rows * columns for rows, columns in (layer.shape for layer in self.layers)) // self.count

    def channels(self, layer: Target) -> Tensor:
        """Return ``[members, count]``: the rows of a writer, or the columns of the reader, of each structure."""
        every = torch.arange(layer.shape[1] if layer is self.reader else layer.shape[0])
        return every.view(self.count, -1).T if self.consecutive else every.view(-1, self.count)


def neurons_of(hidden: HiddenNeurons) -> Structures:
    """Return the hidden neurons of an MLP as structures."""
    return Structures(hidden.reader, hidden.writers, hidden.width, consecutive=False)


def find_heads(model: PreTrainedModel, targets: Targets, mlps: Container[str] = ()) -> list[Structures]:
    """Return the key/value heads of every attention module with their query heads, in the order of the blocks.

    Args:
        model: A causal language model; it stays unchanged.
        targets: Its target layers.
        mlps: Names of modules that are MLPs.

    Raises:
        ValueError: The model has no attention module whose heads can be removed, one that can't work with fewer heads,
            or only one key/value head.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    advice = "prune only its MLPs (attention false)"
    if not isinstance(count, int):
        raise ValueError(
            f"{type(model.config).__name__} gives {count!r} as the number of heads, expected one number: {advice}"
        )
    if count == 1:
        raise ValueError(f"{type(model).__name__} has one key/value head in each block, which must stay: {advice}")
    found = []
    by_module = groupby((one for one in targets.modules if parent_name(one) not in mlps), key=parent_name)
    for _, layers in by_module:
        *writers, reader = layers
        if writers and reader.shape[1] % count == 0 and all(one.shape[0] % count == 0 for one in writers):
            found.append(Structures(reader, tuple(writers), count, consecutive=True))
    calls = _calls(model, [heads.parent for heads in found])
    for heads in found:
        if not _removable(model, heads, calls[heads.parent]):
            raise ValueError(
                f"no heads can be removed from {heads.parent} ({type(model.get_submodule(heads.parent)).__name__}) by "
                f"cutting its linear layers ({', '.join(one.kind for one in heads.layers)}): it takes the number of "
                f"heads from the config, or some of its layers are not targeted; {advice}"
            )
    if not found:
        raise ValueError(
            f"no attention with {count} key/value heads was found in {type(model).__name__}: expected modules whose "
            f"targeted linear layers divide into them; {advice}"
        )
    return found


def without(model: PreTrainedModel, structures: Structures, kept: Tensor) -> dict[str, nn.Module]:
    """Return the linear layers with the structures ``kept`` (ascending indices) only, by name."""
    modules = {}
    for layer in structures.layers:
        old = model.get_submodule(layer.name)
        weight = dense_weight(old).detach()
        channels = structures.channels(layer)[:, kept.cpu()].flatten().sort().values.to(weight.device)
        if layer is structures.reader:
            modules[layer.name] = resized_layer(old, weight[:, channels])
        else:
            modules[layer.name] = resized_layer(old, weight[channels], channels)
    return modules


def _calls(model: PreTrainedModel, names: Sequence[str]) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments of the modules ``names`` in a forward pass of a few tokens."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    tokens = torch.arange(4, device=input_device(model))[None]
    with evaluating(model), ExitStack() as hooks:
        for name in names:

            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                calls[name] = (args, kwargs)

            hooks.callback(model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True).remove)
        model(input_ids=tokens, use_cache=False)
    return calls


def _removable(model: PreTrainedModel, heads: Structures, call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    """Tell whether removing the first head from the module gives the same output as ignoring it."""
    module, reader = model.get_submodule(heads.parent), model.get_submodule(heads.reader.name)
    args, kwargs = call
    weight = dense_weight(reader).detach()
    unread = weight.clone()
    unread[:, heads.channels(heads.reader)[:, 0].to(weight.device)] = 0

    def computed(modules: Mapping[str, nn.Module]) -> Any:
        with evaluating(model), replaced(model, modules):
            output = module(*args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

    try:
        all_read, ignored = computed({}), computed({heads.reader.name: resized_layer(reader, unread)})
        removed = computed(without(model, heads, torch.arange(1, heads.count)))
        error, change = (removed - ignored).float().norm(), (all_read - ignored).float().norm()
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False
    return bool(change > 0 and error <= torch.finfo(weight.dtype).eps ** 0.5 * change)
