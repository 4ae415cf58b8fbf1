"""Dobi-SVD: one learned cutoff a module, with a gate of constant steepness."""

from __future__ import annotations

from typing import ClassVar

from lowrank_pl.methods.masks.cutoff import CutoffMask, CutoffMethod
from lowrank_pl.utils.checks import check_numbers

__all__ = ["DobiSVD"]


class DobiSVD(CutoffMethod):
    """Dobi-SVD's gate (arXiv 2502.02723), on weights: ``tanh(steepness * (cutoff - j)) / 2 + 1/2``.

    Args:
        steepness: Called beta in the paper, per component whatever the rank. At the paper's 10, about one component on
            each side of the cutoff gets a gradient.
        top: As in ``CutoffMethod``.
        budget_weight: As in ``CutoffMethod``.

    Raises:
        ValueError: A setting outside its range.
    """

    name: ClassVar[str] = "dobi_svd"
    paper: ClassVar[str | None] = "2502.02723"
    former_names: ClassVar[tuple[str, ...]] = ("tanh",)

    def __init__(self, *, steepness: float = 10.0, top: float = 1.2, budget_weight: float = 100.0) -> None:
        super().__init__(top=top, budget_weight=budget_weight)
        check_numbers({"steepness": (steepness, 0)}, above=True)
        self.steepness = steepness

    def slope_at(self, mask: CutoffMask, step: int) -> float:
        """Return twice the steepness: ``tanh(x) / 2 + 1/2`` is ``sigmoid(2 x)``."""
        return 2 * self.steepness
