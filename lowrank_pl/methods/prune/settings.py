"""Settings of pruning, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lowrank_pl.utils.checks import check_choices, check_counts, check_numbers

__all__ = ["STEPS", "Aggregation", "Importance", "LLMPruner", "WidthPruning"]

Importance = Literal["element", "vector"]
"""How LLM-Pruner adds up the importance of a structure: of single weights, or of their sum."""

Aggregation = Literal["sum", "prod", "max", "last"]
"""How LLM-Pruner combines the importances of the layers of a structure."""

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
        check_counts({"multiple_of": self.multiple_of})
        # A smaller ridge would drown in the rounding of the moments, which lack full rank if the text is short.
        check_numbers({"damping": (self.damping, 1e-4)})

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

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return dict(vars(self))


@dataclass(frozen=True)
class LLMPruner:
    """LLM-Pruner (arXiv 2305.11627): whole heads and MLP neurons are removed by first-order Taylor importance.

    Every block between the first and the last ones loses the same fraction of its structures, those with the least
    importance. A structure is a key/value head with its query heads and their columns of the output projection, or a
    hidden neuron of an MLP. Weights that stay are not changed: the paper recovers by fine-tuning, which is left to
    ``lowrank heal``. The defaults are those of the paper's code for blocks (``param_first``, ``sum``, blocks 4 to 29 of
    32).

    Args:
        keep: Fraction of the targeted parameters that pruning leaves, for ranks to be allocated on what is left. By
            default pruning alone brings the model to its final size.
        attention: Prune key/value heads.
        mlp: Prune hidden neurons of MLPs.
        skip_first: Blocks at the beginning that are not pruned.
        skip_last: Blocks at the end that are not pruned.
        importance: ``element`` sums ``|w * dL/dw|`` over the weights of a channel (the paper's Element, first order);
            ``vector`` takes the absolute value of the sum (the paper's Vector).
        aggregation: How the layers of a structure are combined: ``sum``, ``prod``, ``max``, or ``last``, the importance
            in the layer that reads the structure.
        multiple_of: MLP widths of pruned blocks are multiples of this.

    Raises:
        ValueError: Nothing is to be pruned, or a setting is out of range.
    """

    keep: float | None = None
    attention: bool = True
    mlp: bool = True
    skip_first: int = 4
    skip_last: int = 2
    importance: Importance = "element"
    aggregation: Aggregation = "sum"
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if not (self.attention or self.mlp):
            raise ValueError("attention and mlp are both false: expected at least one of them to prune")
        if self.keep is not None and not 0 < self.keep < 1:
            raise ValueError(f"keep of llm_pruner is {self.keep}: expected a fraction above 0 and below 1")
        check_counts({"skip_first": self.skip_first, "skip_last": self.skip_last}, least=0)
        check_counts({"multiple_of": self.multiple_of})
        if not self.mlp and self.multiple_of != LLMPruner.multiple_of:
            raise ValueError(
                f"multiple_of is {self.multiple_of}, which is for the widths of MLPs, and mlp is false: leave one of "
                "them out"
            )
        check_choices({"importance": (self.importance, Importance), "aggregation": (self.aggregation, Aggregation)})

    def describe(self) -> dict[str, Any]:
        """Return the name of the method and its settings as JSON values."""
        return {"method": "llm_pruner", **vars(self)}
