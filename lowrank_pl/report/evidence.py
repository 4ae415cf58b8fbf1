"""Measurements of a model that other commands made, read back from their JSON files.

A file is recognised by its content, not by its name: ``lowrank doctor``, ``evaluate``, ``bench decode`` and ``bench
prefill`` write such files with ``--json``. Scores on tasks may also come from lm-evaluation-harness.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from lowrank_pl.evaluate.paired import members
from lowrank_pl.export.health.diagnosis import Diagnosis
from lowrank_pl.utils.json_files import unsealed

__all__ = [
    "Agreement",
    "Evidence",
    "HealthCheck",
    "ScoredText",
    "Speed",
    "TaskScores",
    "TextScore",
    "describe_protocol",
    "read_evidence",
]

_log = logging.getLogger(__name__)

MOST_BYTES = 2**24
"""Largest file that is read without being named: model folders hold large JSON files of other kinds."""

EXPECTED = (
    "expected what `lowrank doctor`, `lowrank evaluate` or `lowrank bench decode` write with --json, or the results of "
    "lm-evaluation-harness"
)


@dataclass(frozen=True)
class TaskScores:
    """Scores of one model on tasks.

    Args:
        source: Name of the file, without its extension.
        model: The model's name in the file; empty if the file names none.
        figures: Value and standard error by task and metric; the error is NaN if it is unknown.
        grouped: Tasks and groups that belong to another group.
        directory: Folder of the model, wherever the command was run; empty if the file names none.

    Example:
        >>> scores = TaskScores("a", "", {"piqa": {"acc": (0.6, 0.1)}, "boolq": {"acc": (0.5, math.nan)}})
        >>> scores.mean_accuracy
        0.55
    """

    source: str
    model: str
    figures: Mapping[str, Mapping[str, tuple[float, float]]]
    grouped: frozenset[str] = frozenset()
    directory: str = ""

    @property
    def mean_accuracy(self) -> float | None:
        """The mean of ``acc`` over the top-level tasks and groups; None unless every one of them has ``acc``."""
        own = [metrics for task, metrics in self.figures.items() if task not in self.grouped]
        found = [metrics["acc"][0] for metrics in own if "acc" in metrics]
        return fmean(found) if found and len(found) == len(own) else None


@dataclass(frozen=True)
class ScoredText:
    """A text that a model was scored on.

    Args:
        name: The text, as it was named to the command.
        sequences: Number of sequences.
        length: Tokens of a sequence.
    """

    name: str
    sequences: int
    length: int

    def __str__(self) -> str:
        """Return the text in words."""
        return f"{self.name}, {self.sequences} sequences of {self.length} tokens"


@dataclass(frozen=True)
class Agreement:
    """Agreement of the compressed model's predictions with the dense model's.

    Args:
        kl: KL(dense || compressed), in nats per token.
        agreement: Fraction of tokens on which both models have the same most likely token.
        tokens: Number of predicted tokens.
        text: The text, in words.
    """

    kl: float
    agreement: float
    tokens: int
    text: str


@dataclass(frozen=True)
class TextScore:
    """Perplexity of a model on a text, as ``lowrank evaluate`` measured it.

    Args:
        source: Name of the file, without its extension.
        model: The model, as it was named to the command.
        dtype: Type of its weights.
        text: The text.
        perplexity: Perplexity.
        tokens_per_second: Predicted tokens per second; None with a reference, since nothing is timed then.
        agreement: Agreement with the reference; None without one.
        directory: Folder of the model, wherever the command was run; empty if the file names none.
        dense_perplexity: That of the reference on the same text; None without one.
    """

    source: str
    model: str
    dtype: str
    text: ScoredText
    perplexity: float
    tokens_per_second: float | None = None
    agreement: Agreement | None = None
    directory: str = ""
    dense_perplexity: float | None = None


@dataclass(frozen=True)
class Speed:
    """Speed of a model.

    Args:
        model: The model, or the storage form that was measured.
        tokens_per_second: Tokens per second.
        how: The command, the machine and the settings.
        ratio: Speed relative to the dense model; None if the dense model was not timed.
    """

    model: str
    tokens_per_second: float
    how: str
    ratio: float | None = None


@dataclass(frozen=True)
class HealthCheck:
    """Health of the exported model.

    Args:
        diagnosis: The findings.
        checked_by: The command that made them.
        thorough: Whether that was ``lowrank doctor``, which also scores the model beside its base.
        stale: Whether the weights were written after the check.
    """

    diagnosis: Diagnosis
    checked_by: str
    thorough: bool = False
    stale: bool = False


@dataclass(frozen=True)
class Evidence:
    """Everything that other commands measured of one model.

    Args:
        model: Folder of the model; None if nothing was exported.
        health: Findings of ``lowrank doctor``, or of the checks that need no text; None if nothing was checked.
        tasks: Scores on tasks.
        texts: Perplexities.
        speeds: Speeds.
    """

    model: Path | None = None
    health: HealthCheck | None = None
    tasks: tuple[TaskScores, ...] = ()
    texts: tuple[TextScore, ...] = ()
    speeds: tuple[Speed, ...] = ()

    @property
    def own_texts(self) -> list[TextScore]:
        """The scores of ``model`` itself, without those of its base and of other models."""
        return [score for score in self.texts if self.is_own(score)]

    def is_own(self, score: TaskScores | TextScore) -> bool:
        """Tell whether a score is that of ``model``."""
        # A folder that is no longer there may have been moved to where the model is now.
        moved = not score.directory or not Path(score.directory).is_dir()
        name = score.model if moved else score.directory
        return self.model is not None and name != "" and Path(name).resolve() == self.model.resolve()

    @property
    def agreement(self) -> Agreement | None:
        """Agreement with the dense model: measured by ``lowrank doctor``, or else by ``lowrank evaluate``."""
        if self.health is not None:
            diagnosis = self.health.diagnosis
            for figures in (finding.figures for finding in diagnosis.findings):
                if {"kl", "agreement", "tokens"} <= figures.keys():
                    text = describe_protocol(diagnosis.protocol) or "the text of `lowrank doctor`"
                    return Agreement(float(figures["kl"]), float(figures["agreement"]), int(figures["tokens"]), text)
        return next((score.agreement for score in self.own_texts if score.agreement is not None), None)


def describe_protocol(protocol: Mapping[str, Any]) -> str:
    """Return the scored text of a protocol in words; empty if the protocol names none.

    >>> describe_protocol({"text": "a.txt", "windows": 8, "length": 512})
    'a.txt, 8 sequences of 512 tokens'
    """
    if not {"text", "windows", "length"} <= protocol.keys():
        return str(protocol.get("text", ""))
    return str(ScoredText(protocol["text"], protocol["windows"], protocol["length"]))


def read_evidence(
    named: Iterable[Path], found: Iterable[Path] = (), *, model: Path | None = None, written: float = 0.0
) -> Evidence:
    """Return the measurements in the files; the last file of ``lowrank doctor`` counts.

    Args:
        named: Files that must hold measurements.
        found: Files that may hold measurements, read before ``named``; other content is logged and skipped.
        model: Folder of the model that the files describe.
        written: Modification time of the weights, as ``stat`` gives it; an older diagnosis is stale.

    Raises:
        ValueError: A named file is missing, holds no measurements, or is a diagnosis of another model; the message says
            what is expected.
    """
    evidence = Evidence(model)
    named = list(named)
    seen = {path.resolve() for path in named}
    for path in found:
        if path.resolve() not in seen:
            try:
                evidence = _add_file(evidence, path, _read_json(path, limit=MOST_BYTES), written)
            except ValueError as error:
                _log.info("left out of the report: %s", error)
    for path in named:
        evidence = _add_file(evidence, path, _read_json(path), written)
    return evidence


def _read_json(path: Path, *, limit: int | None = None) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}: {EXPECTED}")
    if limit is not None and path.stat().st_size > limit:
        raise ValueError(f"{path} has more than {limit} bytes: name it with --scores")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): {EXPECTED}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no scores: {EXPECTED}")
    try:
        return unsealed(values)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): measure again") from None


def _add_file(evidence: Evidence, path: Path, values: dict[str, Any], written: float) -> Evidence:
    """Return ``evidence`` with the measurements of one file."""
    if _is_of_another_model(values, evidence.model):
        raise ValueError(
            f"{path} is a diagnosis of {values['directory']!r}, not of {str(evidence.model)!r}: name that of this model"
        )
    try:
        changes = _changes(evidence, path, values, written)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): {EXPECTED}") from None
    # What `lowrank fit` writes with --json is the run's own summary, which is read elsewhere.
    if not changes and "facts" not in values:
        raise ValueError(f"{path} holds no scores: {EXPECTED}")
    return replace(evidence, **changes)


def _is_of_another_model(values: Mapping[str, Any], model: Path | None) -> bool:
    """Tell whether a diagnosis is of another folder than ``model``."""
    examined = values.get("directory")
    if model is None or "findings" not in values or not isinstance(examined, str):
        return False
    # A folder that is no longer there may have been moved to where the model is now.
    return Path(examined).is_dir() and Path(examined).resolve() != model.resolve()


def _changes(evidence: Evidence, path: Path, values: dict[str, Any], written: float) -> dict[str, Any]:
    """Return the fields of ``evidence`` that a file changes; none if its content is of another kind."""
    if isinstance(values.get("findings"), dict):
        stale = path.stat().st_mtime < written
        diagnosis = Diagnosis.from_dict(values)
        return {"health": HealthCheck(diagnosis, f"lowrank doctor, {path.name}", thorough=True, stale=stale)}
    if isinstance(values.get("results"), dict):
        return {"tasks": (*evidence.tasks, _task_scores(path.stem, values))}
    if "model" in values and (isinstance(values.get("texts"), dict) or isinstance(values.get("tasks"), dict)):
        return _changes_by_evaluate(evidence, path.stem, values)
    rows = values.get("rows")
    # Rows of the other cases of `lowrank bench` are of no model.
    if isinstance(rows, list) and any("storage" in row for row in rows):
        return {"speeds": (*evidence.speeds, *_speeds(values))}
    if {"model", "text", "perplexity", "tokens_per_second"} <= values.keys():
        return {"texts": (*evidence.texts, _text_score(path.stem, values, values))}
    return {}


def _changes_by_evaluate(evidence: Evidence, source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changed fields for a file of ``lowrank evaluate``: texts, and tasks of the model and its reference."""
    changes: dict[str, Any] = {}
    if texts := values.get("texts"):
        changes["texts"] = (*evidence.texts, *(_text_score(source, values, one) for one in texts.values()))
    if tasks := values.get("tasks"):
        names = {"model": values["model"], "reference": values.get("reference")}
        scores = [
            _task_scores(source, {**tasks[who], "model_name": name}) for who, name in names.items() if who in tasks
        ]
        scores[:1] = [replace(one, directory=str(values.get("directory", ""))) for one in scores[:1]]
        # The reference comes first: the table of tasks has one column per entry.
        reference = [replace(one, source="dense") for one in scores[1:]]
        changes["tasks"] = (*evidence.tasks, *reference, *scores[:1])
    return changes


def _text_score(source: str, file: Mapping[str, Any], score: Mapping[str, Any]) -> TextScore:
    text = ScoredText(score["text"], score["windows"], score["length"])
    found = score.get("divergence") or {}
    agreement = None
    if {"kl", "agreement"} <= found.keys():
        agreement = Agreement(found["kl"], found["agreement"], score.get("tokens", 0), str(text))
    return TextScore(
        source, file["model"], file["dtype"], text, score["perplexity"], score.get("tokens_per_second"), agreement,
        str(file.get("directory", "")), found.get("dense_perplexity"),
    )  # fmt: skip


def _task_scores(source: str, values: Mapping[str, Any]) -> TaskScores:
    figures: dict[str, dict[str, tuple[float, float]]] = {}
    grouped, groups = members(values), values.get("group_subtasks") or {}
    for task, metrics in values["results"].items():
        # A group stands for its tasks, as in the table of `lowrank evaluate`.
        if task in grouped and not groups.get(task):
            continue
        for key, value in metrics.items():
            metric, _, kind = str(key).partition(",")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            # lm-eval stores the number of rows beside the metrics.
            if not is_number or metric == "sample_len" or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}" if kind else f"{metric}_stderr")
            name = metric if kind in ("", "none") else f"{metric} ({kind})"
            spread = float(error) if isinstance(error, int | float) else math.nan
            figures.setdefault(str(task), {})[name] = (float(value), spread)
    if not figures:
        raise ValueError("its results name no task with a score")
    return TaskScores(source, str(values.get("model_name") or values.get("model") or ""), figures, grouped)


def _speeds(values: Mapping[str, Any]) -> list[Speed]:
    machine = values.get("machine") or {}
    place = machine.get("accelerator") or machine.get("processor") or "an unnamed machine"
    speeds = []
    for row in values["rows"]:
        what = row["storage"] if row["storage"] == "dense" else f"{row['storage']}, keep {row['keep']:g}"
        what += ", optimized" if row.get("optimized") else ""
        how = (
            f"lowrank bench {row['case']} on {place}: {row['dtype']}, batch {row['batch']}, {row['length']} tokens, "
            "random weights, the same keep in every layer"
        )
        speeds.append(Speed(f"{row['base']}, {what}", float(row["tokens_per_second"]), how, row.get("ratio_to_dense")))
    return speeds
