"""Checks of what a model says: likelihood and divergence on a text, and whether it repeats itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.evaluate.generation import Continuation, continuations, repetition_rate
from lowrank_pl.evaluate.likelihood import Divergence, LogitsError, Score, divergence, perplexity
from lowrank_pl.export.health.diagnosis import Finding, Sample
from lowrank_pl.utils.formatting import percent

__all__ = ["EXCESS_NATS", "PROMPTS", "REPETITION_MARGIN", "check_generation", "check_text"]

EXCESS_NATS = 1.0
"""Excess, or divergence, in nats a token from which there is a warning: a perplexity ``e`` times the dense model's.
Of the methods in the README's table those that are of use at 60 % of the parameters stay below, at 80 % by far."""

REPETITION_MARGIN = 0.2
"""Rise of the repetition rate over the dense model's from which there is a warning. Greedy text of sound models repeats
itself too (0.44 for the one in arXiv 1908.04319, table 2), and over three short texts the rate is coarse."""

PROMPTS = (
    "The capital of France is",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that adds two numbers.",
)


def check_text(model: PreTrainedModel, dense: PreTrainedModel | None, sequences: Tensor) -> Finding:
    """Return how well ``model`` predicts a text, and how far that is from the dense model.

    A model that predicts worse than a uniform guess over its vocabulary, where the dense one does not, is sick.

    Args:
        model: The model to examine.
        dense: What it was made from, if that is at hand.
        sequences: Token ids ``[sequences, length]``.

    Raises:
        ValueError: Sequences that a model can't be scored on, or a dense model of another vocabulary.
    """
    try:
        if dense is None:
            return _alone(perplexity(model, sequences, progress="score"), _chance(model))
        return _beside(divergence(model, dense, sequences, progress="score both"), _chance(model))
    except LogitsError as error:
        return Finding("quality", "sick", str(error))


def check_generation(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
) -> tuple[Finding, list[Sample]]:
    """Return whether ``model`` repeats itself, or says nothing, more than the dense one, and what both say.

    Args:
        model: The model to examine.
        dense: What it was made from, if that is at hand.
        tokenizer: For both; prompts go through its chat template where it has one.
        prompts: What to continue or to answer.
        max_new_tokens: How far.

    Raises:
        ValueError: A prompt that has no token.
    """
    chat = bool(tokenizer.chat_template)

    def spoken(one: PreTrainedModel, when: str) -> list[Continuation]:
        return continuations(
            one, tokenizer, prompts, max_new_tokens=max_new_tokens, chat=chat, progress=f"generate {when}"
        )

    after, before = spoken(model, "after"), None if dense is None else spoken(dense, "before")
    old_texts = [None] * len(after) if before is None else [old.text for old in before]
    samples = [Sample(*texts) for texts in zip(prompts, [new.text for new in after], old_texts, strict=True)]
    return _speech(after, before, chat=chat), samples


def _chance(model: PreTrainedModel) -> float:
    """Return the nats of a uniform guess."""
    return math.log(model.get_input_embeddings().num_embeddings)


def _alone(score: Score, chance: float) -> Finding:
    said = f"perplexity {score.perplexity:.2f}"
    if score.nats >= chance:
        said += ", worse than a uniform guess over the vocabulary"
        return Finding("quality", "warning", said, score.to_dict(), "compare it with the base: give --base")
    return Finding("quality", "healthy", f"{said}; there is no dense model beside it", score.to_dict())


def _beside(found: Divergence, chance: float) -> Finding:
    figures = {
        "perplexity": found.perplexity,
        "dense_perplexity": found.dense_perplexity,
        "excess_nats": found.excess_nats,
        **asdict(found),
    }
    said = (
        f"perplexity {found.perplexity:.2f}, before {found.dense_perplexity:.2f}: {found.excess_nats:.3f} nats more; "
        f"KL {found.kl:.3f} nats, the same most likely token in {percent(found.agreement)}"
    )
    if found.nats >= chance > found.dense_nats:
        said += "; that is worse than a uniform guess over the vocabulary"
        return Finding("quality", "sick", said, figures, "the weights are damaged: export it again")
    if max(found.excess_nats, found.kl) > EXCESS_NATS:
        advice = "keep more, learn the ranks, refit, or calibrate on text like the one that it is for"
        return Finding("quality", "warning", said, figures, advice)
    return Finding("quality", "healthy", said, figures)


def _speech(after: Sequence[Continuation], before: Sequence[Continuation] | None, *, chat: bool) -> Finding:
    rate, silent = repetition_rate([new.tokens for new in after]), _silent(after)
    figures: dict[str, Any] = {"repetition": rate, "silent": silent, "prompts": len(after), "chat_template": chat}
    said = f"{percent(rate)} of the 4-grams repeat"
    if before is None:
        return Finding("generation", "healthy", f"{said}; there is no dense model beside it", figures)
    old_rate, old_silent = repetition_rate([old.tokens for old in before]), _silent(before)
    figures |= {"dense_repetition": old_rate, "dense_silent": old_silent}
    said += f", before {percent(old_rate)}"
    if silent > old_silent:
        said = f"to {silent} of {len(after)} prompts there is no answer, before {old_silent}; {said}"
    if silent > old_silent or rate > old_rate + REPETITION_MARGIN:
        advice = "read the texts above; keep more, refit, or calibrate on chats if it answers them badly"
        return Finding("generation", "warning", said, figures, advice)
    return Finding("generation", "healthy", said, figures)


def _silent(spoken: Sequence[Continuation]) -> int:
    """Return how many continuations are empty, as of a model that ends every chat at once."""
    return sum(not one.text.strip() for one in spoken)
