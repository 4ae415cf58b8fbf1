"""Ranks as numbers: what they cost, which of them fit a budget, and any size from one plan."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "budget": ["Budget"],
        "constraints": ["Constraints"],
        "component_order": ["ComponentOrder"],
        "plan": ["ModulePlan", "RankPlan"],
        "resize": ["nested"],
        "storage": ["Storage"],
    },
)
