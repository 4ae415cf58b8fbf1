"""What ``lowrank doctor`` finds in a folder: damaged weights, a broken tokenizer, scores that do not fit."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "examine": ["diagnose"],
    },
)
