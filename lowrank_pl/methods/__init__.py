"""The published methods, one paper a file, and the recipes that name them."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "recipes": ["RECIPES", "recipe"],
    },
)
