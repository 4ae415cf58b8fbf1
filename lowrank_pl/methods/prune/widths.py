"""The best MLP widths at a size: predicted loss of width pruning plus that of the rank allocation after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.calibration.roots import Roots
from lowrank_pl.factors.decomposition import SquareRoot
from lowrank_pl.methods.prune.eliminate import nested_prunings
from lowrank_pl.methods.prune.mlp import HiddenNeurons, rows_of
from lowrank_pl.models.targets import Target, Targets, dense_weight
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.convex_hull import Sizes, hull_slopes, sizes_of

__all__ = ["Spectrum", "WidthLosses", "WidthOption", "measure_widths"]


class Spectrum(NamedTuple):
    """Shape of a linear layer, and its singular values, weighted so that half their squares are nats."""

    shape: tuple[int, int]
    sigma: Tensor


class WidthOption(NamedTuple):
    """An MLP at one of its widths: the nats that pruning loses, and the spectra of its linear layers by name."""

    lost: float
    layers: dict[str, Spectrum]


@dataclass(frozen=True)
class WidthLosses:
    """Predicted losses of MLPs at every candidate width, and of all linear layers at every rank.

    The loss of a choice of widths is that of pruning plus that of the exact rank allocation (``fisher``) within the
    allowed parameters, in the storage, the multiples and the floors of the run. Kept neurons are assumed to keep their
    moments.

    Args:
        others: Spectra of the linear layers outside MLPs, by name.
        options: Each MLP at each width; all MLPs have the same candidate widths.
        constraints: ``storage``, ``multiple_of`` and ``floors`` of the ranks; the rest is unused. No floor holds for
            MLPs.
        bytes_per_parameter: Bytes of one stored number.
    """

    others: dict[str, Spectrum]
    options: Sequence[dict[int, WidthOption]]
    constraints: Constraints = Constraints()
    bytes_per_parameter: int = 4

    def losses(self, limit: int) -> dict[int, float]:
        """Return the nats lost if all MLPs have one width, by width.

        Widths with fewer parameters than ``limit``, or without ranks that are small enough for it, are omitted.

        Args:
            limit: Parameters that all linear layers may keep together.
        """
        alike = {width: [width] * len(self.options) for width in self.options[0]}
        large = {width: all_ for width, all_ in alike.items() if _parameters(self._layers(all_)) >= limit}
        found = {width: self.loss(all_, limit) for width, all_ in large.items()}
        return {width: loss for width, loss in found.items() if math.isfinite(loss)}

    def loss(self, widths: Sequence[int], limit: int) -> float:
        """Return the nats lost if the MLPs have ``widths`` and ranks leave at most ``limit`` parameters.

        Infinite if the smallest ranks, which are multiples, take more.
        """
        lost = sum(option[width].lost for option, width in zip(self.options, widths, strict=True))
        return lost + self._least_loss(self._layers(widths), limit)

    def _least_loss(self, layers: dict[str, Spectrum], limit: int) -> float:
        """Return the nats that the best ranks of ``layers`` lose within ``limit`` parameters."""
        budget = self._budget(layers, self.constraints.floors)
        if sum(budget.cost(name, budget.least_rank(name)) for name in layers) > limit:
            return math.inf
        budget = replace(budget, keep=min(1.0, limit / budget.total))
        sizes = budget.sizes({name: hull_slopes(budget, name, entry.sigma) for name, entry in layers.items()})
        cut = (layers[name].sigma[rank:] for name, rank in sizes.items() if rank is not None)
        return sum(rest.square().sum().item() for rest in cut) / 2

    def _budget(self, layers: dict[str, Spectrum], floors: Mapping[str, float]) -> Budget:
        """Return a budget of ``layers`` that keeps them dense, with the constraints of the run."""
        shapes = {name: entry.shape for name, entry in layers.items()}
        return Budget(
            keep=1.0, shapes=shapes, model_parameters=_parameters(layers),
            bytes_per_parameter=self.bytes_per_parameter, multiple_of=self.constraints.multiple_of, floors=floors,
            storage=self.constraints.storage,
        )  # fmt: skip

    def _sizes(self, layers: dict[str, Spectrum], floors: Mapping[str, float]) -> list[Sizes]:
        budget = self._budget(layers, floors)
        return [sizes_of(budget, name, entry.sigma) for name, entry in layers.items()]

    def _layers(self, widths: Sequence[int]) -> dict[str, Spectrum]:
        chosen = (option[width].layers for option, width in zip(self.options, widths, strict=True))
        return {**self.others, **{name: entry for layers in chosen for name, entry in layers.items()}}

    def best(self, limit: int, width: int) -> tuple[list[int], float]:
        """Return a width for each MLP, and the nats lost with the best ranks: no more than with ``width`` for all.

        A Lagrange multiplier sets the cost of a parameter in nats. At a given cost, each linear layer takes its best
        rank and each MLP its best width. Bisection finds the lowest cost at which the total is within ``limit``. The
        total falls in steps, and close to the full size it may fall far below ``limit``. Where these widths leave fewer
        parameters than ``limit``, or lose more, all MLPs get ``width``.

        Args:
            limit: Parameters that all linear layers may keep together.
            width: The one width that loses least.
        """
        # A floor of 0 may name MLPs alone, whose layers this budget lacks.
        rest = self._sizes(self.others, {pattern: floor for pattern, floor in self.constraints.floors.items() if floor})
        mlps = [
            {width: (option.lost, self._sizes(option.layers, {})) for width, option in mlp.items()}
            for mlp in self.options
        ]
        low, high = -25.0, 5.0
        for _ in range(60):
            middle = (low + high) / 2
            if _spent(10.0**middle, rest, mlps)[0] > limit:
                low = middle
            else:
                high = middle
        alike = [width] * len(mlps)
        loss_alike = self.loss(alike, limit)
        chosen = _spent(10.0**high, rest, mlps)[1]
        if _parameters(self._layers(chosen)) < limit or (loss := self.loss(chosen, limit)) > loss_alike:
            return alike, loss_alike
        return chosen, loss


def measure_widths(
    model: PreTrainedModel,
    targets: Targets,
    hidden: Sequence[HiddenNeurons],
    roots: Roots,
    widths: Sequence[int],
    *,
    damping: float = 0.1,
    constraints: Constraints = Constraints(),
) -> WidthLosses:
    """Return the predicted losses of the MLPs of ``model`` at each of ``widths``.

    Args:
        model: The dense base.
        targets: Its target layers.
        hidden: Its MLPs.
        roots: Two-sided roots of all target layers.
        widths: Candidate widths.
        damping: As in ``prune_inputs``.
        constraints: Those of the run; see ``WidthLosses``.
    """
    mlp_layers = {target.name for mlp in hidden for target in (mlp.reader, *mlp.writers)}
    others = {}
    for target in tqdm([one for one in targets.modules if one.name not in mlp_layers], desc="spectra", unit="module"):
        outputs, inputs = _both(roots, target)
        others[target.name] = Spectrum(target.shape, _sigma(_weight(model, target), outputs, inputs))
    options = []
    for mlp in tqdm(hidden, desc="widths", unit="MLP"):
        moment = roots.moment_of_inputs(mlp.reader)
        assert moment is not None
        outputs, inputs = _both(roots, mlp.reader)
        writers = [(writer, _weight(model, writer), *_both(roots, writer)) for writer in mlp.writers]
        tried = nested_prunings(_weight(model, mlp.reader), moment, widths, outputs=outputs, damping=damping)
        at: dict[int, WidthOption] = {}
        for width, found in zip(sorted(widths, reverse=True), tried, strict=True):
            read = _sigma(found.weight, outputs, inputs.of_features(found.features))
            layers = {mlp.reader.name: Spectrum((mlp.reader.shape[0], width), read)}
            for writer, weight, left, right in writers:
                own = rows_of(writer, mlp.width, found.features)
                written = _sigma(weight[own], left.of_features(own), right)
                layers[writer.name] = Spectrum((len(own), writer.shape[1]), written)
            at[width] = WidthOption(found.loss / 2, layers)
        options.append(at)
    return WidthLosses(others, options, constraints, model.dtype.itemsize)


def _spent(
    cost: float, rest: Sequence[Sizes], mlps: Sequence[dict[int, tuple[float, list[Sizes]]]]
) -> tuple[float, list[int]]:
    """Return the parameters of all linear layers if one costs ``cost`` nats, and the width of each MLP."""
    spent, widths = sum(_at(cost, sizes)[0] for sizes in rest), []
    for mlp in mlps:
        found = []
        for width, (lost, layers) in mlp.items():
            parameters, losses = zip(*(_at(cost, sizes) for sizes in layers), strict=True)
            found.append((lost + sum(losses) + cost * sum(parameters), -width, sum(parameters)))
        # Of equal totals, the widest.
        _, negative, kept = min(found)
        widths.append(-negative)
        spent += kept
    return spent, widths


def _at(cost: float, sizes: Sizes) -> tuple[float, float]:
    """Return parameters and loss of a linear layer at its best size if a parameter costs ``cost`` nats."""
    parameters, losses = sizes
    best = int(np.argmin(losses + cost * parameters))
    return float(parameters[best]), float(losses[best])


def _weight(model: PreTrainedModel, target: Target) -> Tensor:
    return dense_weight(model.get_submodule(target.name)).detach().double()


def _both(roots: Roots, target: Target) -> tuple[SquareRoot, SquareRoot]:
    """Return the roots that weight the outputs and the inputs of ``target``."""
    ((inputs, _),) = roots.by_inputs([target])
    outputs = roots.of_outputs(target.name)
    assert inputs is not None
    assert outputs is not None
    return outputs, inputs


def _sigma(weight: Tensor, outputs: SquareRoot, inputs: SquareRoot) -> Tensor:
    """Return the singular values of ``outputs.root' @ weight @ inputs.root``, descending; 0 where a moment is zero.

    They come from a Gram matrix, so values far below the first one are inaccurate.
    """
    if outputs.zero or inputs.zero:
        return torch.zeros(min(weight.shape), dtype=torch.float64)
    matrix = outputs.root.mT @ weight @ inputs.root
    gram = matrix @ matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix.mT @ matrix
    squares: Tensor = torch.linalg.eigvalsh(gram).flip(0)[: min(weight.shape)]
    return squares.clamp_min(0).sqrt().cpu()


def _parameters(layers: dict[str, Spectrum]) -> int:
    return sum(rows * columns for rows, columns in (entry.shape for entry in layers.values()))
