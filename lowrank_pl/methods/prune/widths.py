"""How wide a model's MLPs should be at a size: what ranks lose that are left to draw, and what the narrowing loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.calibration.roots import Roots
from lowrank_pl.factors.decomposition import SquareRoot
from lowrank_pl.methods.prune.eliminate import prunings
from lowrank_pl.methods.prune.mlp import Hidden, rows_of
from lowrank_pl.models.targets import Target, Targets, dense_weight
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.convex_hull import hull_slopes, losses_by_rank
from lowrank_pl.plans.storage import Storage

__all__ = ["Map", "Option", "Widths", "measured_widths"]


class Map(NamedTuple):
    """Shape of a map and its singular values, weighted so that half their squares are nats."""

    shape: tuple[int, int]
    sigma: Tensor


class Option(NamedTuple):
    """An MLP at one of its widths: the nats that leaving features out loses, and its maps by name."""

    lost: float
    maps: dict[str, Map]


@dataclass(frozen=True)
class Widths:
    """What MLPs lose at every width that is tried, and what their maps lose at every rank then.

    To what leaving out features loses comes what the exact allocation of ranks (``fisher``, pivoted storage) loses at
    the parameters that are allowed. Moments of the features that stay are those that they had among all.

    Args:
        others: The maps that are of no MLP, by name.
        options: For each MLP what it is at each width, the same widths for all.
    """

    others: dict[str, Map]
    options: Sequence[dict[int, Option]]

    def losses(self, limit: int) -> dict[int, float]:
        """Return the nats lost where all MLPs have one width, by width; those that leave fewer parameters are out.

        Args:
            limit: How many parameters the maps may keep together.
        """
        alike = {width: [width] * len(self.options) for width in self.options[0]}
        return {
            width: self.loss(all_, limit) for width, all_ in alike.items() if _parameters(self._maps(all_)) >= limit
        }

    def loss(self, widths: Sequence[int], limit: int) -> float:
        """Return the nats lost where the MLPs have ``widths``, and ranks that leave ``limit`` parameters or all."""
        lost = sum(option[width].lost for option, width in zip(self.options, widths, strict=True))
        return lost + _least_loss(self._maps(widths), limit)

    def _maps(self, widths: Sequence[int]) -> dict[str, Map]:
        chosen = (option[width].maps for option, width in zip(self.options, widths, strict=True))
        return {**self.others, **{name: entry for maps in chosen for name, entry in maps.items()}}

    def best(self, limit: int) -> list[int]:
        """Return the width of each MLP that loses least together with the best ranks: one price holds for all.

        At a price of a parameter each map takes the rank, and each MLP the width, that is best for itself. The price
        is the lowest at which all of it is within ``limit``.
        """
        rest = [_sizes(entry) for entry in self.others.values()]
        mlps = [
            {width: (option.lost, [_sizes(entry) for entry in option.maps.values()]) for width, option in mlp.items()}
            for mlp in self.options
        ]
        low, high = -25.0, 5.0
        for _ in range(60):
            middle = (low + high) / 2
            if _spent(10.0**middle, rest, mlps)[0] > limit:
                low = middle
            else:
                high = middle
        return _spent(10.0**high, rest, mlps)[1]


def measured_widths(
    model: PreTrainedModel,
    targets: Targets,
    hidden: Sequence[Hidden],
    roots: Roots,
    widths: Sequence[int],
    *,
    damping: float = 0.1,
) -> Widths:
    """Return what the MLPs of ``model`` lose at each of ``widths``.

    Args:
        model: The dense base.
        targets: Its linear maps.
        hidden: Its MLPs.
        roots: Two-sided, of all the maps.
        widths: The widths to try.
        damping: As in ``leave_out``.
    """
    mlp_maps = {target.name for mlp in hidden for target in (mlp.reader, *mlp.writers)}
    others = {}
    for target in tqdm([one for one in targets.modules if one.name not in mlp_maps], desc="spectra", unit="module"):
        outputs, inputs = _both(roots, target)
        others[target.name] = Map(target.shape, _sigma(_weight(model, target), outputs.root, inputs.root))
    options = []
    for mlp in tqdm(hidden, desc="widths", unit="MLP"):
        moment = roots.moment_of_inputs(mlp.reader)
        assert moment is not None
        outputs, inputs = _both(roots, mlp.reader)
        writers = [(writer, _weight(model, writer), *_both(roots, writer)) for writer in mlp.writers]
        tried = prunings(_weight(model, mlp.reader), moment, widths, outputs=outputs, damping=damping)
        at: dict[int, Option] = {}
        for width, found in zip(sorted(widths, reverse=True), tried, strict=True):
            read = _sigma(found.weight, outputs.root, inputs.root[found.features])
            maps = {mlp.reader.name: Map((mlp.reader.shape[0], width), read)}
            for writer, weight, left, right in writers:
                own = rows_of(writer, mlp.width, found.features)
                written = _sigma(weight[own], left.root[own], right.root)
                maps[writer.name] = Map((len(own), writer.shape[1]), written)
            at[width] = Option(found.loss / 2, maps)
        options.append(at)
    return Widths(others, options)


Sizes = tuple[NDArray[np.float64], NDArray[np.float64]]
"""What a map costs at each rank below break-even and dense, and the nats that it loses there."""


def _sizes(entry: Map) -> Sizes:
    storage = Storage()
    ranks = np.arange(1, storage.break_even(entry.shape) + 1)
    costs = np.append(storage.costs(entry.shape, ranks), entry.shape[0] * entry.shape[1])
    return costs.astype(np.float64), np.append(losses_by_rank(entry.sigma)[ranks], 0.0)


def _spent(
    price: float, rest: Sequence[Sizes], mlps: Sequence[dict[int, tuple[float, list[Sizes]]]]
) -> tuple[float, list[int]]:
    """Return the parameters of all maps where one costs ``price`` nats, and the width of each MLP."""
    spent, widths = sum(_at(price, sizes)[0] for sizes in rest), []
    for mlp in mlps:
        found = []
        for width, (lost, maps) in mlp.items():
            costs, losses = zip(*(_at(price, sizes) for sizes in maps), strict=True)
            found.append((lost + sum(losses) + price * sum(costs), -width, sum(costs)))
        # Of equals the widest.
        _, negative, cost = min(found)
        widths.append(-negative)
        spent += cost
    return spent, widths


def _at(price: float, sizes: Sizes) -> tuple[float, float]:
    """Return cost and loss of the size of a map that is best at ``price``."""
    costs, losses = sizes
    place = int(np.argmin(losses + price * costs))
    return float(costs[place]), float(losses[place])


def _weight(model: PreTrainedModel, target: Target) -> Tensor:
    return dense_weight(model.get_submodule(target.name)).detach().double()


def _both(roots: Roots, target: Target) -> tuple[SquareRoot, SquareRoot]:
    """Return what the outputs and the inputs of ``target`` are weighted by."""
    ((inputs, _),) = roots.by_inputs([target])
    outputs = roots.of_outputs(target.name)
    assert inputs is not None
    assert outputs is not None
    return outputs, inputs


def _sigma(weight: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return the singular values of ``outputs' @ weight @ inputs``, descending; digits far below the first are lost.

    Rows of a square root are a root of that part of what it is the root of.
    """
    matrix = outputs.mT @ weight @ inputs
    gram = matrix @ matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix.mT @ matrix
    squares: Tensor = torch.linalg.eigvalsh(gram).flip(0)[: min(weight.shape)]
    return squares.clamp_min(0).sqrt().cpu()


def _least_loss(maps: dict[str, Map], limit: int) -> float:
    """Return in nats what the best ranks of ``maps`` lose that have ``limit`` parameters together."""
    shapes = {name: entry.shape for name, entry in maps.items()}
    total = _parameters(maps)
    budget = Budget(keep=min(1.0, limit / total), shapes=shapes, model_parameters=total)
    sizes = budget.sizes({name: hull_slopes(budget, name, entry.sigma) for name, entry in maps.items()})
    cut = (maps[name].sigma[rank:] for name, rank in sizes.items() if rank is not None)
    return sum(rest.square().sum().item() for rest in cut) / 2


def _parameters(maps: dict[str, Map]) -> int:
    return sum(rows * columns for rows, columns in (entry.shape for entry in maps.values()))
