"""SVD-LLM V2: within each type of module, modules that lose more by truncation are truncated less."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowrank_pl.methods.allocate.base import Allocator, Problem
from lowrank_pl.plans.component_order import requested_keep_scores

__all__ = ["SVDLLMv2"]


@dataclass(frozen=True)
class SVDLLMv2(Allocator):
    """Modules of one type share its budget by their truncation loss (SVD-LLM V2, arXiv 2503.12340).

    With ``loss`` the truncation loss at the uniform rank, the removed fraction of a module is the type's fraction times
    ``1 / log(loss)`` over the type's mean of ``1 / log(loss)``. On whitened factors, as in the paper, the loss is the
    Frobenius norm of the output error over all calibration tokens; ``asvd`` and ``two_sided`` factors weigh this error
    in their own way.

    The plan depends on how many tokens are calibrated on. On ``t`` times the tokens every loss is larger by the root of
    ``t``. That adds the same ``log(t) / 2`` to the logarithm of every large loss, and so draws the modules of a type
    nearer to the uniform ratio. The paper calibrates on 256 sequences of 2,048 tokens. A note says how many tokens the
    losses of a plan count.

    The logarithm is taken of ``e + loss``. The paper takes it of the loss, which has no meaning where the loss is 1 or
    less: ``1 / log(loss)`` is infinite at 1, and below 1 it would remove parameters where a module loses most. With
    ``e``, a module that loses nothing has the weight 1, the most there is. The paper's losses are in the thousands,
    where this makes no difference. A module that would lose everything keeps the least rank, and a note counts such
    modules.
    """

    name: ClassVar[str] = "svdllm_v2"
    paper: ClassVar[str | None] = "2503.12340"
    kinds: ClassVar[tuple[str, ...]] = ("whitened", "two_sided", "asvd")

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return scores by which every module shrinks in proportion to its requested rank."""
        budget = problem.budget
        # A negative share leaves the least rank, which the budget grants every module anyway.
        return {
            name: requested_keep_scores(budget.rank_costs, budget.shapes[name], max(0.0, share))
            for name, share in _kept_shares(problem).items()
        }

    def notes(self, problem: Problem) -> Sequence[str]:
        """Return how many tokens the losses count, and how many modules would lose everything.

        The paper's rule does not exclude that.
        """
        notes = [f"truncation losses over {max(_tokens(problem, name) for name in problem.budget.shapes):,} tokens"]
        emptied = [name for name, share in _kept_shares(problem).items() if share <= 0]
        if emptied:
            notes.append(
                f"the rule removes all of {len(emptied)} modules, which keep the least rank, e.g. {emptied[0]}"
            )
        return notes


def _kept_shares(problem: Problem) -> dict[str, float]:
    """Return the fraction of each module that the rule keeps; it is negative where the rule removes more than all."""
    shapes, keep = problem.budget.shapes, problem.budget.share
    types: dict[str, list[str]] = defaultdict(list)
    for target in problem.targets.modules:
        if target.name in shapes:
            types[target.kind].append(target.name)
    shares: dict[str, float] = {}
    for names in types.values():
        weights = {name: 1 / math.log(math.e + _loss(problem, name)) for name in names}
        mean = sum(weights.values()) / len(names)
        shares |= {name: 1 - (1 - keep) * weight / mean for name, weight in weights.items()}
    return shares


def _loss(problem: Problem, name: str) -> float:
    """Return the root of the weighted squared error over all calibration tokens at the uniform rank."""
    rank = int(problem.budget.rank_costs.rank_at(problem.budget.shapes[name], problem.budget.share))
    tail = problem.sigma(name)[rank:]
    return math.sqrt(_tokens(problem, name) * tail.double().square().sum().item())


def _tokens(problem: Problem, name: str) -> int:
    """Return how many calibration tokens a module's errors are means over; of experts too, these are all tokens."""
    return int(problem.notes(name)["tokens"])
