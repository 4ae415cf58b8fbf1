"""Settings of a refit, importable without torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from lowrank_pl.utils.checks import check_choices, check_counts, check_numbers

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Joint", "JointMethod", "Refit"]


JointMethod = Literal["gauss_newton", "adamw"]
"""How the factors of a block are fitted together."""


@dataclass(frozen=True)
class Joint:
    """Settings of a joint refit: all factors of a block are fitted together to the block's output in the dense model.

    It follows the layer-by-layer refit of each block. ``gauss_newton`` solves damped least-squares problems;
    ``adamw`` trains the factors by gradient descent, and the notes of its plans say so.

    Args:
        method: ``gauss_newton`` or ``adamw``. Without any of these settings there is no joint refit.
        sweeps: At most so many Gauss-Newton steps, or passes of AdamW. Those after which the error on held-back text
            would rise are left out. By default 2 steps, or 8 passes.
        iterations: Conjugate-gradient iterations of a Gauss-Newton step.
        curvature: Fraction of the text that the curvature of a Gauss-Newton step is taken from, other text in each
            step; its gradient is that of all text. Every iteration costs a pass forward and back over that fraction.
        damping: Of a Gauss-Newton step, relative to the curvature of each layer alone. More stays closer to the factors
            of the layer-by-layer refit.
        learning_rate: Largest step of AdamW, relative to the root mean square of each factor.

    Raises:
        ValueError: A setting is out of range.
    """

    method: JointMethod = "gauss_newton"
    sweeps: int | None = None
    iterations: int = 8
    curvature: float = 0.1
    damping: float = 1.0
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        check_choices({"method": (self.method, JointMethod)})
        if self.sweeps is None:
            object.__setattr__(self, "sweeps", 2 if self.method == "gauss_newton" else 8)
        check_counts({"sweeps": self.sweeps, "iterations": self.iterations})
        if not 0 < self.curvature <= 1:
            raise ValueError(f"curvature is {self.curvature}: expected a fraction of the text, above 0 and at most 1")
        check_numbers({"damping": (self.damping, 0), "learning_rate": (self.learning_rate, 0)}, above=True)

    @property
    def most_sweeps(self) -> int:
        """``sweeps``, or what it is by default."""
        assert self.sweeps is not None
        return self.sweeps

    @property
    def passes_of_fit(self) -> float:
        """Passes forward and back over the text that one fit takes at most."""
        return self.most_sweeps * (1 + self.iterations * self.curvature if self.method == "gauss_newton" else 1)

    @property
    def passes(self) -> float:
        """Passes forward and back over the text that a joint refit takes at most: a fit to choose by, and another."""
        return 2 * self.passes_of_fit


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
        joint: How all factors of a block are then fitted together to the block's output; None leaves them as fitted
            layer by layer.

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
    joint: Joint | None = None

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

    def identity(self) -> dict[str, Any]:
        """Return the settings as JSON values, without those of later versions if they change nothing."""
        settings: dict[str, Any] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }
        if self.joint is None:
            del settings["joint"]
            return settings
        # Factors of the time when the first fit started from factors that had seen the held-back text are others.
        settings["joint"]["starts"] = "unseen"
        if self.joint.curvature == 1:
            del settings["joint"]["curvature"]
        return settings

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
