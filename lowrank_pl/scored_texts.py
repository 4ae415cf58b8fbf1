"""The texts that a comparison scores: their names, and whether methods have seen them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank_pl.recipes import Recipe
from lowrank_pl.windows import known_windows, token_windows

__all__ = ["named_texts", "warn_of_known_text"]

_log = logging.getLogger(__name__)


def warn_of_known_text(
    scored: Mapping[str, Tensor],
    statistics: Tensor,
    calibration: str,
    tokenizer: PreTrainedTokenizerBase,
    recipes: Mapping[str, Recipe],
) -> None:
    """Warn of windows to score whose text statistics or learning see, for their perplexity flatters.

    Args:
        scored: ``[windows, length]`` token ids of every text to score, by its name.
        statistics: ``[windows, length]`` token ids for statistics.
        calibration: The text that those are from, and that masks learn from.
        tokenizer: The one that made them.
        recipes: The methods, which say how much of the text masks learn from.
    """
    counts = [method.learning.windows for method in recipes.values() if method.learning is not None]
    learnt = token_windows(calibration, tokenizer, length=statistics.shape[1], windows=max([len(statistics), *counts]))
    for corpus, windows in scored.items():
        known = known_windows(windows, [learnt], tokenizer)
        if known:
            _log.warning(
                "%d of %d windows of %s hold text that methods are calibrated on: their perplexity flatters",
                known,
                len(windows),
                corpus,
            )


def named_texts(entries: Sequence[str]) -> dict[str, str]:
    """Return the texts to score by name, each given as ``NAME=TEXT``, or as ``TEXT``, which its file names.

    Raises:
        ValueError: Two have the same name.

    >>> named_texts(["wiki=a/test.txt", "b/c4.jsonl::part=50%-100%"])
    {'wiki': 'a/test.txt', 'c4': 'b/c4.jsonl::part=50%-100%'}
    """
    texts: dict[str, str] = {}
    for name, text in map(_named_text, entries):
        if name in texts:
            raise ValueError(f"two texts to score are called {name!r}: name them, as NAME=TEXT")
        texts[name] = text
    return texts


def _named_text(entry: str) -> tuple[str, str]:
    """Return name and text of ``NAME=TEXT``, or of ``TEXT``, which then names itself by its file."""
    named = re.fullmatch(r"([\w.-]+)=(.+)", entry, flags=re.DOTALL)
    if named:
        return named[1], named[2]
    return Path(entry.partition("::")[0]).stem, entry
