"""Allocation by energy: the plainest global rule, and the baseline of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowrank_pl.methods.allocate.base import Allocator, Problem

__all__ = ["Energy"]


@dataclass(frozen=True)
class Energy(Allocator):
    """The plan that keeps the components with the largest share of their module's energy.

    Each squared singular value is divided by their sum in its module, and all are sorted together. Shares say nothing
    of what a module matters to the loss: a baseline.
    """

    name: ClassVar[str] = "energy"

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return every component's share of its module's energy."""
        return {name: energy_shares(problem.factors.sigma(name)) for name in problem.budget.shapes}


def energy_shares(sigma: Tensor) -> Tensor:
    """Return the squares of ``sigma`` ``[components]`` as fractions of their sum; of a zero weight all are 0.

    >>> import torch
    >>> energy_shares(torch.tensor([3.0, 1.0])).tolist()
    [0.9, 0.1]
    """
    energy = sigma.double().square()
    total = energy.sum()
    return energy / total if total > 0 else energy
