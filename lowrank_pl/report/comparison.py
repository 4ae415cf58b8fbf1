"""Results of ``lowrank compare`` as JSON, as a table, as plots and as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lowrank_pl.plans.plan import training_of
from lowrank_pl.report.page import render
from lowrank_pl.utils.figures import plain, save_figure
from lowrank_pl.utils.files import atomic_write, write_json
from lowrank_pl.utils.formatting import code, escaped, percent, rounded_perplexity, table
from lowrank_pl.utils.json_files import read_json, sealed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DENSE",
    "comparison_cells",
    "comparison_page",
    "comparison_plot",
    "comparison_table",
    "lines_by_mean_excess",
    "read_results",
    "write_comparison",
    "write_comparison_page",
]

DENSE = "dense"
MARK = " (trained)"
"""Mark behind the name of a method whose weights were trained after the compression."""

MARKERS = "osD^vP*Xhd<>"

LABEL_HEIGHT = 0.16
"""Distance of the names of methods beside a figure, in inches."""

WIDTH, HEIGHT = 640, 360
"""Size of a plot on the page, in units of its own view box."""

LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40
"""Margins of a plot on the page, which hold the labels of its axes."""


@dataclass(frozen=True)
class Line:
    """One method in a plot on the page.

    Args:
        name: The method.
        place: Its rank among all methods, by mean excess; sets its colour.
        points: ``(x, y, description)`` of every size.
    """

    name: str
    place: int
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Plot:
    """A plot on the page: excess on one text against the kept fraction.

    Args:
        corpus: The text.
        lines: One per method.
        xs: Positions and labels on the x axis.
        ys: Positions and labels on the y axis.
    """

    corpus: str
    lines: Sequence[Line]
    xs: Sequence[tuple[float, str]]
    ys: Sequence[tuple[float, str]]


def comparison_table(results: Sequence[Mapping[str, Any]], *, fmt: str = "github") -> str:
    """Return the results as a table, best method first within each size.

    Args:
        results: As in ``results.json``.
        fmt: A format of ``tabulate``.
    """
    return table(*comparison_cells(results), fmt)


def comparison_cells(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return head and body of the table of ``results``, best method first within each size."""
    corpora = list(results[0]["perplexity"]) if results else []
    whole = _dense_bytes(results)
    head = ["method", "keep", "kept model", *(["kept bytes"] if whole else []), "MB"]
    head += [*(f"ppl {corpus}" for corpus in corpora), *(f"excess {corpus}" for corpus in corpora)]
    head += ["seconds", "peak GB"]
    body = [
        [
            _shown_name(row["method"], [row]),
            percent(row["keep"]["targeted"]),
            percent(row["keep"]["model"]),
            *([percent(row["bytes"] / whole)] if whole else []),
            f"{row['bytes'] / 1e6:,.1f}",
            *(rounded_perplexity(row["perplexity"][corpus]) for corpus in corpora),
            *(f"{row['excess'][corpus]:.3f}" for corpus in corpora),
            _seconds(row["seconds"]),
            f"{row['peak_memory'] / 1e9:.1f}",
        ]
        for row in sorted(results, key=lambda row: (-row["keep"]["asked"], _mean_excess(row)))
    ]
    return head, body


def _dense_bytes(results: Sequence[Mapping[str, Any]]) -> int:
    """Return the bytes of the dense model if any of ``results`` has rounded matrices, so that bytes compare; else 0."""
    if not any("bits" in row for row in results):
        return 0
    return next((int(row["bytes"]) for row in results if row["method"] == DENSE), 0)


def _kept(row: Mapping[str, Any], whole: int) -> float:
    """Return the kept fraction of bytes, or of the targeted parameters where the dense model's bytes are not needed."""
    return float(row["bytes"] / whole if whole else row["keep"]["targeted"])


def _shown_name(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{name}{MARK}" if any(training_of(row.get("notes", ())) for row in rows) else name


def _trained_rows(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each result whose weights were trained."""
    return [
        f"{row['method']} at keep {row['keep']['asked']:g} was trained after the compression: {found}"
        for row in results
        if (found := training_of(row.get("notes", ())))
    ]


def lines_by_mean_excess(
    results: Sequence[Mapping[str, Any]], methods: Sequence[str] = ()
) -> dict[str, list[Mapping[str, Any]]]:
    """Return the results of each method from its smallest size to its largest, without the dense model.

    Methods are sorted by the mean excess over the texts at their best size.

    Args:
        results: As in ``results.json``.
        methods: Methods to return; all by default.

    Raises:
        ValueError: A method has no result.
    """
    lines: dict[str, list[Mapping[str, Any]]] = {}
    whole = _dense_bytes(results)
    for row in sorted(results, key=lambda row: _kept(row, whole)):
        if row["method"] != DENSE:
            lines.setdefault(row["method"], []).append(row)
    for name in methods:
        if name not in lines:
            raise ValueError(f"no results of {name!r} to plot: expected one of {', '.join(lines)}")
    best = {name: min(map(_mean_excess, lines[name])) for name in methods or lines}
    return {name: lines[name] for name in sorted(best, key=best.__getitem__)}


def comparison_plot(results: Sequence[Mapping[str, Any]], corpus: str, *, methods: Sequence[str] = ()) -> Figure:
    """Return a plot of the excess in nats on ``corpus`` against the kept fraction, one line per method.

    The name of a method stands at the end of its line, at the largest size.

    Args:
        results: As in ``results.json``.
        corpus: One of the scored texts.
        methods: Methods to show; all by default.

    Raises:
        ValueError: A method has no result.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    lines = lines_by_mean_excess(results, methods)
    whole = _dense_bytes(results)
    figure = Figure(figsize=(7.2, max(4.2, 1.2 + 0.19 * len(lines))), layout="constrained")
    axes = figure.add_subplot()
    ends = {}
    for place, (name, rows) in enumerate(lines.items()):
        points = [(_kept(row, whole), row["excess"][corpus]) for row in rows]
        ends[_shown_name(name, rows)] = points[-1]
        axes.plot(
            *zip(*points, strict=True),
            marker=MARKERS[place % len(MARKERS)],
            linewidth=2.4 if place == 0 else 1.2,
            markersize=5,
            color=f"C{place % 10}",
            linestyle=("-", "--", ":")[place // 10 % 3],
        )
    # A tiny random model may come out better than dense by chance.
    values = [row["excess"][corpus] for rows in lines.values() for row in rows]
    if min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("{x:g}")
        if max(values) > 20 * min(values):
            # Labels of all digits would overlap.
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    sizes = sorted({row["keep"]["asked"] for rows in lines.values() for row in rows})
    if whole:
        axes.xaxis.set_major_formatter(lambda size, _: percent(size))
    elif len(sizes) <= 8:
        axes.set_xticks(sizes, [percent(size) for size in sizes])
    axes.set_xlabel("kept fraction of the model's bytes" if whole else "kept fraction of the targeted parameters")
    axes.set_ylabel("excess over the dense model in nats per token")
    axes.set_title(f"{plain(corpus)}: lower is better")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    if whole:
        # Many of these lines are single points, whose names would lie on each other.
        axes.legend(list(map(plain, ends)), loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
    else:
        _name_lines(axes, ends, {name: f"C{place % 10}" for place, name in enumerate(ends)})
    return figure


def _name_lines(axes: Axes, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Write the names of lines beside the axes, as close to their ends as they fit without overlap."""
    last = max(x for x, _ in ends.values())
    # Ranks are whole numbers, so kept fractions of one size differ slightly.
    outside = {name: end for name, end in ends.items() if end[0] > last - 0.02}
    heights = axes.transAxes.inverted().transform(axes.transData.transform(list(outside.values())))[:, 1]
    figure = axes.get_figure(root=True)
    assert figure is not None
    inches = figure.get_figheight() * axes.get_position().height
    gap = min(LABEL_HEIGHT / inches, 1 / max(1, len(outside) - 1))
    places = _spread(dict(zip(outside, heights, strict=True)), gap=gap)
    line: dict[str, Any] = {"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    for name, end in ends.items():
        look: dict[str, Any] = {"color": colours[name], "fontsize": 8, "verticalalignment": "center"}
        if name in places:
            beside: dict[str, Any] = {"xytext": (1.08, places[name]), "textcoords": "axes fraction"}
            axes.annotate(plain(name), end, **beside, **look, arrowprops={**line, "color": colours[name]})
        else:
            axes.annotate(plain(name), end, xytext=(7, 0), textcoords="offset points", **look)


def _spread(wanted: Mapping[str, float], *, gap: float) -> dict[str, float]:
    """Return the places in ``[0, 1]`` that are closest to ``wanted`` in least squares, at least ``gap`` apart."""
    order = sorted(wanted, key=lambda name: wanted[name])
    # After subtracting one gap per place below, this is isotonic regression: pool adjacent violators.
    pools: list[list[float]] = []
    for number, name in enumerate(order):
        pools.append([wanted[name] - number * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    room = 1 - (len(order) - 1) * gap
    level = [min(max(fmean(pool), 0), room) for pool in pools for _ in pool]
    return {name: place + number * gap for number, (name, place) in enumerate(zip(order, level, strict=True))}


def write_comparison(
    folder: Path, results: Sequence[Mapping[str, Any]], *, command: str, plotted: Sequence[str] = ()
) -> None:
    """Write ``results.json``, ``results.md`` and a plot per corpus to ``folder``, each file atomically.

    Args:
        folder: Created if absent.
        results: One per method and size.
        command: The command that makes them.
        plotted: Methods in the plots, as far as they have results; all by default.
    """
    write_json(folder / "results.json", [sealed(row) for row in results])
    trained = "".join(f"* {escaped(sentence)}\n" for sentence in _trained_rows(results))
    said = f"{trained}\n" if trained else ""
    atomic_write(folder / "results.md", f"{comparison_table(results)}\n\n{said}Made by {code(command)}.\n")
    drawn = [row for row in results if row["method"] != DENSE]
    there = {row["method"] for row in drawn}
    for corpus in drawn[0]["perplexity"] if drawn else ():
        shown = [name for name in plotted if name in there]
        save_figure(comparison_plot(results, corpus, methods=shown), folder / f"excess-{corpus}.png")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the list in ``results.json`` of ``folder``; empty if there is no such file.

    Raises:
        ValueError: The file is damaged; the message names it and the field.
    """
    path = folder / "results.json"
    if not path.exists():
        return []
    from lowrank_pl.report.file_schemas import ComparisonFile

    advice = "delete it or name another folder"
    found: list[dict[str, Any]] = read_json(path, ComparisonFile, what="a list of results", advice=advice)
    return found


def _seconds(parts: Mapping[str, float | None]) -> str:
    """Return the seconds from the dense model to the plan; a plus marks that a part of them is unknown."""
    spent = {name: part for name, part in parts.items() if name != "scores"}
    known = sum(part for part in spent.values() if part is not None)
    return f"{known:,.0f}{'+' if None in spent.values() else ''}"


def _mean_excess(row: Mapping[str, Any]) -> float:
    excess: dict[str, float] = row["excess"]
    return sum(excess.values()) / max(1, len(excess))


def write_comparison_page(folder: Path, path: Path) -> Path:
    """Write the page of the comparison in ``folder`` to ``path`` and return the path.

    Raises:
        ValueError: There are no results, or they are damaged.
    """
    return atomic_write(path, comparison_page(read_results(folder), title=f"Comparison in {folder.name}"))


def comparison_page(results: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Return the page of a comparison as HTML.

    Args:
        results: As in ``results.json``.
        title: Heading of the page.

    Raises:
        ValueError: There are no results.
    """
    if not results:
        raise ValueError("the comparison has no results yet: run `lowrank compare` again, it resumes")
    head, body = comparison_cells(results)
    lines, whole = lines_by_mean_excess(results), _dense_bytes(results)
    corpora = results[0]["excess"] if lines else ()
    machines = {
        str(row.get("machine", {}).get("accelerator") or row.get("machine", {}).get("processor")) for row in results
    }
    return render(
        "comparison.html", title=title, head=head, body=body, machines=sorted(machines - {"None"}),
        names=[_shown_name(name, rows) for name, rows in lines.items()], in_bytes=bool(whole),
        plots=[_plot(lines, corpus, whole) for corpus in corpora], results=results, trained=_trained_rows(results),
        WIDTH=WIDTH, HEIGHT=HEIGHT, LEFT=LEFT, RIGHT=RIGHT, BOTTOM=BOTTOM,
    )  # fmt: skip


def _plot(results: Mapping[str, Sequence[Mapping[str, Any]]], corpus: str, whole: int) -> Plot:
    rows = [row for of_method in results.values() for row in of_method]
    sizes = [_kept(row, whole) for row in rows]
    values = [row["excess"][corpus] for row in rows]
    ticks = _ticks(min(values), max(values))
    # A tiny random model may come out better than dense by chance.
    scale = math.log10 if min(values) > 0 else float
    low, high = scale(min(*ticks, *values)), scale(max(*ticks, *values))
    left, right = min(sizes), max(sizes)

    def x(size: float) -> float:
        share = (size - left) / (right - left) if right > left else 0.5
        return round(LEFT + 24 + share * (WIDTH - LEFT - RIGHT - 48), 1)

    def y(value: float) -> float:
        return round(TOP + (high - scale(value)) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for place, (name, of_method) in enumerate(results.items()):
        lines.append(Line(_shown_name(name, of_method), place, [
            (x(_kept(row, whole)), y(row["excess"][corpus]),
             f"{name}, {percent(_kept(row, whole))} kept: {row['excess'][corpus]:.3f} nats")
            for row in of_method
        ]))  # fmt: skip
    asked = sorted({round(size, 1) for size in sizes} if whole else {row["keep"]["asked"] for row in rows})
    return Plot(corpus, lines, [(x(size), percent(size)) for size in asked], [(y(tick), f"{tick:g}") for tick in ticks])


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers from the last one at or below ``low`` to the first one at or above ``high``.

    These are 1, 2 and 5 of every decade, or evenly spaced numbers if ``low`` is not positive.

    >>> _ticks(0.03, 0.4), _ticks(-0.1, 0.3)
    ([0.02, 0.05, 0.1, 0.2, 0.5], [-0.1, 0.0, 0.1, 0.2, 0.3])
    """
    if low > 0:
        marks = [float(f"{digit}e{power}") for power in range(-12, 13) for digit in (1, 2, 5)]
        first = max(mark for mark in marks if mark <= max(low, marks[0]))
        return [
            mark for mark in marks if first <= mark and (mark <= high or mark == min(m for m in marks if m >= high))
        ]
    span = high - low or 1.0
    unit = 10.0 ** math.floor(math.log10(span))
    step = next(unit * part for part in (0.1, 0.2, 0.5, 1, 2) if span / (unit * part) <= 6)
    return [round(step * k, 12) for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
