"""Which model is compressed, and how it is loaded: what users choose, importable without torch."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EMBEDDINGS", "NOT_FINITE", "Base", "DType"]

DType = Literal["float32", "bfloat16", "float16"]
"""Types that weights are loaded in."""

EMBEDDINGS = "embeddings"
"""The pattern that stands for the token embeddings and the head, which no glob matches. Also the kind of the former."""

NOT_FINITE = "check the checkpoint, and if it was loaded in half precision, load it in float32"
"""What to do about NaN or infinity where the numbers of a model are summed."""


@dataclass(frozen=True)
class Base:
    """A model to compress, and how it is loaded.

    ``lowrank_pl.models.base.resolve_base`` says what each kind of name stands for.

    Args:
        name: Hub id, local folder, ``.gguf`` file, ``package:NAME``, ``random:FAMILY`` or ``layers:NAME``.
        dtype: Type that the weights are loaded in.
        trust_remote_code: Run Python code that comes with the model.

    Example:
        >>> Base("random:llama", dtype="bfloat16").load().dtype
        torch.bfloat16
    """

    name: str
    _: KW_ONLY
    dtype: DType = "float32"
    trust_remote_code: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch has it."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def load(self) -> PreTrainedModel:
        """Return the model on the CPU, as ``load_base`` does."""
        from lowrank_pl.models.base import load_base

        return load_base(self.name, dtype=self.torch_dtype, trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, as ``load_tokenizer`` does."""
        from lowrank_pl.models.base import load_tokenizer

        return load_tokenizer(self.name, trust_remote_code=self.trust_remote_code)
