"""Greedy continuations of prompts, and how much a text repeats itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.models.eval_mode import evaluating, input_device
from lowrank_pl.models.sequences import check_sequences

__all__ = ["Continuation", "check_prompts", "continuations", "generate_samples", "repetition_rate"]


@dataclass(frozen=True)
class Continuation:
    """A model's continuation of a prompt.

    Args:
        text: The new text, without special tokens.
        tokens: The new token ids, including the end-of-text token if there is one.
    """

    text: str
    tokens: tuple[int, ...]


def generate_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_new_tokens: int = 40
) -> list[str]:
    """Return the greedy continuation of each prompt, without the prompt.

    Prompts are used as they are, without a chat template. The sampling settings of the model's own generation config
    are ignored, so equal models give equal text.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts to continue, one at a time: padding would make them depend on each other.
        max_new_tokens: Maximum number of new tokens; the model may end the text earlier.

    Raises:
        ValueError: A prompt has no token.

    Example:
        >>> from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
        >>> [text] = generate_samples(tiny_model("llama"), byte_tokenizer(), ["A list is"], max_new_tokens=3)
        >>> isinstance(text, str)
        True
    """
    return [found.text for found in continuations(model, tokenizer, prompts, max_new_tokens=max_new_tokens)]


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    chat: bool = False,
    progress: str | None = None,
) -> list[Continuation]:
    """Return the greedy continuation of each prompt as text and as tokens; see ``generate_samples``.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts to continue, or messages of a user with ``chat``.
        max_new_tokens: Maximum number of new tokens; the model may end the text earlier.
        chat: Whether each prompt is a user's message, to be answered through the tokenizer's chat template.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        ValueError: A prompt has no token, or one that the model has no embedding for, or more than the model has
            positions; or the tokenizer has no chat template for ``chat``.
    """
    if chat and not tokenizer.chat_template:
        raise ValueError("chat was given, but the tokenizer has no chat template: use plain prompts instead")
    config = _greedy(model, tokenizer, max_new_tokens)
    bar = tqdm(prompts, desc=progress, unit="prompt", disable=progress is None)
    with evaluating(model), _generating(model, config):
        return [_continue(model, tokenizer, prompt, chat=chat) for prompt in bar]


def check_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    model: PreTrainedModel | None = None,
    *,
    max_new_tokens: int = 0,
) -> None:
    """Check that every prompt can be continued.

    Args:
        tokenizer: The tokenizer.
        prompts: Texts to continue.
        model: The model that will continue them; without it, it is only checked that there are tokens.
        max_new_tokens: Tokens that each continuation may have.

    Raises:
        ValueError: A prompt has no token, or one that the model has no embedding for, or more tokens than the model has
            positions for, with those of the continuation.
    """
    positions = None if model is None else getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt in prompts:
        tokens = tokenizer(prompt)["input_ids"]
        if not tokens:
            raise ValueError(f"the prompt {prompt!r} has no token: expected a text to continue")
        if positions is not None and len(tokens) + max_new_tokens > positions:
            raise ValueError(
                f"the prompt {prompt!r} has {len(tokens)} tokens and max_new_tokens is {max_new_tokens}, but the "
                f"model has {positions} positions: give a shorter prompt or fewer max_new_tokens"
            )
        if model is not None:
            check_sequences(model, torch.tensor([tokens]), least=1)


def repetition_rate(texts: Sequence[Sequence[int]], *, n: int = 4) -> float:
    """Return the fraction of n-grams of a text that occurred before, mean over the texts: ``seq-rep-n``.

    This is ``1 - distinct n-grams / n-grams`` (Welleck et al., Neural text generation with unlikelihood training,
    arXiv 1908.04319). Texts with fewer than ``n`` tokens do not count; the result is 0 if no text counts.

    Args:
        texts: Token ids of each text.
        n: Length of the n-grams.

    >>> repetition_rate([[1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 7, 7, 7, 7]])
    0.4
    """
    rates = []
    for tokens in texts:
        grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
        if grams:
            rates.append(1 - len(set(grams)) / len(grams))
    return fmean(rates) if rates else 0.0


@contextmanager
def _generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the generation config of ``model`` within the context.

    Passing it to ``generate`` is not enough: unset values, such as a repetition penalty, would come from the model.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> Continuation:
    if chat:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    encoded = encoded.to(input_device(model))
    length = encoded["input_ids"].shape[1]
    if length == 0:
        raise ValueError(f"the prompt {prompt!r} has no token: expected a text to continue")
    check_sequences(model, encoded["input_ids"], least=1)
    output = model.generate(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])[0]
    whole = str(tokenizer.decode(output, skip_special_tokens=True))
    start = str(tokenizer.decode(output[:length], skip_special_tokens=True))
    # Decoding only the new tokens would lose the space before a word in SentencePiece vocabularies.
    alone = not whole.startswith(start)
    text = str(tokenizer.decode(output[length:], skip_special_tokens=True)) if alone else whole[len(start) :]
    return Continuation(text, tuple(output[length:].tolist()))


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    pad = next((token for token in (tokenizer.pad_token_id, end) if token is not None), 0)
    return GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad)
