"""Learned masks: one method a file, all with the interface of ``MaskMethod``."""

from __future__ import annotations

from lowrank_pl.masks.ars import ARS, ARSMask
from lowrank_pl.masks.base import Mask, MaskMethod
from lowrank_pl.masks.cutoff import CutoffMask, Fermi, Tanh
from lowrank_pl.masks.lifetimes import Lifetimes
from lowrank_pl.masks.per_value import PerValue, PerValueMask
from lowrank_pl.masks.rescaled import Rescaled, RescaledMask
from lowrank_pl.masks.staircase import Staircase, StaircaseMask
from lowrank_pl.masks.switches import SwitchMask, SwitchMethod

__all__ = [
    "ARS",
    "ARSMask",
    "CutoffMask",
    "Fermi",
    "Lifetimes",
    "Mask",
    "MaskMethod",
    "PerValue",
    "PerValueMask",
    "Rescaled",
    "RescaledMask",
    "Staircase",
    "StaircaseMask",
    "SwitchMask",
    "SwitchMethod",
    "Tanh",
]
