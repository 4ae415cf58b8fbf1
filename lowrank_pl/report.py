"""What people read of a run: the table of scores, the summary file and the model card; see also ``plan_report``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowrank_pl.files import write_json
from lowrank_pl.plan import RankPlan
from lowrank_pl.plan_report import block_and_kind, percent, rank_map, rank_table, table
from lowrank_pl.sizes import RESIZED

__all__ = [
    "Row",
    "block_and_kind",
    "model_card",
    "rank_map",
    "rank_table",
    "read_summary",
    "row_table",
    "sample_table",
    "write_summary",
]

SUMMARY = "summary.json"
FACTS = "facts"
MOST_NOTES = 12


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
            _shown(row.perplexity, _perplexity),
            _shown(row.excess_nats, "{:.3f}".format),
            _shown(row.kept_targeted, percent),
            _shown(row.kept_model, percent),
            _shown(row.bytes, _megabytes),
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


def model_card(
    plan: RankPlan,
    rows: Sequence[Row],
    *,
    base: str,
    command: str,
    samples: Sequence[tuple[str, str, str]] = (),
    license: str | None = None,
    merged: bool = False,
) -> str:
    """Return a Hugging Face model card in Markdown: what the model is, how it was made, counts, scores, loading.

    Args:
        plan: The plan that the model follows.
        rows: Its scores and those of the models it is compared with.
        base: The model that was compressed, as it was named to ``lowrank``.
        command: The command that makes it again.
        samples: Triples of prompt, dense continuation and compressed continuation.
        license: The base model's licence, as the hub names it; ``None`` leaves it out.
        merged: Whether the folder holds dense weights multiplied out, which any loader reads.
    """
    sections = (
        _front_matter(base, license),
        _what(plan, base, merged=merged),
        _load(merged=merged),
        f"## Scores\n\n{row_table(rows, fmt='github')}" if rows else "",
        _counts(plan, merged=merged),
        _made(plan, command),
        _samples(samples),
        _notes(plan),
        _LIMITS,
    )
    return "\n\n".join(section for section in sections if section) + "\n"


_LIMITS = """\
## Limits

The weights were not fine-tuned after the compression. The scores hold for the text and the window length above; text
akin to the calibration text scores better than other text. Nothing else was measured: no tasks, no safety, no other
language. Everything said of the base model's own limits, biases and licence applies here too."""

_LOAD = """\
## How to load it

```python
import lowrank_pl  # teaches transformers the storage format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```

Without `lowrank_pl` installed, pass `trust_remote_code=True` to `AutoModelForCausalLM.from_pretrained`: the folder
brings the code. Without either, loading stops with a size mismatch."""

_LOAD_MERGED = """\
## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```"""


def _front_matter(base: str, license: str | None) -> str:
    # JSON strings are YAML strings, whatever they hold.
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"license: {json.dumps(license)}"] if license else []
    lines += [f"base_model: {json.dumps(base)}"] if _is_hub_id(base) else []
    lines += ["tags:", "- low-rank", "- compression", "- lowrank_pl"]
    return "\n".join(["---", *lines, "---"])


def _is_hub_id(base: str) -> bool:
    shape = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", base, flags=re.ASCII)
    return shape is not None and not base.endswith(".gguf") and not Path(base).exists()


def _what(plan: RankPlan, base: str, *, merged: bool) -> str:
    stored = "multiplied out to dense weights again" if merged else "stored as two thin matrices each"
    name = base.rstrip("/").rsplit("/", 1)[-1]
    factored = len(plan.modules) - len(plan.dense_modules)
    return (
        f"# {name} with {percent(plan.keep_targeted)} of its linear layers' parameters\n\n"
        f"`{base}` compressed with `lowrank_pl`: {factored} of "
        f"{len(plan.modules)} linear maps are replaced by low-rank factors, {stored}; the others are as they were."
        f"{_resized(plan)}"
    )


def _resized(plan: RankPlan) -> str:
    """Return the sentence that tells a size that was not drawn for itself."""
    note = next((note for note in plan.notes if note.startswith(RESIZED)), None)
    return "" if note is None else f" This size was {note}, and contains the smaller sizes made with it."


def _load(*, merged: bool) -> str:
    return _LOAD_MERGED if merged else _LOAD


def _counts(plan: RankPlan, *, merged: bool) -> str:
    head = ("", "dense", "compressed", "kept")
    body = [
        ("parameters of the targeted layers", plan.targeted_parameters, plan.kept_parameters, plan.keep_targeted),
        ("parameters of the whole model", plan.model_parameters, plan.kept_model_parameters, plan.keep_model),
        ("bytes of the parameters", plan.dense_bytes, plan.bytes, plan.bytes / plan.dense_bytes),
    ]
    shown = [(what, f"{dense:,}", f"{kept:,}", percent(share)) for what, dense, kept, share in body]
    merged_line = "These are the counts of the factors, not of the dense weights in this folder.\n\n" if merged else ""
    any_k = (
        f"\n\nIn {len(plan.any_k_modules)} modules (any-k) the kept components are not those of the largest singular "
        "values, but a chosen set; `plan.json` lists it."
        if plan.any_k_modules
        else ""
    )
    return f"## Size\n\n{merged_line}{table(head, shown, 'github')}\n\n{rank_table(plan, fmt='github')}{any_k}"


def _made(plan: RankPlan, command: str) -> str:
    # Where the maker kept the factors is of no use to a reader.
    origin = {key: value for key, value in plan.origin.items() if key != "store"}
    lines = [f"Method `{plan.method}`, asked to keep {percent(plan.keep)} of the targeted parameters."]
    lines += ["", "```bash", command, "```"]
    lines += ["", *(f"* {key}: `{_brief(value)}`" for key, value in origin.items())] if origin else []
    if plan.fingerprint:
        lines += ["", "Made from (SHA-256 or version):", ""]
        lines += [f"* {key}: `{value}`" for key, value in plan.fingerprint.items()]
    return "\n".join(["## How it was made", "", *lines])


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:199] + "…"


def _samples(samples: Sequence[tuple[str, str, str]]) -> str:
    if not samples:
        return ""
    said = "Greedy continuations of the same prompts, not chosen for looks."
    return f"## Samples\n\n{said}\n\n{sample_table(samples)}"


def sample_table(samples: Sequence[tuple[str, str, str]], *, name: str = "compressed") -> str:
    """Return prompts with two continuations each as a table in Markdown.

    Args:
        samples: Prompt, continuation of the dense model and of the compressed one.
        name: What the head calls the last.
    """
    body = [tuple(map(_in_cell, sample)) for sample in samples]
    return table(("prompt", "dense", name), body, "github", align=("left",) * 3)


def _in_cell(text: str) -> str:
    """Return ``text`` so that Markdown shows it letter by letter inside one cell of a table."""
    escaped = re.sub(r"[\\`*_\[\]<>|~$&#]", lambda found: f"&#{ord(found.group())};", text.strip())
    return re.sub(r"\s*\n\s*", "<br>", escaped)


def _notes(plan: RankPlan) -> str:
    """Return the plan's notes; those that say the same of several modules become one line."""
    groups: dict[str, list[str]] = {}
    for note in plan.notes:
        name, _, reason = note.partition(": ")
        about_module = bool(reason) and (name in plan.modules or re.fullmatch(r"[\w.]+\.[\w.]+", name) is not None)
        groups.setdefault(reason if about_module else note, []).extend([name] if about_module else [])
    lines = []
    for text, names in groups.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"* `{names[0]}`{more}: {text}" if names else f"* {text}")
    if len(lines) > MOST_NOTES:
        lines = [*lines[:MOST_NOTES], f"* and {len(lines) - MOST_NOTES} more notes in `plan.json`"]
    return "\n".join(["## Notes", "", *lines]) if lines else ""


def _figures(row: Row) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row) if field.name != "name"}


def _shown(value: Any, to_text: Callable[[Any], str]) -> str:
    return "-" if value is None else to_text(value)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.1e}"
