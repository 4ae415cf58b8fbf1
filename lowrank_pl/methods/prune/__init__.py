"""MLPs pruned in width: redundant hidden neurons are removed, and the down-projection compensates."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["WidthPruning", "pruned_base"],
    },
)
