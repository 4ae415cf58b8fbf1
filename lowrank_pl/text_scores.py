"""Scores of a model on several texts: perplexity alone, or beside the dense model with what differs and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.evaluate import perplexity
from lowrank_pl.plan_report import percent, table
from lowrank_pl.where_diverged import WhereDiverged, profile_table, where_diverged

__all__ = ["score_texts", "show_texts"]


def score_texts(
    model: PreTrainedModel,
    texts: Mapping[str, Tensor],
    *,
    reference: PreTrainedModel | None = None,
    batch_size: int = 1,
    bins: int = 8,
) -> tuple[dict[str, dict[str, Any]], dict[str, WhereDiverged]]:
    """Return the figures of each text as they go into JSON, and where the model departs from the reference on it.

    Args:
        model: A causal language model.
        texts: Token ids ``[windows, length]`` by the text's name.
        reference: The dense model; windows are then read one by one, and nothing is timed.
        batch_size: Windows per forward without a reference.
        bins: As in ``where_diverged``.
    """
    figures: dict[str, dict[str, Any]] = {}
    found: dict[str, WhereDiverged] = {}
    for name, windows in texts.items():
        label = "score" if len(texts) == 1 else f"score {name}"
        if reference is None:
            scores: dict[str, Any] = perplexity(model, windows, batch_size=batch_size, progress=label).to_dict()
        else:
            found[name] = where_diverged(model, reference, windows, bins=bins, progress=f"{label}, both models")
            whole = found[name].whole
            scores = {"perplexity": whole.perplexity, "nats": whole.nats, "tokens": whole.tokens}
            scores["divergence"] = found[name].to_dict()
        figures[name] = {"windows": len(windows), "length": windows.shape[1], **scores}
    return figures, found


def show_texts(figures: Mapping[str, Mapping[str, Any]], found: Mapping[str, WhereDiverged]) -> str:
    """Return what people read of the scores: a line a text, and below where each diverged.

    Args:
        figures: From ``score_texts``.
        found: Likewise.
    """
    if not found:
        return table(("text", "perplexity", "nats/token", "tokens", "tokens/s"), [
            (name, f"{one['perplexity']:.4f}", f"{one['nats']:.5f}", f"{one['tokens']:,}",
             f"{one['tokens_per_second']:,.0f}")
            for name, one in figures.items()
        ], "simple")  # fmt: skip
    head = ("text", "perplexity", "dense", "excess nats", "KL", "same top-1", "tokens")
    body = [
        (name, f"{one.whole.perplexity:.4f}", f"{one.whole.dense_perplexity:.4f}", f"{one.whole.excess_nats:.4f}",
         f"{one.whole.kl:.4f}", percent(one.whole.agreement), f"{one.whole.tokens:,}")
        for name, one in found.items()
    ]  # fmt: skip
    parts = [table(head, body, "simple"), *(f"{name}\n\n{profile_table(one)}" for name, one in found.items())]
    return "\n\n".join(parts)
