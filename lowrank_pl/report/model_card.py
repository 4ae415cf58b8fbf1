"""The model card: the README of an exported model, in the Markdown of the Hugging Face hub."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

from lowrank_pl.models.digests import NESTED
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.resize import RESIZED
from lowrank_pl.report.card_metadata import front_matter, refreshed_front_matter, split_front_matter, title
from lowrank_pl.report.evidence import Evidence, HealthCheck, Speed, TaskScores, describe_protocol
from lowrank_pl.report.rank_map import count_bits, rank_table
from lowrank_pl.report.run_record import Exported, RunRecord
from lowrank_pl.report.scores import Summary, row_table
from lowrank_pl.utils.files import atomic_write
from lowrank_pl.utils.formatting import code, escaped, longest_run, percent, rounded_perplexity, table

__all__ = [
    "adapter_card",
    "grouped_notes",
    "load_code",
    "model_card",
    "refresh_card",
    "sample_table",
    "score_with_error",
    "speedup",
    "task_rows",
    "without_package",
]

_log = logging.getLogger(__name__)

MOST_NOTES = 12


def model_card(record: RunRecord, *, license: str | None = None) -> str:
    """Return the model card of a run in Markdown: what the model is, how to load it, scores, sizes, how it was made.

    Args:
        record: The run, or an export with its plan.
        license: The base model's licence, as the hub names it; by default what the base's card says, if it lies on this
            machine.
    """
    plan, facts, evidence = record.plan, record.summary.facts, record.evidence
    sections = (
        front_matter(record, license).rstrip("\n"),
        _what(record),
        _load(merged=record.merged, own_code=record.own_code, rounded=plan.is_rounded),
        _scores(record.summary, evidence),
        _health(evidence.health),
        _speeds(record.speeds),
        _size(plan, record.exported),
        _made(plan, record.command, {key: facts[key] for key in ("date", "versions") if key in facts}),
        _samples(record.samples),
        _notes(plan),
        _limits(plan, tasks=bool(evidence.tasks)),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


_LIMITS = """\
## Limits

{} The scores hold for the text and the sequence length above; text
similar to the calibration text scores better than other text. Nothing else was measured: {}no safety, no other
language. The base model's own limits, biases and licence apply here too."""

_WITHOUT_PACKAGE = """\
Without `lowrank_pl` installed, pass `trust_remote_code=True`: the folder contains the code. With neither, loading fails
with a size mismatch."""

_WITH_OWN_CODE = """\
The base came with modelling code of its own, which `trust_remote_code=True` runs. Without `lowrank_pl` installed,
loading fails with a size mismatch."""


def _what(record: RunRecord) -> str:
    plan = record.plan
    low_rank = sum(len(module.layers) or 1 for module in plan.modules.values() if module.rank)
    pivoted, shared = len(plan.pivoted_modules), any(one.layers and one.rank for one in plan.modules.values())
    stored = "stored as two thin matrices each"
    if record.merged:
        stored = "multiplied out to dense weights again"
    elif pivoted:
        some = "" if pivoted == low_rank else f"{pivoted} of them "
        stored = f"{some}stored as independent rows or columns and the coefficients of the rest"
    if shared and not record.merged:
        stored += "; the experts of a block share one matrix for their gates and one for their ups"
    return (
        f"# {escaped(title(record))}\n\n"
        f"{code(record.base)} compressed with `lowrank_pl`: {low_rank} of {len(plan.layers)} {_counted(plan)} are "
        f"replaced by low-rank factors, {stored}; {_dropped(plan)}the other layers {_others(plan)}.{_embedded(plan)}"
        f"{_rounded(record)}{_pruned(plan)}{_resized(plan)}{_healed(plan)}"
    )


def _counted(plan: RankPlan) -> str:
    return "linear layers and embeddings" if plan.embedded else "linear layers"


def _dropped(plan: RankPlan) -> str:
    """Return a clause on dropped experts, empty if there are none."""
    if not plan.dropped_modules:
        return ""
    return (
        f"{len(plan.dropped_modules)} are gone with {len(plan.dropped_experts)} dropped experts, whose tokens use the "
        "other experts that they chose; "
    )


def _embedded(plan: RankPlan) -> str:
    """Return a sentence on embeddings and a head among the targets, empty if there are none."""
    if not plan.embedded:
        return ""
    found = {name: plan.modules[name] for name in plan.embedded}
    said = [f"{code(name)} {'dense' if one.rank is None else f'of rank {one.rank}'}" for name, one in found.items()]
    return f" Embeddings and head were among them: {', '.join(said)}."


def _healed(plan: RankPlan) -> str:
    """Return a sentence on the training after the compression, empty if there was none."""
    return f" **After the compression the model was healed**: {escaped(plan.healed)}." if plan.healed else ""


def adapter_card(base: str, healed: str) -> str:
    """Return the model card of an adapter that heals a compressed model.

    Args:
        base: The compressed model, as PEFT names it.
        healed: What was trained, and what it gained.
    """
    head = "---\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lowrank_pl\n- lora\n---\n\n"
    return (
        f"{head}# LoRA adapter of a compressed model\n\nMade with `lowrank_pl` for {code(base)}. **The compressed "
        f"model was healed**: {escaped(healed)}.\n\n```python\nimport lowrank_pl  # registers the storage format with "
        "transformers\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(base)})\n"
        'model = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER")\n```\n'
    )


def _others(plan: RankPlan) -> str:
    return "keep their rank" if plan.is_rounded else "are unchanged"


def _rounded(record: RunRecord) -> str:
    """Return a sentence on the rounding of the numbers, empty if there is none."""
    if not record.plan.is_rounded:
        return ""
    merged = " This folder holds the rounded values as ordinary numbers." if record.merged else ""
    return f" Numbers are rounded to a few bits: {escaped(count_bits(record.plan))}.{merged}"


def _pruned(plan: RankPlan) -> str:
    """Return a sentence on the pruning of the base, empty if there was none."""
    # Plans store pruning under this name since it was called so.
    pruned = plan.origin.get("narrowed")
    if pruned is None:
        return ""
    if pruned.get("method"):
        return (
            f" Before that, the base was pruned by {code(str(pruned['method']))} to "
            f"{escaped(str(pruned.get('described')))}, without any compensation."
        )
    return (
        f" Before that, the MLPs were pruned: {escaped(str(pruned['left']))} of {int(pruned['width']):,} hidden "
        "neurons remain in each, and the down-projections were updated to compensate."
    )


def _resized(plan: RankPlan) -> str:
    """Return a sentence on the plan that this size was resized from, empty if it was allocated directly."""
    note = next((note for note in plan.notes if note.startswith(RESIZED)), None)
    return "" if note is None else f" This size was {escaped(note)}, and contains the smaller sizes made with it."


def load_code(place: str, *, merged: bool, own_code: bool = False) -> str:
    """Return the Python code that loads the model in ``place``.

    Args:
        place: A folder or a hub id.
        merged: Whether its weights are dense, so that any transformers loads them.
        own_code: Whether the base came with modelling code of its own.
    """
    trust = ", trust_remote_code=True" if own_code else ""
    package = "" if merged else "import lowrank_pl  # registers the storage format with transformers\n"
    return f"""\
{package}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(place)}{trust})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(place)}{trust})"""


_ROUNDED = """\
Rounded numbers stay packed in memory. A layer turns its own into numbers of the model's type while it runs."""


def _load(*, merged: bool, own_code: bool, rounded: bool) -> str:
    code = f"## How to load it\n\n```python\n{load_code('PATH_OR_ID', merged=merged, own_code=own_code)}\n```"
    if merged:
        return code
    return "\n\n".join([code, without_package(own_code=own_code), *([_ROUNDED] if rounded else [])])


def without_package(*, own_code: bool) -> str:
    """Return in Markdown how a model that is stored as factors loads where lowrank_pl is not installed, and if it does.

    Args:
        own_code: Whether the base came with modelling code of its own.
    """
    return _WITH_OWN_CODE if own_code else _WITHOUT_PACKAGE


NOT_TRAINED = "The weights were not fine-tuned after the compression."


TRAINED = "The weights were trained after the compression, as said above."


def _limits(plan: RankPlan, *, tasks: bool) -> str:
    return _LIMITS.format(TRAINED if plan.healed else NOT_TRAINED, "" if tasks else "no tasks, ")


def _scores(summary: Summary, evidence: Evidence) -> str:
    parts = []
    if summary.rows:
        text = describe_protocol(summary.facts.get("protocol", {}))
        note = (
            f"\n\nScored on {code(text)}; excess is ln(perplexity / dense perplexity), 0 is lossless." if text else ""
        )
        parts.append(f"{row_table(summary.rows, fmt='github')}{note}")
    elif evidence.texts:
        head = ("model", "text", "sequences", "tokens", "perplexity")
        body = [
            (
                one.model,
                one.text.name,
                str(one.text.sequences),
                str(one.text.length),
                rounded_perplexity(one.perplexity),
            )
            for one in evidence.texts
        ]
        parts.append(table(head, body, "github"))
    found = evidence.agreement
    if found is not None:
        parts.append(
            f"Compared with the dense model on {code(found.text)}: KL divergence {found.kl:.4f} nats per token, the "
            f"same most likely token for {percent(found.agreement)} of {found.tokens:,} tokens."
        )
    if evidence.tasks:
        parts.append(f"{_tasks(evidence.tasks)}\n\nFrom results of lm-evaluation-harness, ± standard error.")
    return "\n\n".join(["## Scores", *parts]) if parts else ""


def _tasks(tasks: Sequence[TaskScores]) -> str:
    head = ("task", "metric", *(one.source for one in tasks))
    body = [
        (*key, *("-" if score is None else score_with_error(*score) for score in scores))
        for key, scores in task_rows(tasks).items()
    ]
    return table(head, body, "github")


def _health(health: HealthCheck | None) -> str:
    if health is None:
        return ""
    lines = [
        f"* {escaped(finding.name)}, {finding.health}: {escaped(finding.sentence)}"
        for finding in health.diagnosis.findings
    ]
    verdict = health.diagnosis.health
    stale = " The weights were written after that." if health.stale else ""
    return "\n".join(["## Health", "", f"Checked by {escaped(health.checked_by)}: {verdict}.{stale}", "", *lines])


def _speeds(speeds: Sequence[Speed]) -> str:
    if not speeds:
        return ""
    body = [(one.model, f"{one.tokens_per_second:,.1f}", speedup(one.ratio), one.how) for one in speeds]
    align = ("left", "right", "right", "left")
    return f"## Speed\n\n{table(('model', 'tokens/s', 'vs dense', 'measured by'), body, 'github', align=align)}"


def _size(plan: RankPlan, exported: Exported | None) -> str:
    head = ("", "dense", "compressed", "kept")
    body = [
        ("parameters of the targeted layers", plan.targeted_parameters, plan.kept_parameters, plan.keep_targeted),
        ("parameters of the whole model", plan.model_parameters, plan.kept_model_parameters, plan.keep_model),
        ("bytes of the parameters", plan.dense_bytes, plan.bytes, plan.bytes / plan.dense_bytes),
    ]
    if plan.is_rounded:
        in_memory = ("bytes of the parameters in memory", plan.dense_bytes, plan.memory, plan.memory / plan.dense_bytes)
        body[-1:] = [("bytes of the parameters on disk", *body[-1][1:]), in_memory]
    shown = [(what, f"{dense:,}", f"{kept:,}", percent(fraction)) for what, dense, kept, fraction in body]
    merged = exported is not None and exported.merged
    merged_note = "These are the sizes of the factors, not of the dense weights in this folder.\n\n" if merged else ""
    nested_note = "" if exported is None else _nested(exported.nested_bytes)
    ranks = rank_table(plan, fmt="github")
    any_k = (
        f"\n\nIn {len(plan.any_k_modules)} layers (any-k) the kept components are not those of the largest singular "
        "values but a selection, which `plan.json` lists."
        if plan.any_k_modules
        else ""
    )
    return f"## Size\n\n{merged_note}{table(head, shown, 'github')}\n\n{nested_note}{ranks}{any_k}"


def _nested(size: int) -> str:
    """Return a paragraph on the components for smaller sizes, empty if there are none."""
    if not size:
        return ""
    return (
        f"The subfolder `{NESTED}` holds {size / 1e6:,.1f} MB more: components from which "
        "`lowrank_pl.load_compressed(FOLDER, keep=...)` makes every smaller size. The model in its own size does not "
        "need them, and loads without the subfolder.\n\n"
    )


def _made(plan: RankPlan, command: str, noted: dict[str, Any]) -> str:
    # The folder of the factor store means nothing on another machine.
    origin = {**{key: value for key, value in plan.origin.items() if key != "store"}, **noted}
    kept = f"Of the targeted parameters {percent(plan.keep_targeted)} are kept; {plan.requested} were requested."
    lines = [f"Method {code(plan.method)}. {kept}"]
    lines += ["", _code_block(command, "bash")] if command else []
    lines += ["", *(f"* {escaped(key)}: {code(_brief(value))}" for key, value in origin.items())] if origin else []
    if plan.fingerprint:
        lines += ["", "Made from (SHA-256 or version):", ""]
        lines += [f"* {escaped(key)}: {code(_brief(value))}" for key, value in plan.fingerprint.items()]
    return "\n".join(["## How it was made", "", *lines])


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:199] + "…"


def _samples(samples: Sequence[tuple[str, str, str]]) -> str:
    if not samples:
        return ""
    return f"## Samples\n\nGreedy continuations of the same prompts, not cherry-picked.\n\n{sample_table(samples)}"


def sample_table(samples: Sequence[tuple[str, str, str]], *, name: str = "compressed") -> str:
    """Return prompts with two continuations each as a Markdown table.

    Args:
        samples: Triples of prompt, dense continuation and compressed continuation.
        name: Heading of the last column.
    """
    return table(("prompt", "dense", name), samples, "github", align=("left",) * 3)


def _code_block(text: str, language: str) -> str:
    """Return ``text`` as a fenced block of code, whatever backticks it holds."""
    fence = "`" * max(3, 1 + longest_run(text, "`"))
    return f"{fence}{language}\n{text}\n{fence}"


def _notes(plan: RankPlan) -> str:
    lines = []
    for text, names in grouped_notes(plan).items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"* {code(names[0])}{more}: {escaped(text)}" if names else f"* {escaped(text)}")
    if len(lines) > MOST_NOTES:
        lines = [*lines[:MOST_NOTES], f"* and {len(lines) - MOST_NOTES} more notes in `plan.json`"]
    return "\n".join(["## Notes", "", *lines]) if lines else ""


def grouped_notes(plan: RankPlan) -> dict[str, list[str]]:
    """Return the plan's notes, each with the layers that it is about; equal notes on several layers are merged."""
    groups: dict[str, list[str]] = {}
    for note in plan.notes:
        name, _, reason = note.partition(": ")
        about_layer = bool(reason) and (name in plan.modules or re.fullmatch(r"[\w.]+\.[\w.]+", name) is not None)
        groups.setdefault(reason if about_layer else note, []).extend([name] if about_layer else [])
    return groups


ScoreAndError = tuple[float, float] | None


def task_rows(tasks: Sequence[TaskScores]) -> dict[tuple[str, str], list[ScoreAndError]]:
    """Return the rows of a table of tasks: by task and metric, the score of each of ``tasks``; the mean comes last."""
    keys = dict.fromkeys((task, metric) for one in tasks for task, metrics in one.figures.items() for metric in metrics)
    rows: dict[tuple[str, str], list[ScoreAndError]] = {
        (task, metric): [one.figures.get(task, {}).get(metric) for one in tasks] for task, metric in keys
    }
    # Means over different tasks do not compare.
    same = len({frozenset(one.figures) for one in tasks}) == 1
    means = [one.mean_accuracy for one in tasks]
    if same and len({task for task, _ in keys}) > 1 and any(mean is not None for mean in means):
        rows["mean", "acc"] = [None if mean is None else (mean, math.nan) for mean in means]
    return rows


def score_with_error(value: float, error: float) -> str:
    """Return a score with its standard error, unless that is NaN.

    >>> score_with_error(0.51234, 0.0123), score_with_error(0.5, math.nan)
    ('0.512 ± 0.012', '0.500')
    """
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"


def speedup(ratio: float | None) -> str:
    """Return a ratio of speeds as text.

    >>> speedup(1.186), speedup(None)
    ('1.19 x', '-')
    """
    return "-" if ratio is None else f"{ratio:.2f} x"


def refresh_card(record: RunRecord) -> bool:
    """Write the model card of a run's exported model again, and return whether it was written.

    The front matter is kept, since it holds the owner's licence and tags; only measured results are added to it. A card
    that this package did not write stays as it is, with a warning.
    """
    if record.exported is None:
        return False
    path = record.exported.folder / "README.md"
    card = model_card(record)
    if path.is_file():
        old = path.read_text(encoding="utf-8", errors="replace")
        if "`lowrank_pl`" not in old:
            _log.warning("%s was not written by lowrank_pl and is left as it is", path)
            return False
        (front, _), (fresh, text) = split_front_matter(old), split_front_matter(card)
        if front:
            card = refreshed_front_matter(front, fresh) + text
    atomic_write(path, card)
    return True
