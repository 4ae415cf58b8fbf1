"""Scores of a run: the table of models, and ``summary.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_pl.utils.files import write_json
from lowrank_pl.utils.formatting import megabytes, percent, rounded_perplexity, table
from lowrank_pl.utils.json_files import SEAL, break_seal, json_digest, read_json

if TYPE_CHECKING:
    from lowrank_pl.plans.plan import RankPlan

__all__ = ["SUMMARY", "Row", "Summary", "bits_and_memory", "read_summary", "row_table", "write_summary"]

SUMMARY = "summary.json"
FACTS = "facts"


@dataclass(frozen=True)
class Row:
    """One model in a table of scores; ``None`` marks a figure that was not measured.

    Args:
        name: Name of the model, such as ``dense``, ``uniform`` or ``learned``.
        perplexity: Perplexity on the validation text.
        excess_nats: Negative log-likelihood above the dense model's, in nats per token.
        kept_targeted: Kept fraction of the targeted layers' parameters.
        kept_model: Kept fraction of the whole model's parameters.
        bytes: Bytes on disk.
        seconds: Seconds from the dense model to this one.
        bits: The bits that its numbers are rounded to, ascending; None if they are not.
        memory: Bytes in memory, of a model that takes others there than on disk.

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
    bits: tuple[int, ...] | None = None
    memory: int | None = None


def bits_and_memory(plan: RankPlan) -> tuple[tuple[int, ...] | None, int | None]:
    """Return ``bits`` and ``memory`` of the row of a model with ``plan``; None twice if it rounds nothing."""
    return (tuple(plan.widths), plan.memory) if plan.is_rounded else (None, None)


@dataclass(frozen=True)
class Summary:
    """The content of ``summary.json``.

    Args:
        rows: The table of scores.
        facts: Everything else that the run recorded, as JSON values: command, protocol, samples, versions, ...
    """

    rows: tuple[Row, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def row_table(rows: Iterable[Row], *, fmt: str = "simple") -> str:
    """Return the rows as a table in units for people; bits and memory are shown if any row has bits.

    Args:
        rows: The models, in the order of the table.
        fmt: A format of ``tabulate``: ``simple`` for a terminal, ``github`` for Markdown.

    Example:
        >>> rows = [Row("dense", 20.7, 0.0, 1.0, 1.0, 538_060_672), Row("learned", 23.456, 0.125, 0.8, 0.84)]
        >>> print(row_table(rows, fmt="github").splitlines()[-1])
        | learned |        23.46 |         0.125 |          80.0 % |       84.0 % |         - |         - |
    """
    rows = list(rows)
    head: tuple[str, ...] = ("model", "perplexity", "excess nats", "kept targeted", "kept model", "on disk", "seconds")
    body: list[tuple[str, ...]] = [
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
    if any(row.bits for row in rows):
        more = [(_shown(row.bits, _listed), _shown(row.memory or row.bytes, megabytes)) for row in rows]
        body = [(*line[:5], bits, line[5], memory, line[6]) for line, (bits, memory) in zip(body, more, strict=True)]
        head = (*head[:5], "bits", "on disk", "in memory", "seconds")
    return table(head, body, fmt)


def _listed(bits: Sequence[int]) -> str:
    return ", ".join(map(str, bits))


def write_summary(run_dir: str | Path, rows: Iterable[Row], **facts: Any) -> Path:
    """Write ``summary.json`` of a run and return its path: rows keyed by name, and ``facts`` under one key.

    ``{"dense": {"perplexity": …, "excess_nats": …, "kept_targeted": …, "kept_model": …, "bytes": …, "seconds": …},
    …, "facts": {…, "sha256": …}}``. It replaces the summary of an earlier run in the folder.

    Args:
        run_dir: The run's folder, created if absent.
        rows: The rows.
        facts: Any other JSON values.

    Raises:
        ValueError: A row is named ``facts``.
    """
    summary: dict[str, Any] = {row.name: _figures(row) for row in rows}
    if FACTS in summary:
        raise ValueError(f"a row is named {FACTS!r}, which {SUMMARY} uses for everything else: give it another name")
    # The digest lies among the facts, since every other key is the name of a row.
    seal = {SEAL: json_digest({**summary, FACTS: facts})}
    return write_json(Path(run_dir) / SUMMARY, {**summary, FACTS: {**facts, **seal}})


def read_summary(run_dir: str | Path) -> Summary:
    """Return what :func:`write_summary` wrote to the run's folder.

    Raises:
        ValueError: There is no ``summary.json``, or it is no summary; the message names the file and the field.
    """
    path = Path(run_dir) / SUMMARY
    if not path.is_file():
        raise ValueError(f"no {SUMMARY} in {run_dir}: expected the folder of a finished run")
    from lowrank_pl.report.file_schemas import SummaryFile

    what, advice = "a run's summary", "delete it or run again"
    data = read_json(path, SummaryFile, what=what, advice=advice)
    facts = data.setdefault(FACTS, {})
    try:
        break_seal(facts, data)
    except ValueError as error:
        raise ValueError(f"{path} is not {what} ({error}): {advice}") from None
    del data[FACTS]
    return Summary(tuple(Row(name, **_listed_bits(figures)) for name, figures in data.items()), facts)


def _listed_bits(figures: dict[str, Any]) -> dict[str, Any]:
    return {**figures, "bits": tuple(figures["bits"])} if figures.get("bits") else figures


def _figures(row: Row) -> dict[str, Any]:
    found = {field.name: getattr(row, field.name) for field in fields(row) if field.name != "name"}
    # Only if there are any: older versions refuse unknown keys.
    return {key: value for key, value in found.items() if value is not None or key not in ("bits", "memory")}


def _shown(value: Any, to_text: Callable[[Any], str]) -> str:
    return "-" if value is None else to_text(value)
