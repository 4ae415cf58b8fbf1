"""A compressed model made smaller from its own weights: components that a smaller plan drops are cut off."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_pl.factors.components import NestedComponents
from lowrank_pl.factors.compression import deployed_plan, factored_embedding, low_rank_layer, shared_layers
from lowrank_pl.models.hf_experts import dropped_experts
from lowrank_pl.models.hf_layers import LowRankEmbedding, LowRankLinear, SharedLowRankLinear
from lowrank_pl.models.hf_quantized import TiedHead, is_quantized
from lowrank_pl.models.targets import replace_module
from lowrank_pl.plans.plan import ModulePlan, RankPlan

__all__ = ["cut"]

_log = logging.getLogger(__name__)

_FACTORED = (LowRankLinear, LowRankEmbedding)


@torch.no_grad()
def cut(model: nn.Module, plan: RankPlan, smaller: RankPlan, components: NestedComponents | None = None) -> RankPlan:
    """Cut the layers of ``model`` to the ranks of ``smaller``, in place, one layer at a time.

    A layer loses the components that ``smaller`` drops. The others keep their bits, and no tensor keeps the memory of
    what was cut off. Layers with ``components`` are made from these, as ``lowrank_pl.factors.compression.compress``
    makes them from a store.

    Args:
        model: A compressed model.
        plan: The plan that the model was exported with.
        smaller: A plan that ``lowrank_pl.plans.resize.cut_plan`` made from ``plan``.
        components: Those that lie beside the weights; needed where dense or pivoted layers are cut.

    Returns:
        ``smaller`` with the storage that each layer really has.

    Raises:
        ValueError: The model has other layers than ``plan`` says, or layers that are rounded or not in memory, or
            components are missing or damaged.
    """
    rounded = next((name for name, module in model.named_modules() if is_quantized(module)), None)
    if rounded is not None:
        raise ValueError(
            f"{rounded} is rounded to a few bits and can't be cut: make this size from the plan with `lowrank export "
            "PLAN --keep` before rounding, and round the result"
        )
    _check_ranks(model, plan)
    todo = {name: entry for name, entry in smaller.modules.items() if entry.rank != plan.modules[name].rank}
    held = frozenset() if components is None else components.names
    for name, entry in todo.items():
        for place in entry.layers or (name,):
            _check_can_be_cut(place, model.get_submodule(place), replaced=name in held)
    for name, entry in tqdm(todo.items(), desc="cut", unit="module", leave=False, delay=2):
        if entry.layers:
            _cut_shared(model, name, plan.modules[name], entry, components)
            continue
        layer = model.get_submodule(name)
        if components is not None and name in held and isinstance(layer, nn.Embedding):
            learns = layer.get_parameter("weight").requires_grad
            for place, made in factored_embedding(model, name, components.kept(name, entry)).items():
                replace_module(model, place, made.train(layer.training).requires_grad_(learns))
        elif components is not None and name in held:
            new = low_rank_layer(name, layer, entry, components.kept(name, entry)).train(layer.training)
            replace_module(model, name, new.requires_grad_(layer.get_parameter("weight").requires_grad))
        else:
            assert isinstance(layer, _FACTORED)
            _cut_factors(layer, plan.modules[name], entry)
            for head in model.modules():
                if isinstance(head, TiedHead) and head.source[0] is layer:
                    head.weight = layer.weight
    beside = sum(name in held for name in todo)
    _log.info("cut %d of %d layers, %d of them to components beside the weights", len(todo), len(plan.modules), beside)
    return deployed_plan(model, smaller)


def _cut_shared(
    model: nn.Module, name: str, own: ModulePlan, entry: ModulePlan, components: NestedComponents | None
) -> None:
    """Cut layers that share a right factor: it loses components once, and each layer those of its left factor."""
    layers = {layer: model.get_submodule(layer) for layer in entry.layers}
    if components is not None and name in components.names:
        for place, made in shared_layers(name, layers, components.kept(name, entry)).items():
            old = layers[place]
            learns = old.get_parameter("weight").requires_grad
            replace_module(model, place, made.train(old.training).requires_grad_(learns))
        return
    for layer in layers.values():
        assert isinstance(layer, LowRankLinear)
        _cut_factors(layer, own, entry)


def _cut_factors(layer: LowRankLinear | LowRankEmbedding, own: ModulePlan, entry: ModulePlan) -> None:
    """Cut a layer with the components of ``own`` to those of ``entry``."""
    assert own.rank is not None
    assert entry.rank is not None
    places = {component: place for place, component in enumerate(own.indices or range(own.rank))}
    kept = torch.tensor([places[one] for one in entry.indices or range(entry.rank)], device=layer.weight.device)
    # The layer itself stays, and with it what others have attached to it.
    layer.weight = _part(layer.weight, 1, kept)
    if not isinstance(layer, SharedLowRankLinear):
        layer.right = _part(layer.right, 0, kept)
    layer.rank = entry.rank


def _part(old: Tensor, dim: int, kept: Tensor) -> nn.Parameter:
    return nn.Parameter(old.index_select(dim, kept), requires_grad=old.requires_grad)


def _check_ranks(model: nn.Module, plan: RankPlan) -> None:
    """Raise ``ValueError`` unless the layers of ``model`` have the ranks of ``plan``."""
    modules = dict(model.named_modules())
    dropped = set(dropped_experts(model))
    planned = {layer: entry.rank for name, entry in plan.modules.items() for layer in entry.layers or (name,)}
    for name, rank in planned.items():
        if rank == 0 and name.rpartition(".")[0] in dropped:
            continue
        found = getattr(modules.get(name), "rank", None)
        if name not in modules or found != rank:
            said = "dense" if rank is None else f"of rank {rank}" if rank else "dropped"
            here = "absent" if name not in modules else "dense" if found is None else f"of rank {found}"
            raise ValueError(f"{name} is {said} in the plan and {here} in the weights: put the export's own plan back")


def _check_can_be_cut(name: str, layer: nn.Module, *, replaced: bool) -> None:
    """Raise ``ValueError`` unless the layer can be cut in place or, if its components are there, be replaced."""
    # The hooks of accelerate would be lost with a layer that is replaced.
    can_be = not hasattr(layer, "_hf_hook") if replaced else isinstance(layer, _FACTORED)
    if not can_be or layer.get_parameter("weight").is_meta:
        raise ValueError(
            f"{name} can't be cut: it is a {type(layer).__name__}, or device_map keeps it on disk; load the model "
            "into memory, or make this size from the plan with `lowrank export PLAN --keep`"
        )
