"""Statistics measured on calibration text, and the factors made from them."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "build": ["build_factors"],
        "build_by_block": ["build_factors_by_block"],
        "statistics": ["Statistics"],
        "subject": ["Subject"],
    },
)
