"""What was measured of a model besides its run, read back from the JSON files of other commands.

What is special: a file is known by what it holds, not by its name. ``lowrank doctor`` and ``evaluate`` write such files
with ``--json``, ``bench decode`` and ``prefill`` too, and scores on tasks come in the form of lm-evaluation-harness.
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

__all__ = ["Agreement", "Evidence", "Pass", "Speed", "TaskScores", "described", "read_evidence"]

_log = logging.getLogger(__name__)


MOST_BYTES = 2**24
"""Of a file that is looked into unasked."""


EXPECTED = (
    "expected what `lowrank doctor`, `lowrank evaluate` or `lowrank bench decode` write with --json, or the results of "
    "lm-evaluation-harness"
)


@dataclass(frozen=True)
class TaskScores:
    """Scores of one model on tasks.

    Args:
        source: Name of the file, without its ending.
        model: What the file calls the model; empty where it doesn't say.
        figures: Value and standard error, NaN where there is none, by task and metric.
        grouped: Those of them that stand in a group.

    Example:
        >>> scores = TaskScores("a", "", {"piqa": {"acc": (0.6, 0.1)}, "boolq": {"acc": (0.5, math.nan)}})
        >>> scores.mean_accuracy
        0.55
    """

    source: str
    model: str
    figures: Mapping[str, Mapping[str, tuple[float, float]]]
    grouped: frozenset[str] = frozenset()

    @property
    def mean_accuracy(self) -> float | None:
        """The mean of ``acc`` over the tasks and groups that are in no other group; None unless every one has it."""
        own = [metrics for task, metrics in self.figures.items() if task not in self.grouped]
        found = [metrics["acc"][0] for metrics in own if "acc" in metrics]
        return fmean(found) if found and len(found) == len(own) else None


@dataclass(frozen=True)
class Pass:
    """A score of ``lowrank evaluate``.

    Args:
        source: Name of the file, without its ending.
        model: What was scored.
        text: On what text.
        sequences: How many sequences.
        length: Tokens of a sequence.
        dtype: Type of the weights.
        perplexity: Perplexity.
        tokens_per_second: Predicted tokens in a second, scoring; None beside a reference, where nothing is timed.
        kl: KL(reference || model) in nats a token; None without a reference.
        agreement: Fraction of tokens for which both find the same one most likely; likewise.
        tokens: Predicted tokens.
    """

    source: str
    model: str
    text: str
    sequences: int
    length: int
    dtype: str
    perplexity: float
    tokens_per_second: float | None = None
    kl: float | None = None
    agreement: float | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Speed:
    """How fast a model was.

    Args:
        model: Which model.
        tokens_per_second: Tokens in a second.
        how: How that was measured.
        ratio: Times as fast as the dense model beside it.
    """

    model: str
    tokens_per_second: float
    how: str
    ratio: float | None = None


@dataclass(frozen=True)
class Agreement:
    """How far predictions are from the dense model's.

    Args:
        kl: KL(dense || model) in nats a token.
        agreement: Fraction of tokens for which both find the same one most likely.
        tokens: On how many tokens.
        how: On what text.
    """

    kl: float
    agreement: float
    tokens: int
    how: str


@dataclass(frozen=True)
class Evidence:
    """All that other commands have measured.

    Args:
        diagnosis: What ``lowrank doctor`` found, or the checks that need no text.
        checked_by: Who made the diagnosis.
        thorough: Whether it was ``lowrank doctor``.
        stale: Whether weights were written after it.
        tasks: Scores on tasks.
        passes: Perplexities.
        speeds: Speeds.
        model: Folder of the model that all this is about; None where there is none.
    """

    diagnosis: Diagnosis | None = None
    checked_by: str = ""
    thorough: bool = False
    stale: bool = False
    tasks: tuple[TaskScores, ...] = ()
    passes: tuple[Pass, ...] = ()
    speeds: tuple[Speed, ...] = ()
    model: Path | None = None

    @property
    def own_passes(self) -> list[Pass]:
        """Those of the passes that were over the model itself."""
        here = self.model and self.model.resolve()
        return [one for one in self.passes if Path(one.model).resolve() == here]

    @property
    def divergence(self) -> Agreement | None:
        """The doctor's, where it had the dense model beside this one, or else that of ``lowrank evaluate``."""
        found = [finding.figures for finding in self.diagnosis.findings] if self.diagnosis else []
        figures = next((one for one in found if {"kl", "agreement", "tokens"} <= one.keys()), None)
        if figures is None or self.diagnosis is None:
            for one in self.own_passes:
                if one.kl is not None and one.agreement is not None:
                    return Agreement(one.kl, one.agreement, one.tokens, described(vars(one)))
            return None
        how = described(self.diagnosis.protocol) or "the text of `lowrank doctor`"
        return Agreement(float(figures["kl"]), float(figures["agreement"]), int(figures["tokens"]), how)


def described(protocol: Mapping[str, Any]) -> str:
    """Return in words what was scored on; nothing where the protocol does not say.

    >>> described({"text": "a.txt", "windows": 8, "length": 512})
    'a.txt, 8 sequences of 512 tokens'
    """
    if not {"text", "windows", "length"} <= protocol.keys():
        return str(protocol.get("text", ""))
    return f"{protocol['text']}, {protocol['windows']} sequences of {protocol['length']} tokens"


def read_evidence(
    named: Iterable[Path], found: Iterable[Path] = (), *, model: Path | None = None, written: float = 0.0
) -> Evidence:
    """Return what the files say together; of several files of ``lowrank doctor`` the last one counts.

    Args:
        named: Files that must hold scores.
        found: Files that may, which come before these; what else they hold is logged and left out.
        model: Folder of the model that they are about.
        written: When the weights were written, as ``stat`` gives it; an older diagnosis is stale.

    Raises:
        ValueError: A named file is absent or holds no scores; the message says what is expected.
    """
    whole = Evidence(model=model)
    named = list(named)
    seen = {path.resolve() for path in named}
    for path in found:
        if path.resolve() not in seen:
            try:
                whole = _with(whole, path, _values(path, limit=MOST_BYTES), written)
            except ValueError as error:
                _log.info("left out of the report: %s", error)
    for path in named:
        whole = _with(whole, path, _values(path), written)
    return whole


def _values(path: Path, *, limit: int | None = None) -> dict[str, Any]:
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
    return values


def _with(whole: Evidence, path: Path, values: dict[str, Any], written: float) -> Evidence:
    """Return ``whole`` with what one file says."""
    parts = _parts(whole, path, values, written)
    # The figures that `lowrank fit` writes with --json are the run's own summary.
    if not parts and "facts" not in values:
        raise ValueError(f"{path} holds no scores: {EXPECTED}")
    return replace(whole, **parts)


def _parts(whole: Evidence, path: Path, values: dict[str, Any], written: float) -> dict[str, Any]:
    try:
        if isinstance(values.get("findings"), dict):
            changed = path.stat().st_mtime
            by = f"lowrank doctor, {path.name}"
            return {
                "diagnosis": Diagnosis.from_dict(values), "checked_by": by, "thorough": True, "stale": changed < written
            }  # fmt: skip
        if isinstance(values.get("results"), dict):
            return {"tasks": (*whole.tasks, _tasks(path.stem, values))}
        if "model" in values and (isinstance(values.get("texts"), dict) or isinstance(values.get("tasks"), dict)):
            return _evaluated(whole, path.stem, values)
        if isinstance(values.get("rows"), list):
            return {"speeds": (*whole.speeds, *_speeds(values))}
        if {"model", "text", "perplexity", "tokens_per_second"} <= values.keys():
            return {"passes": (*whole.passes, _pass(path.stem, values, values))}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): {EXPECTED}") from None
    return {}


def _evaluated(whole: Evidence, source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file of ``lowrank evaluate`` says: of each text, and of tasks for the model and its reference."""
    parts: dict[str, Any] = {}
    if texts := values.get("texts"):
        parts["passes"] = (*whole.passes, *(_pass(source, values, one) for one in texts.values()))
    if tasks := values.get("tasks"):
        names = {"model": values["model"], "reference": values.get("reference")}
        found = [_tasks(source, {**tasks[who], "model_name": name}) for who, name in names.items() if who in tasks]
        # In a table of tasks they stand side by side.
        beside = [replace(one, source="dense") for one in found[1:]]
        parts["tasks"] = (*whole.tasks, *beside, *found[:1])
    return parts


def _pass(source: str, whole: Mapping[str, Any], text: Mapping[str, Any]) -> Pass:
    beside = text.get("divergence") or {}
    return Pass(
        source, whole["model"], text["text"], text["windows"], text["length"], whole["dtype"], text["perplexity"],
        text.get("tokens_per_second"), beside.get("kl"), beside.get("agreement"), text.get("tokens", 0),
    )  # fmt: skip


def _tasks(source: str, values: Mapping[str, Any]) -> TaskScores:
    figures: dict[str, dict[str, tuple[float, float]]] = {}
    grouped, groups = members(values), values.get("group_subtasks") or {}
    for task, metrics in values["results"].items():
        # A group stands for its tasks, as in the table of `lowrank evaluate`.
        if task in grouped and not groups.get(task):
            continue
        for key, value in metrics.items():
            metric, _, kind = str(key).partition(",")
            # Beside the metrics lm-eval notes how many rows there are.
            if (
                metric == "sample_len"
                or metric.endswith("_stderr")
                or isinstance(value, bool)
                or not isinstance(value, int | float)
            ):
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
        how = (
            f"lowrank bench {row['case']} on {place}: {row['dtype']}, batch {row['batch']}, {row['length']} tokens, "
            "layers of random numbers, every layer at the same keep"
        )
        speeds.append(Speed(f"{row['base']}, {what}", float(row["tokens_per_second"]), how, row.get("ratio_to_dense")))
    return speeds
