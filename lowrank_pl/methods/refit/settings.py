"""How factors are refitted: what users choose, importable without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Refit"]


@dataclass(frozen=True)
class Refit:
    """How factors are refitted.

    Everything that can do harm is chosen module by module on held-back text: a refit on too little text makes a model
    worse.

    Args:
        sequences: How many sequences of text to use, the first ones; more make better factors and take longer.
        hold_back: Fraction of the sequences that choices are made on, the last ones: text next to what was fitted, of the
            same article, would flatter every choice. The factors chosen are then fitted to all sequences.
        margin: By what fraction a refit has to lower a module's error on held-back text to be applied.
        blends: What parts of an error to try to make up for; 1 is all of it. 0 is always tried.
        dampings: Ridges of the regression to try, relative to each input's second moment; more is nearer to the dense
            weight.
        residual: Whether modules whose output is added to a stream, as attention's and the MLP's last ones, also make
            up for the error that the stream has there.
        two_sided: Whether errors are weighted by the outputs' gradients, and by tokens, where the factors were.

    Raises:
        ValueError: A setting out of its range.
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
            raise ValueError(f"windows is {self.sequences}: expected at least 2, of which one is held back")
        if not 0 < self.hold_back < 1:
            raise ValueError(
                f"hold_back is {self.hold_back}: expected a fraction of the sequences, above 0 and below 1"
            )
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin is {self.margin}: expected a fraction of at least 0 and below 1")
        if not self.blends or not all(0 <= blend <= 1 for blend in self.blends):
            raise ValueError(f"blends are {self.blends}: expected one or more fractions in [0, 1]")
        # Less is lost in the rounding of the moments.
        if not self.dampings or not all(1e-4 <= damping < math.inf for damping in self.dampings):
            raise ValueError(f"dampings are {self.dampings}: expected one or more finite numbers of at least 0.0001")

    def split(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Return of the first sequences those to fit and those to hold back, at least one each.

        Raises:
            ValueError: There is only one sequence, or none.

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
