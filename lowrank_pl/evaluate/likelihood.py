"""Scores of a language model on fixed token sequences: perplexity, divergence from the dense model."""

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

__all__ = [
    "Divergence",
    "LogitsError",
    "Score",
    "check_sequences",
    "compared",
    "divergence",
    "excess_nats",
    "perplexity",
]

CHUNK_NUMBERS = 2**24
"""Logits taken to fp32 at a time: 256k words times a sequence of 2,048 would be 2 GiB at once, and as much softmaxed."""


class LogitsError(ValueError):
    """A model gave logits that are NaN or infinite."""


@dataclass(frozen=True)
class Score:
    """What a model scored on a set of token sequences.

    Args:
        perplexity: ``exp(nats)``; ``inf`` where that is beyond a double.
        nats: Mean negative log-likelihood of a token.
        tokens: Tokens predicted, one fewer than its length in every sequence.
        seconds: Wall time of the whole pass.

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
        """Predicted tokens in a second."""
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, float]:
        """Return the figures, ``tokens_per_second`` included, as they go into JSON."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a model are from those of the dense one, on the same sequences.

    Args:
        kl: Mean of KL(dense || model) over the predicted tokens, in nats, each over the whole vocabulary.
        agreement: Fraction of the tokens for which both models find the same one most likely.
        nats: Mean negative log-likelihood of a token under the model.
        dense_nats: The same under the dense model.
        tokens: Tokens predicted, one fewer than its length in every sequence.

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
        """Nats by which a token is less likely than under the dense model."""
        return self.nats - self.dense_nats

    @property
    def perplexity(self) -> float:
        """Perplexity of the model, as the function of that name returns."""
        return _exp(self.nats)

    @property
    def dense_perplexity(self) -> float:
        """Perplexity of the dense model."""
        return _exp(self.dense_nats)


def perplexity(model: PreTrainedModel, sequences: Tensor, *, batch_size: int = 1, progress: str | None = None) -> Score:
    """Return the perplexity of ``model`` on ``sequences``: each token after the first, given those before it.

    Sequences are independent of each other and nothing is padded. Logits are taken to fp32 a piece at a time and the
    likelihoods are summed in fp64, so the batch size and the storage type of the logits do not show in the sum.
    The model may be on any device and is left in the mode (training or evaluation) it was in.

    Args:
        model: A causal language model.
        sequences: Token ids ``[sequences, length]``, as the tokenizer's own BOS rule made them.
        batch_size: Sequences in one forward pass.
        progress: Label of a progress bar with the remaining time; ``None`` shows none.

    Raises:
        ValueError: Sequences that the model can't score.
        LogitsError: Logits that are NaN or infinite; the sequence is named.

    Example:
        >>> from lowrank_pl.models.tiny import tiny_model
        >>> score = perplexity(tiny_model("llama"), torch.arange(64).view(4, 16))
        >>> score.tokens, score.perplexity > 100
        (60, True)
    """
    check_sequences(model, sequences, batch_size)
    start = time.perf_counter()
    total = 0.0
    with evaluating(model), tqdm(total=len(sequences), desc=progress, unit="window", disable=progress is None) as bar:
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
    """Return how far ``model`` is from ``dense`` on ``sequences``: KL divergence, agreement and both likelihoods.

    Both models read each batch in turn, so no more than the logits of one batch of either are held; they are taken to
    fp32 a piece at a time and summed in fp64, as in ``perplexity``. The models may be on different devices.

    Args:
        model: The compressed model.
        dense: The one it was made from.
        sequences: Token ids ``[sequences, length]``, as the tokenizer's own BOS rule made them.
        batch_size: Sequences in one forward pass.
        progress: Label of a progress bar with the remaining time; ``None`` shows none.

    Raises:
        ValueError: Sequences that a model can't be scored on, or vocabularies of different sizes.
        LogitsError: Logits of either model that are NaN or infinite; the sequence is named.

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
        tqdm(total=len(sequences), desc=progress, unit="window", disable=progress is None) as bar,
    ):
        for first in range(0, len(sequences), batch_size):
            batch = sequences[first : first + batch_size]
            sums += compared(model, dense, batch, first=first).sum(1)
            bar.update(len(batch))
    tokens = sequences.shape[0] * (sequences.shape[1] - 1)
    kl, agreement, nats, dense_nats = (sums / tokens).tolist()
    return Divergence(kl, agreement, nats, dense_nats, tokens)


def excess_nats(score: Score, dense: Score) -> float:
    """Return by how many nats a token is less likely than under the dense model: ``log(ppl / dense ppl)``.

    >>> excess_nats(Score(0.0, 3.5, 1, 1.0), Score(0.0, 3.0, 1, 1.0))
    0.5
    """
    return score.nats - dense.nats


def check_sequences(model: PreTrainedModel, sequences: Tensor, batch_size: int = 1) -> None:
    """Check, without computing anything, that ``model`` can be scored on ``sequences``.

    Raises:
        ValueError: Not whole-number ids ``[sequences, length]``, ids that the model lacks, too long, or no batch.
    """
    if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < 2 or sequences.is_floating_point():
        raise ValueError(
            f"windows of shape {tuple(sequences.shape)} and type {sequences.dtype} were given: "
            "expected whole-number token ids [sequences, length] with at least one sequence of two tokens"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected a whole number of at least 1")
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(sequences.min()), int(sequences.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"the sequences hold token ids from {low} to {high}, but the model knows 0 to {vocabulary - 1}: "
            "make them with the model's own tokenizer"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and sequences.shape[1] > positions:
        raise ValueError(
            f"windows of {sequences.shape[1]} tokens were given, but the model has {positions} positions: "
            "use shorter windows"
        )


def _negative_log_likelihoods(model: PreTrainedModel, batch: Tensor, *, first: int) -> Tensor:
    """Return ``[batch, length - 1]`` in fp64 on the CPU; ``first`` is the number of the batch's first sequence."""
    logits = _logits(model, batch)
    targets = batch[:, 1:].to(logits.device)
    pieces = []
    for span in _spans(logits):
        piece = _finite(logits[:, span], first)
        nats = F.cross_entropy(piece.flatten(0, 1), targets[:, span].flatten(), reduction="none")
        pieces.append(nats.view(piece.shape[:2]).cpu())
    return torch.cat(pieces, dim=1).double()


def compared(model: PreTrainedModel, dense: PreTrainedModel, batch: Tensor, *, first: int = 0) -> Tensor:
    """Return the sums over a batch of KL, agreement, nats and dense nats at each predicted position.

    Args:
        model: The compressed model, in evaluation mode without gradients.
        dense: The one it was made from, likewise.
        batch: Token ids ``[batch, length]``.
        first: Number of the batch's first sequence, for the error.

    Returns:
        ``[4, length - 1]`` in fp64 on the CPU.

    Raises:
        ValueError: Vocabularies of different sizes.
        LogitsError: Logits of either model that are NaN or infinite; the sequence is named.
    """
    ours, theirs = _logits(model, batch), _logits(dense, batch)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"the model gives logits of {ours.shape[-1]} words, the dense one of {theirs.shape[-1]}: "
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
    """Return ``[batch, length - 1, vocabulary]``, on the model's device and in its type."""
    logits: Tensor = model(input_ids=batch.to(input_device(model)), use_cache=False).logits
    return logits[:, :-1]


def _spans(logits: Tensor) -> Iterator[slice]:
    """Yield the spans of positions whose logits are taken to fp32 at a time."""
    step = max(1, CHUNK_NUMBERS // (logits.shape[0] * logits.shape[2]))
    for at in range(0, logits.shape[1], step):
        yield slice(at, at + step)


def _finite(piece: Tensor, first: int, whose: str = "the") -> Tensor:
    """Return logits ``[batch, positions, vocabulary]`` in fp32; those that are not finite are refused."""
    piece = piece.float()
    finite = piece.isfinite().all(dim=-1)
    if not finite.all():
        sequence = first + int((~finite).any(dim=1).nonzero()[0])
        # No position is named: attention spreads a NaN over the whole sequence, backwards too.
        raise LogitsError(
            f"{whose} logits of sequence {sequence} are NaN or infinite: expected finite numbers; "
            "the model's weights are damaged or its storage type (fp16?) is too narrow for it"
        )
    return piece


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
