"""The page of a comparison: its table, and for every text the excess against the size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_pl.comparison import comparison_cells, lines_by_mean_excess, read_results
from lowrank_pl.files import atomic_write
from lowrank_pl.page import render
from lowrank_pl.plan_report import percent

__all__ = ["comparison_page", "write_comparison_page"]

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40
"""Margins of the plot, with the labels of its axes."""


@dataclass(frozen=True)
class Line:
    """One method in a plot.

    Args:
        name: The method.
        place: Its rank among all, by mean excess, from which its colour follows.
        points: ``(x, y, what)`` of every size.
    """

    name: str
    place: int
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Plot:
    """The excess on one text against the kept fraction.

    Args:
        corpus: The text.
        lines: One a method.
        xs: Labels of the x axis with their places.
        ys: Labels of the y axis with theirs.
    """

    corpus: str
    lines: Sequence[Line]
    xs: Sequence[tuple[float, str]]
    ys: Sequence[tuple[float, str]]


def write_comparison_page(folder: Path, path: Path) -> Path:
    """Write the page of the comparison in ``folder`` to ``path`` and return the path.

    Raises:
        ValueError: There are no results, or damaged ones.
    """
    return atomic_write(path, comparison_page(read_results(folder), title=f"Comparison in {folder.name}"))


def comparison_page(results: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Return the page of a comparison as HTML.

    Args:
        results: As in ``results.json``.
        title: Its heading.

    Raises:
        ValueError: There are no results.
    """
    if not results:
        raise ValueError("the comparison has no results yet: run `lowrank compare` again, it goes on where it stopped")
    head, body = comparison_cells(results)
    lines = lines_by_mean_excess(results)
    corpora = results[0]["excess"] if lines else ()
    machines = {
        str(row.get("machine", {}).get("accelerator") or row.get("machine", {}).get("processor")) for row in results
    }
    return render(
        "comparison.html", title=title, head=head, body=body, names=list(lines), machines=sorted(machines - {"None"}),
        plots=[_plot(lines, corpus) for corpus in corpora], results=results,
        WIDTH=WIDTH, HEIGHT=HEIGHT, LEFT=LEFT, RIGHT=RIGHT, BOTTOM=BOTTOM,
    )  # fmt: skip


def _plot(results: Mapping[str, Sequence[Mapping[str, Any]]], corpus: str) -> Plot:
    rows = [row for of_method in results.values() for row in of_method]
    sizes = [row["keep"]["targeted"] for row in rows]
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
        lines.append(Line(name, place, [
            (x(row["keep"]["targeted"]), y(row["excess"][corpus]),
             f"{name}, {percent(row['keep']['targeted'])} kept: {row['excess'][corpus]:.3f} nats")
            for row in of_method
        ]))  # fmt: skip
    asked = sorted({row["keep"]["asked"] for row in rows})
    return Plot(corpus, lines, [(x(size), percent(size)) for size in asked], [(y(tick), f"{tick:g}") for tick in ticks])


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers from the last one at or below ``low`` to the first one at or above ``high``.

    They are 1, 2 and 5 of every decade; where ``low`` is not positive, evenly spaced ones.

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
