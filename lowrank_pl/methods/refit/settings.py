"""Settings of a refit, importable without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Refit"]


@dataclass(frozen=True)
class Refit:
    """Settings of a refit.

    A refit on too little text makes a model worse. Its strength is therefore chosen for each module on held-back text.

    Args:
        sequences: Number of sequences to use, from the first on; more give better factors and take longer.
        hold_back: Fraction of the sequences that choices are made on. The last ones are taken: sequences between the
            fitted ones come from the same articles and would favour every refit. The chosen refit then uses all
            sequences.
        margin: A refit is applied if it lowers a module's error on held-back text by at least this fraction.
        blends: Fractions of an error to compensate that are tried; 1 is all of it. 0 is always tried.
        dampings: Ridges of the regression that are tried, relative to each input's second moment. A larger ridge stays
            closer to the dense weight.
        residual: Whether layers whose output is added to a residual stream also compensate the error of that stream.
        two_sided: Whether to weight errors by the outputs' gradients, and tokens, if the factors were made so.

    Raises:
        ValueError: A setting is out of range.
    """

    sequences: int = 128
    hold_back: float = 0.2
    margin: float = 0.01
    blends: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    dampings: tuple[float, ...] = (0.03, 0.3, 3.0)
    residual: bool = True
    two_sided: bool = True

    def __post_init__(self) -> None:
        if self.sequences < 2:
            raise ValueError(f"sequences is {self.sequences}: expected at least 2, of which one is held back")
        if not 0 < self.hold_back < 1:
            raise ValueError(
                f"hold_back is {self.hold_back}: expected a fraction of the sequences, above 0 and below 1"
            )
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin is {self.margin}: expected a fraction of at least 0 and below 1")
        if not self.blends or not all(0 <= blend <= 1 for blend in self.blends):
            raise ValueError(f"blends are {self.blends}: expected one or more fractions in [0, 1]")
        # A smaller ridge would drown in the rounding of the moments.
        if not self.dampings or not all(1e-4 <= damping < math.inf for damping in self.dampings):
            raise ValueError(f"dampings are {self.dampings}: expected one or more finite numbers of at least 0.0001")

    def split(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sequences to fit to and the held-back sequences, at least one of each.

        Raises:
            ValueError: Fewer than two sequences were given.

        >>> import torch
        >>> [len(part) for part in Refit(sequences=64).split(torch.zeros(100, 512))]
        [51, 13]
        """
        sequences = sequences[: self.sequences]
        if len(sequences) < 2:
            raise ValueError(
                f"{len(sequences)} sequences of text were given: a refit needs two or more, one is held back"
            )
        held = min(max(1, round(self.hold_back * len(sequences))), len(sequences) - 1)
        return sequences[:-held], sequences[-held:]
