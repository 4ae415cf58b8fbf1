"""Settings of width pruning, importable without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["STEPS", "WidthPruning"]

STEPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3)
"""Fractions of the hidden neurons that are tried."""


@dataclass(frozen=True)
class WidthPruning:
    """How MLPs are pruned in width before ranks are allocated.

    ``keep`` of a run counts the parameters that the base had before pruning.

    Args:
        by_block: Choose the best width for each MLP. This loses less, but no plain config describes several widths:
            exports then hold factors and can't be merged into dense weights.
        share: Fraction of the hidden neurons to keep. By default twelve fractions and the full width are compared,
            and the one with the lowest predicted loss after rank allocation at ``keep`` is taken.
        multiple_of: The width is a multiple of this.
        damping: Ridge of the compensating update of the down-projection; a larger ridge trusts the text less.

    Raises:
        ValueError: ``share`` is not a fraction, or another setting is out of range.
    """

    by_block: bool = False
    share: float | None = None
    multiple_of: int = 8
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.by_block and self.share is not None:
            raise ValueError(
                f"share {self.share} sets one width for all MLPs, and by_block one for each: give only one of them"
            )
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}: expected a fraction above 0 and below 1")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of is {self.multiple_of}: expected a whole number of at least 1")
        # A smaller ridge would drown in the rounding of the moments, which lack full rank if the text is short.
        if not 1e-6 <= self.damping < math.inf:
            raise ValueError(f"damping is {self.damping}: expected a finite number of at least 0.000001")

    def widths(self, present: int) -> list[int]:
        """Return the candidate widths below ``present``, ascending.

        Raises:
            ValueError: Every fraction rounds to all ``present`` neurons.
        """
        shares = STEPS if self.share is None else (self.share,)
        rounded = {max(1, int(share * present / self.multiple_of + 0.5)) * self.multiple_of for share in shares}
        smaller = sorted(width for width in rounded if width < present)
        if not smaller:
            raise ValueError(
                f"share={', '.join(map(str, shares))} rounds to all {present} hidden neurons (multiple_of="
                f"{self.multiple_of}): lower share or multiple_of"
            )
        return smaller
