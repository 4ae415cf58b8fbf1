"""A folder that reloads as exactly this model."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "export": ["load_compressed", "save_compressed"],
        "hub": ["HubRepo"],
    },
)
