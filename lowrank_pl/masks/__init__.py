"""Learned masks: one method a file, all with the interface of ``MaskMethod``."""

from __future__ import annotations

from lowrank_pl.masks.base import Mask, MaskMethod
from lowrank_pl.masks.staircase import Staircase, StaircaseMask

__all__ = ["Mask", "MaskMethod", "Staircase", "StaircaseMask"]
