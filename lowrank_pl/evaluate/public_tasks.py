r"""lm-eval's own tasks on local files: the public releases of PIQA, ARC, MMLU and others, read and checked.

A file belongs to a task by its name: ``piqa.jsonl``, or ``piqa=FILE`` for another file. It holds the rows of the split
that lm-eval scores, with the columns of the data set that lm-eval loads from the hub, as JSON lines (``.jsonl`` or
``.json``), a JSON array (``.json``) or Parquet. The authors' own releases of ARC, OpenBookQA, BoolQ and MathQA have
other columns or another layout, and are read too. Prompt, choices and scoring stay those of lm-eval, so that scores are
comparable with published ones.

Few-shot examples come from a second file, ``piqa.train.jsonl`` beside ``piqa.jsonl`` (``mmlu.dev.jsonl`` for MMLU),
since lm-eval takes them from another split than the scored one.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FILES", "MMLU_SUBJECTS", "RELEASES", "PublicTask", "Release", "first_row", "release_of", "rows_of", "shown"]

Row = dict[str, Any]

FILES = (".jsonl", ".json", ".parquet")
"""Endings of files with a public release."""

MMLU_GROUPS = ("mmlu", "mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other")

# fmt: off
MMLU_SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios",
    "nutrition", "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)
# fmt: on
"""Values of the column ``subject`` of MMLU."""


@dataclass(frozen=True)
class Release:
    """How a task's data are published, and how a row becomes one of lm-eval's.

    Args:
        folder: lm-eval's folder with the task.
        hub: Data set on the hub.
        config: Configuration of the data set, or None.
        split: The split that is scored.
        examples: The split of few-shot examples.
        columns: The columns that the task reads.
        convert: Returns a row with these columns, or raises ``ValueError`` with what is wrong.
    """

    folder: str
    hub: str
    config: str | None
    split: str
    examples: str
    columns: tuple[str, ...]
    convert: Callable[[Row], Row]

    def command(self, file: str, *, examples: bool = False) -> str:
        """Return the shell command that writes ``file`` from the hub.

        >>> print(RELEASES["piqa"].command("p.jsonl"))
        python -c 'from datasets import load_dataset; load_dataset("baber/piqa", split="validation").to_json("p.jsonl")'
        """
        place = f'"{self.hub}"' + (f', "{self.config}"' if self.config else "")
        split = self.examples if examples else self.split
        write = "to_parquet" if file.endswith(".parquet") else "to_json"
        code = f'from datasets import load_dataset; load_dataset({place}, split="{split}").{write}("{file}")'
        return f"python -c '{code}'"


@dataclass(frozen=True)
class PublicTask:
    """A task of lm-eval on a local file.

    Args:
        name: lm-eval's name of the task or, for MMLU, of a group.
        path: File with the rows that are scored.
    """

    name: str
    path: Path

    @property
    def release(self) -> Release:
        """How the data of the task are published."""
        return RELEASES["mmlu" if self.name.startswith("mmlu") else self.name]

    def rows(self) -> list[Row]:
        """Return the rows that are scored, with the columns of ``release``.

        Raises:
            ValueError: There is no row, or a row is none of this task; the message names it.
        """
        return self._checked(self.path, examples=False)

    def example_path(self) -> Path:
        """Return the file of few-shot examples, which need not exist."""
        found = [self.path.with_name(f"{self.path.stem}.{self.release.examples}{suffix}") for suffix in FILES]
        return next((path for path in found if path.is_file()), self.path.with_name(found[0].name))

    def example_rows(self) -> list[Row]:
        """Return the few-shot examples; none if there is no file of them.

        Raises:
            ValueError: As for ``rows``.
        """
        path = self.example_path()
        return self._checked(path, examples=True) if path.is_file() else []

    def require_examples(self, number: int) -> None:
        """Check that there is a file of few-shot examples.

        Raises:
            ValueError: There is none; the message has the command that writes it.
        """
        path = self.example_path()
        if not path.is_file():
            raise ValueError(
                f"fewshot is {number}, but task {self.name!r} has no file {path} of examples, which lm-eval takes from "
                f"the split {self.release.examples!r}: leave --fewshot out, or write the file with "
                f"{self.release.command(path.name, examples=True)}"
            )

    def _checked(self, path: Path, *, examples: bool) -> list[Row]:
        release = self.release
        cure = f"write the file with {release.command(path.name, examples=examples)}"
        wanted = f"a row of {release.hub} with the columns {', '.join(release.columns)}"
        rows = []
        for where, row in rows_of(path, wanted, cure):
            try:
                rows.append(release.convert(row))
            except ValueError as error:
                raise ValueError(
                    f"{where} is no row of task {self.name!r}: {error}. Expected {wanted}, got {shown(row)}; {cure}"
                ) from None
        if not rows:
            raise ValueError(f"{path} holds no row of task {self.name!r}: {cure}")
        if self.name.startswith("mmlu"):
            self._check_subjects(path, rows, cure)
        return rows

    def _check_subjects(self, path: Path, rows: list[Row], cure: str) -> None:
        found = {row["subject"] for row in rows}
        alone = self.name.removeprefix("mmlu_")
        wanted = MMLU_SUBJECTS if self.name == "mmlu" else (alone,) if alone in MMLU_SUBJECTS else ()
        missing = [subject for subject in wanted if subject not in found]
        if missing:
            raise ValueError(
                f"{path} has no rows of {len(missing)} of the subjects of task {self.name!r} ({', '.join(missing[:5])}"
                f"{', ...' if missing[5:] else ''}), so its score would be another one: {cure}, or name single "
                f"subjects, as mmlu_anatomy={path.name}"
            )


def release_of(name: str) -> Release | None:
    """Return the release of lm-eval's task ``name``, or None if its local files are not known.

    >>> release_of("mmlu_anatomy").hub, release_of("my_own")
    ('cais/mmlu', None)
    """
    if name in MMLU_GROUPS or (name.startswith("mmlu_") and name.removeprefix("mmlu_") in MMLU_SUBJECTS):
        return RELEASES["mmlu"]
    return RELEASES.get(name)


def first_row(path: Path) -> Any:
    """Return the first row of a file, or None where there is none or it can't be read.

    Args:
        path: A file that exists.
    """
    try:
        return next((row for _, row in rows_of(path, "", "")), None)
    except ValueError:
        return None


def rows_of(path: Path, wanted: str, cure: str) -> Iterator[tuple[str, Row]]:
    """Yield where each row of a file is, and the row.

    Args:
        path: A file that exists.
        wanted: What a row should be, for errors.
        cure: What to do about a file that can't be read, for errors.

    Raises:
        ValueError: The file can't be read, or a row is no mapping; the message names it.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, cure)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path} is not a UTF-8 text ({error}): {cure}") from None
    numbered: Iterable[tuple[str, Any]]
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            numbered = [(f"{path}, row {place}", row) for place, row in enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}): {cure}") from None
    else:
        numbered = _line_rows(path, text, wanted, cure)
    for where, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected {wanted}, got {shown(row)}; {cure}")
        yield where, row


def _line_rows(path: Path, text: str, wanted: str, cure: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON ({error}): expected {wanted}; {cure}") from None
            yield where, row


def _parquet_rows(path: Path, cure: str) -> Iterator[tuple[str, Row]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} can't be read as Parquet ({reason}): {cure}") from None
    for place, row in enumerate(rows, 1):
        yield f"{path}, row {place}", row


def shown(row: Any) -> str:
    """Return a row in JSON, cut to 120 characters."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else text[:117] + "..."


def _text(row: Row, key: str, *, empty: bool = False) -> str:
    """Return the text in a column."""
    if key not in row:
        raise ValueError(f"the column {key!r} is missing")
    value = row[key]
    if not _is_text(value) or not (empty or value.strip()):
        raise ValueError(f"{key} is {reprlib.repr(value)}, expected a text")
    return str(value)


def _is_text(value: Any) -> bool:
    """Return whether a value is text that can be written as UTF-8: JSON also has halves of surrogate pairs."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _texts(row: Row, key: str) -> list[str]:
    """Return the list of texts in a column."""
    if key not in row:
        raise ValueError(f"the column {key!r} is missing")
    value = row[key]
    if not (isinstance(value, list) and value and all(map(_is_text, value))):
        raise ValueError(f"{key} is {reprlib.repr(value)}, expected a list of texts")
    return value


def _index(row: Row, key: str, choices: int, *, letters: str = "") -> int:
    """Return the answer in a column as an index from 0; ``letters`` are other names of the choices."""
    if key not in row:
        raise ValueError(f"the column {key!r} is missing")
    value = row[key]
    if isinstance(value, str) and len(value) == 1 and value in letters:
        value = letters.index(value)
    elif isinstance(value, str) and value.isdecimal():
        value = int(value)
    if type(value) is not int or not 0 <= value < choices:
        unlabeled = " (rows of a split whose answers are not public)" if value in (-1, "", None) else ""
        raise ValueError(
            f"{key} is {reprlib.repr(row[key])}{unlabeled}, expected the index of the answer, 0 to {choices - 1}"
        )
    return value


def _piqa(row: Row) -> Row:
    texts = {key: _text(row, key) for key in ("goal", "sol1", "sol2")}
    return {**texts, "label": _index(row, "label", 2)}


def _boolq(row: Row) -> Row:
    question, passage = _text(row, "question"), _text(row, "passage")
    key = "answer" if "answer" in row and "label" not in row else "label"
    if key == "answer":
        # The authors' release. SuperGLUE, which lm-eval scores, puts the title in front of the passage.
        if "title" not in row:
            raise ValueError("the column 'title' is missing, with which every passage of lm-eval's SuperGLUE begins")
        passage = f"{_text(row, 'title')} -- {passage}"
    if isinstance(row.get(key), bool):
        row = {**row, key: int(row[key])}
    return {"question": question, "passage": passage, "label": _index(row, key, 2)}


def _labelled(row: Row, key: str) -> Row:
    """Return a row of ARC or OpenBookQA, whose choices have labels, with the question in column ``key``."""
    choices = row.get("choices")
    question = row.get("question")
    if isinstance(question, dict):  # the authors' release
        row = {**row, key: question.get("stem")}
        choices = question.get("choices")
    if isinstance(choices, list) and all(isinstance(one, dict) for one in choices):
        choices = {name: [one.get(name) for one in choices] for name in ("text", "label")}
    if not isinstance(choices, dict):
        raise ValueError(f"choices are {reprlib.repr(choices)}, expected lists 'text' and 'label'")
    texts, labels = _texts(choices, "text"), _texts(choices, "label")
    if len(texts) != len(labels) or len(texts) < 2:
        raise ValueError(f"there are {len(texts)} choices with {len(labels)} labels, expected as many, at least 2")
    answer = _text(row, "answerKey").strip()
    if answer not in labels:
        raise ValueError(f"answerKey is {reprlib.repr(answer)}, expected one of the labels {', '.join(labels)}")
    return {key: _text(row, key), "choices": {"text": texts, "label": labels}, "answerKey": answer}


def _arc(row: Row) -> Row:
    return _labelled(row, "question")


def _openbookqa(row: Row) -> Row:
    return _labelled(row, "question_stem")


def _hellaswag(row: Row) -> Row:
    texts = {"activity_label": _text(row, "activity_label")}
    texts |= {key: _text(row, key, empty=True) for key in ("ctx_a", "ctx_b")}
    endings = _texts(row, "endings")
    return {**texts, "endings": endings, "label": str(_index(row, "label", len(endings)))}


def _winogrande(row: Row) -> Row:
    texts = {key: _text(row, key) for key in ("sentence", "option1", "option2")}
    if "_" not in texts["sentence"]:
        raise ValueError("sentence has no _ where an option goes")
    answer = str(row.get("answer", ""))
    if answer not in ("1", "2"):
        unlabeled = " (rows of a split whose answers are not public)" if answer == "" else ""
        raise ValueError(f"answer is {reprlib.repr(row.get('answer'))}{unlabeled}, expected 1 or 2")
    return {**texts, "answer": answer}


def _mathqa(row: Row) -> Row:
    problem, options, correct = (_text(row, key) for key in ("Problem", "options", "correct"))
    if correct not in ("a", "b", "c", "d", "e"):
        raise ValueError(f"correct is {reprlib.repr(correct)}, expected one of a, b, c, d, e")
    if len(re.findall(r"[abcde] \) ", options)) < 2:
        raise ValueError(f"options are {reprlib.repr(options)}, expected choices as in 'a ) 38 , b ) 27 , ...'")
    return {"Problem": problem, "options": options, "correct": correct}


def _nq_open(row: Row) -> Row:
    return {"question": _text(row, "question"), "answer": _texts(row, "answer")}


def _mmlu(row: Row) -> Row:
    choices = _texts(row, "choices")
    if len(choices) != 4:
        raise ValueError(f"there are {len(choices)} choices, expected 4")
    subject = _text(row, "subject")
    if subject not in MMLU_SUBJECTS:
        raise ValueError(
            f"subject is {reprlib.repr(subject)}, expected one of the {len(MMLU_SUBJECTS)} of MMLU, as 'anatomy'"
        )
    answer = _index(row, "answer", 4, letters="ABCD")
    return {"question": _text(row, "question"), "subject": subject, "choices": choices, "answer": answer}


_CHOICES = ("choices", "answerKey")
_HELLASWAG = ("activity_label", "ctx_a", "ctx_b", "endings", "label")

RELEASES = {
    "arc_challenge": Release("arc", "allenai/ai2_arc", "ARC-Challenge", "test", "train", ("question", *_CHOICES), _arc),
    "arc_easy": Release("arc", "allenai/ai2_arc", "ARC-Easy", "test", "train", ("question", *_CHOICES), _arc),
    "boolq": Release(
        "super_glue/boolq", "aps/super_glue", "boolq", "validation", "train", ("question", "passage", "label"), _boolq
    ),
    "hellaswag": Release("hellaswag", "Rowan/hellaswag", None, "validation", "train", _HELLASWAG, _hellaswag),
    "mathqa": Release("mathqa", "regisss/math_qa", None, "test", "train", ("Problem", "options", "correct"), _mathqa),
    "mmlu": Release(
        "mmlu/default", "cais/mmlu", "all", "test", "dev", ("question", "subject", "choices", "answer"), _mmlu
    ),
    "nq_open": Release(
        "nq_open", "google-research-datasets/nq_open", None, "validation", "train", ("question", "answer"), _nq_open
    ),
    "openbookqa": Release(
        "openbookqa", "allenai/openbookqa", "main", "test", "train", ("question_stem", *_CHOICES), _openbookqa
    ),
    "piqa": Release("piqa", "baber/piqa", None, "validation", "train", ("goal", "sol1", "sol2", "label"), _piqa),
    "winogrande": Release(
        "winogrande",
        "allenai/winogrande",
        "winogrande_xl",
        "validation",
        "train",
        ("sentence", "option1", "option2", "answer"),
        _winogrande,
    ),
}
"""Releases by lm-eval's name of the task; groups and subjects of MMLU share that of ``mmlu``."""
