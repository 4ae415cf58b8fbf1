"""SVD-LLM V2: within each type of module, those that lose more by truncation are truncated less."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowrank_pl.allocate.base import Allocator, Problem
from lowrank_pl.order import wish_scores

__all__ = ["SvdLlmV2"]


@dataclass(frozen=True)
class SvdLlmV2(Allocator):
    """The plan in which modules of one type share its budget by their truncation loss (SVD-LLM V2, arXiv 2503.12340).

    With ``loss`` the Frobenius norm of the output error over all calibration tokens at the uniform rank, the removed
    share of a module is the type's share times ``1 / log(loss)`` over the type's mean of it. The logarithm is taken of
    ``e + loss``: for the paper's losses, in the thousands, that is the same, and small ones can't turn its sign.
    """

    name: ClassVar[str] = "svdllm_v2"
    kinds: ClassVar[tuple[str, ...]] = ("whitened", "two_sided", "asvd")

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return scores by which every module shrinks in proportion to its wished rank."""
        shapes, keep = problem.budget.shapes, problem.budget.keep
        types: dict[str, list[str]] = defaultdict(list)
        for target in problem.targets.modules:
            if target.name in shapes:
                types[target.kind].append(target.name)
        scores = {}
        for names in types.values():
            weights = {name: 1 / math.log(math.e + _loss(problem, name)) for name in names}
            mean = sum(weights.values()) / len(names)
            for name in names:
                m, n = shapes[name]
                # A share of all or more leaves the rank that the budget grants every module anyway.
                kept = max(0.0, 1 - (1 - keep) * weights[name] / mean)
                scores[name] = wish_scores((m, n), kept * m * n / (m + n))
        return scores


def _loss(problem: Problem, name: str) -> float:
    """Return the output error over all calibration tokens at the uniform rank."""
    m, n = problem.budget.shapes[name]
    tail = problem.factors.sigma(name)[int(problem.budget.keep * m * n / (m + n)) :]
    return math.sqrt(int(problem.factors.notes(name)["tokens"]) * tail.double().square().sum().item())
