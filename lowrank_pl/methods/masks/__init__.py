"""Learned masks: one method a file, all with the interface of ``MaskMethod``; ``MASK_METHODS`` names them."""

from __future__ import annotations

from lowrank_pl.methods.masks.acip import ACIP
from lowrank_pl.methods.masks.ara import ARA, ARAMask
from lowrank_pl.methods.masks.ars import ARS, ARSMask
from lowrank_pl.methods.masks.base import Mask, MaskMethod, ModelMasks
from lowrank_pl.methods.masks.cutoff import CutoffMask, CutoffMethod
from lowrank_pl.methods.masks.dobi_svd import DobiSVD
from lowrank_pl.methods.masks.fermi import Fermi
from lowrank_pl.methods.masks.gumbel import GumbelMask, GumbelMethod
from lowrank_pl.methods.masks.llrc import LLRC, LLRCMask
from lowrank_pl.methods.masks.registry import MASK_METHODS, paper_of
from lowrank_pl.methods.masks.rescaled import Rescaled, RescaledMask

__all__ = [
    "ACIP",
    "ARA",
    "ARS",
    "LLRC",
    "MASK_METHODS",
    "ARAMask",
    "ARSMask",
    "CutoffMask",
    "CutoffMethod",
    "DobiSVD",
    "Fermi",
    "GumbelMask",
    "GumbelMethod",
    "LLRCMask",
    "Mask",
    "MaskMethod",
    "ModelMasks",
    "Rescaled",
    "RescaledMask",
    "paper_of",
]
