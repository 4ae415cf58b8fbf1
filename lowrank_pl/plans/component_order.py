"""The order in which components are removed as a model shrinks: one score a component, comparable across modules."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_pl.plans.storage import Storage

__all__ = ["ComponentOrder", "requested_keep_scores", "requested_rank_scores"]


@dataclass(frozen=True, eq=False)
class ComponentOrder:
    """Scores of every module's components: components with higher scores are kept longer.

    One order serves every size (the score map of ACIP, arXiv 2502.01717): every budget keeps the components with the
    highest scores, so that the smaller of two models is contained in the larger.

    Args:
        scores: A tensor ``[components]`` by name of the module, stored as float32 on the CPU. Infinity is allowed.

    Raises:
        ValueError: A score is NaN, or a tensor is not one-dimensional.

    Example:
        >>> order = ComponentOrder({"a": torch.tensor([3.0, 1.0])})
        >>> ComponentOrder.from_json(order.to_json()) == order
        True
    """

    scores: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        ready = {}
        for name, score in self.scores.items():
            if score.dim() != 1 or torch.isnan(score).any():
                raise ValueError(
                    f"the scores of {name} have shape {tuple(score.shape)} or hold NaN: expected one number a component"
                )
            ready[name] = score.detach().to("cpu", torch.float32)
        object.__setattr__(self, "scores", ready)

    def __eq__(self, other: object) -> bool:
        """Tell whether ``other`` has the same scores for the same modules."""
        if not isinstance(other, ComponentOrder):
            return NotImplemented
        return self.scores.keys() == other.scores.keys() and all(
            torch.equal(score, other.scores[name]) for name, score in self.scores.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> dict[str, str]:
        """Return the scores by module, as base64 of little-endian float32."""
        return {n: base64.b64encode(s.numpy().astype("<f4").tobytes()).decode() for n, s in self.scores.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> ComponentOrder:
        """Return the order that ``to_json`` wrote.

        Raises:
            ValueError: An entry is not base64 of float32 numbers.
        """
        scores = {}
        for name, text in data.items():
            try:
                numbers = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
            except ValueError as error:
                raise ValueError(f"the component order of {name} is damaged ({error}): allocate again") from None
            scores[name] = torch.from_numpy(numbers.astype(np.float32))
        return cls(scores)


def requested_rank_scores(shape: tuple[int, int], requested: float) -> Tensor:
    """Return scores ``[min(out, in)]`` with which all modules keep their requested ranks times one common factor.

    Component ``j`` (from 1) scores ``requested / j``: it is kept while ``factor * requested >= j`` (ARA, arXiv
    2510.19389).

    Args:
        shape: ``(out, in)`` of the module.
        requested: Its requested rank; infinite for dense.

    Example:
        >>> requested_rank_scores((3, 2), 4.0).tolist()
        [4.0, 2.0]
    """
    return requested / torch.arange(1, min(shape) + 1, dtype=torch.float64)


def requested_keep_scores(storage: Storage, shape: tuple[int, int], requested: float) -> Tensor:
    """Return scores ``[min(out, in)]`` with which all modules keep their requested fractions times one common factor.

    Args:
        storage: The cost of ranks.
        shape: ``(out, in)`` of the module.
        requested: Requested fraction of its parameters; only the relation to the other modules' counts.

    Example:
        >>> requested_keep_scores(Storage("factored"), (3, 6), 0.5).tolist()
        [1.0, 0.5, 0.3333333333333333]
    """
    return requested / storage.ratios(shape)
