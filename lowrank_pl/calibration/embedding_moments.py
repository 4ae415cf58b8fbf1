"""Sums over calibration text of what embeddings and heads are weighted by, where gradients weight them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_pl.calibration.measures import Batch, Call, GradientMeasure, Passes
from lowrank_pl.calibration.symmetric_sum import SymmetricSum, compact, rows_of
from lowrank_pl.models.targets import EMBEDDINGS, Target
from lowrank_pl.utils.distributed import sum_across_processes, total_across_processes

__all__ = ["EmbeddingMoments", "PlainEmbeddingMoments"]

_TOKENS = 64
"""Tokens whose gradients by all logits are looked at in one go: there may be hundreds of thousands of logits."""


class EmbeddingMoments(GradientMeasure):
    """The two sides of the curvature of the loss by a matrix ``[vocabulary, width]`` in one of its places.

    Each token's gradient is split evenly between both sides, as in ``WeightedMoments``; the vocabulary's side is the
    diagonal of a moment.

    * Where rows are looked up, a token ``v`` of the text with the gradient ``g`` by the output adds ``|g|`` to the
      weight of row ``v``, and ``g g' / |g|`` to the moment.
    * Where the matrix is the head, a token with the input ``x`` and the gradient ``g`` by the logits adds ``|g| x x'``
      to the moment. The weight of row ``v`` is the mean of ``g_v^2 / |g|``. Its sum over all rows is measured, and is
      shared out by the mean of ``|g_v|``: with labels sampled from the model both are proportional to ``p_v (1 -
      p_v)``, but squares are those of the few labels that were sampled, while ``|g_v|`` knows the probability of every
      token.

    Args:
        vocabulary: Rows of the matrix.
        width: Its columns.
        looks_up: Whether rows are looked up; otherwise the place is the head.
        device: Where the sums are.

    Attributes:
        tokens: How many tokens had a label.

    Example:
        >>> moments = EmbeddingMoments(3, 1, looks_up=True)
        >>> moments.add([Call(torch.tensor([[2, 1]]), torch.tensor([[[-4.0], [0.0]]]))], Batch(0, torch.zeros(1, 2)))
        >>> moments.rows.tolist(), moments.columns.item()
        ([0.0, 0.0, 4.0], 4.0)
    """

    folder = "embedding_moments"
    weighs_tokens: ClassVar[bool] = True

    def __init__(self, vocabulary: int, width: int, *, looks_up: bool, device: torch.device | str = "cpu") -> None:
        self._columns = SymmetricSum(width, device=device)
        self._rows = torch.zeros(vocabulary, dtype=torch.float64, device=device)
        # The sum of the weights of all rows.
        self._total = torch.zeros(1, dtype=torch.float64, device=device)
        self.looks_up = looks_up
        self.tokens = 0

    @classmethod
    def bytes_of(cls, target: Target, passes: Passes) -> int:
        """Return the bytes that the sums of ``target`` take."""
        return SymmetricSum.bytes_of(target.shape[1]) + 8 * target.shape[0]

    @classmethod
    def empty(cls, target: Target, passes: Passes, device: torch.device) -> EmbeddingMoments:
        """Return the moments of ``target``, a place of a matrix, before the first batch."""
        return cls(*target.shape, looks_up=target.kind == EMBEDDINGS, device=device)

    def add(self, calls: Sequence[Call], batch: Batch) -> None:
        """Add the tokens or inputs, and the gradients, of one batch.

        Raises:
            ValueError: A gradient or an input holds NaN or infinity.
        """
        for call in calls:
            gradients = call.gradient.detach().flatten(0, -2)
            norms = self._norms(gradients)
            if self.looks_up:
                self._add_lookup(call.inputs.flatten(), gradients.float(), norms)
            else:
                self._add_head(rows_of(call.inputs), gradients, norms)
        self.tokens += batch.labels

    def _norms(self, gradients: Tensor) -> Tensor:
        """Return the norm of each token's gradient, float64 ``[tokens]``."""
        parts = [part.double().square().sum(-1).sqrt() for part in torch.split(gradients, _TOKENS)]
        norms = torch.cat(parts)
        if not torch.isfinite(norms).all():
            raise ValueError("the gradients hold NaN or infinity")
        return norms

    def _add_lookup(self, ids: Tensor, gradients: Tensor, norms: Tensor) -> None:
        weights, scales = torch.ones_like(norms), torch.ones_like(norms)
        if self.weighs_tokens:
            # A token without a gradient contributes nothing.
            weights, scales = norms, torch.where(norms > 0, norms.rsqrt(), 0.0)
        self._columns.add(gradients * scales.float()[:, None], "the gradients hold")
        self._rows.index_add_(0, ids, weights)
        self._total += weights.sum()

    def _add_head(self, inputs: Tensor, gradients: Tensor, norms: Tensor) -> None:
        scales = norms.sqrt() if self.weighs_tokens else torch.ones_like(norms)
        self._columns.add(inputs * scales.float()[:, None], "the inputs hold")
        for part in torch.split(gradients, _TOKENS):
            self._rows += part.abs().sum(0, dtype=torch.float64)
        self._total += (norms if self.weighs_tokens else norms.square()).sum()

    def merge_processes(self) -> None:
        """Add the sums of all processes that work together."""
        self._columns.merge_processes()
        sum_across_processes(self._rows)
        sum_across_processes(self._total)
        self.tokens = total_across_processes(self.tokens)

    @property
    def rows(self) -> Tensor:
        """``[vocabulary]`` weight of each row, float64."""
        shared_out = self._total / self._rows.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return self._rows * shared_out / max(1, self.tokens)

    @property
    def columns(self) -> Tensor:
        """``[width, width]`` moment of the hidden side, float64."""
        return self._columns.matrix().div_(max(1, self.tokens))

    def tensors(self) -> dict[str, Tensor]:
        """Return ``rows`` ``[vocabulary]`` and ``columns`` ``[width, width]``."""
        return {"rows": self.rows, "columns": compact(self.columns)}

    def notes(self) -> dict[str, str]:
        """Return how many tokens had a label."""
        return {"tokens": str(self.tokens)}


class PlainEmbeddingMoments(EmbeddingMoments):
    """The same where all tokens weigh alike, as in K-FAC.

    Where rows are looked up, a token adds 1 to the weight of its row, and ``g g'`` to the moment. A head's moment is
    that of its inputs, and the weights of its rows are the mean squared gradients of the logits, shared out as above.
    """

    folder = "plain_embedding_moments"
    weighs_tokens = False
