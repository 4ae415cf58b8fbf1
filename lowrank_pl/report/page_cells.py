"""The linear layers on the page of a run: rank in words, cell of the rank map, drawn spectrum; experts by the block."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.names import block_and_kind, expert_number
from lowrank_pl.plans.plan import ModulePlan, RankPlan, count_kinds
from lowrank_pl.plans.storage import Storage
from lowrank_pl.utils.formatting import percent

__all__ = [
    "HEIGHT",
    "WIDTH",
    "Cell",
    "Drawing",
    "Experts",
    "SpectrumGroup",
    "by_place",
    "cells",
    "grid",
    "read_spectra",
    "spectrum_groups",
]

_log = logging.getLogger(__name__)

WIDTH, HEIGHT = 120.0, 60.0
"""Size of a drawn spectrum, in units of its own view box."""

POINTS = 32
"""Approximate points of a drawn spectrum; more are not visible at that size."""

DECADES = 6.0
"""Range of a drawn spectrum below the largest singular value; smaller values are rounding errors."""


@dataclass(frozen=True)
class Cell:
    """One linear layer in the rank map.

    Args:
        number: Position in the plan.
        name: Name of the layer.
        module: Its entry in the plan.
        bytes_per_parameter: Bytes of one stored number.
        fell_back: Whether it is stored as two factors because pivoted storage would be inaccurate.
        lost: Fraction of the spectral energy (sum of squared singular values) that was cut; None if the spectrum is
            not available.
    """

    number: int
    name: str
    module: ModulePlan
    bytes_per_parameter: int
    fell_back: bool
    lost: float | None

    @property
    def block(self) -> int | None:
        """Index of its decoder block; None outside the blocks."""
        return block_and_kind(self.name)[0]

    @property
    def kind(self) -> str:
        """Its path within the block."""
        return block_and_kind(self.name)[1]

    @property
    def expert(self) -> int | None:
        """Number of its expert; None if it belongs to none."""
        return expert_number(self.name)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.module.shape

    @property
    def rank(self) -> int | None:
        """Kept components; None if the layer is dense, 0 if its expert is dropped."""
        return self.module.rank

    @property
    def ranks(self) -> str:
        """The rank in words."""
        return "\u2013" if self.rank is None else str(self.rank or "dropped")

    @property
    def full_rank(self) -> int:
        """Components of the dense weight."""
        return min(self.shape)

    @property
    def parameters(self) -> int:
        """Stored numbers, indices of pivots included."""
        return self.module.numbers(self.bytes_per_parameter)

    @property
    def dense_parameters(self) -> int:
        """Numbers of the dense weight."""
        return self.module.dense_parameters

    @property
    def kept(self) -> float:
        """Kept fraction of its parameters."""
        return self.parameters / self.dense_parameters

    @property
    def bytes(self) -> int:
        """Bytes of the stored numbers."""
        return self.module.bytes(self.bytes_per_parameter)

    @property
    def storage(self) -> str:
        """``dense``, ``factored``, ``pivoted`` or ``dropped``."""
        if self.module.is_dropped:
            return "dropped"
        return "dense" if self.rank is None else self.module.storage

    @property
    def bits(self) -> str:
        """The bits of its numbers, such as ``4 bits in groups of 32``; empty if they are not rounded."""
        return "" if self.module.grid is None else next(iter(count_kinds([self.module.grid])))

    @property
    def any_k(self) -> bool:
        """Whether the kept components are a selection rather than the first ones."""
        return not self.module.is_prefix

    @property
    def level(self) -> int:
        """The kept fraction as one of ten colours."""
        return min(9, max(0, int(10 * self.kept)))

    @property
    def description(self) -> str:
        """All figures in one sentence."""
        place = "outside the blocks" if self.block is None else f"block {self.block}"
        size = f"{self.parameters:,} of {self.dense_parameters:,} parameters, {self.bytes / 1e6:,.2f} MB"
        size += f", {self.bits}" if self.bits else ""
        if self.rank is None:
            return f"{self.kind}, {place}: left dense, full rank {self.full_rank}, {size}"
        if self.module.is_dropped:
            return f"{self.kind}, {place}: dropped with its expert, whose tokens use others, {size}"
        form = "stored as two factors" if self.storage == "factored" else f"stored {self.storage}"
        form += f", the right one shared by {len(self.module.layers)} experts" if self.module.layers else ""
        notes = [
            *(["pivoted storage would be inaccurate"] if self.fell_back else []),
            *(["a selection of components, not the first ones"] if self.any_k else []),
            *([] if self.lost is None else [f"{_percent_of_tiny(self.lost)} of the spectral energy cut"]),
        ]
        rank = f"rank {self.rank} of {self.full_rank}, {percent(self.kept)} kept ({size}), {form}"
        return "; ".join([f"{self.kind}, {place}: {rank}", *notes])


@dataclass(frozen=True)
class Experts:
    """The layers of one type of all experts of a block, which share a cell of the rank map and a line of the table.

    Args:
        cells: One cell for each expert, of at least one.
    """

    cells: Sequence[Cell]

    @property
    def number(self) -> int:
        """Position of the first expert in the plan."""
        return self.cells[0].number

    @property
    def name(self) -> str:
        """Name of the layers, without the number of the expert."""
        inside = 1 + len(str(self.cells[0].expert)) + len(self.kind)
        return f"{self.cells[0].name[:-inside]}{self.kind}"

    @property
    def block(self) -> int | None:
        """Index of their decoder block."""
        return self.cells[0].block

    @property
    def kind(self) -> str:
        """Their path within the block."""
        return self.cells[0].kind

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of each."""
        return self.cells[0].shape

    @property
    def rank(self) -> int | None:
        """The least rank; None if all are dense."""
        return min((cell.rank for cell in self.cells if cell.rank is not None), default=None)

    @property
    def ranks(self) -> str:
        """The least and the greatest rank, and how many are dense or dropped."""
        ranks = [cell.rank for cell in self.cells if cell.rank]
        dropped = sum(cell.module.is_dropped for cell in self.cells)
        dense = len(self.cells) - len(ranks) - dropped
        said = [f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else str(ranks[0])] if ranks else []
        counts = {"dense": dense, "dropped": dropped}
        return ", ".join([*said, *(f"{count} {what}" for what, count in counts.items() if count)])

    @property
    def full_rank(self) -> int:
        """Components of one dense weight."""
        return min(self.shape)

    @property
    def parameters(self) -> int:
        """Stored numbers of all."""
        return sum(cell.parameters for cell in self.cells)

    @property
    def dense_parameters(self) -> int:
        """Numbers of all dense weights."""
        return sum(cell.dense_parameters for cell in self.cells)

    @property
    def kept(self) -> float:
        """Kept fraction of the parameters of all."""
        return self.parameters / self.dense_parameters

    @property
    def level(self) -> int:
        """The kept fraction as one of ten colours."""
        return min(9, max(0, int(10 * self.kept)))

    @property
    def bytes(self) -> int:
        """Bytes of the stored numbers."""
        return sum(cell.bytes for cell in self.cells)

    @property
    def storage(self) -> str:
        """The forms of storage that occur."""
        return ", ".join(dict.fromkeys(cell.storage for cell in self.cells))

    @property
    def bits(self) -> str:
        """The bits that occur; empty if no numbers are rounded."""
        return ", ".join(dict.fromkeys(cell.bits for cell in self.cells if cell.bits))

    @property
    def any_k(self) -> bool:
        """Whether an expert keeps a selection of components rather than the first ones."""
        return any(cell.any_k for cell in self.cells)

    @property
    def fell_back(self) -> bool:
        """Whether a layer is stored as two factors because pivoted storage would be inaccurate."""
        return any(cell.fell_back for cell in self.cells)

    @property
    def lost(self) -> float | None:
        """Mean fraction of the spectral energy that was cut where an expert is kept; None if a spectrum is missing."""
        there = [cell for cell in self.cells if not cell.module.is_dropped]
        lost = [cell.lost for cell in there if cell.lost is not None]
        return sum(lost) / len(lost) if lost and len(lost) == len(there) else None

    @property
    def curve(self) -> str:
        """The kept fractions of all experts, sorted, as an SVG path that is one high and as wide as there are experts.

        Every expert is a step, so that few experts can be counted.
        """
        heights = sorted(1 - min(cell.kept, 1.0) for cell in self.cells)
        return "M0 1" + "".join(f"V{height:.3f}H{place + 1}" for place, height in enumerate(heights)) + "V1Z"

    @property
    def description(self) -> str:
        """The figures of all in one sentence."""
        least, most = (pick(self.cells, key=lambda cell: cell.kept) for pick in (min, max))
        size = f"{self.parameters:,} of {self.dense_parameters:,} parameters, {self.bytes / 1e6:,.2f} MB"
        return (
            f"{self.kind}, block {self.block}: rank {self.ranks} of {self.full_rank} in {len(self.cells)} experts, "
            f"{percent(self.kept)} kept ({size}); most by expert {most.expert} ({percent(most.kept)}), least by expert "
            f"{least.expert} ({percent(least.kept)})"
        )


@dataclass(frozen=True)
class Drawing:
    """The spectrum of one layer as an SVG path, singular values on a logarithmic scale.

    Args:
        cell: The layer.
        area: Path of the area under the singular values.
        cut: Intervals of cut components as ``(start, width)``, from left to right.
    """

    cell: Cell
    area: str
    cut: Sequence[tuple[float, float]]

    @property
    def caption(self) -> str:
        """Rank and lost energy in words."""
        if self.cell.rank is None:
            return "dense"
        if self.cell.module.is_dropped:
            return "dropped"
        lost = "" if self.cell.lost is None else f", {_percent_of_tiny(self.cell.lost)} lost"
        return f"{self.cell.rank} of {self.cell.full_rank}{lost}"


@dataclass(frozen=True)
class SpectrumGroup:
    """The spectra of all layers of one type, on a common scale.

    Args:
        kind: The type.
        top: Singular value at the upper edge.
        bottom: Singular value at the lower edge.
        drawings: One per layer.
    """

    kind: str
    top: float
    bottom: float
    drawings: Sequence[Drawing]


def cells(plan: RankPlan, spectra: Mapping[str, Tensor]) -> list[Cell]:
    """Return one cell per layer of ``plan``, in its order.

    Args:
        plan: The plan.
        spectra: Singular values by layer; layers may be missing.
    """
    choice = Storage(plan.storage, plan.bytes_per_parameter)
    found = []
    for number, (name, module) in enumerate(plan.modules.items()):
        sigma = spectra.get(name)
        chosen = module.storage
        # Embeddings and layers that share a factor are factored in any case.
        if module.rank and not module.layers and name not in plan.embedded:
            chosen = choice.form(module.shape, module.rank)
        found.append(
            Cell(
                number=number,
                name=name,
                module=module,
                bytes_per_parameter=plan.bytes_per_parameter,
                fell_back=chosen != module.storage,
                lost=None if sigma is None else _lost_energy(sigma, module),
            )
        )
    return found


def _lost_energy(sigma: Tensor, module: ModulePlan) -> float:
    squares = sigma.double().square()
    total = float(squares.sum())
    if module.rank is None or total == 0:
        return 0.0
    kept = squares[: module.rank] if module.indices is None else squares[_indices(module)]
    return max(0.0, 1.0 - float(kept.sum()) / total)


def _indices(module: ModulePlan) -> Tensor:
    return torch.arange(module.rank or 0) if module.indices is None else torch.tensor(module.indices)


def by_place(shown: Sequence[Cell]) -> list[Cell | Experts]:
    """Return ``shown`` in its order, with the experts of a block together where the first of them is."""
    experts: dict[tuple[int | None, str], list[Cell]] = {}
    found: list[Cell | list[Cell]] = []
    for cell in shown:
        if cell.expert is None:
            found.append(cell)
        else:
            together = experts.setdefault((cell.block, cell.kind), [])
            if not together:
                found.append(together)
            together.append(cell)
    return [one if isinstance(one, Cell) else Experts(one) for one in found]


def grid(shown: Sequence[Cell | Experts]) -> tuple[list[int | None], dict[str, list[Cell | Experts | None]]]:
    """Return the blocks, and for each layer type its cell in every block; None where a block has none."""
    blocks: list[int | None] = [*sorted({cell.block for cell in shown if cell.block is not None})]
    blocks += [None] if any(cell.block is None for cell in shown) else []
    places = {(cell.kind, cell.block): cell for cell in shown}
    kinds = dict.fromkeys(cell.kind for cell in shown)
    return blocks, {kind: [places.get((kind, block)) for block in blocks] for kind in kinds}


def read_spectra(plan: RankPlan) -> tuple[dict[str, Tensor], str]:
    """Return the singular values of the plan's layers from its factor store, and a sentence that explains them.

    A store of refitted or rounded factors holds the kept components only, so the spectra come from the store that these
    were made from.
    """
    named = plan.origin.get("store")
    if "heal" in plan.fingerprint:
        return {}, "The factors were trained after the compression, so the singular values would say nothing about it."
    if not named:
        return {}, "The plan names no factor store, so the singular values can't be shown."
    directory = whole = Path(str(named))
    steps = []
    while whole.parent.name in ("rounding", "refit") and whole.parent.name in plan.fingerprint:
        steps.append(whole.parent.name)
        whole = whole.parent.parent
    of_refit = "refit" in steps
    try:
        store = FactorStore.existing(whole)
        here = [name for name in plan.modules if name in store]
        found = {name: store.sigma(name) for name in tqdm(here, desc="spectra", unit="layer", leave=False, delay=2)}
    except (ValueError, OSError) as error:
        _log.info("no spectra: %s", error)
        return {}, f"The factor store {directory} is missing or damaged, so the singular values can't be shown."
    if not found:
        return {}, f"The factor store {directory} has none of this plan's layers, so no singular values can be shown."
    weighting = {"two_sided": "weighted by inputs and output gradients", "whitened": "weighted by inputs"}
    kind = str(plan.origin.get("decomposition", {}).get("kind", ""))
    text = (
        f"Singular values of every weight{', ' + weighting[kind] if kind in weighting else ''}, on a logarithmic scale."
    )
    text += " They are from before the refit." if of_refit else ""
    absent = len(plan.modules) - len(found)
    return found, text + (f" Those of {absent} layers are missing." if absent else "")


def spectrum_groups(shown: Sequence[Cell], spectra: Mapping[str, Tensor]) -> list[SpectrumGroup]:
    """Return the drawn spectra, grouped by the type of layer.

    Of the experts of a block, those that keep least and most are drawn.
    """
    groups: dict[str, list[Cell]] = {}
    drawn: list[Cell] = []
    for one in by_place(shown):
        ends = [one] if isinstance(one, Cell) else sorted(one.cells, key=lambda cell: cell.kept)
        drawn += dict.fromkeys([ends[0], ends[-1]])
    for cell in drawn:
        if cell.name in spectra and len(spectra[cell.name]):
            groups.setdefault(cell.kind, []).append(cell)
    return [_group(kind, inside, spectra) for kind, inside in groups.items()]


def _group(kind: str, inside: Sequence[Cell], spectra: Mapping[str, Tensor]) -> SpectrumGroup:
    values = {cell.name: spectra[cell.name].double() for cell in inside}
    top = max(float(sigma.max()) for sigma in values.values()) or 1.0
    positive = [float(sigma[sigma > 0].min()) for sigma in values.values() if bool((sigma > 0).any())]
    bottom = max(min(positive, default=top), top * 10**-DECADES)
    bottom = bottom if bottom < top else top / 10
    return SpectrumGroup(kind, top, bottom, [_draw(cell, values[cell.name], top, bottom) for cell in inside])


def _draw(cell: Cell, sigma: Tensor, top: float, bottom: float) -> Drawing:
    count = len(sigma)
    heights = sigma.clamp(bottom, top).log10()
    span = math.log10(top) - math.log10(bottom)
    ys = (HEIGHT * (math.log10(top) - heights) / span).tolist()
    step = WIDTH / count
    # Spectra are steepest at their beginning.
    drawn = {*torch.linspace(0, count - 1, POINTS).round().int().tolist(), *(2**k for k in range(6) if 2**k < count)}
    line = "L".join(f"{(at + 0.5) * step:.1f} {ys[at]:.1f}" for at in sorted(drawn))
    area = f"M0 {HEIGHT:g}V{ys[0]:.1f}L{line}H{WIDTH:g}V{HEIGHT:g}Z"
    module = cell.module
    kept = torch.arange(count if module.rank is None else module.rank) if module.indices is None else _indices(module)
    missing = sorted({*range(count)} - {*kept.tolist()})
    cut = [(round(first * step, 1), round((last - first) * step, 1)) for first, last in _runs(missing, count)]
    return Drawing(cell, area, cut)


def _runs(indices: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Return the runs of consecutive ``indices`` as half-open intervals; gaps narrower than a pixel are closed.

    >>> _runs([0, 1, 2, 5, 6], 7)
    [(0, 3), (5, 7)]
    """
    per_pixel = count / WIDTH
    runs: list[tuple[int, int]] = []
    for at in indices:
        if runs and at - runs[-1][1] <= (per_pixel if per_pixel >= 1 else 0):
            runs[-1] = (runs[-1][0], at + 1)
        else:
            runs.append((at, at + 1))
    return runs


def _percent_of_tiny(fraction: float) -> str:
    """Return a fraction as a percentage, with one significant digit below 0.1 %.

    >>> _percent_of_tiny(0.1234), _percent_of_tiny(0.00034), _percent_of_tiny(1e-9)
    ('12.3 %', '0.03 %', '< 0.001 %')
    """
    if fraction >= 0.001 or fraction == 0:
        return percent(fraction)
    return f"{100 * fraction:.1g} %" if fraction >= 1e-5 else "< 0.001 %"
