"""The page of a run: one HTML file that answers, at a glance and without a network, whether to ship this model.

What is special: nothing is loaded from anywhere, which a content security policy in the page enforces, and all that
comes from files is escaped. Without JavaScript only the line under the rank map is missing.
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
from markupsafe import Markup

from lowrank_pl.methods.masks.registry import paper_of
from lowrank_pl.report import page_cells as page_modules
from lowrank_pl.report.evidence import Speed, described
from lowrank_pl.report.model_card import grouped_notes, load_code, task_lines, times, with_error
from lowrank_pl.report.page_cells import Cell, cells, grid, read_spectra, spectrum_groups
from lowrank_pl.report.run_record import RunRecord
from lowrank_pl.utils.files import atomic_write
from lowrank_pl.utils.formatting import megabytes, percent, rounded_perplexity

__all__ = ["render", "run_page", "write_page"]

WIDE = 48
"""Blocks beyond which cells of the rank map have no room for numbers."""


@dataclass(frozen=True)
class Tile:
    """One of the figures at the top.

    Args:
        label: What it is.
        value: The figure.
        note: What it stands beside, or how it was measured.
        state: ``healthy``, ``warning``, ``broken`` or nothing, for the colour.
    """

    label: str
    value: str
    note: str = ""
    state: str = ""


@dataclass(frozen=True)
class Bar:
    """Dense against kept parameters of some modules.

    Args:
        label: Which.
        dense: Parameters before.
        kept: Parameters after.
        most: The largest ``dense`` beside it, for the scale.
    """

    label: str
    dense: int
    kept: int
    most: int


def write_page(record: RunRecord, path: Path) -> Path:
    """Write the page of a run to ``path``, whole or not at all, and return the path."""
    return atomic_write(path, run_page(record))


def run_page(record: RunRecord) -> str:
    """Return the page of a run as HTML."""
    plan = record.plan
    spectra, about_spectra = read_spectra(plan)
    shown = cells(plan, spectra)
    blocks, rows = grid(shown)
    return render(
        "run.html",
        title=f"{_short(record.base)}, {percent(plan.keep_targeted)} kept",
        record=record,
        plan=plan,
        tiles=_tiles(record),
        about=_about(record),
        protocol=described(record.facts.get("protocol", {})),
        tasks=task_lines(record.evidence.tasks),
        speeds=_by_how(record.speeds),
        modules=shown,
        blocks=blocks,
        grid=rows,
        compact=len(blocks) > WIDE,
        spectra=spectrum_groups(plan, shown, spectra),
        about_spectra=about_spectra,
        by_kind=_bars({kind: [cell for cell in row if cell] for kind, row in rows.items()}),
        by_block=_bars(_by_block(shown)),
        notes=grouped_notes(plan),
        load=load_code(str(record.model or "PATH_OR_ID"), merged=record.merged, own_code=record.own_code),
        origin={key: value for key, value in plan.origin.items() if key != "store"},
        paper=paper_of(plan.method),
        WIDTH=page_modules.WIDTH,
        HEIGHT=page_modules.HEIGHT,
    )


def render(template: str, **values: Any) -> str:
    """Return one of the package's templates as a page: everything in ``values`` is escaped.

    Args:
        template: Its file in ``templates``.
        **values: What it shows.
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
        "times": times,
        "with_error": lambda found: "-" if found is None else with_error(*found),
        "brief": brief,
        "signed": lambda value: f"{value:+.3f}",
    }
    return environment


def visible(value: Any) -> Any:
    r"""Return text without characters that HTML can't hold or nobody sees; anything else as it is.

    >>> visible("a\x00b\x1b[1m")
    'a␀b␛[1m'
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda found: _picture(ord(found.group())), value)
    return re.sub(r"[\x80-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", shown)


def _picture(code: int) -> str:
    return "\u2421" if code == 0x7F else chr(0x2400 + code)


def brief(count: float) -> str:
    """Return a count in three digits.

    >>> brief(12_345_678), brief(960), brief(134_515_008), brief(999_999)
    ('12.3 M', '960', '135 M', '1 M')
    """
    for limit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if float(f"{count:.3g}") >= limit:
            return f"{count / limit:.3g}{name}"
    return f"{count:.3g}"


def _short(base: str) -> str:
    return base.removeprefix("package:").rstrip("/").rsplit("/", 1)[-1]


def _by_how(speeds: Sequence[Speed]) -> dict[str, list[Speed]]:
    groups: dict[str, list[Speed]] = {}
    for speed in speeds:
        groups.setdefault(speed.how, []).append(speed)
    return groups


def _tiles(record: RunRecord) -> list[Tile]:
    plan = record.plan
    before, after = plan.dense_bytes, record.bytes_on_disk
    size = plan.bytes if after is None else after
    where = "on disk" if after is not None else "of parameters"
    saved = f"before {megabytes(before)}; {percent(plan.keep_model)} of the whole model's parameters"
    if record.merged:
        saved += " as factors, here merged into dense weights"
    kept = f"of the targeted layers' parameters; asked {percent(plan.keep)}"
    tiles = [
        _verdict(record),
        *_main_score(record),
        Tile(f"Size {where}", megabytes(size), saved),
        Tile("Kept", percent(plan.keep_targeted), kept),
    ]
    found = record.evidence.divergence
    if found is not None:
        note = f"of tokens have the same most likely next one; KL {found.kl:.3f} nats"
        tiles.append(Tile("Agrees with its base", percent(found.agreement), note))
    own = {speed.model: speed for speed in record.speeds}.get("learned")
    if own is not None:
        beside = f"scoring; {times(own.ratio)} the dense model" if own.ratio else "scoring"
        tiles.append(Tile("Speed", f"{own.tokens_per_second:,.0f} tokens/s", beside))
    tiles += _task_tile(record)
    return tiles


def _task_tile(record: RunRecord) -> list[Tile]:
    """Return the mean accuracies: that of the model itself where a file says whose it is, else all."""
    found = [one for one in record.evidence.tasks if one.mean_accuracy is not None]
    here = record.model and record.model.resolve()
    own = [one for one in found if one.model and Path(one.model).resolve() == here] or found
    if not own:
        return []
    rest = [f"{one.source} {one.mean_accuracy:.3f}" for one in found if one not in own]
    note = ", ".join(one.source for one in own)
    return [
        Tile("Mean accuracy on tasks", ", ".join(f"{one.mean_accuracy:.3f}" for one in own), "; ".join([note, *rest]))
    ]


def _verdict(record: RunRecord) -> Tile:
    evidence = record.evidence
    found = evidence.diagnosis
    if found is None:
        return Tile(
            "Health", "Not checked", "nothing was looked at" if record.model else "no model is exported", "warning"
        )
    warned = ", ".join(finding.name for finding in found.named("warning"))
    broken = ", ".join(finding.name for finding in found.named("broken"))
    words = {
        "healthy": "Healthy" if evidence.thorough else "No damage found",
        "warning": "Healthy, with warnings" if evidence.thorough else "Warnings",
        "broken": "Broken",
    }
    note = f"by {evidence.checked_by}"
    note = f"on {broken or warned}, {note}" if broken or warned else note
    if evidence.stale:
        return Tile(
            "Health", "Out of date", f"{words[found.health].lower()} {note}, before the weights were written", "warning"
        )
    return Tile("Health", words[found.health], note, found.health)


def _main_score(record: RunRecord) -> list[Tile]:
    row, dense = record.row, record.dense
    if row is not None and row.perplexity is not None:
        before = "" if dense is None or dense.perplexity is None else f"dense {rounded_perplexity(dense.perplexity)}; "
        excess = "" if row.excess_nats is None else f"{row.excess_nats:+.3f} nats a token"
        return [Tile("Perplexity", rounded_perplexity(row.perplexity), f"{before}{excess}")]
    found = record.evidence.diagnosis
    for finding in found.findings if found else ():
        if "dense_perplexity" in finding.figures:
            figures = finding.figures
            note = (
                f"dense {rounded_perplexity(figures['dense_perplexity'])}; {figures['excess_nats']:+.3f} nats a token"
            )
            return [Tile("Perplexity", rounded_perplexity(figures["perplexity"]), note)]
    return [
        Tile("Perplexity", rounded_perplexity(one.perplexity), f"on {one.text}")
        for one in record.evidence.own_passes[:1]
    ]


def _about(record: RunRecord) -> dict[str, str]:
    """Return what the model is, in pairs."""
    plan = record.plan
    said = {
        "Calibrated on": described(plan.origin.get("calibration", {})),
        "Scored on": described(record.facts.get("protocol", {})),
        "Weights": f"{plan.origin.get('dtype', '')} {_forms(record)}".strip(),
        "Date": f"{record.written:%Y-%m-%d %H:%M}",
        "Made with": ", ".join(f"{name} {number}" for name, number in record.facts.get("versions", {}).items()),
    }
    return {key: value for key, value in said.items() if value}


def _forms(record: RunRecord) -> str:
    plan = record.plan
    pivoted, dense = len(plan.pivoted_modules), len(plan.dense_modules)
    counts = {"pivoted": pivoted, "as two factors": len(plan.modules) - pivoted - dense, "dense": dense}
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"({said}{'; merged' if record.merged else ''})"


def _by_block(shown: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in sorted(shown, key=lambda cell: math.inf if cell.block is None else cell.block):
        found.setdefault("none" if cell.block is None else str(cell.block), []).append(cell)
    return found


def _bars(groups: Mapping[str, Sequence[Cell]]) -> list[Bar]:
    sums = {
        label: (sum(cell.dense_parameters for cell in inside), sum(cell.parameters for cell in inside))
        for label, inside in groups.items()
    }
    most = max(dense for dense, _ in sums.values())
    return [Bar(label, dense, kept, most) for label, (dense, kept) in sums.items()]
