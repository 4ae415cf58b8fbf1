"""A plan as a table of its module types, and as a rank map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowrank_pl.models.names import block_and_kind, expert_number
from lowrank_pl.plans.plan import ModulePlan, RankPlan, count_kinds
from lowrank_pl.utils.figures import plain
from lowrank_pl.utils.formatting import percent, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bits_in_words", "count_bits", "rank_map", "rank_table"]

WIDE = 40
"""Blocks beyond which there is no room for a number under every column."""

NUMBERED = 8
"""Experts of a block beyond which they are sorted, because nobody looks for one of them by its number."""


@dataclass(frozen=True)
class _Band:
    """The rows of a rank map that show one module type: one row, or one for each expert of a block.

    Args:
        kind: The module type.
        kept: Kept fractions ``[rows, blocks]``, NaN without a module.
        dense: Whether a module is left dense, ``[rows, blocks]``.
        height: Height in units of a module type without experts.
        label: What the axis says.
    """

    kind: str
    kept: NDArray[np.float64]
    dense: NDArray[np.bool_]
    height: float
    label: str


def rank_table(plan: RankPlan, *, fmt: str = "simple") -> str:
    """Return a table of what a plan keeps of each module type: mean, least and most over the blocks.

    If a plan keeps a selection of components rather than the first ones, a column counts the modules with a selection.
    If it drops experts, a column counts their modules, and if it rounds numbers, one names the bits.

    Args:
        plan: The plan.
        fmt: A format of ``tabulate``: ``simple`` for a terminal, ``github`` for Markdown.

    Example:
        >>> plan = RankPlan(method="hand", keep=0.5, model_parameters=300,
        ...                 modules={"h.0.q": ModulePlan((10, 10), 2), "h.1.q": ModulePlan((10, 10))})
        >>> print(rank_table(plan, fmt="github").splitlines()[2])
        | q             |         2 |       1 |      70.0 % |  40.0 % | 100.0 % |
    """
    kinds: dict[str, list[ModulePlan]] = {}
    for name, module in plan.modules.items():
        kinds.setdefault(block_and_kind(name)[1], []).append(module)
    kinds["all"] = list(plan.modules.values())
    head = ["module type", "modules", "dense", "mean kept", "least", "most"]
    body = [_kept_line(kind, modules, plan.bytes_per_parameter) for kind, modules in kinds.items()]
    if plan.any_k_modules:
        head.insert(3, "any-k")
        for line, modules in zip(body, kinds.values(), strict=True):
            line.insert(3, str(sum(not module.is_prefix for module in modules)))
    if plan.dropped_modules:
        head.insert(3, "dropped")
        for line, modules in zip(body, kinds.values(), strict=True):
            line.insert(3, str(sum(module.is_dropped for module in modules)))
    if plan.is_rounded:
        head.append("bits")
        for line, modules in zip(body, kinds.values(), strict=True):
            line.append(_bits(modules))
    return table(head, body, fmt)


def _bits(modules: Sequence[ModulePlan]) -> str:
    """Return the bits that modules are rounded to; ``as is`` stands for those that are not."""
    widths = sorted({module.grid.bits for module in modules if module.grid is not None})
    as_is = ["as is"] if any(module.grid is None for module in modules) else []
    return ", ".join([*map(str, widths), *as_is])


def bits_in_words(plan: RankPlan) -> str:
    """Return the bits that a plan rounds to, such as ``4 and 8 bits``; empty if it rounds nothing."""
    *first, last = [str(width) for width in plan.widths] or [""]
    return f"{', '.join(first)}{' and ' if first else ''}{last} bits" if last else ""


def count_bits(plan: RankPlan) -> str:
    """Return how many layers have each kind of numbers, and which embeddings; empty if the plan rounds nothing."""
    if not plan.is_rounded:
        return ""
    layers = [f"{count} {_counted(plan)} {_with(kind)}" for kind, count in plan.bits.items()]
    embeddings = [f"{name} {_with(next(iter(count_kinds([one.grid]))))}" for name, one in plan.embeddings.items()]
    return ", ".join([*layers, *embeddings])


def _counted(plan: RankPlan) -> str:
    return "layers" if plan.embedded else "linear layers"


def _with(kind: str) -> str:
    return kind if kind == "as they are" else f"with {kind}"


def rank_map(plan: RankPlan, *, title: str | None = None) -> Figure:
    """Return a heat map of the kept fraction of every targeted module: blocks across, module types down.

    Experts have a thin row each, in the order of their numbers or, if there are many, sorted in each block from the one
    that keeps most to the one that keeps least.

    Colours range from 0 to 1 in every figure, so figures are comparable. Dense modules are marked, and cells without a
    targeted module are grey. Plans of few blocks show the fractions as numbers. The figure is not registered with
    ``pyplot``.

    Args:
        plan: The plan.
        title: Heading; by default the method and the kept fraction.

    Raises:
        ValueError: The plan has no module.
    """
    from matplotlib.figure import Figure

    if not plan.modules:
        raise ValueError("the plan has no module: expected at least one")
    blocks, bands = _bands(plan)
    size = (min(18.0, max(5.5, 3.0 + 0.28 * len(blocks))), 1.8 + 0.32 * sum(band.height for band in bands))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.9")
    # Lines separate cells of equal colour. Viridis is uniform in lightness, so colour-blind readers can read it.
    line = 1.0 if len(blocks) <= WIDE else 0.3
    columns, top, marks = np.arange(len(blocks) + 1), 0.0, []
    for band in bands:
        edges = top + band.height * np.linspace(0, 1, len(band.kept) + 1)
        width = line if len(band.kept) <= NUMBERED else 0.0
        mesh = axes.pcolormesh(
            columns, edges, band.kept, cmap="viridis", vmin=0.0, vmax=1.0, edgecolors="white", linewidth=width
        )
        if len(band.kept) > 1:
            axes.axhline(top, color="white", linewidth=5 * line)
        middles = (edges[1:] + edges[:-1]) / 2
        if len(blocks) <= 8 and len(band.kept) <= NUMBERED:
            _write_cells(axes, band, middles)
        else:
            marks += [(column + 0.5, middles[row]) for row, column in zip(*band.dense.nonzero(), strict=True)]
        top += band.height
    _label_axes(axes, blocks, bands)
    if marks:
        across, down = zip(*marks, strict=True)
        axes.scatter(across, down, s=10 if len(marks) <= 500 else 1, color="black", label="left dense")
    bits = f", {bits_in_words(plan)}" if plan.is_rounded else ""
    heading = title or f"{plan.method}: {percent(plan.keep_targeted)} of the targeted parameters kept{bits}"
    axes.set_title(plain(heading), pad=8)
    figure.colorbar(mesh, ax=axes, label="kept fraction", pad=0.02, ticks=np.linspace(0, 1, 6))
    _add_legend(figure, axes, missing=any(np.isnan(band.kept).any() for band in bands))
    return figure


def _kept(module: ModulePlan, size: int) -> float:
    return module.numbers(size) / module.dense_parameters


def _kept_line(kind: str, modules: Sequence[ModulePlan], size: int) -> list[str]:
    kept = [_kept(module, size) for module in modules]
    dense = sum(module.rank is None for module in modules)
    # Weighted by size, so that the row of all modules is the plan's own fraction.
    mean = sum(module.numbers(size) for module in modules) / sum(module.dense_parameters for module in modules)
    return [kind, str(len(modules)), str(dense), percent(mean), percent(min(kept)), percent(max(kept))]


def _bands(plan: RankPlan) -> tuple[list[int | None], list[_Band]]:
    """Return the blocks, and the rows of every module type."""
    places = {name: block_and_kind(name) for name in plan.modules}
    numbered = sorted({block for block, _ in places.values() if block is not None})
    blocks: list[int | None] = [*numbered, *([None] if any(block is None for block, _ in places.values()) else [])]
    columns = {block: column for column, block in enumerate(blocks)}
    kinds: dict[str, list[str]] = {}
    for name, (_, kind) in places.items():
        kinds.setdefault(kind, []).append(name)
    return blocks, [_band(plan, kind, names, columns) for kind, names in kinds.items()]


def _band(plan: RankPlan, kind: str, names: Sequence[str], columns: dict[int | None, int]) -> _Band:
    experts = [expert_number(name) for name in names]
    rows = 1 + max((number for number in experts if number is not None), default=0)
    kept, dense = np.full((rows, len(columns)), np.nan), np.zeros((rows, len(columns)), dtype=bool)
    for name, expert in zip(names, experts, strict=True):
        place = expert or 0, columns[block_and_kind(name)[0]]
        kept[place], dense[place] = _kept(plan.modules[name], plan.bytes_per_parameter), plan.modules[name].rank is None
    if all(expert is None for expert in experts):
        return _Band(kind, kept, dense, 1.0, kind)
    if rows <= NUMBERED:
        return _Band(kind, kept, dense, 0.62 * rows, f"{kind}\n{rows} experts from the top")
    order = np.argsort(-np.nan_to_num(kept, nan=-1.0), axis=0, kind="stable")
    kept, dense = (np.take_along_axis(values, order, axis=0) for values in (kept, dense))
    return _Band(kind, kept, dense, min(8.0, 0.4 * rows), f"{kind}\n{rows} experts, sorted")


def _label_axes(axes: Any, blocks: Sequence[int | None], bands: Sequence[_Band]) -> None:
    every = max(1, -(-len(blocks) // WIDE))
    labels = ["none" if block is None else str(block) for block in blocks]
    axes.set_xticks([place + 0.5 for place in range(0, len(blocks), every)], labels[::every], fontsize=8)
    ends = np.cumsum([band.height for band in bands])
    places = [end - band.height / 2 for end, band in zip(ends, bands, strict=True)]
    axes.set_yticks(places, [plain(band.label) for band in bands], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylim(ends[-1], 0)
    axes.set_xlabel("block")
    axes.set_ylabel("module type")


def _write_cells(axes: Any, band: _Band, middles: NDArray[np.float64]) -> None:
    for (row, column), kept in np.ndenumerate(band.kept):
        if not np.isnan(kept):
            text = "dense" if band.dense[row, column] else f"{kept:.2f}" if kept else "dropped"
            colour = "black" if kept > 0.6 else "white"
            axes.text(column + 0.5, middles[row], text, ha="center", va="center", color=colour, fontsize=8)


def _add_legend(figure: Figure, axes: Any, *, missing: bool) -> None:
    from matplotlib.patches import Patch

    handles = axes.get_legend_handles_labels()[0]
    handles += [Patch(color="0.9", label="not targeted")] if missing else []
    if handles:
        figure.legend(handles=handles, loc="outside lower right", ncols=2, frameon=False, fontsize=8)
