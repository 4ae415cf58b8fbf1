"""Learned masks: one method a file, all with the interface of ``MaskMethod``."""

from __future__ import annotations

from lowrank_pl.methods.masks.acip import Lifetimes
from lowrank_pl.methods.masks.ara import Staircase, StaircaseMask
from lowrank_pl.methods.masks.ars import ARS, ARSMask
from lowrank_pl.methods.masks.base import Mask, MaskMethod
from lowrank_pl.methods.masks.cutoff import CutoffMask, Fermi, Tanh
from lowrank_pl.methods.masks.llrc import PerValue, PerValueMask
from lowrank_pl.methods.masks.rescaled import Rescaled, RescaledMask
from lowrank_pl.methods.masks.switches import SwitchMask, SwitchMethod

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
