"""Which features of a map's input others can stand for, and the map that makes up for leaving them out. Pure functions.

What is special: features go in groups, so that most of the work is products of matrices; within a group they still go
one by one, each with the error that those before it have left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.factors.decomposition import SquareRoot, damped_root

__all__ = ["Narrowed", "leave_out", "prunings"]

_GROUP = 32
"""Features that go at a time, out of twice as many; of few features fewer."""


@dataclass(frozen=True)
class Narrowed:
    """A map that is fed fewer features.

    Args:
        features: ``[kept]`` indices of the features that stay, ascending.
        weight: ``[out, kept]``, float64.
        loss: ``E|R' (W z - W' z[features])|^2``, with what damping adds.
    """

    features: Tensor
    weight: Tensor
    loss: float


def leave_out(
    weight: Tensor, second_moment: Tensor, keep: int, *, outputs: SquareRoot | None = None, damping: float = 0.1
) -> Narrowed:
    """Return ``weight`` for ``keep`` of its input features, changed so that they stand for the others.

    Backward elimination: of all features the one goes whose loss raises ``E|R' (W z - W' z')|^2`` least when the
    weights of those that stay make up for it in closed form (Optimal Brain Surgeon, Hassibi and Stork 1993; of whole
    columns, as in ZipLM, arXiv 2302.04089). The change that makes up for it does not depend on ``R``, the choice does.

    Args:
        weight: ``[out, in]``.
        second_moment: ``[in, in]`` of the features ``z``.
        keep: How many of them stay.
        outputs: ``R``, the root of what the outputs' errors count; None for the identity.
        damping: Ridge of the change, relative to each feature's own second moment; more trusts the text less.

    Raises:
        ValueError: ``keep`` is none of ``1 ... in``, or what was given holds NaN or infinity.

    Example:
        >>> copies = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
        >>> found = leave_out(torch.tensor([[1.0, 5.0, 2.0]]), copies, 2, damping=1e-6)
        >>> found.features.tolist(), found.weight.round(decimals=3).tolist()
        ([1, 2], [[5.0, 3.0]])
    """
    (found,) = prunings(weight, second_moment, [keep], outputs=outputs, damping=damping)
    return found


def prunings(
    weight: Tensor,
    second_moment: Tensor,
    keeps: Sequence[int],
    *,
    outputs: SquareRoot | None = None,
    damping: float = 0.1,
) -> Iterator[Narrowed]:
    """Yield what ``leave_out`` returns for each of ``keeps``, from the largest on, each contained in those before.

    Arguments and errors are those of ``leave_out``.
    """
    features = weight.shape[1]
    for keep in keeps:
        if not 1 <= keep <= features:
            raise ValueError(f"{keep} features are to stay: expected a number from 1 to the {features} that there are")
    if not (torch.isfinite(weight).all() and torch.isfinite(second_moment).all()):
        raise ValueError("the weight or the second moment holds NaN or infinity: the checkpoint is damaged")
    rest = weight.double() if outputs is None else outputs.multiply_right(weight.double().mT).mT
    inverse = torch.cholesky_inverse(damped_root(second_moment.double(), damping))
    left, loss = torch.arange(features, device=weight.device), 0.0
    for keep in sorted(keeps, reverse=True):
        while (surplus := len(left) - keep) > 0:
            gone, added = _next(rest, inverse, min(_GROUP, surplus, max(1, len(left) // 32)))
            loss += added
            # All at once what one after the other would come to.
            columns = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
            stay = torch.ones(len(left), dtype=torch.bool, device=left.device).index_fill(0, gone, False)
            rest = (rest - rest[:, gone] @ columns)[:, stay]
            inverse = (inverse - inverse[:, gone] @ columns)[stay][:, stay]
            left = left[stay]
        yield Narrowed(left, rest if outputs is None else outputs.solve_right(rest.mT).mT, loss)


def _next(rest: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, float]:
    """Return the next ``count`` features to go and by how much the loss rises.

    Those that cost least by now are tried; what leaving out some of them does to the others is exact.

    Args:
        rest: ``[out, in]`` the weight of those that are left.
        inverse: ``[in, in]`` inverse of their second moment.
        count: How many.
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
        # It is out: its row and column are 0 but for rounding, and nothing is divided by them.
        inverse[one, one] = 1.0
    return tried[gone], loss
