"""What people read of a run: the table of scores and the summary file; see also ``plan_report`` and ``model_card``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowrank_pl.utils.files import write_json
from lowrank_pl.utils.formatting import megabytes, percent, rounded_perplexity, table

__all__ = ["SUMMARY", "Row", "read_summary", "row_table", "write_summary"]

SUMMARY = "summary.json"


FACTS = "facts"


@dataclass(frozen=True)
class Row:
    """One model in a table of scores; ``None`` stands for what was not measured.

    Args:
        name: Who it is, such as ``dense``, ``uniform`` or ``learned``.
        perplexity: Perplexity on the held-back text.
        excess_nats: Nats a token more than the dense model's.
        kept_targeted: Kept fraction of the targeted layers' parameters.
        kept_model: Kept fraction of the whole model's parameters.
        bytes: Bytes on disk.
        seconds: Seconds that it took to make.

    Example:
        >>> Row("dense", perplexity=20.7, excess_nats=0.0).kept_model is None
        True
    """

    name: str
    perplexity: float | None = None
    excess_nats: float | None = None
    kept_targeted: float | None = None
    kept_model: float | None = None
    bytes: int | None = None
    seconds: float | None = None


def row_table(rows: Iterable[Row], *, fmt: str = "simple") -> str:
    """Return the rows as a table in human units.

    Args:
        rows: The models, in the order shown.
        fmt: A format of ``tabulate``: ``simple`` for a terminal, ``github`` for Markdown.

    Example:
        >>> rows = [Row("dense", 20.7, 0.0, 1.0, 1.0, 538_060_672), Row("learned", 23.456, 0.125, 0.8, 0.84)]
        >>> print(row_table(rows, fmt="github").splitlines()[-1])
        | learned |        23.46 |         0.125 |          80.0 % |       84.0 % |         - |         - |
    """
    head = ("model", "perplexity", "excess nats", "kept targeted", "kept model", "on disk", "seconds")
    body = [
        (
            row.name,
            _shown(row.perplexity, rounded_perplexity),
            _shown(row.excess_nats, "{:.3f}".format),
            _shown(row.kept_targeted, percent),
            _shown(row.kept_model, percent),
            _shown(row.bytes, megabytes),
            _shown(row.seconds, "{:,.1f}".format),
        )
        for row in rows
    ]
    return table(head, body, fmt)


def write_summary(run_dir: str | Path, rows: Iterable[Row], **facts: Any) -> Path:
    """Write ``summary.json`` of a run and return its path: rows keyed by name, and ``facts`` under one key.

    ``{"dense": {"perplexity": …, "excess_nats": …, "kept_targeted": …, "kept_model": …, "bytes": …, "seconds": …},
    …, "facts": {…}}``. Rows and facts join those of an older summary in the folder; same-named ones are replaced.

    Args:
        run_dir: The run's folder; made if absent.
        rows: The rows to add.
        facts: Whatever else JSON can hold.

    Raises:
        ValueError: A row called ``facts``, or a damaged summary in the folder.
    """
    path = Path(run_dir) / SUMMARY
    old_rows, old_facts = read_summary(run_dir) if path.exists() else ([], {})
    merged = {row.name: row for row in [*old_rows, *rows]}
    if FACTS in merged:
        raise ValueError(f"a row is called {FACTS!r}, the key of everything else in {SUMMARY}: give it another name")
    summary: dict[str, Any] = {name: _figures(row) for name, row in merged.items()}
    all_facts = {**old_facts, **facts}
    return write_json(path, {**summary, FACTS: all_facts} if all_facts else summary)


def read_summary(run_dir: str | Path) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows and the facts that :func:`write_summary` left in the run's folder.

    Raises:
        ValueError: No ``summary.json`` there, or not one of ours; the message names the file.
    """
    path = Path(run_dir) / SUMMARY
    if not path.is_file():
        raise ValueError(f"no {SUMMARY} in {run_dir}: expected the folder of a finished run")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        facts = dict(data.pop(FACTS, {}))
        return [Row(name, **figures) for name, figures in data.items()], facts
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a run's summary ({error}): delete it or run again") from None


def _figures(row: Row) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row) if field.name != "name"}


def _shown(value: Any, to_text: Callable[[Any], str]) -> str:
    return "-" if value is None else to_text(value)
