"""Learned masks: one method a file, all with the interface of ``MaskMethod``."""

from __future__ import annotations

from lowrank_pl.methods.masks.acip import Lifetimes
from lowrank_pl.methods.masks.ara import ARA, ARAMask
from lowrank_pl.methods.masks.ars import ARS, ARSMask
from lowrank_pl.methods.masks.base import Mask, MaskMethod
from lowrank_pl.methods.masks.cutoff import CutoffMask, DobiSVD, Fermi
from lowrank_pl.methods.masks.gumbel import GumbelMask, GumbelMethod
from lowrank_pl.methods.masks.llrc import LLRC, LLRCMask
from lowrank_pl.methods.masks.rescaled import Rescaled, RescaledMask

__all__ = [
    "ARA",
    "ARS",
    "LLRC",
    "ARAMask",
    "ARSMask",
    "CutoffMask",
    "DobiSVD",
    "Fermi",
    "GumbelMask",
    "GumbelMethod",
    "LLRCMask",
    "Lifetimes",
    "Mask",
    "MaskMethod",
    "Rescaled",
    "RescaledMask",
]
