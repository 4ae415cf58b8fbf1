"""Factors of embeddings and heads: what an error of a token's row costs, and the decomposition weighted by it.

A matrix ``[vocabulary, width]`` that is looked up reads one-hot inputs. An error ``d_v`` of the row of token ``v``
therefore costs ``f_v d_v' G d_v / 2``, where ``f_v`` is how often the token occurs and ``G`` the second moment of the
gradients by the module's output. A head costs ``g_v d_v' C d_v / 2``, where ``C`` is the second moment of its inputs
and ``g_v`` the mean squared gradient of the token's logit: the diagonal of a moment that would have as many rows and
columns as there are tokens. Both sides weigh tokens by their gradients as those of linear layers do
(``embedding_moments``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.calibration.statistics import Statistics
from lowrank_pl.factors.decomposition import SquareRoot, decompose_rows, square_root
from lowrank_pl.factors.settings import EMBEDDING_KINDS, Decomposition, Statistic
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.targets import EMBEDDINGS, HEAD, EmbeddingTarget, weight_of
from lowrank_pl.utils.distributed import my_share
from lowrank_pl.utils.tensor_store import weight_digest

__all__ = ["RowMetric", "check_embeddings", "decompose_embeddings", "row_metric", "smoothed"]


@dataclass(frozen=True, eq=False)
class RowMetric:
    """What errors of a matrix ``[vocabulary, width]`` cost: ``sum_v rows_v d_v' M d_v``, by the error ``d_v`` of a row.

    Args:
        rows: Weights ``[vocabulary]``, float64; None where all are 1.
        columns: Root of ``M``; None for the identity.
        tokens: How many tokens were measured; 0 without text.
    """

    rows: Tensor | None = None
    columns: SquareRoot | None = None
    tokens: int = 0

    def cost(self, error: Tensor) -> float:
        """Return half of the sum for an ``error`` ``[vocabulary, width]``: nats, if gradients weight it."""
        if self.columns is not None and self.columns.zero:
            return 0.0
        seen = error if self.columns is None else self.columns.multiply_right(error.to(self.columns.root))
        each = seen.square().sum(1, dtype=torch.float64)
        return (each if self.rows is None else each * self.rows.to(each)).sum().item() / 2


def check_embeddings(settings: Decomposition, targets: Sequence[EmbeddingTarget], model: PreTrainedModel) -> None:
    """Check that ``settings`` have a meaning for embeddings, before anything is measured.

    Raises:
        ValueError: They have not, or the embeddings compute something else than a multiple of a row.
    """
    if not targets:
        return
    without = f"leave out --include {EMBEDDINGS}"
    if settings.kind not in EMBEDDING_KINDS:
        raise ValueError(
            f"embeddings were asked for with factors of the kind {settings.kind!r}, which weights inputs of linear "
            f"layers: expected {', '.join(EMBEDDING_KINDS)} (--decomposition.kind), or {without}"
        )
    if settings.at_keep is not None:
        raise ValueError(
            f"embeddings were asked for with at_keep {settings.at_keep}, which measures linear layers a second time: "
            f"leave at_keep out, or {without}"
        )
    for target in targets:
        if target.embedding is not None:
            _scale(model, target.embedding)


@torch.no_grad()
def _scale(model: PreTrainedModel, name: str) -> float:
    """Return the number by which an embedding multiplies its rows, such as Gemma's root of the width.

    Raises:
        ValueError: It computes something else.
    """
    module: Any = model.get_submodule(name)
    weight = module.weight
    ids = torch.linspace(0, len(weight) - 1, min(64, len(weight)), device=weight.device).long()
    rows, found = weight[ids].double(), module(ids).double()
    scale: float = ((rows * found).sum() / rows.square().sum().clamp_min(torch.finfo(torch.float64).tiny)).item()
    if not torch.allclose(found, scale * rows, rtol=0.02, atol=1e-6 * found.abs().max().item()):
        raise ValueError(
            f"{name} is a {type(module).__name__} that computes something else than rows times a number: leave out "
            f"--include {EMBEDDINGS}"
        )
    return scale


def smoothed(rows: Tensor, counts: Tensor) -> Tensor:
    """Return the weights of rows that are looked up, where tokens that the text lacks are not free.

    Every token gets as many pseudo-occurrences of the mean weight that all together have the share that Good and Turing
    estimate for tokens that the text lacks: the share of the text's tokens that occur once, ``(once + 1) / (all + 1)``.

    Args:
        rows: Measured weights ``[vocabulary]``.
        counts: How often each token occurs, ``[vocabulary]``.

    Example:
        >>> smoothed(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([2, 1, 0])).tolist()
        [1.5, 1.0, 0.5]
    """
    lacking = ((counts == 1).sum().item() + 1) / (counts.sum().item() + 1)
    return rows * (1 - lacking) + rows.mean() * lacking


def row_metric(
    settings: Decomposition, statistics: Statistics, target: EmbeddingTarget, *, device: torch.device
) -> RowMetric:
    """Return what weights the rows and the columns of embeddings, from statistics that are collected when missing.

    Without gradients (``whitened``), embeddings have the frequencies of tokens as weights of rows, and a head has the
    second moment of its inputs as that of columns; the other side is the identity. Each side is damped as inputs or
    outputs of linear layers are (``Decomposition.damping``, ``output_damping``).

    Tied matrices have the sum of two costs, ``f_v d' G d + g_v d' C d``, for which no decomposition is known. It is
    taken as one product with the same marginals, ``w_v d' M d``: ``w_v = f_v tr(G) + g_v tr(C)`` and ``M`` is
    proportional to ``sum(f) G + sum(g) C``. It is exact for errors that have no direction, and for errors that all
    tokens share, but for a token that is mostly read or mostly predicted its metric is the mean of both.

    Args:
        settings: How to decompose.
        statistics: The statistics of the dense model.
        target: The matrix.
        device: Where to compute.
    """
    if settings.kind == "svd":
        return RowMetric()
    _measure(settings, statistics, [target])
    parts, tokens = [], 0
    for place in target.places:
        looks_up = place.kind == EMBEDDINGS
        rows: Tensor | None
        if settings.kind == "two_sided":
            store = statistics.collect(_moments(settings), [place], settings.labels)
            rows, columns = (store.read(place.name, part).to(device).double() for part in ("rows", "columns"))
            tokens = int(store.notes(place.name)["tokens"])
        elif looks_up:
            rows = _counts(statistics, target).to(device).double() / statistics.passes.sequences.numel()
            columns = torch.eye(target.shape[1], dtype=torch.float64, device=device)
            tokens = statistics.passes.sequences.numel()
        else:
            store = statistics.collect("inputs", [place])
            rows = torch.ones(target.shape[0], dtype=torch.float64, device=device)
            columns = store.read(place.name, "second_moment").to(device).double()
            tokens = int(store.notes(place.name)["tokens"])
        if looks_up:
            scale = _scale(statistics.model, place.name)
            rows = smoothed(rows, _counts(statistics, target).to(device))
            columns = _damped(columns, settings.output_damping) * scale**2
        else:
            rows = rows + settings.output_damping * rows.mean()
            columns = _damped(columns, settings.damping)
        parts.append((rows, columns))
    weights = sum(rows * columns.trace() for rows, columns in parts)
    moment = sum(rows.sum() * columns for rows, columns in parts)
    total = sum((rows.sum() * columns.trace()).item() for rows, columns in parts)
    assert isinstance(weights, Tensor)
    assert isinstance(moment, Tensor)
    # Both sides have the mean size of rows and columns, which their product must have only once.
    # Each place's moment is damped already.
    return RowMetric(weights, square_root(moment / (total or 1.0), damping=0.0), tokens)


def _moments(settings: Decomposition) -> Statistic:
    return "embedding_moments" if settings.token_weights else "plain_embedding_moments"


def _measure(settings: Decomposition, statistics: Statistics, targets: Sequence[EmbeddingTarget]) -> None:
    """Collect what is missing of the statistics of ``targets``, in one pass for all of them."""
    places = [place for target in targets for place in target.places]
    if settings.kind == "two_sided":
        statistics.collect(_moments(settings), places, settings.labels)
    elif settings.kind == "whitened" and (heads := [place for place in places if place.kind == HEAD]):
        statistics.collect("inputs", heads)


def _counts(statistics: Statistics, target: EmbeddingTarget) -> Tensor:
    """Return how often each token occurs in the calibration text, ``[vocabulary]``."""
    return statistics.passes.sequences.flatten().cpu().bincount(minlength=target.shape[0])


def _damped(moment: Tensor, damping: float) -> Tensor:
    found = (moment + moment.mT) / 2
    found.diagonal().add_(damping * found.diagonal().mean())
    return found


def decompose_embeddings(
    model: PreTrainedModel,
    todo: Sequence[EmbeddingTarget],
    store: FactorStore,
    settings: Decomposition,
    statistics: Statistics,
) -> None:
    """Write the factors of embeddings and heads to ``store``; processes that work together take a share each.

    Args:
        model: The dense model.
        todo: The matrices.
        store: Where the factors are written.
        settings: How to decompose.
        statistics: The statistics of the model.
    """
    _measure(settings, statistics, todo)
    metrics = {target.name: row_metric(settings, statistics, target, device=model.device) for target in todo}
    for target in my_share(list(todo)):
        began = time.perf_counter()
        weight = weight_of(model.get_submodule(target.name)).detach()
        metric = metrics.pop(target.name)
        factors = decompose_rows(weight, rows=metric.rows, columns=metric.columns)
        notes = {"weight": weight_digest(weight), "seconds": f"{time.perf_counter() - began:.4f}"}
        if metric.columns is not None:
            notes |= {"square_root": metric.columns.kind, "tokens": str(metric.tokens)}
        store.add(target.name, factors, notes=notes)
