"""Refit: a closed-form update of factors on the compressed model's own inputs."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "refitting": ["Refit", "refit"],
    },
)
