"""The model card: what a Hugging Face folder says of itself in Markdown, and what the page of a run says too."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.resize import RESIZED
from lowrank_pl.report.evidence import Evidence, Speed, TaskScores, described
from lowrank_pl.report.rank_map import rank_table
from lowrank_pl.report.run_record import RunRecord
from lowrank_pl.report.scores import Row, row_table
from lowrank_pl.utils.files import atomic_write
from lowrank_pl.utils.formatting import percent, rounded_perplexity, table

__all__ = [
    "card_of",
    "grouped_notes",
    "load_code",
    "model_card",
    "refresh_card",
    "sample_table",
    "task_lines",
    "times",
    "with_error",
]

_log = logging.getLogger(__name__)


MOST_NOTES = 12


def model_card(
    plan: RankPlan,
    rows: Sequence[Row],
    *,
    base: str,
    command: str,
    samples: Sequence[tuple[str, str, str]] = (),
    license: str | None = None,
    merged: bool = False,
    own_code: bool = False,
    evidence: Evidence | None = None,
    speeds: Sequence[Speed] = (),
    facts: Mapping[str, Any] | None = None,
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
        own_code: Whether the base came with code of its own.
        evidence: What other commands measured: health, divergence, scores on tasks.
        speeds: How fast it was.
        facts: What the run noted besides: the protocol of the scores, versions, the date.
    """
    evidence, facts = evidence or Evidence(), facts or {}
    sections = (
        _front_matter(base, license),
        _what(plan, base, merged=merged),
        _load(merged=merged, own_code=own_code),
        _scores(rows, evidence, facts),
        _health(evidence),
        _speeds(speeds),
        _counts(plan, merged=merged),
        _made(plan, command, facts),
        _samples(samples),
        _notes(plan),
        _limits(tasks=bool(evidence.tasks)),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


_LIMITS = """\
## Limits

The weights were not fine-tuned after the compression. The scores hold for the text and the sequence length above; text
akin to the calibration text scores better than other text. Nothing else was measured: {}no safety, no other
language. Everything said of the base model's own limits, biases and licence applies here too."""


_WITHOUT = """\
Without `lowrank_pl` installed, pass `trust_remote_code=True` to `AutoModelForCausalLM.from_pretrained`: the folder
brings the code. Without either, loading stops with a size mismatch."""


_WITH_OWN_CODE = """\
The base came with code of its own, which `trust_remote_code=True` lets run. Without `lowrank_pl` installed, loading
stops with a size mismatch."""


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
    factored, pivoted = len(plan.modules) - len(plan.dense_modules), len(plan.pivoted_modules)
    stored = "stored as two thin matrices each"
    if merged:
        stored = "multiplied out to dense weights again"
    elif pivoted:
        some = "" if pivoted == factored else f"{pivoted} of them "
        stored = f"{some}stored as independent rows or columns and the coefficients of the rest"
    name = base.rstrip("/").rsplit("/", 1)[-1]
    return (
        f"# {name} with {percent(plan.keep_targeted)} of its linear layers' parameters\n\n"
        f"`{base}` compressed with `lowrank_pl`: {factored} of "
        f"{len(plan.modules)} linear maps are replaced by low-rank factors, {stored}; the others are as they were."
        f"{_narrowed(plan)}{_resized(plan)}"
    )


def _narrowed(plan: RankPlan) -> str:
    """Return the sentence that tells that hidden features were left out before."""
    narrowed = plan.origin.get("narrowed")
    if narrowed is None:
        return ""
    return (
        f" Before that, {narrowed['left']} of the {narrowed['width']:,} hidden features of every MLP were left, which "
        "stand for the others."
    )


def _resized(plan: RankPlan) -> str:
    """Return the sentence that tells a size that was not drawn for itself."""
    note = next((note for note in plan.notes if note.startswith(RESIZED)), None)
    return "" if note is None else f" This size was {note}, and contains the smaller sizes made with it."


def load_code(place: str, *, merged: bool, own_code: bool = False) -> str:
    """Return the Python that loads the model in ``place``.

    Args:
        place: A folder or a hub id.
        merged: Whether it holds dense weights, which any transformers loads.
        own_code: Whether the base came with code of its own.
    """
    trust = ", trust_remote_code=True" if own_code else ""
    teaching = "" if merged else "import lowrank_pl  # teaches transformers the storage format\n"
    return f"""\
{teaching}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(place)}{trust})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(place)}{trust})"""


def _load(*, merged: bool, own_code: bool) -> str:
    code = f"## How to load it\n\n```python\n{load_code('PATH_OR_ID', merged=merged, own_code=own_code)}\n```"
    return code if merged else f"{code}\n\n{_WITH_OWN_CODE if own_code else _WITHOUT}"


def _limits(*, tasks: bool) -> str:
    return _LIMITS.format("" if tasks else "no tasks, ")


def _scores(rows: Sequence[Row], evidence: Evidence, facts: Mapping[str, Any]) -> str:
    parts = []
    if rows:
        how = described(facts.get("protocol", {}))
        said = f"\n\nScored on `{how}`; excess is ln(perplexity / dense perplexity), 0 is lossless." if how else ""
        parts.append(f"{row_table(rows, fmt='github')}{said}")
    elif evidence.passes:
        head = ("model", "text", "windows", "tokens", "perplexity")
        body = [
            (one.model, one.text, str(one.sequences), str(one.length), rounded_perplexity(one.perplexity))
            for one in evidence.passes
        ]
        parts.append(table(head, [tuple(map(_in_cell, row)) for row in body], "github"))
    found = evidence.divergence
    if found is not None:
        parts.append(
            f"Beside the dense model on `{found.how}`: KL divergence {found.kl:.4f} nats a token, the same most likely "
            f"token in {percent(found.agreement)} of {found.tokens:,}."
        )
    if evidence.tasks:
        parts.append(f"{_tasks(evidence.tasks)}\n\nFrom files of lm-evaluation-harness's form, ± its standard error.")
    return "\n\n".join(["## Scores", *parts]) if parts else ""


def _tasks(tasks: Sequence[TaskScores]) -> str:
    head = ("task", "metric", *(_in_cell(one.source) for one in tasks))
    body = [
        (*map(_in_cell, key), *("-" if found is None else with_error(*found) for found in figures))
        for key, figures in task_lines(tasks).items()
    ]
    return table(head, body, "github")


def _health(evidence: Evidence) -> str:
    found = evidence.diagnosis
    if found is None:
        return ""
    lines = [f"* {finding.name}, {finding.health}: {_in_cell(finding.sentence)}" for finding in found.findings]
    stale = " The weights were written after that." if evidence.stale else ""
    return "\n".join(
        ["## Health", "", f"Checked by {_in_cell(evidence.checked_by)}: {found.health}.{stale}", "", *lines]
    )


def _speeds(speeds: Sequence[Speed]) -> str:
    if not speeds:
        return ""
    body = [
        (_in_cell(one.model), f"{one.tokens_per_second:,.1f}", times(one.ratio), _in_cell(one.how)) for one in speeds
    ]
    align = ("left", "right", "right", "left")
    return f"## Speed\n\n{table(('model', 'tokens/s', 'to dense', 'how'), body, 'github', align=align)}"


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


def _made(plan: RankPlan, command: str, facts: Mapping[str, Any]) -> str:
    # Where the maker kept the factors is of no use to a reader.
    origin = {key: value for key, value in plan.origin.items() if key != "store"}
    lines = [f"Method `{plan.method}`, asked to keep {percent(plan.keep)} of the targeted parameters."]
    lines += ["", "```bash", command, "```"] if command else []
    noted = {key: facts[key] for key in ("date", "versions") if key in facts}
    origin = {**origin, **noted}
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
    lines = []
    for text, names in grouped_notes(plan).items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"* `{names[0]}`{more}: {text}" if names else f"* {text}")
    if len(lines) > MOST_NOTES:
        lines = [*lines[:MOST_NOTES], f"* and {len(lines) - MOST_NOTES} more notes in `plan.json`"]
    return "\n".join(["## Notes", "", *lines]) if lines else ""


def grouped_notes(plan: RankPlan) -> dict[str, list[str]]:
    """Return the plan's notes, those that say the same of several modules as one, each with these modules' names."""
    groups: dict[str, list[str]] = {}
    for note in plan.notes:
        name, _, reason = note.partition(": ")
        about_module = bool(reason) and (name in plan.modules or re.fullmatch(r"[\w.]+\.[\w.]+", name) is not None)
        groups.setdefault(reason if about_module else note, []).extend([name] if about_module else [])
    return groups


Scores = tuple[float, float] | None


def task_lines(tasks: Sequence[TaskScores]) -> dict[tuple[str, str], list[Scores]]:
    """Return the lines of a table of tasks: for every task and metric what each of ``tasks`` has, the mean last."""
    keys = dict.fromkeys((task, metric) for one in tasks for task, metrics in one.figures.items() for metric in metrics)
    lines: dict[tuple[str, str], list[Scores]] = {
        (task, metric): [one.figures.get(task, {}).get(metric) for one in tasks] for task, metric in keys
    }
    # A mean over other tasks would not compare.
    same = len({frozenset(one.figures) for one in tasks}) == 1
    means = [one.mean_accuracy for one in tasks]
    if same and len({task for task, _ in keys}) > 1 and any(mean is not None for mean in means):
        lines["mean", "acc"] = [None if mean is None else (mean, math.nan) for mean in means]
    return lines


def with_error(value: float, error: float) -> str:
    """Return a score with its standard error, if that is known.

    >>> with_error(0.51234, 0.0123), with_error(0.5, math.nan)
    ('0.512 ± 0.012', '0.500')
    """
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"


def times(ratio: float | None) -> str:
    """Return a ratio as so many times.

    >>> times(1.186), times(None)
    ('1.19 x', '-')
    """
    return "-" if ratio is None else f"{ratio:.2f} x"


def card_of(record: RunRecord) -> str:
    """Return the model card of a run's model, with all that the run's folder says."""
    return model_card(
        record.plan, record.rows, base=record.plan.named_base, command=record.command,
        samples=record.samples, merged=record.merged, own_code=record.own_code, evidence=record.evidence,
        speeds=record.speeds, facts=record.facts,
    )  # fmt: skip


def refresh_card(record: RunRecord) -> bool:
    """Write the model card of a run's model again and return whether that was done.

    The front matter stays, where the owner's licence and tags are. A card that is not of this package stays whole, with
    a warning.
    """
    if record.model is None:
        return False
    path = record.model / "README.md"
    card = card_of(record)
    if path.is_file():
        old = path.read_text(encoding="utf-8", errors="replace")
        if "`lowrank_pl`" not in old:
            _log.warning("%s was not written by lowrank_pl and is left as it is", path)
            return False
        front = re.match(r"---\n.*?\n---\n", old, re.S)
        if front is not None:
            card = re.sub(r"\A---\n.*?\n---\n", lambda _: front[0], card, flags=re.S)
    atomic_write(path, card)
    return True
