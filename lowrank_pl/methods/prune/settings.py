"""How the MLPs' width is pruned: what users choose, importable without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["STEPS", "WidthPruning"]

STEPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3)
"""Shares of the hidden features that are tried."""


@dataclass(frozen=True)
class WidthPruning:
    """How hidden features of MLPs are left out before ranks are drawn.

    ``keep`` of a run counts the parameters that the base had before.

    Args:
        by_block: Let each MLP have the width that is best for it. Less is lost so, but no plain checkpoint can say it:
            exports then hold factors, and can't be merged into dense weights.
        share: Fraction of the hidden features that stay; by default the one of twelve, or all, that is predicted to
            lose least once ranks are drawn that leave ``keep``.
        multiple_of: The width is a multiple of this.
        damping: Ridge of the change that makes up for what is left out; more trusts the text less.

    Raises:
        ValueError: A share that is no fraction, or a number out of its range.
    """

    by_block: bool = False
    share: float | None = None
    multiple_of: int = 8
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.by_block and self.share is not None:
            raise ValueError(f"share {self.share} is one width for all MLPs: give it, or by_block")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}: expected a fraction above 0 and below 1")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of is {self.multiple_of}: expected a whole number of at least 1")
        # Less is lost in the rounding of the moments, which have no full rank where text is short.
        if not 1e-6 <= self.damping < math.inf:
            raise ValueError(f"damping is {self.damping}: expected a finite number of at least 0.000001")

    def widths(self, present: int) -> list[int]:
        """Return the widths below ``present`` to choose from, ascending.

        Raises:
            ValueError: There is none.
        """
        shares = STEPS if self.share is None else (self.share,)
        rounded = {max(1, int(share * present / self.multiple_of + 0.5)) * self.multiple_of for share in shares}
        narrower = sorted(width for width in rounded if width < present)
        if not narrower:
            raise ValueError(
                f"of {present} hidden features none would be left out at a share of {', '.join(map(str, shares))}, in "
                f"multiples of {self.multiple_of}: lower one of both"
            )
        return narrower
