"""Which text is used for calibration, and how it is cut: what users choose, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """Text to calibrate on, and how it is cut into sequences.

    ``lowrank_pl.text.sources`` says how texts are named.

    Args:
        text: A file, folder, glob, hub dataset or ``python-docs``, or several of them joined by a plus sign between
            spaces.
        length: Tokens of a sequence.
        sequences: How many sequences are taken.
    """

    text: str = "python-docs"
    length: int = 512
    sequences: int = 256

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Return int64 ``[sequences, length]`` token ids, as ``token_windows`` does."""
        from lowrank_pl.text.sequences import token_windows

        return token_windows(self.text, tokenizer, length=self.length, sequences=self.sequences)
