"""Trained low-rank layers as a store of factors, and the plan for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.factors.compression import deployed_plan
from lowrank_pl.factors.decomposition import Factors
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.hf_layers import LowRankEmbedding, LowRankLinear, PivotedLinear
from lowrank_pl.plans.plan import HEALED, RankPlan
from lowrank_pl.utils.files import canonical_json, sha256_of
from lowrank_pl.utils.tensor_store import tensor_digest

__all__ = ["healed_plan", "low_rank_embeddings", "low_rank_layers"]


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear | PivotedLinear]:
    """Return the low-rank layers of ``model`` by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (LowRankLinear, PivotedLinear))}


def low_rank_embeddings(model: nn.Module) -> dict[str, LowRankEmbedding]:
    """Return the embeddings of low rank of ``model`` by name; they are stored beside what was trained."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankEmbedding)}


def healed_plan(
    model: nn.Module,
    plan: RankPlan,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    note: str,
    weights: Mapping[str, str],
) -> RankPlan:
    """Write the trained layers of ``model`` to a store of factors, and return the plan for it.

    The plan has the same ranks. It has no component order, because training mixes components: other sizes follow from
    the plan before. Its fingerprint differs from that of every other plan.

    Args:
        model: The compressed model after training.
        plan: The plan that it was compressed by.
        folder: Folder in which the store's own folder is made.
        settings: What the training depended on, as JSON values.
        note: What was trained, for the plan's notes.
        weights: Digest of the dense weight of a layer, by its name, as far as it is known.
    """
    plan = deployed_plan(model, plan)
    every = {**low_rank_layers(model), **low_rank_embeddings(model)}
    layers = {name: layer for name, layer in every.items() if name in plan.modules}
    made = {name: _factors(layer) for name, layer in layers.items()}
    digest = tensor_digest(
        (f"{name}.{part}", getattr(factors, part)) for name, factors in made.items() for part in ("left", "right")
    )
    # With the digest of what was trained: two runs with the same settings may differ in their last bits.
    fingerprint = {**plan.fingerprint, "heal": {**settings, "factors": digest}}
    store = FactorStore(fingerprint, folder / sha256_of(canonical_json(fingerprint))[:20])
    for name, factors in made.items():
        store.add(name, factors, notes={"weight": weights[name]} if name in weights else None)
    return replace(
        plan,
        modules={name: replace(module, indices=None) for name, module in plan.modules.items()},
        origin={**plan.origin, "store": str(store.directory.resolve())},
        fingerprint=store.fingerprint,
        notes=(*plan.notes, f"{HEALED}{note}"),
        order=None,
    )


@torch.no_grad()
def _factors(layer: LowRankLinear | PivotedLinear | LowRankEmbedding) -> Factors:
    """Return the factors whose product is the weight of ``layer``, with the singular values of the product."""
    left, right = layer.weight.detach().float().cpu(), layer.right.detach().float().cpu()
    if isinstance(layer, PivotedLinear):
        pivots = layer.pivots.cpu().long()
        if layer.side == "out":
            left = _with_identity(left, pivots, layer.out_features)
        else:
            right = _with_identity(right.mT, pivots, layer.in_features).mT.contiguous()
    small = torch.linalg.qr(left.double()).R @ torch.linalg.qr(right.double().mT).R.mT
    return Factors(left, right, torch.linalg.svdvals(small))


def _with_identity(others: Tensor, pivots: Tensor, size: int) -> Tensor:
    """Return ``[size, rank]``: the identity in the rows ``pivots``, and ``others`` in all other rows."""
    whole = others.new_zeros(size, len(pivots))
    is_pivot = torch.zeros(size, dtype=torch.bool)
    is_pivot[pivots] = True
    whole[pivots], whole[~is_pivot] = torch.eye(len(pivots), dtype=others.dtype), others
    return whole
