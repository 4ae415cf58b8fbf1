"""The mask methods by name, and the paper behind any method that a plan can name."""

from __future__ import annotations

from lowrank_pl.methods.allocate import ALLOCATORS, Allocator
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.ars import ARS
from lowrank_pl.methods.masks.base import MaskMethod
from lowrank_pl.methods.masks.dobi_svd import DobiSVD
from lowrank_pl.methods.masks.fermi import Fermi
from lowrank_pl.methods.masks.llrc import LLRC
from lowrank_pl.methods.masks.rescaled import Rescaled

__all__ = ["MASK_METHODS", "paper_of"]

MASK_METHODS: dict[str, type[MaskMethod]] = {kind.name: kind for kind in (ARA, LLRC, ARS, DobiSVD, Fermi, Rescaled)}
"""The mask methods of this package, by the name that plans and checkpoints give them."""


def paper_of(method: str) -> str | None:
    """Return the arXiv number of the paper behind the mask method or allocator that plans call ``method``.

    It is None for a method of ours, for a paper that is not on arXiv, and for a method of another package. Names from
    earlier versions are known too.

    >>> paper_of("ara"), paper_of("uniform"), paper_of("rescaled"), paper_of("tanh")
    ('2510.19389', '2403.07378', None, '2502.02723')
    """
    kinds: list[type[MaskMethod | Allocator]] = [*MASK_METHODS.values(), *ALLOCATORS.values()]
    for kind in kinds:
        if method in (kind.name, *kind.former_names):
            return kind.paper
    return None
