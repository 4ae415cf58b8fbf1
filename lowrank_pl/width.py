"""How wide a model's MLPs should be at a size: what ranks lose that are left to draw, and what the narrowing loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.budget import Budget
from lowrank_pl.decompose import SquareRoot
from lowrank_pl.decomposition import Roots
from lowrank_pl.hull import hull_slopes
from lowrank_pl.leaving_out import narrowings
from lowrank_pl.narrowing import Hidden, rows_of
from lowrank_pl.targets import Target, Targets, dense_weight

__all__ = ["predicted_losses"]


class _Map(NamedTuple):
    """Shape of a map and its singular values, weighted so that half their squares are nats."""

    shape: tuple[int, int]
    sigma: Tensor


def predicted_losses(
    model: PreTrainedModel,
    targets: Targets,
    hidden: Sequence[Hidden],
    roots: Roots,
    limit: int,
    widths: Sequence[int],
    *,
    damping: float = 0.1,
) -> dict[int, float]:
    """Return the loss in nats that is predicted for each of ``widths`` of the MLPs, all ranks as good as they can be.

    To what leaving out features loses comes what the exact allocation of ranks (``fisher``, pivoted storage) loses at
    the parameters that are allowed. Moments of the features that stay are those that they had among all.

    Args:
        model: The dense base.
        targets: Its linear maps.
        hidden: Its MLPs.
        roots: Two-sided, of all the maps.
        limit: How many parameters the maps may keep together; widths that leave fewer than that are left out.
        widths: The widths to try.
        damping: As in ``leave_out``.
    """
    mlp_maps = {target.name for mlp in hidden for target in (mlp.reader, *mlp.writers)}
    others = {}
    for target in tqdm([one for one in targets.modules if one.name not in mlp_maps], desc="spectra", unit="module"):
        outputs, inputs = _both(roots, target)
        others[target.name] = _Map(target.shape, _sigma(_weight(model, target), outputs.root, inputs.root))
    maps: dict[int, dict[str, _Map]] = {width: dict(others) for width in widths}
    lost = dict.fromkeys(widths, 0.0)
    for mlp in tqdm(hidden, desc="widths", unit="MLP"):
        moment = roots.moment_of_inputs(mlp.reader)
        assert moment is not None
        outputs, inputs = _both(roots, mlp.reader)
        writers = [(writer, _weight(model, writer), *_both(roots, writer)) for writer in mlp.writers]
        tried = narrowings(_weight(model, mlp.reader), moment, widths, outputs=outputs, damping=damping)
        for width, found in zip(sorted(widths, reverse=True), tried, strict=True):
            lost[width] += found.loss / 2
            read = _sigma(found.weight, outputs.root, inputs.root[found.features])
            maps[width][mlp.reader.name] = _Map((mlp.reader.shape[0], width), read)
            for writer, weight, left, right in writers:
                own = rows_of(writer, mlp.width, found.features)
                written = _sigma(weight[own], left.root[own], right.root)
                maps[width][writer.name] = _Map((len(own), writer.shape[1]), written)
    return {
        width: lost[width] + _least_loss(maps[width], limit)
        for width in widths
        if sum(rows * columns for rows, columns in (entry.shape for entry in maps[width].values())) >= limit
    }


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


def _least_loss(maps: dict[str, _Map], limit: int) -> float:
    """Return in nats what the best ranks of ``maps`` lose that have ``limit`` parameters together."""
    shapes = {name: entry.shape for name, entry in maps.items()}
    total = sum(rows * columns for rows, columns in shapes.values())
    budget = Budget(keep=limit / total, shapes=shapes, model_parameters=total)
    sizes = budget.sizes({name: hull_slopes(budget, name, entry.sigma) for name, entry in maps.items()})
    cut = (maps[name].sigma[rank:] for name, rank in sizes.items() if rank is not None)
    return sum(rest.square().sum().item() for rest in cut) / 2
