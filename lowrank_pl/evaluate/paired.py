"""Scores of two models on the same items: differences with paired standard errors, and a table of both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowrank_pl.utils.formatting import table

__all__ = ["differences", "members", "paired_difference", "task_table"]

Results = Mapping[str, Any]
"""Results of lm-eval for one model, as in its JSON files."""

_Scored = tuple[float | None, float | None]


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Return the mean of ``ours - theirs`` over the same items, and its standard error.

    Items that are hard for both models cancel, so the error is usually far below that of two independent samples.

    Args:
        ours: Score of every item.
        theirs: Scores of the other model, in the same order.

    Raises:
        ValueError: The lengths differ, or are below two.

    >>> paired_difference([1, 0, 1, 1], [1, 1, 1, 1])
    (-0.25, 0.25)
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"{len(ours)} and {len(theirs)} scores were given: expected equally many, at least two")
    changes = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
    mean = math.fsum(changes) / len(changes)
    variance = math.fsum((change - mean) ** 2 for change in changes) / (len(changes) - 1)
    return mean, math.sqrt(variance / len(changes))


def differences(model: Results, reference: Results) -> dict[str, dict[str, float | None]]:
    """Return the scores of ``model`` minus those of ``reference``, by task and metric.

    Each ``metric,filter`` comes with ``metric_paired_stderr,filter``. The error is None unless the score is a mean
    over items that both models were scored on.

    Args:
        model: lm-eval's results, with ``samples``.
        reference: lm-eval's results of the other model on the same rows.
    """
    found: dict[str, dict[str, float | None]] = {}
    for task, metric, kind in _metrics(model):
        key = f"{metric},{kind}"
        if key not in reference["results"].get(task, {}):
            continue
        change = model["results"][task][key] - reference["results"][task][key]
        ours, theirs = (_items(results, task, metric, kind) for results in (model, reference))
        error = None
        if len(ours) > 1 and ours.keys() == theirs.keys():
            mean, deviation = paired_difference([*ours.values()], [theirs[item] for item in ours])
            # Groups may weight tasks other than by size, and some scores are not means.
            error = deviation if math.isclose(mean, change, abs_tol=1e-9) else None
        found.setdefault(task, {})[key] = change
        found[task][f"{metric}_paired_stderr,{kind}"] = error
    return found


def task_table(model: Results, reference: Results | None = None, *, fmt: str = "simple") -> str:
    """Return a table of scores with standard errors: of one model, or of the dense and the compressed one.

    A group replaces its tasks. With several tasks, the last rows show the mean of every metric that all of them have.

    Args:
        model: lm-eval's results, with ``samples`` if there is a reference.
        reference: lm-eval's results of the dense model.
        fmt: A format of ``tabulate``.
    """
    columns = [model] if reference is None else [reference, model]
    change = {} if reference is None else differences(model, reference)
    head = ["task", "metric", "rows", *(["score"] if reference is None else ["dense", "compressed", "difference"])]
    grouped, groups = members(model), model.get("group_subtasks", {})
    lines: list[list[str]] = []
    means: dict[str, list[list[_Scored]]] = {}
    roots = set()
    for task, metric, kind in _metrics(model):
        if task in grouped and not groups.get(task):
            continue
        scores = [_scored(results["results"].get(task, {}), metric, kind) for results in columns]
        if reference is not None:
            scores.append(_scored(change.get(task, {}), metric, kind, error="paired_stderr"))
        label = metric if kind == "none" else f"{metric} ({kind})"
        lines.append([task, label, f"{_rows(model, task):,}", *_cells(scores)])
        if task not in grouped:
            roots.add(task)
            means.setdefault(label, []).append(scores)
    for label, found in means.items():
        if len(found) == len(roots) > 1:
            lines.append(["mean", label, "", *_cells([_mean(column) for column in zip(*found, strict=True)])])
    return table(head, lines, fmt, align=("left", "left", *["right"] * (len(head) - 2)))


def _metrics(results: Results) -> Iterator[tuple[str, str, str]]:
    """Yield task, metric and filter of every score."""
    for task, scores in results["results"].items():
        for key, value in scores.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                yield task, metric, kind


def _items(results: Results, task: str, metric: str, kind: str) -> dict[tuple[str, int], float]:
    """Return the score of every item of a task, or of all tasks of a group."""
    return {
        (leaf, sample["doc_id"]): float(sample[metric])
        for leaf in _leaves(results, task)
        for sample in results.get("samples", {}).get(leaf, ())
        if sample["filter"] == kind and isinstance(sample.get(metric), int | float)
    }


def _leaves(results: Results, task: str) -> list[str]:
    below = results.get("group_subtasks", {}).get(task) or ()
    return [leaf for one in below for leaf in _leaves(results, one)] if below else [task]


def members(results: Results) -> frozenset[str]:
    """Return the tasks and groups that belong to another group."""
    groups = results.get("group_subtasks") or {}
    return frozenset(name for names in groups.values() for name in names)


def _rows(results: Results, task: str) -> int:
    counts = results.get("n-samples", {})
    return sum(counts[leaf]["effective"] for leaf in _leaves(results, task) if leaf in counts)


def _scored(scores: Mapping[str, Any], metric: str, kind: str, *, error: str = "stderr") -> _Scored:
    """Return a score and its error; lm-eval writes ``"N/A"`` for an unknown error."""
    found = scores.get(f"{metric}_{error},{kind}")
    return scores.get(f"{metric},{kind}"), found if isinstance(found, int | float) else None


def _mean(column: Sequence[_Scored]) -> _Scored:
    """Return the mean over independent tasks, and its error if every task has one."""
    scores = [score for score, _ in column if score is not None]
    errors = [error for _, error in column if error is not None]
    if len(scores) < len(column):
        return None, None
    error = math.hypot(*errors) / len(column) if len(errors) == len(column) else None
    return math.fsum(scores) / len(column), error


def _cells(scores: Sequence[_Scored]) -> list[str]:
    """Return ``score ± error`` for each; the third is a difference and gets a sign."""
    cells = []
    for (score, error), form in zip(scores, (".4f", ".4f", "+.4f"), strict=False):
        cells.append("" if score is None else format(score, form) + ("" if error is None else f" ± {error:.4f}"))
    return cells
