"""Backward elimination of a linear layer's input features, with a closed-form update of the layer. Pure functions.

Features are removed in groups, so that most of the work is matrix products. Within a group they are still removed one
by one, and each removal accounts for the error of the ones before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.factors.decomposition import SquareRoot, damped_root

__all__ = ["PrunedLayer", "nested_prunings", "prune_inputs"]

_GROUP = 32
"""Features removed at a time, chosen among twice as many; fewer if the layer has few features."""


@dataclass(frozen=True)
class PrunedLayer:
    """A linear layer with fewer input features.

    Args:
        features: ``[kept]`` indices of the kept features, ascending.
        weight: ``[out, kept]``, float64.
        loss: ``E|R' (W z - W' z[features])|^2``, including the damping term.
    """

    features: Tensor
    weight: Tensor
    loss: float


def prune_inputs(
    weight: Tensor, second_moment: Tensor, keep: int, *, outputs: SquareRoot | None = None, damping: float = 0.1
) -> PrunedLayer:
    """Return the layer with ``keep`` of its input features, and with weights updated to replace the removed ones.

    Backward elimination: each step removes the feature that raises ``E|R' (W z - W' z')|^2`` least after a closed-form
    update of the remaining weights (Optimal Brain Surgeon, Hassibi and Stork 1993; for whole columns as in ZipLM, arXiv
    2302.04089). The update does not depend on ``R``, the choice of the feature does.

    Args:
        weight: ``[out, in]``.
        second_moment: ``[in, in]`` of the features ``z``.
        keep: Number of features to keep.
        outputs: ``R``, the square root of the weighting of output errors; None for the identity.
        damping: Ridge of the update, relative to each feature's own second moment; a larger ridge trusts the text less.

    Raises:
        ValueError: ``keep`` is not in ``1 ... in``, or ``weight`` or ``second_moment`` holds NaN or infinity.

    Example:
        >>> copies = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
        >>> found = prune_inputs(torch.tensor([[1.0, 5.0, 2.0]]), copies, 2, damping=1e-6)
        >>> found.features.tolist(), found.weight.round(decimals=3).tolist()
        ([1, 2], [[5.0, 3.0]])
    """
    (found,) = nested_prunings(weight, second_moment, [keep], outputs=outputs, damping=damping)
    return found


def nested_prunings(
    weight: Tensor,
    second_moment: Tensor,
    keeps: Sequence[int],
    *,
    outputs: SquareRoot | None = None,
    damping: float = 0.1,
) -> Iterator[PrunedLayer]:
    """Yield the result of ``prune_inputs`` for each of ``keeps``, largest first; kept features are nested.

    Arguments and errors are those of ``prune_inputs``.
    """
    features = weight.shape[1]
    for keep in keeps:
        if not 1 <= keep <= features:
            raise ValueError(f"keep is {keep} features: expected a whole number from 1 to {features}")
    if not (torch.isfinite(weight).all() and torch.isfinite(second_moment).all()):
        raise ValueError("the weight or the second moment holds NaN or infinity: the checkpoint is damaged")
    rest = weight.double() if outputs is None else outputs.multiply_right(weight.double().mT).mT
    inverse = torch.cholesky_inverse(damped_root(second_moment.double(), damping))
    left, loss = torch.arange(features, device=weight.device), 0.0
    for keep in sorted(keeps, reverse=True):
        while (surplus := len(left) - keep) > 0:
            gone, added = _next(rest, inverse, min(_GROUP, surplus, max(1, len(left) // 32)))
            loss += added
            # One block elimination gives the same result as removing the features one after the other.
            columns = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
            stay = torch.ones(len(left), dtype=torch.bool, device=left.device).index_fill(0, gone, False)
            rest = (rest - rest[:, gone] @ columns)[:, stay]
            inverse = (inverse - inverse[:, gone] @ columns)[stay][:, stay]
            left = left[stay]
        found = rest if outputs is None else outputs.solve_right(rest.mT).mT
        yield PrunedLayer(left, found, 0.0 if outputs is not None and outputs.zero else loss)


def _next(rest: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, float]:
    """Return the next ``count`` features to remove, and the increase of the loss.

    Only the currently cheapest features are candidates. The effect of a removal on the other candidates is exact.

    Args:
        rest: ``[out, in]`` weight of the remaining features.
        inverse: ``[in, in]`` inverse of their second moment.
        count: Number of features to remove.
    """
    costs = rest.square().sum(0) / inverse.diagonal()
    tried = costs.topk(min(2 * count, len(costs)), largest=False).indices
    rest, inverse = rest[:, tried], inverse[tried][:, tried]
    gone: list[int] = []
    loss = 0.0
    for _ in range(count):
        costs = rest.square().sum(0) / inverse.diagonal()
        costs[gone] = torch.inf
        one = int(costs.argmin())
        loss += costs[one].item()
        gone.append(one)
        column = inverse[one] / inverse[one, one]
        rest = rest - rest[:, one, None] * column
        inverse = inverse - inverse[:, one, None] * column
        # Row and column of a removed feature are 0 up to rounding; a diagonal of 1 avoids a division by 0.
        inverse[one, one] = 1.0
    return tried[gone], loss
