"""A plan as a table of its module types, and as a rank map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowrank_pl.plans.plan import ModulePlan, RankPlan, count_kinds
from lowrank_pl.utils.figures import plain
from lowrank_pl.utils.formatting import block_and_kind, percent, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bits_in_words", "count_bits", "rank_map", "rank_table"]

WIDE = 40
"""Blocks beyond which there is no room for a number under every column."""


def rank_table(plan: RankPlan, *, fmt: str = "simple") -> str:
    """Return a table of what a plan keeps of each module type: mean, least and most over the blocks.

    If a plan keeps a selection of components rather than the first ones, a column counts the modules with a selection.
    If it rounds numbers, a column names the bits.

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
    body = [_kept_line(kind, modules) for kind, modules in kinds.items()]
    if plan.any_k_modules:
        head.insert(3, "any-k")
        for line, modules in zip(body, kinds.values(), strict=True):
            line.insert(3, str(sum(not module.is_prefix for module in modules)))
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
    grid, blocks, kinds = _kept_grid(plan)
    dense = [(kinds.index(kind), blocks.index(block)) for block, kind in map(block_and_kind, plan.dense_modules)]
    size = (min(18.0, max(5.5, 3.0 + 0.28 * len(blocks))), 1.8 + 0.32 * len(kinds))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.9")
    # Lines separate cells of equal colour. Viridis is uniform in lightness, so colour-blind readers can read it.
    line = 1.0 if len(blocks) <= WIDE else 0.3
    mesh = axes.pcolormesh(grid, cmap="viridis", vmin=0.0, vmax=1.0, edgecolors="white", linewidth=line)
    _label_axes(axes, blocks, kinds)
    if len(blocks) <= 8:
        _write_cells(axes, grid, dense)
    elif dense:
        rows, columns = np.array(dense).T + 0.5
        axes.scatter(columns, rows, s=10, color="black", label="left dense")
    bits = f", {bits_in_words(plan)}" if plan.is_rounded else ""
    heading = title or f"{plan.method}: {percent(plan.keep_targeted)} of the targeted parameters kept{bits}"
    axes.set_title(plain(heading), pad=8)
    figure.colorbar(mesh, ax=axes, label="kept fraction", pad=0.02, ticks=np.linspace(0, 1, 6))
    _add_legend(figure, axes, missing=bool(np.isnan(grid).any()))
    return figure


def _kept(module: ModulePlan) -> float:
    return module.parameters / module.dense_parameters


def _kept_line(kind: str, modules: Sequence[ModulePlan]) -> list[str]:
    kept = [_kept(module) for module in modules]
    dense = sum(module.rank is None for module in modules)
    # Weighted by size, so that the row of all modules is the plan's own fraction.
    mean = sum(module.parameters for module in modules) / sum(module.dense_parameters for module in modules)
    return [kind, str(len(modules)), str(dense), percent(mean), percent(min(kept)), percent(max(kept))]


def _kept_grid(plan: RankPlan) -> tuple[NDArray[np.float64], list[int | None], list[str]]:
    """Return the kept fractions ``[kinds, blocks]``, NaN without a module, and the labels of both axes."""
    places = {name: block_and_kind(name) for name in plan.modules}
    numbered = sorted({block for block, _ in places.values() if block is not None})
    blocks = [*numbered, *([None] if any(block is None for block, _ in places.values()) else [])]
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for name, (block, kind) in places.items():
        grid[kinds.index(kind), blocks.index(block)] = _kept(plan.modules[name])
    return grid, blocks, kinds


def _label_axes(axes: Any, blocks: Sequence[int | None], kinds: Sequence[str]) -> None:
    every = max(1, -(-len(blocks) // WIDE))
    labels = ["none" if block is None else str(block) for block in blocks]
    axes.set_xticks([place + 0.5 for place in range(0, len(blocks), every)], labels[::every], fontsize=8)
    axes.set_yticks([place + 0.5 for place in range(len(kinds))], list(map(plain, kinds)), fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    axes.set_xlabel("block")
    axes.set_ylabel("module type")


def _write_cells(axes: Any, grid: NDArray[np.float64], dense: Sequence[tuple[int, int]]) -> None:
    for (row, column), kept in np.ndenumerate(grid):
        if not np.isnan(kept):
            text = "dense" if (row, column) in dense else f"{kept:.2f}"
            colour = "black" if kept > 0.6 else "white"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=8)


def _add_legend(figure: Figure, axes: Any, *, missing: bool) -> None:
    from matplotlib.patches import Patch

    handles = axes.get_legend_handles_labels()[0]
    handles += [Patch(color="0.9", label="not targeted")] if missing else []
    if handles:
        figure.legend(handles=handles, loc="outside lower right", ncols=2, frameon=False, fontsize=8)
