"""The page of a run: one HTML file that shows, without a network, whether the model is fit for use.

The page loads nothing, which its content security policy enforces, and all text from files is escaped. Without
JavaScript only the line below the rank map is missing.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lowrank_pl.methods.masks.registry import paper_of
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.report.evidence import Speed, describe_protocol
from lowrank_pl.report.model_card import (
    grouped_notes,
    load_code,
    score_with_error,
    speedup,
    task_rows,
    without_package,
)
from lowrank_pl.report.page_cells import (
    HEIGHT,
    WIDTH,
    Cell,
    Experts,
    by_place,
    cells,
    grid,
    read_spectra,
    spectrum_groups,
)
from lowrank_pl.report.rank_map import bits_in_words, count_bits
from lowrank_pl.report.run_record import RunRecord
from lowrank_pl.utils.files import atomic_write
from lowrank_pl.utils.formatting import megabytes, percent, rounded_perplexity

__all__ = ["render", "run_page", "write_page"]

WIDE = 48
"""Blocks beyond which the cells of the rank map have no room for numbers."""


@dataclass(frozen=True)
class Tile:
    """One of the figures at the top of the page.

    Args:
        label: Name of the figure.
        value: The figure.
        note: A figure to compare with, or how it was measured.
        state: ``healthy``, ``warning``, ``broken`` or empty; sets the colour.
    """

    label: str
    value: str
    note: str = ""
    state: str = ""


@dataclass(frozen=True)
class Bar:
    """Dense and kept parameters of a group of layers.

    Args:
        label: Name of the group.
        dense: Parameters before the compression.
        kept: Parameters after it.
        most: Largest ``dense`` of the chart, for the scale.
    """

    label: str
    dense: int
    kept: int
    most: int


def write_page(record: RunRecord, path: Path) -> Path:
    """Write the page of a run to ``path``, atomically, and return the path."""
    return atomic_write(path, run_page(record))


def run_page(record: RunRecord) -> str:
    """Return the page of a run as HTML."""
    plan = record.plan
    spectra, about_spectra = read_spectra(plan)
    shown = cells(plan, spectra)
    lines = by_place(shown)
    blocks, rows = grid(lines)
    place = "PATH_OR_ID" if record.exported is None else str(record.exported.folder)
    return render(
        "run.html",
        title=f"{_short_name(record.base)}, {percent(plan.keep_targeted)} kept{_in_bits(plan)}",
        record=record,
        plan=plan,
        summary=record.summary,
        evidence=record.evidence,
        tiles=_tiles(record),
        about=_about(record),
        protocol=describe_protocol(record.summary.facts.get("protocol", {})),
        tasks=task_rows(record.evidence.tasks),
        speeds=_by_measurement(record.speeds),
        cells=shown,
        lines=lines,
        blocks=blocks,
        grid=rows,
        compact=len(blocks) > WIDE,
        spectra=spectrum_groups(shown, spectra),
        about_spectra=about_spectra,
        by_kind=_bars({kind: [cell for cell in row if cell] for kind, row in rows.items()}),
        by_block=_bars(_by_block(shown)),
        notes=grouped_notes(plan),
        load=load_code(place, merged=record.merged, own_code=record.own_code),
        without_package="" if record.merged else without_package(own_code=record.own_code),
        origin={key: value for key, value in plan.origin.items() if key != "store"},
        paper=paper_of(plan.method),
        WIDTH=WIDTH,
        HEIGHT=HEIGHT,
    )


def _in_bits(plan: RankPlan) -> str:
    return f", {bits_in_words(plan)}" if plan.is_rounded else ""


def render(template: str, **values: Any) -> str:
    """Return the page of a template; every value is escaped.

    Args:
        template: File in ``templates``.
        **values: Variables of the template.
    """
    environment = _environment()
    source, _, _ = PackageLoader("lowrank_pl.report").get_source(environment, "page.js")
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return environment.get_template(template).render(script=Markup(source), script_digest=digest, **values)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lowrank_pl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    environment.filters |= {
        "percent": percent,
        "megabytes": megabytes,
        "perplexity": rounded_perplexity,
        "speedup": speedup,
        "score": lambda score: "-" if score is None else score_with_error(*score),
        "brief": brief,
        "code_spans": code_spans,
        "signed": lambda value: f"{value:+.3f}",
    }
    return environment


def visible(value: Any) -> Any:
    r"""Return text with control characters made visible, since HTML can't hold them; other values unchanged.

    >>> visible("a\x00b\x1b[1m")
    'a␀b␛[1m'
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda found: _picture(ord(found.group())), value)
    return re.sub(r"[\x80-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", shown)


def _picture(code: int) -> str:
    return "\u2421" if code == 0x7F else chr(0x2400 + code)


def code_spans(text: str) -> Markup:
    """Return Markdown whose only marks are backquotes as HTML.

    >>> code_spans("set `a < b`")
    Markup('set <code>a &lt; b</code>')
    """
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def brief(count: float) -> str:
    """Return a count in three digits.

    >>> brief(12_345_678), brief(960), brief(134_515_008), brief(999_999)
    ('12.3 M', '960', '135 M', '1 M')
    """
    for limit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if float(f"{count:.3g}") >= limit:
            return f"{count / limit:.3g}{name}"
    return f"{count:.3g}"


def _short_name(base: str) -> str:
    return base.removeprefix("package:").rstrip("/").rsplit("/", 1)[-1]


def _by_measurement(speeds: Sequence[Speed]) -> dict[str, list[Speed]]:
    groups: dict[str, list[Speed]] = {}
    for speed in speeds:
        groups.setdefault(speed.how, []).append(speed)
    return groups


def _tiles(record: RunRecord) -> list[Tile]:
    plan = record.plan
    kept = f"of the targeted layers' parameters; {plan.requested} requested"
    tiles = [
        _health_tile(record),
        *_perplexity_tile(record),
        _size_tile(record),
        Tile("Kept", percent(plan.keep_targeted), kept),
    ]
    agreement = record.evidence.agreement
    if agreement is not None:
        note = f"of tokens have the same most likely next token; KL {agreement.kl:.3f} nats"
        tiles.append(Tile("Agreement with its base", percent(agreement.agreement), note))
    own = {speed.model: speed for speed in record.speeds}.get("learned")
    if own is not None:
        note = f"while scoring; {speedup(own.ratio)} the dense model" if own.ratio else "while scoring"
        tiles.append(Tile("Speed", f"{own.tokens_per_second:,.0f} tokens/s", note))
    if plan.healed:
        tiles.append(Tile("Healed", "Trained after compression", plan.healed))
    return tiles + _task_tile(record)


def _size_tile(record: RunRecord) -> Tile:
    plan, on_disk = record.plan, record.bytes_on_disk
    size, where = (plan.bytes, "of parameters") if on_disk is None else (on_disk, "on disk")
    note = f"{megabytes(plan.dense_bytes)} before; {percent(plan.keep_model)} of the whole model's parameters"
    if plan.is_rounded:
        note += f"; {megabytes(plan.memory)} in memory"
    if record.merged:
        note += " as factors, which are merged into dense weights here"
    return Tile(f"Size {where}", megabytes(size), note)


def _task_tile(record: RunRecord) -> list[Tile]:
    """Return the mean accuracy of the model itself if a file names it, else the mean accuracies of all files."""
    found = [one for one in record.evidence.tasks if one.mean_accuracy is not None]
    own = [one for one in found if record.evidence.is_own(one)] or found
    if not own:
        return []
    others = [f"{one.source} {one.mean_accuracy:.3f}" for one in found if one not in own]
    note = "; ".join([", ".join(one.source for one in own), *others])
    return [Tile("Mean accuracy on tasks", ", ".join(f"{one.mean_accuracy:.3f}" for one in own), note)]


def _health_tile(record: RunRecord) -> Tile:
    health = record.evidence.health
    if health is None:
        return Tile("Health", "Not checked", "no model is exported" if record.exported is None else "", "warning")
    verdicts = {
        "healthy": "Healthy" if health.thorough else "No damage found",
        "warning": "Healthy, with warnings" if health.thorough else "Warnings",
        "broken": "Broken",
    }
    diagnosis = health.diagnosis
    word = diagnosis.health
    # The checks that decided the verdict: the broken ones, or else the warnings.
    named = ", ".join(finding.name for finding in diagnosis.named("broken") or diagnosis.named("warning"))
    note = f"{named}; checked by {health.checked_by}" if named else f"checked by {health.checked_by}"
    if health.stale:
        return Tile(
            "Health", "Out of date", f"{verdicts[word]} before the weights were last written: {note}", "warning"
        )
    return Tile("Health", verdicts[word], note, word)


def _perplexity_tile(record: RunRecord) -> list[Tile]:
    """Return the perplexity from the run's own table, or else from ``lowrank doctor`` or ``lowrank evaluate``."""
    row, dense = record.learned, record.dense
    if row is not None and row.perplexity is not None:
        before = "" if dense is None or dense.perplexity is None else f"dense {rounded_perplexity(dense.perplexity)}; "
        excess = "" if row.excess_nats is None else f"{row.excess_nats:+.3f} nats per token"
        return [Tile("Perplexity", rounded_perplexity(row.perplexity), f"{before}{excess}")]
    health = record.evidence.health
    for finding in health.diagnosis.findings if health else ():
        figures = finding.figures
        if "dense_perplexity" in figures:
            excess = f"{figures['excess_nats']:+.3f} nats per token"
            note = f"dense {rounded_perplexity(figures['dense_perplexity'])}; {excess}"
            return [Tile("Perplexity", rounded_perplexity(figures["perplexity"]), note)]
    return [
        Tile("Perplexity", rounded_perplexity(score.perplexity), f"on {score.text.name}")
        for score in record.evidence.own_texts[:1]
    ]


def _about(record: RunRecord) -> dict[str, str]:
    """Return the facts below the tiles."""
    plan, facts = record.plan, record.summary.facts
    about = {
        "Calibrated on": describe_protocol(plan.origin.get("calibration", {})),
        "Scored on": describe_protocol(facts.get("protocol", {})),
        "Weights": f"{plan.origin.get('dtype', '')} {_storage_counts(record)}".strip(),
        "Bits": count_bits(plan),
        "Date": f"{record.written:%Y-%m-%d %H:%M}",
        "Made with": ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items()),
    }
    return {key: value for key, value in about.items() if value}


def _storage_counts(record: RunRecord) -> str:
    plan = record.plan
    counts = {"pivoted": len(plan.pivoted_modules), "as two factors": 0, "dense": len(plan.dense_modules)}
    counts["dropped"] = len(plan.dropped_modules)
    counts["as two factors"] = len(plan.modules) - sum(counts.values())
    parts = ", ".join(f"{count} {form}" for form, count in counts.items() if count)
    return f"({parts}{'; merged' if record.merged else ''})"


def _by_block(shown: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in sorted(shown, key=lambda cell: math.inf if cell.block is None else cell.block):
        found.setdefault("none" if cell.block is None else str(cell.block), []).append(cell)
    return found


def _bars(groups: Mapping[str, Sequence[Cell | Experts]]) -> list[Bar]:
    sums = {
        label: (sum(cell.dense_parameters for cell in inside), sum(cell.parameters for cell in inside))
        for label, inside in groups.items()
    }
    most = max(dense for dense, _ in sums.values())
    return [Bar(label, dense, kept, most) for label, (dense, kept) in sums.items()]
