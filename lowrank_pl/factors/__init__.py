"""Weights as low-rank factors: decomposed, stored, and put into a model."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "components": ["AnySize"],
        "compression": ["compress", "compressed", "restore_dense"],
        "decomposition": ["Factors", "decompose"],
        "pivoting": ["pivot"],
        "settings": ["Decomposition"],
        "store": ["FactorStore"],
    },
)
