"""Matrices rounded to a few bits, with scales and codes chosen by what the errors cost. Pure functions.

The cost of an error ``E`` of a weight is that of a decomposition: ``|R' E L|^2 / 2`` with the square roots of the
second moments of outputs and inputs (:mod:`lowrank_pl.factors.decomposition`). With two-sided moments it is K-FAC's
estimate of the rise of the loss in nats, so that the costs of truncating and of rounding compare, and compare across
modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowrank_pl.models.hf_layers import PivotedLinear
from lowrank_pl.models.hf_quantized import SCALE_TYPE, Grid, Rounded, pack

__all__ = [
    "Metric",
    "compensated",
    "component_costs",
    "dense_costs",
    "nearest",
    "round_dense",
    "round_factors",
    "round_pivoted",
]

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
"""The parts of a group's range that are tried as the range of its codes."""

_BLOCK = 64
"""Columns whose errors are passed on to all later columns at once."""

_DAMPING = 1e-4
"""Added to the diagonal of moments before they are inverted, relative to its mean."""


@dataclass(frozen=True, eq=False)
class Metric:
    """What errors of a linear layer's weight cost.

    Args:
        inputs: Second moment of the inputs, ``[in, in]``; None for the identity.
        outputs: Second moment of the outputs' gradients, ``[out, out]``; None for the identity.
        free: Whether errors cost nothing, because a moment is zero; the other fields then only shape them.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    free: bool = False

    def cost(self, error: Tensor) -> float:
        """Return the cost of an ``error`` ``[out, in]`` of the weight, in nats with two-sided moments."""
        if self.free:
            return 0.0
        seen = error if self.inputs is None else error @ self.inputs.to(error)
        felt = error if self.outputs is None else self.outputs.to(error) @ error
        return (seen * felt).sum(dtype=torch.float64).item() / 2


def nearest(matrix: Tensor, grid: Grid, *, weights: Tensor | None = None) -> Rounded:
    """Return ``matrix`` with every number rounded to the nearest one that its group has.

    The range of each group is the one with the least weighted squared error among a few parts of its whole range.

    Args:
        matrix: ``[rows, columns]``, finite.
        grid: The numbers to round to.
        weights: Weights ``[columns]`` of squared errors; all alike by default.

    Example:
        >>> nearest(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), Grid(2)).dense().tolist()
        [[0.0, 1.0, 2.0, 3.0]]
    """
    values = matrix.float()
    table = _Table.of(values, grid, weights)
    return table.rounded(_codes(values, *table.spread(), *table.limits))


def compensated(
    matrix: Tensor, grid: Grid, moment: Tensor | None, *, between_rows: bool = False, weights: Tensor | None = None
) -> Rounded:
    """Return ``matrix`` rounded column by column, where later columns make up for the errors of earlier ones.

    It minimises ``tr(E moment E')``, in the order and by the recursion of GPTQ (arXiv 2210.17323): columns with large
    moments come first. The ranges of groups are chosen beforehand, and errors weigh there as much as later columns
    can't make up for.

    Args:
        matrix: ``[rows, columns]``, finite.
        grid: The numbers to round to.
        moment: ``[columns, columns]``, or ``[rows, rows]`` between rows; None rounds to nearest.
        between_rows: Make up for errors between rows instead, minimising ``tr(E' moment E)``. Groups are those of
            columns all the same.
        weights: Between rows, what the squared errors of each column weigh, ``[columns]``.

    Example:
        >>> weight, inputs = torch.randn(8, 64), torch.randn(256, 64) @ torch.randn(64, 64)
        >>> moment = inputs.T @ inputs
        >>> costs = [Metric(moment).cost(weight - one.dense()) for one in
        ...          (nearest(weight, Grid(4, 32)), compensated(weight, Grid(4, 32), moment))]
        >>> costs[1] < costs[0]
        True
    """
    return _compensated(matrix, [grid], moment, between_rows=between_rows, weights=weights)[0]


def _compensated(
    matrix: Tensor,
    grids: Sequence[Grid],
    moment: Tensor | None,
    *,
    between_rows: bool = False,
    weights: Tensor | None = None,
) -> list[Rounded]:
    """Return what ``compensated`` does for each of ``grids``, all of them in one pass over the columns."""
    values = matrix.float()
    if moment is None:
        return [nearest(values, grid, weights=weights) for grid in grids]
    order, upper = _inverse_root(moment)
    if not between_rows:
        # What remains of a column's error after later columns have made up for it.
        weights = torch.empty_like(upper.diagonal()).index_copy_(0, order, upper.diagonal() ** -2)
    tables = [_Table.of(values, grid, weights) for grid in grids]
    # In the order of columns, one below the other: [columns, grids * rows], so that a step reads one piece of memory.
    lines = [[part[order] if between_rows else part.mT[order] for part in table.spread()] for table in tables]
    scale, zero = (torch.cat(parts, 1) for parts in zip(*lines, strict=True))
    line = values[order] if between_rows else values.mT[order]
    limits = [values.new_tensor([table.limits[side] for table in tables]) for side in (0, 1)]
    low, high = (limit.repeat_interleave(line.shape[1]) for limit in limits)
    codes = _compensate(line.repeat(1, len(grids)), upper, scale, zero, low, high)
    codes = torch.empty_like(codes).index_copy_(0, order, codes)
    each = codes.chunk(len(grids), 1)
    return [table.rounded(one if between_rows else one.mT) for table, one in zip(tables, each, strict=True)]


def round_dense(weight: Tensor, grid: Grid, metric: Metric) -> Rounded:
    """Return a dense weight ``[out, in]`` rounded with error compensation between columns, and between rows as well.

    With a metric of the inputs alone this is GPTQ. With one of the outputs too, every number also makes up for the
    errors of those above and to the left of it, in the order of large moments: the recursion of GPTQ for
    ``tr(outputs E inputs E')`` (as in YAQA, arXiv 2505.22988).

    Args:
        weight: The weight.
        grid: The numbers to round to.
        metric: What errors cost.
    """
    return _round_dense(weight, [grid], metric)[0]


def dense_costs(weight: Tensor, grids: Sequence[Grid], metric: Metric) -> list[float]:
    """Return what rounding a dense weight by ``round_dense`` costs on each of ``grids``."""
    return [metric.cost(rounded.dense() - weight.float()) for rounded in _round_dense(weight, grids, metric)]


def _round_dense(weight: Tensor, grids: Sequence[Grid], metric: Metric) -> list[Rounded]:
    if metric.inputs is None or metric.outputs is None:
        return _compensated(weight, grids, metric.inputs)
    values = weight.float()
    (columns, right), (rows, left) = _triangular_root(metric.inputs), _triangular_root(metric.outputs)
    kept = right.diagonal().square()
    kept = torch.empty_like(kept).index_copy_(0, columns, kept)
    unit = left / left.diagonal(), right / right.diagonal()
    found = []
    # As many grids at a time as fit a few hundred megabytes.
    count = max(1, _NUMBERS // values.numel())
    for some in (grids[start : start + count] for start in range(0, len(grids), count)):
        tables = [_Table.of(values, grid, kept) for grid in some]
        ordered = [[part[rows][:, columns] for part in table.spread()] for table in tables]
        scale, zero = (torch.stack(parts) for parts in zip(*ordered, strict=True))
        limits = [values.new_tensor([table.limits[side] for table in tables])[:, None, None] for side in (0, 1)]
        codes = _compensate_both(values[rows][:, columns], unit, scale, zero, *limits)
        codes = torch.empty_like(codes).index_copy_(2, columns, codes)
        codes = torch.empty_like(codes).index_copy_(1, rows, codes)
        found += [table.rounded(one) for table, one in zip(tables, codes, strict=True)]
    return found


def round_factors(left: Tensor, right: Tensor, grid: Grid, metric: Metric) -> dict[str, Rounded]:
    """Return the rounded factors ``weight`` ``[out, rank]`` and ``right`` ``[rank, in]``.

    The scale of a component can move between its two factors at no cost. It is chosen so that the columns of the left
    factor, which share groups, have the same size. The right factor is rounded in the metric of the inputs. Then the
    left factor is fitted to the rounded right one, which takes a part of its error back, and is rounded between its
    rows in the metric of the outputs.

    Args:
        left: ``[out, rank]``.
        right: ``[rank, in]``.
        grid: The numbers to round to.
        metric: What errors cost.
    """
    left, right = _equal_columns(left, right)
    rounded = compensated(right, grid, metric.inputs)
    kept = rounded.dense()
    moment = kept @ kept.mT if metric.inputs is None else kept @ metric.inputs.float() @ kept.mT
    cross = right @ kept.mT if metric.inputs is None else right @ metric.inputs.float() @ kept.mT
    left = left @ _solve(moment, cross)
    if metric.outputs is None:
        return {"weight": compensated(left, grid, moment), "right": rounded}
    found = compensated(left, grid, metric.outputs, between_rows=True, weights=moment.diagonal())
    return {"weight": found, "right": rounded}


def round_pivoted(layer: PivotedLinear, grid: Grid, metric: Metric) -> dict[str, Rounded]:
    """Return the rounded parts ``weight`` and ``right`` of a pivoted layer.

    The second matrix, ``right``, is rounded in the metric of its inputs. Then ``weight`` is fitted to it, which takes a
    part of its error back, and is rounded in the metric of what it reads and, with pivots among inputs, of the outputs.

    Args:
        layer: The layer.
        grid: The numbers to round to.
        metric: What errors cost.
    """
    weight, right = (layer.matrix(name).detach().float() for name in ("weight", "right"))
    pivots, others = layer.order()
    inputs = torch.eye(layer.in_features).to(right) if metric.inputs is None else metric.inputs.to(right)
    if layer.side == "out":
        rounded = compensated(right, grid, metric.inputs)
        read, exact = rounded.dense(), right
        outputs = None
    else:
        rounded = compensated(right, grid, None if metric.inputs is None else metric.inputs[others][:, others])
        # What ``weight`` reads is ``x[pivots] + right @ x[others]``.
        read, exact = (inputs.new_zeros(layer.rank, layer.in_features) for _ in range(2))
        for made, matrix in ((read, rounded.dense()), (exact, right)):
            made[:, others] = matrix
            made[:, pivots] = torch.eye(layer.rank).to(matrix)
        outputs = metric.outputs
    seen = read @ inputs
    moment = seen @ read.mT
    fitted = weight @ _solve(moment, exact @ seen.mT)
    return {"weight": round_dense(fitted, grid, Metric(moment, outputs)), "right": rounded}


def component_costs(left: Tensor, right: Tensor, grids: Sequence[Grid], metric: Metric) -> list[Tensor]:
    """Return, for each of ``grids``, what rounding adds to the cost of keeping each component, float64 ``[rank]``.

    The components of a decomposition in this metric are orthogonal, so that truncating adds to the cost of rounding
    without a cross term, and the sum of the first ``k`` numbers estimates the cost of rounding ``k`` components. It is
    an upper estimate: what the left factor takes back of the right one's error is not counted.

    Args:
        left: ``[out, rank]``, of a decomposition in the same metric.
        right: ``[rank, in]``.
        grids: The numbers to round to.
        metric: What errors cost.
    """
    if metric.free:
        return [torch.zeros(len(right), dtype=torch.float64, device=right.device) for _ in grids]
    left, right = _equal_columns(left, right)
    inputs, outputs = (None if moment is None else moment.float() for moment in (metric.inputs, metric.outputs))

    def of_rows(rows: Tensor, moment: Tensor | None) -> Tensor:
        return ((rows if moment is None else rows @ moment) * rows).sum(1)

    seen, felt = of_rows(right, inputs), of_rows(left.mT, outputs)
    rights = _compensated(right, grids, metric.inputs)
    lefts = _compensated(left, grids, metric.outputs, between_rows=True, weights=seen)
    return [
        (felt * of_rows(one.dense() - right, inputs) + seen * of_rows((other.dense() - left).mT, outputs)).double() / 2
        for one, other in zip(rights, lefts, strict=True)
    ]


def _equal_columns(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors with the same product, in float32, where the columns of the left one have the same size."""
    left, right = left.float(), right.float()
    size = left.square().mean(0).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return left / size, right * size[:, None]


@dataclass(frozen=True, eq=False)
class _Table:
    """Scales and zero points of a matrix, ``[rows, groups]``."""

    grid: Grid
    columns: int
    scales: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, values: Tensor, grid: Grid, weights: Tensor | None) -> _Table:
        """Return for each group the scale and zero point with the least weighted squared error."""
        rows, columns = values.shape
        size, groups = grid.group or columns, grid.groups(columns)
        more = groups * size - columns
        # Copies of a group's last number, which has no weight, do not change its range.
        filled = pad(values[None], (0, more), mode="replicate")[0] if more else values
        cells = filled.view(rows, groups, size)
        weight = values.new_ones(columns) if weights is None else weights.to(values)
        weight = pad(weight, (0, more)).view(groups, size)
        levels = 2**grid.bits - 1
        low, high = cells.amin(-1).clamp_max(0), cells.amax(-1).clamp_min(0)
        if not grid.has_zeros:
            high = torch.maximum(high, -low)
            low = -high
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for part in _SHRINK:
            scale = _exact((high - low) * (part / (levels if grid.has_zeros else levels - 1)))
            zero = (-low * part / scale).round().clamp(0, levels) if grid.has_zeros else torch.full_like(scale, 128.0)
            codes = (cells / scale[..., None] + zero[..., None]).round().clamp(0 if grid.has_zeros else 1, levels)
            lost = (((codes - zero[..., None]) * scale[..., None] - cells).square() * weight).sum(-1)
            if best is None:
                best = lost, scale, zero
            else:
                better = lost < best[0]
                best = (
                    torch.where(better, lost, best[0]),
                    torch.where(better, scale, best[1]),
                    torch.where(better, zero, best[2]),
                )
        assert best is not None
        return cls(grid, columns, best[1], best[2])

    def spread(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of every number, ``[rows, columns]``."""
        size = self.grid.group or self.columns
        scale, zero = (part.repeat_interleave(size, 1)[:, : self.columns] for part in (self.scales, self.zeros))
        return scale, zero

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest code; at 8 bits codes are symmetric."""
        return 0 if self.grid.has_zeros else 1, 2**self.grid.bits - 1

    def rounded(self, codes: Tensor) -> Rounded:
        """Return the matrix with the given ``codes``."""
        grid = self.grid
        zeros = pack(self.zeros.to(torch.uint8), grid.bits) if grid.has_zeros else None
        return Rounded(grid, self.columns, pack(codes.to(torch.uint8), grid.bits), self.scales, zeros)


def _exact(scale: Tensor) -> Tensor:
    """Return scales that files hold exactly, above 0."""
    stored = scale.to(SCALE_TYPE).float()
    return torch.where(stored > 0, stored, torch.ones_like(stored))


def _codes(values: Tensor, scale: Tensor, zero: Tensor, low: Any, high: Any) -> Tensor:
    return (values / scale + zero).round().clamp(low, high)


def _inverse_root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of columns, largest moments first, and ``U``, float32, where ``U' U`` is the inverse moment."""
    order, wide = _ordered(moment)
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(_cholesky(wide)), upper=True)
    return order, upper.float()


def _ordered(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of columns, largest moments first, and the symmetric moment in it, float64."""
    wide = moment.double()
    if not wide.isfinite().all():
        raise ValueError("a second moment holds NaN or infinity: load the base in float32, or measure again")
    order = wide.diagonal().argsort(descending=True, stable=True)
    return order, ((wide + wide.mT) / 2)[order][:, order]


def _cholesky(moment: Tensor) -> Tensor:
    """Return the Cholesky root of a moment, which is damped as much as it needs."""
    damping = _DAMPING * (moment.diagonal().mean().item() or 1.0)
    while True:
        damped = moment + damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        root: Tensor
        root, info = torch.linalg.cholesky_ex(damped)
        if not info.item():
            return root
        damping *= 10


def _compensate(rest: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return codes ``[columns, rows]`` of a transposed matrix, whose columns are in the order of ``upper``.

    Args:
        rest: The numbers, ``[columns, rows]``; they are overwritten.
        upper: ``[columns, columns]``.
        scale: Scale of each number.
        zero: Zero point of each number.
        low: Lowest code of each row.
        high: Highest code of each row.
    """
    codes = torch.empty_like(rest)
    for start in range(0, len(rest), _BLOCK):
        stop = min(start + _BLOCK, len(rest))
        errors = torch.empty_like(rest[start:stop])
        for place in range(start, stop):
            codes[place] = _codes(rest[place], scale[place], zero[place], low, high)
            back = (codes[place] - zero[place]) * scale[place]
            errors[place - start] = (rest[place] - back) / upper[place, place]
            rest[place + 1 : stop].addr_(upper[place, place + 1 : stop], errors[place - start], alpha=-1)
        rest[stop:].addmm_(upper[start:stop, stop:].mT, errors, alpha=-1)
    return codes


def _triangular_root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of columns, largest moments first, and upper triangular ``V``, where ``V V'`` is the moment."""
    order, wide = _ordered(moment)
    root = _cholesky(wide.flip(0, 1))
    return order, root.flip(0, 1).float()


_TILE = 32
"""Rows and columns of a tile; all tiles on an anti-diagonal are rounded at a time."""

_NUMBERS = 2**23
"""How many numbers are rounded at a time."""


def _compensate_both(
    values: Tensor, roots: tuple[Tensor, Tensor], scale: Tensor, zero: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Return codes ``[grids, rows, columns]`` of ``values``, whose rows and columns are in the order of ``roots``.

    With errors ``E`` and unit upper triangular roots ``P`` of the outputs' and ``R`` of the inputs' moment, the cost is
    the weighted sum of the squares of ``P' E R``, whose entry ``i, j`` holds errors from above and from the left only.
    Each number is rounded after what these contribute was subtracted. Numbers on an anti-diagonal don't depend on each
    other, nor do tiles.

    Args:
        values: ``[rows, columns]``.
        roots: ``P`` and ``R``.
        scale: Scale of each number, ``[grids, rows, columns]``.
        zero: Zero point of each number, ``[grids, rows, columns]``.
        low: Lowest code, ``[grids, 1, 1]``.
        high: Highest code, ``[grids, 1, 1]``.
    """
    rows, columns = values.shape
    pads = -rows % _TILE, -columns % _TILE
    # Numbers beyond the edge are 0 and contribute nothing, however they are rounded: their roots are 0.
    edges = (0, pads[1], 0, pads[0])
    values, zero = pad(values, edges), pad(zero, edges)
    scale = pad(scale, edges, value=1.0)
    above, before = (pad(root, (0, more, 0, more)) for root, more in zip(roots, pads, strict=True))
    down, across = values.shape[0] // _TILE, values.shape[1] // _TILE
    span = [slice(place * _TILE, (place + 1) * _TILE) for place in range(max(down, across))]
    errors, codes = torch.zeros_like(scale), torch.zeros_like(scale)
    # E R, row tile by row tile, with everything to the left of a tile and the tile itself.
    seen = torch.zeros_like(scale)
    steps = torch.arange(_TILE, device=values.device)
    for diagonal in range(down + across - 1):
        tiles = [(i, diagonal - i) for i in range(max(0, diagonal - across + 1), min(down, diagonal + 1))]
        known = []
        for i, j in tiles:
            seen[:, span[i], span[j]] = errors[:, span[i], : j * _TILE] @ before[: j * _TILE, span[j]]
            known.append(above[: (i + 1) * _TILE, span[i]].mT @ seen[:, : (i + 1) * _TILE, span[j]])
        plain = torch.stack([values[span[i], span[j]] for i, j in tiles])
        given = plain - torch.stack(known, 1)
        size, offset = (torch.stack([part[:, span[i], span[j]] for i, j in tiles], 1) for part in (scale, zero))
        own_above = torch.stack([above[span[i], span[i]] for i, _ in tiles]).mT
        own_before = torch.stack([before[span[j], span[j]] for _, j in tiles]).mT
        error, code = torch.zeros_like(given), torch.zeros_like(given)
        for step in range(2 * _TILE - 1):
            row = steps[max(0, step - _TILE + 1) : step + 1]
            column = step - row
            at = (..., row, column)
            # Only what is rounded already is not 0 in ``error``.
            passed = ((own_above[:, row] @ error) * own_before[:, column]).sum(-1)
            code[at] = _codes(given[at] - passed, size[at], offset[at], low, high)
            error[at] = (code[at] - offset[at]) * size[at] - plain[at]
        for place, (i, j) in enumerate(tiles):
            errors[:, span[i], span[j]], codes[:, span[i], span[j]] = error[:, place], code[:, place]
            seen[:, span[i], span[j]] += error[:, place] @ before[span[j], span[j]]
    return codes[:, :rows, :columns]


def _solve(moment: Tensor, cross: Tensor) -> Tensor:
    """Return ``cross @ inverse(moment)``, with a little damping."""
    wide = moment.double()
    wide.diagonal().add_(1e-7 * (wide.diagonal().mean().item() or 1.0))
    solved: Tensor = torch.linalg.solve(wide, cross.double(), left=False)
    return solved.to(cross)
