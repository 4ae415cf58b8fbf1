"""Perplexity of a language model on token sequences, and divergence from the dense model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_pl.models.eval_mode import evaluating, input_device
from lowrank_pl.models.sequences import check_sequences

__all__ = [
    "Divergence",
    "LogitsError",
    "Score",
    "compared",
    "divergence",
    "excess_nats",
    "perplexity",
]

CHUNK_NUMBERS = 2**24
"""Logits converted to fp32 at a time: 2,048 positions with a vocabulary of 256k would take 2 GiB, softmax as much."""


class LogitsError(ValueError):
    """The logits of a model are NaN or infinite."""


@dataclass(frozen=True)
class Score:
    """Score of a model on token sequences.

    Args:
        perplexity: ``exp(nats)``; ``inf`` if it exceeds a double.
        nats: Mean negative log-likelihood of a token.
        tokens: Predicted tokens: all but the first of every sequence.
        seconds: Wall time.

    Example:
        >>> Score(perplexity=20.0, nats=2.9957, tokens=1000, seconds=4.0).tokens_per_second
        250.0
    """

    perplexity: float
    nats: float
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens per second."""
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, float]:
        """Return the figures and ``tokens_per_second`` as JSON values."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class Divergence:
    """Divergence of a model's predictions from the dense model's, on the same sequences.

    Args:
        kl: KL(dense || model) over the whole vocabulary, in nats, mean over the predicted tokens.
        agreement: Fraction of tokens on which both models have the same most likely token.
        nats: Mean negative log-likelihood of a token under the model.
        dense_nats: Mean negative log-likelihood of a token under the dense model.
        tokens: Predicted tokens: all but the first of every sequence.

    Example:
        >>> found = Divergence(kl=0.3, agreement=0.8, nats=3.0, dense_nats=2.75, tokens=100)
        >>> found.excess_nats, round(found.perplexity, 1)
        (0.25, 20.1)
    """

    kl: float
    agreement: float
    nats: float
    dense_nats: float
    tokens: int

    @property
    def excess_nats(self) -> float:
        """Mean negative log-likelihood above the dense model's, in nats per token."""
        return self.nats - self.dense_nats

    @property
    def perplexity(self) -> float:
        """Perplexity of the model."""
        return _exp(self.nats)

    @property
    def dense_perplexity(self) -> float:
        """Perplexity of the dense model."""
        return _exp(self.dense_nats)


def perplexity(model: PreTrainedModel, sequences: Tensor, *, batch_size: int = 1, progress: str | None = None) -> Score:
    """Return the perplexity of ``model`` on ``sequences``: each token after the first, given the tokens before it.

    Sequences are independent and nothing is padded. Logits are converted to fp32 in chunks, and likelihoods are summed
    in fp64, so neither the batch size nor the type of the logits affects the sum. The model may be on any device and
    keeps its mode (training or evaluation).

    Args:
        model: A causal language model.
        sequences: Token ids ``[sequences, length]``, with BOS where the tokenizer adds it.
        batch_size: Sequences per forward pass.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        ValueError: The model can't score the sequences.
        LogitsError: Logits are NaN or infinite; the message names the sequence.

    Example:
        >>> from lowrank_pl.models.tiny import tiny_model
        >>> score = perplexity(tiny_model("llama"), torch.arange(64).view(4, 16))
        >>> score.tokens, score.perplexity > 100
        (60, True)
    """
    check_sequences(model, sequences, batch_size)
    start = time.perf_counter()
    total = 0.0
    with evaluating(model), tqdm(total=len(sequences), desc=progress, unit="sequence", disable=progress is None) as bar:
        for first in range(0, len(sequences), batch_size):
            batch = sequences[first : first + batch_size]
            total += _negative_log_likelihoods(model, batch, first=first).sum().item()
            bar.update(len(batch))
    tokens = sequences.shape[0] * (sequences.shape[1] - 1)
    nats = total / tokens
    return Score(_exp(nats), nats, tokens, time.perf_counter() - start)


def divergence(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    sequences: Tensor,
    *,
    batch_size: int = 1,
    progress: str | None = None,
) -> Divergence:
    """Return the divergence of ``model`` from ``dense`` on ``sequences``.

    Both models run on each batch in turn, so the logits of one batch are in memory. They are converted to fp32 in
    chunks and summed in fp64, as in ``perplexity``. The models may be on different devices.

    Args:
        model: The compressed model.
        dense: The model that it was made from.
        sequences: Token ids ``[sequences, length]``, with BOS where the tokenizer adds it.
        batch_size: Sequences per forward pass.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        ValueError: A model can't score the sequences, or the vocabularies have different sizes.
        LogitsError: Logits of either model are NaN or infinite; the message names the sequence.

    Example:
        >>> from lowrank_pl.models.tiny import tiny_model
        >>> found = divergence(tiny_model("llama"), tiny_model("llama"), torch.arange(64).view(4, 16))
        >>> found.kl, found.agreement, found.tokens
        (0.0, 1.0, 60)
    """
    for one in (dense, model):
        check_sequences(one, sequences, batch_size)
    sums = torch.zeros(4, dtype=torch.float64)
    with (
        evaluating(model),
        evaluating(dense),
        tqdm(total=len(sequences), desc=progress, unit="sequence", disable=progress is None) as bar,
    ):
        for first in range(0, len(sequences), batch_size):
            batch = sequences[first : first + batch_size]
            sums += compared(model, dense, batch, first=first).sum(1)
            bar.update(len(batch))
    tokens = sequences.shape[0] * (sequences.shape[1] - 1)
    kl, agreement, nats, dense_nats = (sums / tokens).tolist()
    return Divergence(kl, agreement, nats, dense_nats, tokens)


def excess_nats(score: Score, dense: Score) -> float:
    """Return the excess over the dense model in nats per token: ``log(perplexity / dense perplexity)``.

    Args:
        score: Score of the model.
        dense: Score of the dense model on the same sequences.

    >>> excess_nats(Score(0.0, 3.5, 1, 1.0), Score(0.0, 3.0, 1, 1.0))
    0.5
    """
    return score.nats - dense.nats


def _negative_log_likelihoods(model: PreTrainedModel, batch: Tensor, *, first: int) -> Tensor:
    """Return ``[batch, length - 1]`` in fp64 on the CPU; ``first`` is the index of the batch's first sequence."""
    logits = _logits(model, batch)
    targets = batch[:, 1:].to(logits.device)
    pieces = []
    for span in _spans(logits):
        piece = _finite(logits[:, span], first)
        nats = F.cross_entropy(piece.flatten(0, 1), targets[:, span].flatten(), reduction="none")
        pieces.append(nats.view(piece.shape[:2]).cpu())
    return torch.cat(pieces, dim=1).double()


def compared(model: PreTrainedModel, dense: PreTrainedModel, batch: Tensor, *, first: int = 0) -> Tensor:
    """Return KL, agreement, nats and dense nats at each predicted position, summed over a batch.

    Args:
        model: The compressed model, in evaluation mode and without gradients.
        dense: The model that it was made from, in evaluation mode and without gradients.
        batch: Token ids ``[batch, length]``.
        first: Index of the batch's first sequence, for the error message.

    Returns:
        ``[4, length - 1]`` in fp64 on the CPU.

    Raises:
        ValueError: The vocabularies have different sizes.
        LogitsError: Logits of either model are NaN or infinite; the message names the sequence.
    """
    ours, theirs = _logits(model, batch), _logits(dense, batch)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"the model's vocabulary has {ours.shape[-1]} tokens, the dense model's {theirs.shape[-1]}: "
            "compare a model with the base that it was made from"
        )
    targets = batch[:, 1:].to(ours.device)
    sums = []
    for span in _spans(ours):
        here = _finite(ours[:, span], first).log_softmax(-1)
        there = _finite(theirs[:, span].to(here.device), first, whose="the dense model's").log_softmax(-1)
        index = targets[:, span, None]
        figures = (
            F.kl_div(here, there, reduction="none", log_target=True).sum(-1),
            here.argmax(-1) == there.argmax(-1),
            -here.gather(-1, index)[..., 0],
            -there.gather(-1, index)[..., 0],
        )
        sums.append(torch.stack([figure.double().sum(0) for figure in figures]).cpu())
    return torch.cat(sums, dim=1)


def _logits(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Return logits ``[batch, length - 1, vocabulary]``, on the model's device and in its type."""
    logits: Tensor = model(input_ids=batch.to(input_device(model)), use_cache=False).logits
    return logits[:, :-1]


def _spans(logits: Tensor) -> Iterator[slice]:
    """Yield the spans of positions whose logits are converted to fp32 at a time."""
    step = max(1, CHUNK_NUMBERS // (logits.shape[0] * logits.shape[2]))
    for at in range(0, logits.shape[1], step):
        yield slice(at, at + step)


def _finite(piece: Tensor, first: int, whose: str = "the") -> Tensor:
    """Return logits ``[batch, positions, vocabulary]`` in fp32; raise if they are not finite."""
    piece = piece.float()
    finite = piece.isfinite().all(dim=-1)
    if not finite.all():
        sequence = first + int((~finite).any(dim=1).nonzero()[0])
        # The position is not named, since attention spreads a NaN over the whole sequence.
        raise LogitsError(
            f"{whose} logits of sequence {sequence} are NaN or infinite: expected finite numbers; the weights are "
            "damaged, or their type (fp16?) has too small a range: load the model in bfloat16 or float32"
        )
    return piece


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
