"""Zero-shot tasks by name: lm-eval's own tasks, its YAML files, and local files of questions.

A task is written as ``[NAME=]SOURCE[::cue=TEXT]``, similar to a text in :mod:`lowrank_pl.text`.

==============  =====================================================================================================
source          meaning
==============  =====================================================================================================
``piqa``        a task, group or tag of lm-eval; its data come from the hub
``x.yaml``      a task file of lm-eval
``piqa.jsonl``  rows of a public release, named after the task: see :mod:`lowrank_pl.evaluate.public_tasks`
``x.jsonl``     one question per line: ``{"query": text, "choices": [text, ...], "gold": index of the answer}``
a folder        all of its ``.jsonl`` files, files of public releases and YAML tasks
==============  =====================================================================================================

A file named after a public task holds plain questions where its first row has a ``query``.

The likelihood of each choice is measured after the question and a space. ``acc`` is the fraction of questions whose
answer is the most likely choice; ``acc_norm`` divides log-likelihoods by the number of characters of the choice first.
If a line of a question begins with ``Question:``, a line ``Answer:`` is appended unless the question ends with it, as
in lm-eval's own PIQA, ARC and BoolQ. Other questions are used as they are, as in its OpenBookQA, where the choice
continues the sentence. ``::cue=none`` appends nothing to any question, and ``::cue=A:`` appends a line ``A:`` to all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowrank_pl.evaluate.public_tasks import FILES, RELEASES, PublicTask, first_row, release_of, rows_of, shown
from lowrank_pl.utils.files import at_home

__all__ = ["YAML", "LocalTask", "Task", "named_tasks"]

YAML = (".yaml", ".yml")
NAMED = re.compile(r"([\w.-]+)=(.+)", flags=re.DOTALL)
QUESTION = '{"query": text, "choices": [two texts or more], "gold": index of the answer, from 0}'
CURE = "write one such question in every line"


@dataclass(frozen=True)
class LocalTask:
    r"""A file of multiple-choice questions.

    Args:
        name: Name in tables and results.
        path: The file, in JSON lines.
        cue: Line after every question, ``"none"``, or ``"auto"`` for the rule in the docstring of this module.

    Example:
        >>> LocalTask("piqa", Path("piqa.jsonl"), cue="A:").config()["doc_to_text"]
        '{{query.rstrip()}}\nA:'
    """

    name: str
    path: Path
    cue: str = "auto"

    def config(self) -> dict[str, Any]:
        """Return the task as in a YAML file of lm-eval, without the source of the rows."""
        return {
            "task": self.name,
            "test_split": "test",
            "fewshot_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": self._prompt(),
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ],
            "metadata": {"version": 1.0},
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return the questions.

        Raises:
            ValueError: The file has no question, or a line is not a question; the message names it.
        """
        rows = [_question(row, where) for where, row in rows_of(self.path, QUESTION, CURE)]
        if not rows:
            raise ValueError(f"{self.path} holds no question: expected {QUESTION} in every line")
        return rows

    def _prompt(self) -> str:
        if self.cue == "none":
            return "{{query}}"
        if self.cue != "auto":
            return "{{query.rstrip()}}\n" + self.cue
        asks = r"""'\nQuestion:' in '\n' ~ query and not query.rstrip().endswith('Answer:')"""
        return "{{query.rstrip()}}{% if " + asks + " %}\nAnswer:{% endif %}"


Task = str | LocalTask | PublicTask
"""A name or YAML path for lm-eval, a file of questions, or a task of lm-eval on a local file."""


def named_tasks(entries: Sequence[str]) -> list[Task]:
    r"""Return the tasks of ``entries``: local files, and names and YAML paths for lm-eval.

    Args:
        entries: Tasks as in the docstring of this module; an entry may hold several, separated by commas.

    Raises:
        ValueError: An entry names no task or has options that don't apply, or two tasks have the same name.

    >>> named_tasks(["piqa,arc_easy", "mmlu"])
    ['piqa', 'arc_easy', 'mmlu']
    """
    words = [word.strip() for entry in entries for word in entry.split(",")]
    tasks = [task for word in words for task in _tasks(word)]
    names = [task if isinstance(task, str) else task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two tasks have the name {twice!r}: name files of questions, as NAME=FILE")
    return tasks


def _tasks(word: str) -> list[Task]:
    """Return the tasks of one word."""
    source, marker, options = word.partition("::")
    named = NAMED.fullmatch(source)
    name, place = (named[1], named[2]) if named else (None, source)
    path = at_home(place)
    if path.suffix in FILES:
        if not path.is_file():
            raise ValueError(f"task {word!r}: there is no file {path.absolute()}")
        found = _file(name or path.stem, path.resolve())
        if not marker:
            return [found]
        if isinstance(found, PublicTask):
            raise ValueError(f"task {word!r}: the prompt of {found.name!r} is lm-eval's own and takes no options")
        return [replace(found, cue=_cue(word, options))]
    if marker or named:
        raise ValueError(f"task {word!r}: only a .jsonl file of questions takes a name or options")
    if path.suffix in YAML:
        if not path.is_file():
            raise ValueError(f"task {word!r}: there is no file {path.absolute()}")
        return [str(path.resolve())]
    # A folder may have the name of a public task, which is then meant.
    if path.is_dir() and ("/" in place or release_of(place) is None):
        return _in_folder(path)
    if "/" in place or not place:
        raise ValueError(
            f"task {word!r}: expected the name of a task of lm-eval, a .yaml file of such a task, a .jsonl file of "
            "questions, or a folder of such files"
        )
    return [place]


def _file(name: str, path: Path) -> LocalTask | PublicTask:
    """Return the task of a file of rows."""
    row = first_row(path)
    questions = isinstance(row, dict) and "query" in row
    if release_of(name) is not None and not questions:
        return PublicTask(name, path)
    if path.suffix != ".jsonl":
        raise ValueError(
            f"task {name!r}: {path} holds no public release that is known by this name, and plain questions are read "
            f"from .jsonl: name it after its task ({', '.join(RELEASES)}), or give NAME={path.name}"
        )
    return LocalTask(name, path)


def _in_folder(folder: Path) -> list[Task]:
    """Return the tasks in the files of a folder, without files that belong to another task.

    Those are YAML files that are only included, and few-shot examples of a public release.
    """
    found: list[Task] = []
    for path in sorted(folder.resolve().iterdir()):
        task, dot, split = path.stem.rpartition(".")
        release = release_of(task) if dot else None
        if path.suffix in FILES and release is not None and split == release.examples:
            continue
        if path.suffix == ".jsonl" or (path.suffix in FILES and release_of(path.stem) is not None):
            found.append(_file(path.stem, path))
        elif path.suffix in YAML and re.search(r"^(task|group):", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            found.append(str(path))
    if not found:
        raise ValueError(
            f"the folder {folder.absolute()} has no task: expected .jsonl files of questions, files of public releases "
            "or .yaml task files"
        )
    return found


def _cue(word: str, options: str) -> str:
    key, equals, value = options.partition("=")
    if key != "cue" or not equals or not value:
        raise ValueError(f"task {word!r}: expected cue=none, cue=auto or cue=TEXT after '::', got {options!r}")
    return value


def _question(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the question that a row is."""
    query, choices, gold = (row.get(key) for key in ("query", "choices", "gold"))
    if not (
        isinstance(query, str)
        and query.strip()
        and isinstance(choices, list)
        and len(choices) > 1
        and all(isinstance(choice, str) and choice for choice in choices)
        and type(gold) is int
        and 0 <= gold < len(choices)
    ):
        raise ValueError(
            f"{where} is not a multiple-choice question: expected {QUESTION}, got {shown(row)}; a file of a public "
            f"release is named after its task, as piqa=FILE ({', '.join(RELEASES)})"
        )
    return {"query": query, "choices": choices, "gold": gold}
