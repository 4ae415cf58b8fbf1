"""Bases that are pruned: hidden neurons of MLPs in width, or heads and neurons as in LLM-Pruner."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["WidthPruning", "pruned_base"],
        "llm_pruner": ["apply_llm_pruner"],
        "settings": ["LLMPruner"],
    },
)
