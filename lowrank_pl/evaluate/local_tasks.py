"""Zero-shot tasks by name: those of lm-eval, its YAML files, and plain files of questions with choices.

One string names a task everywhere: ``[NAME=]SOURCE[::cue=TEXT]``, as :mod:`lowrank_pl.text` does it for texts.

==============  =====================================================================================================
source          what it is
==============  =====================================================================================================
``piqa``        a task, group or tag of lm-eval, whose data come from the hub
``x.yaml``      a task file of lm-eval
``x.jsonl``     one question a line: ``{"query": text, "choices": [text, ...], "gold": index of the right one}``
a folder        all of its ``.jsonl`` files and YAML tasks
==============  =====================================================================================================

Of a file of questions the likelihood of each choice is measured behind the question and a space; ``acc`` counts the
questions whose right choice is the most likely one, ``acc_norm`` divides log-likelihoods by the characters of the
choice first. A question with a line that begins with ``Question:`` is followed by a line ``Answer:``, unless it ends
in one, as in lm-eval's own PIQA, ARC and BoolQ; any other question stands as it is, as in its OpenBookQA, where the
choice goes on with the sentence. ``::cue=none`` leaves all questions as they are and ``::cue=A:`` puts a line ``A:``
behind all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LocalTask", "named_tasks"]

YAML = (".yaml", ".yml")


NAMED = re.compile(r"([\w.-]+)=(.+)", flags=re.DOTALL)


WANTED = 'expected {"query": text, "choices": [two texts or more], "gold": number of the right one, from 0}'


@dataclass(frozen=True)
class LocalTask:
    r"""A file of questions with choices.

    Args:
        name: What tables and results call it.
        path: The file, JSON lines.
        cue: Line behind every question, ``"none"``, or ``"auto"`` for the rule at the head of this module.

    Example:
        >>> LocalTask("piqa", Path("piqa.jsonl"), cue="A:").config()["doc_to_text"]
        '{{query.rstrip()}}\nA:'
    """

    name: str
    path: Path
    cue: str = "auto"

    def config(self) -> dict[str, Any]:
        """Return the task as lm-eval's YAML files say it, but for where the rows come from."""
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
            ValueError: The file has none, or a line that is none; it is named.
        """
        rows = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                rows.append(_row(line, f"{self.path}, line {number}"))
        if not rows:
            raise ValueError(f"{self.path} holds no question: {WANTED} in every line")
        return rows

    def _prompt(self) -> str:
        if self.cue == "none":
            return "{{query}}"
        if self.cue != "auto":
            return "{{query.rstrip()}}\n" + self.cue
        asks = r"""'\nQuestion:' in '\n' ~ query and not query.rstrip().endswith('Answer:')"""
        return "{{query.rstrip()}}{% if " + asks + " %}\nAnswer:{% endif %}"


def named_tasks(entries: Sequence[str]) -> list[str | LocalTask]:
    r"""Return the tasks that ``entries`` name: files of questions, and what lm-eval finds itself, YAML paths or names.

    Args:
        entries: As at the head of this module; several may stand in one, with commas between them.

    Raises:
        ValueError: An entry names nothing, has options that it can't have, or two tasks have one name.

    >>> named_tasks(["piqa,arc_easy", "mmlu"])
    ['piqa', 'arc_easy', 'mmlu']
    """
    words = [word.strip() for entry in entries for word in entry.split(",")]
    tasks = [task for word in words for task in _tasks(word)]
    names = [task.name if isinstance(task, LocalTask) else task for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two tasks are called {twice!r}: name files of questions, as NAME=FILE")
    return tasks


def _tasks(word: str) -> list[str | LocalTask]:
    """Return what one word names."""
    source, marker, options = word.partition("::")
    named = NAMED.fullmatch(source)
    name, place = (named[1], named[2]) if named else (None, source)
    path = Path(place).expanduser()
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise ValueError(f"task {word!r}: there is no file {path.absolute()}")
        return [LocalTask(name or path.stem, path.resolve(), _cue(word, options) if marker else "auto")]
    if marker or named:
        raise ValueError(f"task {word!r}: only a .jsonl file of questions takes a name or options")
    if path.suffix in YAML:
        if not path.is_file():
            raise ValueError(f"task {word!r}: there is no file {path.absolute()}")
        return [str(path.resolve())]
    if path.is_dir() and ("/" in place or place in (".", "..")):
        return _in_folder(path)
    if "/" in place or not place:
        raise ValueError(
            f"task {word!r}: expected the name of a task of lm-eval, a .yaml file of such a task, a .jsonl file of "
            "questions, or a folder of such files"
        )
    return [place]


def _in_folder(folder: Path) -> list[str | LocalTask]:
    """Return the tasks in the files of a folder; YAML files that others include are none."""
    found: list[str | LocalTask] = []
    for path in sorted(folder.resolve().iterdir()):
        if path.suffix == ".jsonl":
            found.append(LocalTask(path.stem, path))
        elif path.suffix in YAML and re.search(r"^(task|group):", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            found.append(str(path))
    if not found:
        raise ValueError(f"no .jsonl or .yaml file in the folder {folder.absolute()} is a task")
    return found


def _cue(word: str, options: str) -> str:
    key, equals, value = options.partition("=")
    if key != "cue" or not equals or not value:
        raise ValueError(f"task {word!r}: expected cue=none, cue=auto or cue=TEXT after '::', got {options!r}")
    return value


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}): {WANTED}") from None
    query, choices, gold = (
        (row.get(key) for key in ("query", "choices", "gold")) if isinstance(row, dict) else [None] * 3
    )
    if not (
        isinstance(query, str)
        and query.strip()
        and isinstance(choices, list)
        and len(choices) > 1
        and all(isinstance(choice, str) and choice for choice in choices)
        and type(gold) is int
        and 0 <= gold < len(choices)
    ):
        shown = line if len(line) <= 120 else line[:117] + "..."
        raise ValueError(f"{where} is no question with choices: {WANTED}, got {shown}")
    return {"query": query, "choices": choices, "gold": gold}
