"""Checks of a model's output: likelihood and divergence on a text, and repetition in generated text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.evaluate.generation import Continuation, continuations, repetition_rate
from lowrank_pl.evaluate.likelihood import Divergence, LogitsError, Score, divergence, perplexity
from lowrank_pl.export.health.diagnosis import Finding, Sample
from lowrank_pl.utils.checks import check_counts
from lowrank_pl.utils.formatting import percent, rounded_perplexity

__all__ = ["EXCESS_NATS", "PROMPTS", "REPETITION_MARGIN", "Prompts", "check_generation", "check_text"]

EXCESS_NATS = 1.0
"""Excess loss or divergence, in nats a token, from which there is a warning: at 1.0, perplexity is ``e`` times that of
the dense model. At 60 % of the parameters, the useful methods of the README's table stay below; at 80 %, by far."""

REPETITION_MARGIN = 0.2
"""Rise of the repetition rate over the dense model's from which there is a warning. Greedy text of healthy models also
repeats itself (0.44 in arXiv 1908.04319, table 2), and the rate is coarse over three short texts."""

PROMPTS = (
    "The capital of France is",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that adds two numbers.",
)


@dataclass(frozen=True)
class Prompts:
    """Prompts to continue.

    Args:
        prompts: Texts to continue, or questions for a model with a chat template; none skips the check.
        max_new_tokens: Number of tokens to generate for each.

    Raises:
        ValueError: ``max_new_tokens`` is no number of at least 1.
    """

    prompts: Sequence[str] = PROMPTS
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        check_counts({"max_new_tokens": self.max_new_tokens})


def check_text(model: PreTrainedModel, dense: PreTrainedModel | None, sequences: Tensor) -> Finding:
    """Return how well ``model`` predicts a text, alone and compared with the dense model.

    A model that is worse than a uniform guess over its vocabulary is broken, unless the dense model is too.

    Args:
        model: The model to examine.
        dense: The model that it was made from, if available.
        sequences: ``[sequences, length]`` token ids.

    Raises:
        ValueError: The model can't be scored on these sequences, or the dense model has another vocabulary.
    """
    try:
        if dense is None:
            return _score_finding(perplexity(model, sequences, progress="score"), _chance(model))
        return _comparison_finding(divergence(model, dense, sequences, progress="score both"), _chance(model))
    except LogitsError as error:
        return Finding("quality", "broken", str(error))


def check_generation(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
) -> tuple[Finding, list[Sample]]:
    """Return whether ``model`` repeats itself or stays silent more often than the dense model, and what both generate.

    Args:
        model: The model to examine.
        dense: The model that it was made from, if available.
        tokenizer: Tokenizer of both; prompts go through its chat template if it has one.
        prompts: Prompts that both models continue.

    Raises:
        ValueError: A prompt has no token.
    """
    chat = bool(tokenizer.chat_template)

    def generate(one: PreTrainedModel, when: str) -> list[Continuation]:
        return continuations(
            one,
            tokenizer,
            prompts.prompts,
            max_new_tokens=prompts.max_new_tokens,
            chat=chat,
            progress=f"generate {when}",
        )

    after, before = generate(model, "after"), None if dense is None else generate(dense, "before")
    old_texts = [None] * len(after) if before is None else [old.text for old in before]
    samples = [Sample(*texts) for texts in zip(prompts.prompts, [new.text for new in after], old_texts, strict=True)]
    return _generation_finding(after, before, chat=chat), samples


def _chance(model: PreTrainedModel) -> float:
    """Return the loss of a uniform guess over the vocabulary, in nats."""
    return math.log(model.get_input_embeddings().num_embeddings)


def _score_finding(score: Score, chance: float) -> Finding:
    message = f"perplexity {rounded_perplexity(score.perplexity)}"
    if score.nats >= chance:
        message += ", worse than a uniform guess over the vocabulary"
        return Finding("quality", "warning", message, score.to_dict(), "compare it with the base: give --base")
    return Finding("quality", "healthy", f"{message}; there is no dense model to compare with", score.to_dict())


def _comparison_finding(found: Divergence, chance: float) -> Finding:
    figures = {
        "perplexity": found.perplexity,
        "dense_perplexity": found.dense_perplexity,
        "excess_nats": found.excess_nats,
        **asdict(found),
    }
    message = (
        f"perplexity {rounded_perplexity(found.perplexity)}, before {rounded_perplexity(found.dense_perplexity)}: "
        f"{found.excess_nats:.3f} nats more; "
        f"KL {found.kl:.3f} nats, the same most likely token in {percent(found.agreement)}"
    )
    if found.nats >= chance > found.dense_nats:
        message += "; this is worse than a uniform guess over the vocabulary"
        return Finding("quality", "broken", message, figures, "the weights are damaged: export it again")
    if max(found.excess_nats, found.kl) > EXCESS_NATS:
        advice = "keep more, learn the ranks, refit, or calibrate on text like that of the application"
        return Finding("quality", "warning", message, figures, advice)
    return Finding("quality", "healthy", message, figures)


def _generation_finding(after: Sequence[Continuation], before: Sequence[Continuation] | None, *, chat: bool) -> Finding:
    rate, silent = repetition_rate([new.tokens for new in after]), _count_silent(after)
    figures: dict[str, Any] = {"repetition": rate, "silent": silent, "prompts": len(after), "chat_template": chat}
    message = f"{percent(rate)} of the 4-grams repeat"
    if before is None:
        return Finding("generation", "healthy", f"{message}; there is no dense model to compare with", figures)
    old_rate, old_silent = repetition_rate([old.tokens for old in before]), _count_silent(before)
    figures |= {"dense_repetition": old_rate, "dense_silent": old_silent}
    message += f", before {percent(old_rate)}"
    if silent > old_silent:
        message = f"{silent} of {len(after)} prompts have no answer, before {old_silent}; {message}"
    if silent > old_silent or rate > old_rate + REPETITION_MARGIN:
        advice = "read the texts above; if they are bad, keep more, refit, or calibrate on chats"
        return Finding("generation", "warning", message, figures, advice)
    return Finding("generation", "healthy", message, figures)


def _count_silent(generated: Sequence[Continuation]) -> int:
    """Return the number of empty continuations: a damaged model may end every chat at once."""
    return sum(not one.text.strip() for one in generated)
