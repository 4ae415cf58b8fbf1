"""What people read of a comparison: its results as a list, a table and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lowrank_pl.files import atomic_write, write_json
from lowrank_pl.plan_report import percent, save_figure, table

__all__ = [
    "by_mean_excess",
    "comparison_cells",
    "comparison_plot",
    "comparison_table",
    "read_results",
    "write_comparison",
]

DENSE = "dense"
MARKERS = "osD^vP*Xhd<>"


def comparison_table(results: Sequence[Mapping[str, Any]], *, fmt: str = "github") -> str:
    """Return the results as a table, the best of each size first.

    Args:
        results: As in ``results.json``.
        fmt: A format of ``tabulate``.
    """
    return table(*comparison_cells(results), fmt)


def comparison_cells(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of the table of ``results``, the best of each size first."""
    corpora = list(results[0]["perplexity"]) if results else []
    head = ["method", "keep", "kept model", "MB", *(f"ppl {c}" for c in corpora), *(f"excess {c}" for c in corpora)]
    head += ["seconds", "peak GB"]
    body = [
        [
            row["method"],
            percent(row["keep"]["targeted"]),
            percent(row["keep"]["model"]),
            f"{row['bytes'] / 1e6:,.1f}",
            *(f"{row['perplexity'][corpus]:.2f}" for corpus in corpora),
            *(f"{row['excess'][corpus]:.3f}" for corpus in corpora),
            _seconds(row["seconds"]),
            f"{row['peak_memory'] / 1e9:.1f}",
        ]
        for row in sorted(results, key=lambda row: (-row["keep"]["asked"], _mean_excess(row)))
    ]
    return head, body


def by_mean_excess(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the methods of ``rows``, first the one whose best size has the least mean excess over the texts."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["method"]] = min(best.get(row["method"], math.inf), _mean_excess(row))
    return sorted(best, key=best.__getitem__)


def comparison_plot(results: Sequence[Mapping[str, Any]], corpus: str) -> Figure:
    """Return a plot of the excess in nats on ``corpus`` against the kept fraction, one line a method, best on top.

    Args:
        results: As in ``results.json``.
        corpus: One of the texts that were scored.
    """
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        if row["method"] != DENSE:
            methods.setdefault(row["method"], []).append(row)
    for place, name in enumerate(by_mean_excess([row for rows in methods.values() for row in rows])):
        rows = sorted(methods[name], key=lambda row: row["keep"]["targeted"])
        axes.plot(
            [row["keep"]["targeted"] for row in rows],
            [row["excess"][corpus] for row in rows],
            marker=MARKERS[place % len(MARKERS)],
            linewidth=1.2,
            markersize=5,
            label=name,
            color=f"C{place % 10}",
            linestyle=("-", "--", ":")[place // 10 % 3],
        )
    # A tiny random model may come out better than dense by chance.
    if all(row["excess"][corpus] > 0 for rows in methods.values() for row in rows):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("{x:g}")
    sizes = sorted({row["keep"]["asked"] for rows in methods.values() for row in rows})
    if len(sizes) <= 8:
        axes.set_xticks(sizes, [percent(size) for size in sizes])
    axes.set_xlabel("kept fraction of the targeted parameters")
    axes.set_ylabel("excess over the dense model in nats a token")
    axes.set_title(f"{corpus}: lower is better")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def write_comparison(folder: Path, results: Sequence[Mapping[str, Any]], *, command: str) -> None:
    """Write ``results.json``, ``results.md`` and a plot for each corpus to ``folder``, each whole or not at all."""
    write_json(folder / "results.json", list(results))
    atomic_write(folder / "results.md", f"{comparison_table(results)}\n\nMade by `{command}`.\n")
    drawn = [row for row in results if row["method"] != DENSE]
    for corpus in drawn[0]["perplexity"] if drawn else ():
        save_figure(comparison_plot(results, corpus), folder / f"excess-{corpus}.png")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the list in ``results.json`` of ``folder``, empty where there is none yet."""
    path = folder / "results.json"
    if not path.exists():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        if not all({"method", "keep", "excess", "seconds"} <= row.keys() for row in found):
            raise ValueError("a row lacks what every result has")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} holds no comparison ({error}): delete it or name another folder") from None
    return found


def _seconds(parts: Mapping[str, float | None]) -> str:
    """Return the seconds from the dense model to the plan; a plus where some of them are not known."""
    spent = {name: part for name, part in parts.items() if name != "scores"}
    known = sum(part for part in spent.values() if part is not None)
    return f"{known:,.0f}{'+' if None in spent.values() else ''}"


def _mean_excess(row: Mapping[str, Any]) -> float:
    excess: dict[str, float] = row["excess"]
    return sum(excess.values()) / max(1, len(excess))
