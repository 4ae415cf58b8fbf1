"""A compressed model made smaller from its own weights: components that a smaller plan drops are cut off."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_pl.factors.compression import deployed_plan
from lowrank_pl.factors.decomposition import thin_svd
from lowrank_pl.factors.pivoting import pivot
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.targets import replace_module
from lowrank_pl.plans.plan import ModulePlan, RankPlan

__all__ = ["check_ranks", "cut"]

_log = logging.getLogger(__name__)


@torch.no_grad()
def cut(model: nn.Module, plan: RankPlan, smaller: RankPlan) -> RankPlan:
    """Cut the low-rank layers of ``model`` to the ranks of ``smaller``, in place, one layer at a time.

    Two factors lose the components that ``smaller`` drops, and nothing else: the rest keeps its bits. Pivots and
    coefficients have no components. Such a layer is made into factors by a plain singular value decomposition of the
    weight that it stores, cut, and pivoted again, with a warning. The calibration text has no say in this, so the same
    plan exported from its base scores better.

    Args:
        model: A compressed model.
        plan: The plan that the model was exported with.
        smaller: A plan that ``plan`` contains.

    Returns:
        ``smaller`` with the storage that each layer really has.

    Raises:
        ValueError: The model has other layers than ``plan`` says, or layers that are not in memory.
    """
    check_ranks(model, plan)
    todo = {name: entry for name, entry in smaller.modules.items() if entry.rank != plan.modules[name].rank}
    for name in todo:
        layer = model.get_submodule(name)
        # Hooks of accelerate know the tensors that they move by their names and would be lost with a pivoted layer.
        if any(part.is_meta for part in layer.parameters()) or (
            hasattr(layer, "_hf_hook") and isinstance(layer, PivotedLinear)
        ):
            raise ValueError(
                f"{name} is moved between devices or kept on disk by device_map, so it can't be cut: load the model "
                "on one device, or export this size with `lowrank export PLAN --keep`"
            )
    pivoted = [name for name in todo if isinstance(model.get_submodule(name), PivotedLinear)]
    if pivoted:
        _log.warning(
            "%d of %d layers to cut are stored pivoted, e.g. %s: they are cut by the singular values of their weight, "
            "not in the calibrated order; export with --storage factored to cut exactly",
            *(len(pivoted), len(todo), pivoted[0]),
        )
    for name, entry in tqdm(todo.items(), desc="cut", unit="module", leave=False):
        _cut_layer(model, name, plan.modules[name], entry)
    _log.info("cut %d of %d low-rank layers", len(todo), len(plan.modules) - len(plan.dense_modules))
    return deployed_plan(model, smaller)


def check_ranks(model: nn.Module, plan: RankPlan) -> None:
    """Raise ``ValueError`` unless the layers of ``model`` have the ranks of ``plan``."""
    modules = dict(model.named_modules())
    for name, entry in plan.modules.items():
        found = getattr(modules.get(name), "rank", None)
        if name not in modules or found != entry.rank:
            said = "dense" if entry.rank is None else f"of rank {entry.rank}"
            here = "absent" if name not in modules else "dense" if found is None else f"of rank {found}"
            raise ValueError(f"{name} is {said} in the plan and {here} in the weights: put the export's own plan back")


def _cut_layer(model: nn.Module, name: str, own: ModulePlan, entry: ModulePlan) -> None:
    """Cut one layer; no part of its old tensors stays in memory."""
    assert own.rank is not None
    assert entry.rank is not None
    layer = model.get_submodule(name)
    if isinstance(layer, PivotedLinear):
        left, right = _components(layer)
        left, right = left[:, : entry.rank], right[: entry.rank]
    else:
        assert isinstance(layer, LowRankLinear)
        places = {component: place for place, component in enumerate(own.indices or range(own.rank))}
        kept = torch.tensor([places[one] for one in entry.indices or range(entry.rank)], device=layer.weight.device)
        left, right = layer.weight.index_select(1, kept), layer.right.index_select(0, kept)
        if entry.storage == "factored":
            # The layer itself stays, and with it what others have attached to it.
            layer.weight, layer.right = _like(left, layer.weight), _like(right, layer.right)
            layer.rank = entry.rank
            return
    replace_module(model, name, _stored(layer, left, right, entry))


def _like(tensor: Tensor, old: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=old.requires_grad)


def _components(layer: PivotedLinear) -> tuple[Tensor, Tensor]:
    """Return factors of a pivoted layer in float64, with its singular values in descending order split over both."""
    weight, right, pivots = layer.weight.double(), layer.right.double(), layer.pivots.long()
    size = layer.out_features if layer.side == "out" else layer.in_features
    is_pivot = torch.zeros(size, dtype=torch.bool, device=pivots.device)
    is_pivot[pivots] = True
    coefficients = weight if layer.side == "out" else right.mT
    whole = coefficients.new_empty(size, layer.rank)
    whole[is_pivot] = torch.eye(layer.rank).to(whole)
    whole[~is_pivot] = coefficients
    left, right = (whole, right) if layer.side == "out" else (weight, whole.mT)
    # The rank is small beside the sizes, and the triangles have all singular values of the product.
    outer, upper = torch.linalg.qr(left)
    inner, lower = torch.linalg.qr(right.mT)
    turned, sigma, back = thin_svd(upper @ lower.mT)
    half = sigma.sqrt()
    return outer @ (turned * half), half[:, None] * (back @ inner.mT)


def _stored(old: LowRankLinear | PivotedLinear, left: Tensor, right: Tensor, entry: ModulePlan) -> nn.Module:
    """Return a layer with the given factors as ``entry`` stores it; as two factors if pivots would be inaccurate."""
    like = old.weight
    if entry.storage == "pivoted":
        found = pivot(left, right, dtype=like.dtype)
        if found.is_accurate:
            return PivotedLinear.from_parts(found.weight, found.right, found.pivots, side=found.side, bias=old.bias)
    return LowRankLinear.from_factors(left.to(like), right.to(like), old.bias)
