"""Numbers in few bits: a plan's matrices rounded by what errors cost, and ranks and bits chosen in one budget."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "byte_budget": ["allocate_bytes"],
        "quantizing": ["quantize"],
        "settings": ["ByteBudget", "Rounding"],
    },
)
