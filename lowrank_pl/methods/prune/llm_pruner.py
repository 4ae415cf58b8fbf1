"""LLM-Pruner (arXiv 2305.11627): coupled structures are removed by first-order Taylor importance.

Importance follows the authors' code (github.com/horseee/LLM-Pruner), with one difference. Where several query heads
share a key/value head, that code folds the channels of queries onto those of keys in an order that mixes heads. Here a
key/value head is scored with its own query heads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.calibration.build import check_finite
from lowrank_pl.calibration.statistics import Statistics
from lowrank_pl.methods.prune.mlp import HiddenNeurons, find_hidden_neurons, find_mlps, pruned_config
from lowrank_pl.methods.prune.settings import LLMPruner
from lowrank_pl.methods.prune.structures import Structures, find_heads, neurons_of, without
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.targets import (
    Target,
    Targets,
    decoder_blocks,
    dense_weight,
    model_parameters,
    replace_module,
    targeted_parameters,
)

__all__ = ["Prunable", "apply_llm_pruner", "find_prunable", "structure_importance", "structures_left"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prunable:
    """The structures of a model that LLM-Pruner chooses from.

    Args:
        heads: Those of attention in all blocks; empty if attention is not pruned.
        neurons: Those of MLPs in all blocks; empty if MLPs are not pruned.
        blocks: The blocks that are pruned.
    """

    heads: Sequence[Structures]
    neurons: Sequence[Structures]
    blocks: range

    @property
    def chosen(self) -> list[Structures]:
        """The structures in the blocks that are pruned."""
        return [one for one in (*self.heads, *self.neurons) if one.reader.block in self.blocks]

    @property
    def layers(self) -> list[Target]:
        """The linear layers in the blocks that are pruned, block by block."""
        return sorted((layer for one in self.chosen for layer in one.layers), key=lambda layer: layer.block)


def structure_importance(
    structures: Structures, weights: Sequence[Tensor], gradients: Sequence[Tensor], settings: LLMPruner
) -> Tensor:
    """Return the importance of each structure, ``[count]``.

    For the rows of a writer and the columns of the reader, ``importance`` of the settings turns ``w * dL/dw`` into one
    number per channel. Channels of a structure are summed, and layers are combined as ``aggregation`` says.

    Args:
        structures: The structures of one module.
        weights: ``[out, in]`` weight of each of ``structures.layers``.
        gradients: ``[out, in]`` gradient of the loss by each.
        settings: How importance is computed.
    """
    by_layer = []
    for layer, weight, gradient in zip(structures.layers, weights, gradients, strict=True):
        change = weight.double() * gradient.double()
        if layer is structures.reader:
            change = change.T
        channels = change.abs().sum(1) if settings.importance == "element" else change.sum(1).abs()
        by_layer.append(channels[structures.channels(layer).to(channels.device)].sum(0))
    stacked = torch.stack(by_layer)
    if settings.aggregation == "sum":
        return stacked.sum(0)
    if settings.aggregation == "prod":
        return stacked.prod(0)
    return stacked.amax(0) if settings.aggregation == "max" else stacked[-1]


def find_prunable(model: PreTrainedModel, targets: Targets, settings: LLMPruner) -> Prunable:
    """Return the structures of ``model`` that ``settings`` lets be pruned; the model stays unchanged.

    Raises:
        ValueError: No block is left to prune, or the model has no such structures.
    """
    count = len(decoder_blocks(model)[1])
    blocks = range(settings.skip_first, count - settings.skip_last)
    if not blocks:
        raise ValueError(
            f"skip_first {settings.skip_first} and skip_last {settings.skip_last} leave none of the {count} blocks of "
            f"{type(model).__name__} to prune: lower them"
        )
    before = Origin.of(model)
    if settings.attention and before is not None and before.heads_left:
        raise ValueError(
            f"the model has {before.described} already: prune {before.base} itself, or only MLPs (attention false)"
        )
    neurons = [neurons_of(hidden) for hidden in (find_hidden_neurons(model, targets) if settings.mlp else [])]
    heads = []
    if settings.attention:
        mlps = {hidden.parent for hidden in find_mlps(model, targets)}
        heads = find_heads(model, targets, mlps)
    found = Prunable(heads, neurons, blocks)
    if not found.chosen:
        raise ValueError(
            f"the blocks {blocks.start} to {blocks.stop - 1}, which skip_first and skip_last leave, have no targeted "
            "heads or MLPs: lower them, or target more layers"
        )
    return found


def apply_llm_pruner(
    model: PreTrainedModel, targets: Targets, statistics: Statistics, settings: LLMPruner, *, base: str, keep: float
) -> Origin:
    """Remove structures of ``model`` in place, and return what it was before, which its config records.

    The same fraction goes in every pruned block. Of the heads it is the nearest possible one; the width of MLPs then
    makes the model as large as ``keep`` allows.

    Args:
        model: The dense base.
        targets: Its target layers.
        statistics: Statistics of the base; cooperating processes collect missing gradients together.
        settings: What is pruned, and how importance is computed.
        base: Name of the base.
        keep: Fraction of the unpruned base's targeted parameters that is left.

    Raises:
        ValueError: ``keep`` is no fraction or can't be reached, or the model has no structures that can be removed.

    Example:
        >>> from lowrank_pl import Subject
        >>> from lowrank_pl.calibration.build import statistics_of
        >>> from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
        >>> subject = Subject(tiny_model("llama"), byte_tokenizer(), torch.arange(256).view(4, 64))
        >>> settings, statistics = LLMPruner(skip_first=1, skip_last=0), statistics_of(subject)
        >>> apply_llm_pruner(
        ...     subject.model, subject.targets, statistics, settings, base="random:llama", keep=0.7
        ... ).described
        '35 to 96 of 96 hidden neurons in each MLP and 1 to 2 of 2 key/value heads in each attention module'
    """
    found, left = structures_left(model, targets, settings, keep)
    origin = Origin.of(model) or Origin(base, targeted_parameters(targets), model_parameters(model), 0, {}, ())
    present = targeted_parameters(targets)
    gone = sum(one.parameters * (one.count - count) for one, count in zip(found.chosen, left, strict=True))
    fraction = (present - gone) / (present + origin.left_out(targets))
    if fraction < keep - 0.005:
        text = "%.4f of the targeted parameters are left, where keep is %g: no smaller parts can be removed"
        _log.warning(text, fraction, keep)
    now = {one.parent: count for one, count in zip(found.chosen, left, strict=True)}
    origin = _recorded(origin, found, now)
    config = model.config
    if origin.one_width:
        hidden = [HiddenNeurons(one.reader, one.writers) for one in found.neurons]
        config = pruned_config(model, hidden, left[0])
    check_finite(model, found.layers)
    gradients = statistics.collect("weight_gradients", found.layers)
    for one, count in zip(tqdm(found.chosen, desc="prune", unit="module"), left, strict=True):
        weights = [dense_weight(model.get_submodule(layer.name)).detach() for layer in one.layers]
        slopes = [
            gradients.read(layer.name, "mean").to(weight.device)
            for layer, weight in zip(one.layers, weights, strict=True)
        ]
        importance = structure_importance(one, weights, slopes, settings)
        kept = importance.argsort(descending=True, stable=True)[:count].sort().values
        for name, module in without(model, one, kept).items():
            replace_module(model, name, module)
    model.config = config
    origin.write(model)
    _log.info("pruned blocks %d to %d to %s", found.blocks.start, found.blocks.stop - 1, origin.described)
    return origin


def structures_left(
    model: PreTrainedModel, targets: Targets, settings: LLMPruner, keep: float
) -> tuple[Prunable, list[int]]:
    """Return the structures of ``model``, and how many each of ``Prunable.chosen`` keeps; nothing is measured.

    Args:
        model: The dense base; it stays unchanged.
        targets: Its target layers.
        settings: What is pruned.
        keep: Fraction of the unpruned base's targeted parameters that is left.

    Raises:
        ValueError: As in ``apply_llm_pruner``.
    """
    if not 0 < keep < 1:
        raise ValueError(f"keep is {keep}: expected a fraction above 0 and below 1")
    found, origin = find_prunable(model, targets, settings), Origin.of(model)
    before = 0 if origin is None else origin.left_out(targets)
    return found, _left(found, targeted_parameters(targets), before, settings, keep)


def _left(found: Prunable, present: int, before: int, settings: LLMPruner, keep: float) -> list[int]:
    """Return how many structures each of ``found.chosen`` keeps.

    Args:
        found: The structures.
        present: Targeted parameters of the model.
        before: Targeted parameters that earlier pruning has removed.
        settings: What is pruned.
        keep: Fraction of both together that is left.
    """
    total = present + before
    surplus = present - int(keep * total + 1e-6)
    if surplus <= 0:
        raise ValueError(
            f"keep is {keep}, but earlier pruning has left only {present / total:.4f} of the targeted parameters: "
            "lower keep, or prune the first base"
        )
    heads = [one for one in found.chosen if one.consecutive]
    neurons = [one for one in found.chosen if not one.consecutive]
    prunable = sum(one.parameters * one.count for one in found.chosen)
    share = surplus / prunable
    left: dict[str, int] = {}
    for one in heads:
        # Without MLPs to make up for it, never less than is asked for.
        gone = int(share * one.count + (0.5 if neurons else 1 - 1e-9))
        left[one.parent] = max(one.count - gone, 1 if neurons else 0)
        surplus -= one.parameters * (one.count - left[one.parent])
    if neurons:
        size = sum(one.parameters for one in neurons)
        width = min(one.count for one in neurons) - max(0, surplus) / size
        width = int((width + 1e-9) // settings.multiple_of) * settings.multiple_of
        left |= {one.parent: width for one in neurons}
    if min(left.values()) < 1:
        what = " and ".join(word for word, used in (("heads", heads), ("MLP neurons", neurons)) if used)
        raise ValueError(
            f"keep {keep} needs {1 - keep:.4g} of the {total:,} targeted parameters to go, but the {what} of blocks "
            f"{found.blocks.start} to {found.blocks.stop - 1} have {prunable / total:.4f} of them, and one of each "
            "must stay: raise keep, lower skip_first or skip_last, or prune attention and mlp"
        )
    return [left[one.parent] for one in found.chosen]


def _recorded(origin: Origin, found: Prunable, left: dict[str, int]) -> Origin:
    """Return ``origin`` with what each module of ``found`` has left, pruned or not."""
    if found.neurons:
        now = {one.parent: left.get(one.parent, one.count) for one in found.neurons}
        origin = replace(origin, width=origin.width or found.neurons[0].count, left=now, maps=_kinds(found.neurons))
    if found.heads:
        now = {one.parent: left.get(one.parent, one.count) for one in found.heads}
        origin = replace(origin, heads=found.heads[0].count, heads_left=now, head_maps=_kinds(found.heads))
    return replace(origin, method="llm_pruner")


def _kinds(structures: Sequence[Structures]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer.kind for one in structures for layer in one.layers))
