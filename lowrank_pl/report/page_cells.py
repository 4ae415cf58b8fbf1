"""What the page of a run shows of each module: its rank in words, its place in the rank map, its spectrum."""

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
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.plans.storage import Storage
from lowrank_pl.utils.formatting import block_and_kind, percent

__all__ = ["Cell", "Drawing", "SpectrumGroup", "cells", "grid", "read_spectra", "spectrum_groups"]

_log = logging.getLogger(__name__)


WIDTH, HEIGHT = 120.0, 60.0
"""Of a drawn spectrum, in its own units."""


POINTS = 32
"""Of a drawn spectrum, about: more show no more at that size."""


DECADES = 6.0
"""Below the largest singular value, where drawing ends: what is smaller is rounding."""


@dataclass(frozen=True)
class Cell:
    """One module of the rank map.

    Args:
        number: Its place in the plan.
        name: Its name.
        block: Its block; None outside any.
        kind: Its path within the block.
        shape: ``(out, in)``.
        rank: Kept components; None is dense.
        kept: Kept fraction of its parameters, indices of pivots included.
        parameters: Numbers that it takes.
        bytes: Bytes that these take.
        storage: ``dense``, ``factored`` or ``pivoted``.
        fell_back: Whether it is stored as two factors only because pivots would not have been accurate.
        any_k: Whether the kept components are not the first ones.
        lost: Fraction of the sum of squared singular values that was cut; None where the spectrum is gone.
    """

    number: int
    name: str
    block: int | None
    kind: str
    shape: tuple[int, int]
    rank: int | None
    kept: float
    parameters: int
    bytes: int
    storage: str
    fell_back: bool
    any_k: bool
    lost: float | None

    @property
    def full_rank(self) -> int:
        """The most components that there are."""
        return min(self.shape)

    @property
    def dense_parameters(self) -> int:
        """Numbers of the dense weight."""
        return self.shape[0] * self.shape[1]

    @property
    def level(self) -> int:
        """The kept fraction as one of ten colours."""
        return min(9, max(0, int(10 * self.kept)))

    @property
    def said(self) -> str:
        """All of it in a sentence."""
        place = "outside the blocks" if self.block is None else f"block {self.block}"
        size = f"{self.parameters:,} of {self.dense_parameters:,} parameters, {self.bytes / 1e6:,.2f} MB"
        if self.rank is None:
            return f"{self.kind}, {place}: left dense, full rank {self.full_rank}, {size}"
        form = "stored as two factors" if self.storage == "factored" else f"stored {self.storage}"
        notes = [
            *(["pivots would not have been accurate"] if self.fell_back else []),
            *(["not the first components but a chosen set"] if self.any_k else []),
            *([] if self.lost is None else [f"{_share(self.lost)} of the squared singular values cut"]),
        ]
        said = f"rank {self.rank} of {self.full_rank}, {percent(self.kept)} kept ({size}), {form}"
        return "; ".join([f"{self.kind}, {place}: {said}", *notes])


@dataclass(frozen=True)
class Drawing:
    """The spectrum of one module as SVG paths, singular values on a logarithmic scale.

    Args:
        cell: The module.
        area: What lies under its values.
        gone: Where components are cut, from left to right as ``(start, width)``.
    """

    cell: Cell
    area: str
    gone: Sequence[tuple[float, float]]

    @property
    def said(self) -> str:
        """The cut in words."""
        if self.cell.rank is None:
            return "dense"
        lost = "" if self.cell.lost is None else f", {_share(self.cell.lost)} lost"
        return f"{self.cell.rank} of {self.cell.full_rank}{lost}"


@dataclass(frozen=True)
class SpectrumGroup:
    """The spectra of all modules of one type, on one scale.

    Args:
        kind: The type.
        top: The value at the upper edge.
        bottom: The value at the lower edge.
        drawings: One a module.
    """

    kind: str
    top: float
    bottom: float
    drawings: Sequence[Drawing]


def cells(plan: RankPlan, spectra: Mapping[str, Tensor]) -> list[Cell]:
    """Return what is shown of each module of ``plan``, in its order.

    Args:
        plan: The plan.
        spectra: Singular values by module, as far as they are there.
    """
    return [
        _cell(number, name, module, plan, spectra.get(name))
        for number, (name, module) in enumerate(plan.modules.items())
    ]


def _cell(number: int, name: str, module: ModulePlan, plan: RankPlan, sigma: Tensor | None) -> Cell:
    block, kind = block_and_kind(name)
    numbers = module.numbers(plan.bytes_per_parameter)
    prices = Storage(plan.storage, plan.bytes_per_parameter)
    return Cell(
        number=number,
        name=name,
        block=block,
        kind=kind,
        shape=module.shape,
        rank=module.rank,
        kept=numbers / module.dense_parameters,
        parameters=numbers,
        bytes=numbers * plan.bytes_per_parameter,
        storage="dense" if module.rank is None else module.storage,
        fell_back=module.rank is not None and prices.form(module.shape, module.rank) != module.storage,
        any_k=not module.is_prefix,
        lost=None if sigma is None else _lost(sigma, module),
    )


def _lost(sigma: Tensor, module: ModulePlan) -> float:
    squares = sigma.double().square()
    total = float(squares.sum())
    if module.rank is None or total == 0:
        return 0.0
    kept = squares[: module.rank] if module.indices is None else squares[_indices(module)]
    return max(0.0, 1.0 - float(kept.sum()) / total)


def _indices(module: ModulePlan) -> Tensor:
    return torch.arange(module.rank or 0) if module.indices is None else torch.tensor(module.indices)


def grid(shown: Sequence[Cell]) -> tuple[list[int | None], dict[str, list[Cell | None]]]:
    """Return the blocks, and for every type of module its cell in each of these, None where there is none."""
    blocks: list[int | None] = [*sorted({cell.block for cell in shown if cell.block is not None})]
    blocks += [None] if any(cell.block is None for cell in shown) else []
    places = {(cell.kind, cell.block): cell for cell in shown}
    kinds = dict.fromkeys(cell.kind for cell in shown)
    return blocks, {kind: [places.get((kind, block)) for block in blocks] for kind in kinds}


def read_spectra(plan: RankPlan) -> tuple[dict[str, Tensor], str]:
    """Return the singular values of the plan's modules from the store that it names, and a sentence on what they are.

    Refitted factors hold the kept components only: the spectra are those that they were refitted from.
    """
    named = plan.origin.get("store")
    if not named:
        return {}, "The plan names no store of factors, so the singular values can't be shown."
    directory = Path(str(named))
    of_refit = "refit" in plan.fingerprint and directory.parent.name == "refit"
    try:
        store = FactorStore.existing(directory.parent.parent if of_refit else directory)
        here = [name for name in plan.modules if name in store]
        found = {name: store.spectrum(name) for name in tqdm(here, desc="spectra", unit="module", leave=False, delay=2)}
    except (ValueError, OSError) as error:
        _log.info("no spectra: %s", error)
        return {}, f"The factors at {directory} are gone or damaged, so the singular values can't be shown."
    if not found:
        return {}, f"The factors at {directory} are not those of this plan's modules: no singular values to show."
    what = {"two_sided": "weighted by inputs and output gradients", "whitened": "weighted by inputs"}
    kind = str(plan.origin.get("decomposition", {}).get("kind", ""))
    said = f"Singular values of every weight{', ' + what[kind] if kind in what else ''}, on a logarithmic scale."
    said += " They are those before the refit." if of_refit else ""
    gone = len(plan.modules) - len(found)
    return found, said + (f" Those of {gone} modules are gone." if gone else "")


def spectrum_groups(plan: RankPlan, shown: Sequence[Cell], spectra: Mapping[str, Tensor]) -> list[SpectrumGroup]:
    """Return the drawn spectra, grouped by the type of module."""
    groups: dict[str, list[Cell]] = {}
    for cell in shown:
        if cell.name in spectra and len(spectra[cell.name]):
            groups.setdefault(cell.kind, []).append(cell)
    return [_group(kind, inside, plan, spectra) for kind, inside in groups.items()]


def _group(kind: str, inside: Sequence[Cell], plan: RankPlan, spectra: Mapping[str, Tensor]) -> SpectrumGroup:
    values = {cell.name: spectra[cell.name].double() for cell in inside}
    top = max(float(sigma.max()) for sigma in values.values()) or 1.0
    positive = [float(sigma[sigma > 0].min()) for sigma in values.values() if bool((sigma > 0).any())]
    bottom = max(min(positive, default=top), top * 10**-DECADES)
    bottom = bottom if bottom < top else top / 10
    drawings = [_drawing(cell, plan.modules[cell.name], values[cell.name], top, bottom) for cell in inside]
    return SpectrumGroup(kind, top, bottom, drawings)


def _drawing(cell: Cell, module: ModulePlan, sigma: Tensor, top: float, bottom: float) -> Drawing:
    count = len(sigma)
    heights = sigma.clamp(bottom, top).log10()
    span = math.log10(top) - math.log10(bottom)
    ys = (HEIGHT * (math.log10(top) - heights) / span).tolist()
    step = WIDTH / count
    # Spectra fall most at their beginning.
    drawn = {*torch.linspace(0, count - 1, POINTS).round().int().tolist(), *(2**k for k in range(6) if 2**k < count)}
    line = "L".join(f"{(at + 0.5) * step:.1f} {ys[at]:.1f}" for at in sorted(drawn))
    area = f"M0 {HEIGHT:g}V{ys[0]:.1f}L{line}H{WIDTH:g}V{HEIGHT:g}Z"
    kept = torch.arange(count if module.rank is None else module.rank) if module.indices is None else _indices(module)
    cut = sorted({*range(count)} - {*kept.tolist()})
    gone = [(round(first * step, 1), round((last - first) * step, 1)) for first, last in _runs(cut, count)]
    return Drawing(cell, area, gone)


def _runs(indices: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Return the runs of neighbours among ``indices``; gaps too narrow to be seen are closed.

    >>> _runs([0, 1, 2, 5, 6], 7)
    [(0, 3), (5, 7)]
    """
    unseen = count / WIDTH
    runs: list[tuple[int, int]] = []
    for at in indices:
        if runs and at - runs[-1][1] <= (unseen if unseen >= 1 else 0):
            runs[-1] = (runs[-1][0], at + 1)
        else:
            runs.append((at, at + 1))
    return runs


def _share(fraction: float) -> str:
    """Return a fraction that may be tiny as a percentage."""
    return percent(fraction) if fraction >= 0.001 or fraction == 0 else f"{100 * fraction:.1g} %"
