"""Allocation by energy: the simplest global rule, a baseline for all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowrank_pl.methods.allocate.base import Allocator, Problem

__all__ = ["Energy", "energy_shares"]


@dataclass(frozen=True)
class Energy(Allocator):
    """The components with the largest share of their module's energy stay.

    Each squared singular value is divided by the sum over its module, and the components of all modules are sorted
    together. Shares do not show how much a module matters to the loss, so this is a baseline.
    """

    name: ClassVar[str] = "energy"
    paper: ClassVar[str | None] = None
    takes_embeddings: ClassVar[bool] = True
    takes_shared: ClassVar[bool] = True

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return every component's share of its module's energy."""
        return {name: energy_shares(problem.sigma(name)) for name in problem.budget.shapes}


def energy_shares(sigma: Tensor) -> Tensor:
    """Return the squares of ``sigma`` ``[components]`` as fractions of their sum; all are 0 for a zero weight.

    >>> import torch
    >>> energy_shares(torch.tensor([3.0, 1.0])).tolist()
    [0.9, 0.1]
    """
    energy = sigma.double().square()
    total = energy.sum()
    return energy / total if total > 0 else energy
