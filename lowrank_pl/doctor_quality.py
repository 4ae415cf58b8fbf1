"""Checks of what a model says: likelihood and divergence on a text, and whether it repeats itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.doctor_findings import Finding
from lowrank_pl.doctor_report import Sample
from lowrank_pl.evaluate import Divergence, LogitsError, Score, divergence, perplexity
from lowrank_pl.generation import Continuation, continuations, repetition_rate
from lowrank_pl.plan_report import percent

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


def check_text(model: PreTrainedModel, dense: PreTrainedModel | None, windows: Tensor) -> Finding:
    """Return how well ``model`` predicts a text, and how far that is from the dense model.

    A model that predicts worse than a uniform guess over its vocabulary, where the dense one does not, is sick.

    Args:
        model: The model to examine.
        dense: What it was made from, if that is at hand.
        windows: Token ids ``[windows, length]``.

    Raises:
        ValueError: Windows that a model can't be scored on, or a dense model of another vocabulary.
    """
    try:
        if dense is None:
            return _alone(perplexity(model, windows, progress="score"), _chance(model))
        return _beside(divergence(model, dense, windows, progress="score both"), _chance(model))
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
    """Return whether ``model`` repeats itself more than the dense one, and what both say to the prompts.

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

    after = spoken(model, "after")
    rate = repetition_rate([new.tokens for new in after])
    if dense is None:
        samples = [Sample(prompt, new.text) for prompt, new in zip(prompts, after, strict=True)]
        return _repetition(rate, None, chat=chat), samples
    before = spoken(dense, "before")
    samples = [Sample(prompt, new.text, old.text) for prompt, new, old in zip(prompts, after, before, strict=True)]
    return _repetition(rate, repetition_rate([old.tokens for old in before]), chat=chat), samples


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


def _repetition(rate: float, dense: float | None, *, chat: bool) -> Finding:
    figures: dict[str, Any] = {"repetition": rate, "dense_repetition": dense, "chat_template": chat}
    said = f"{percent(rate)} of the 4-grams repeat"
    if dense is None:
        return Finding("generation", "healthy", f"{said}; there is no dense model beside it", figures)
    said += f", before {percent(dense)}"
    if rate > dense + REPETITION_MARGIN:
        return Finding("generation", "warning", said, figures, "read the texts above; keep more or refit if they loop")
    return Finding("generation", "healthy", said, figures)
