"""A Hugging Face causal language model: opened, probed, run in part, and the format exports are stored in."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["Base", "load_base", "load_tokenizer"],
        "hf_experts": ["fuse_experts", "split_experts"],
        "hf_layers": ["LowRankLinear", "PivotedLinear"],
        "lazy": ["Skeleton"],
        "targets": ["decoder_blocks", "find_targets"],
        "upcycling": ["upcycled"],
    },
)
