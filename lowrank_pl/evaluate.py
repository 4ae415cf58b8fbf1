"""Scores of a language model: perplexity on fixed token windows, excess over the dense model, greedy samples."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.evaluating import evaluating

__all__ = ["Score", "check_windows", "excess_nats", "generate_samples", "perplexity"]

CHUNK_NUMBERS = 2**24
"""Logits taken to fp32 at a time: 256k words times a window of 2,048 would be 2 GiB at once, and as much softmaxed."""


@dataclass(frozen=True)
class Score:
    """What a model scored on a set of token windows.

    Args:
        perplexity: ``exp(nats)``; ``inf`` where that is beyond a double.
        nats: Mean negative log-likelihood of a token.
        tokens: Tokens predicted, one fewer than its length in every window.
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


def perplexity(model: PreTrainedModel, windows: Tensor, *, batch_size: int = 1, progress: str | None = None) -> Score:
    """Return the perplexity of ``model`` on ``windows``: each token after the first, given those before it.

    Windows are independent of each other and nothing is padded. Logits are taken to fp32 a piece at a time and the
    likelihoods are summed in fp64, so the batch size and the storage type of the logits do not show in the sum.
    The model may be on any device and is left in the mode (training or evaluation) it was in.

    Args:
        model: A causal language model.
        windows: Token ids ``[windows, length]``, as the tokenizer's own BOS rule made them.
        batch_size: Windows in one forward pass.
        progress: Label of a progress bar with the remaining time; ``None`` shows none.

    Raises:
        ValueError: Windows that the model can't score, or logits that are NaN or infinite; the window is named.

    Example:
        >>> from lowrank_pl.tiny_models import tiny_model
        >>> score = perplexity(tiny_model("llama"), torch.arange(64).view(4, 16))
        >>> score.tokens, score.perplexity > 100
        (60, True)
    """
    check_windows(model, windows, batch_size)
    start = time.perf_counter()
    total = 0.0
    with evaluating(model), tqdm(total=len(windows), desc=progress, unit="window", disable=progress is None) as bar:
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            total += _negative_log_likelihoods(model, batch, first=first).sum().item()
            bar.update(len(batch))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    nats = total / tokens
    return Score(_exp(nats), nats, tokens, time.perf_counter() - start)


def excess_nats(score: Score, dense: Score) -> float:
    """Return by how many nats a token is less likely than under the dense model: ``log(ppl / dense ppl)``.

    >>> excess_nats(Score(0.0, 3.5, 1, 1.0), Score(0.0, 3.0, 1, 1.0))
    0.5
    """
    return score.nats - dense.nats


def generate_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_new_tokens: int = 40
) -> list[str]:
    """Return the greedy continuation of each prompt, without the prompt.

    The text goes to the model as it is, without a chat template; whatever sampling the model's own generation
    config asks for is left aside, so equal models give equal text.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts to continue, one at a time: padding would make them depend on each other.
        max_new_tokens: Most tokens to add; fewer where the model ends the text.

    Raises:
        ValueError: A prompt that has no token.

    Example:
        >>> from lowrank_pl.tiny_models import byte_tokenizer, tiny_model
        >>> [text] = generate_samples(tiny_model("llama"), byte_tokenizer(), ["A list is"], max_new_tokens=3)
        >>> isinstance(text, str)
        True
    """
    config = _greedy(model, tokenizer, max_new_tokens)
    with evaluating(model), _generating(model, config):
        return [_continue(model, tokenizer, prompt) for prompt in prompts]


def check_windows(model: PreTrainedModel, windows: Tensor, batch_size: int = 1) -> None:
    """Check, without computing anything, that ``model`` can be scored on ``windows``.

    Raises:
        ValueError: Not whole-number ids ``[windows, length]``, ids that the model lacks, too long, or no batch.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2 or windows.is_floating_point():
        raise ValueError(
            f"windows of shape {tuple(windows.shape)} and type {windows.dtype} were given: "
            "expected whole-number token ids [windows, length] with at least one window of two tokens"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected a whole number of at least 1")
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"the windows hold token ids from {low} to {high}, but the model knows 0 to {vocabulary - 1}: "
            "make them with the model's own tokenizer"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and windows.shape[1] > positions:
        raise ValueError(
            f"windows of {windows.shape[1]} tokens were given, but the model has {positions} positions: "
            "use shorter windows"
        )


def _negative_log_likelihoods(model: PreTrainedModel, batch: Tensor, *, first: int) -> Tensor:
    """Return ``[batch, length - 1]`` in fp64 on the CPU; ``first`` is the number of the batch's first window."""
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=batch.to(device), use_cache=False).logits[:, :-1]
    targets = batch[:, 1:].to(logits.device)
    step = max(1, CHUNK_NUMBERS // (logits.shape[0] * logits.shape[2]))
    pieces = []
    for at in range(0, logits.shape[1], step):
        piece = logits[:, at : at + step].float()
        finite = piece.isfinite().all(dim=-1)
        if not finite.all():
            _refuse(first + int((~finite).any(dim=1).nonzero()[0]))
        nats = F.cross_entropy(piece.flatten(0, 1), targets[:, at : at + step].flatten(), reduction="none")
        pieces.append(nats.view(finite.shape).cpu())
    return torch.cat(pieces, dim=1).double()


def _refuse(window: int) -> None:
    # No position is named: attention spreads a NaN over the whole window, backwards too.
    raise ValueError(
        f"the logits of window {window} are NaN or infinite: expected finite numbers; "
        "the model's weights are damaged or its storage type (fp16?) is too narrow for it"
    )


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


@contextmanager
def _generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Give ``model`` the generation ``config`` for a while.

    Passing it to ``generate`` is not enough: what it leaves open, such as a repetition penalty, comes from the model.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    encoded = tokenizer(prompt, return_tensors="pt").to(model.get_input_embeddings().weight.device)
    length = encoded["input_ids"].shape[1]
    if length == 0:
        raise ValueError(f"the prompt {prompt!r} has no token: expected a text to continue")
    output = model.generate(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])[0]
    whole = str(tokenizer.decode(output, skip_special_tokens=True))
    start = str(tokenizer.decode(output[:length], skip_special_tokens=True))
    # Decoding the new tokens alone would lose the space before a word in SentencePiece vocabularies.
    if whole.startswith(start):
        return whole[len(start) :]
    return str(tokenizer.decode(output[length:], skip_special_tokens=True))


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    pad = next((token for token in (tokenizer.pad_token_id, end) if token is not None), 0)
    return GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad)
