"""Text by name: Python's own documentation, local files, datasets of the hub.

One string names a text everywhere: ``SOURCE[::key=value[,key=value...]]``.

======================  ==============================================================  =============================
source                  what it is                                                      options
======================  ==============================================================  =============================
``python-docs``         the English documentation that ships with Python                ``part``, ``limit``,
                                                                                        ``every``
file, folder or glob    ``.txt .md .json .jsonl .parquet``, each also with ``.gz``      ``field``, ``part``, ``limit``,
                                                                                        ``every``
``OWNER/NAME``          dataset of the hub, streamed; ``hub:NAME`` says so explicitly   ``field``, ``config``,
                                                                                        ``split``, ``revision``,
                                                                                        ``limit``, ``every``
======================  ==============================================================  =============================

``limit=N`` takes the first N documents. ``part=A%-B%`` takes a share: of the *characters* of ``python-docs`` (whole
topics, spread over the alphabet) and of a single ``.txt`` or ``.md`` file (whole lines, in order); of the *documents*
of any other local source (in order). Parts that do not overlap share no document and no line. ``every=N`` takes every
N-th sequence of tokens of all that: as many sequences of a text in a fixed order, such as an encyclopaedia's, are then of N
times as many articles.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowrank_pl.text.files import SUFFIXES, Document, count_documents, file_documents, kind_of, lines_in_part
from lowrank_pl.text.records import record_text
from lowrank_pl.utils.files import sha256_of

__all__ = ["TextSource", "named_texts", "parse_text", "read_documents", "read_stream", "source_identity"]

PYTHON_DOCS = "python-docs"


HUB = "hub:"


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


PART = re.compile(r"\s*(\d+(?:\.\d+)?)%\s*-\s*(\d+(?:\.\d+)?)%\s*")


OPTIONS = {
    "docs": ("part", "limit", "every"),
    "files": ("field", "part", "limit", "every"),
    "hub": ("field", "config", "split", "revision", "limit", "every"),
}


REPEATED = 60  # a paragraph of so many characters that stands in two topics is a copy, not a common phrase


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextSource:
    """What a text's name says, checked.

    Attributes:
        text: The name as given.
        kind: ``"docs"``, ``"files"`` or ``"hub"``.
        name: The source without prefix and options; local ones as an absolute path.
        paths: The files, sorted, of a local source.
        part: Beginning and end of the share, between 0 and 1.
        every: Which sequences to take: the first of every so many.
    """

    text: str = field(compare=False)
    kind: str
    name: str
    paths: tuple[Path, ...] = ()
    field: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    part: tuple[Fraction, Fraction] | None = None
    limit: int | None = None
    every: int = 1


def parse_text(text: str) -> TextSource:
    """Return what ``text`` names; nothing is read yet, but local files must be there.

    Raises:
        ValueError: Unknown option, bad value, or a source that is neither a local file nor the form of a dataset's id.

    >>> parse_text("python-docs::part=50%-100%,limit=3").limit
    3
    """
    name, marker, tail = text.partition("::")
    given = _options(text, tail) if marker else {}
    paths: tuple[Path, ...] = ()
    if name == PYTHON_DOCS:
        kind = "docs"
    elif name.startswith(HUB):
        kind, name = "hub", name.removeprefix(HUB)
    elif paths := _local_files(text, name):
        kind, name = "files", str(Path(name).expanduser().resolve())
    elif HUB_ID.fullmatch(name) and kind_of(Path(name)) is None:
        kind = "hub"
    else:
        raise ValueError(
            f"text {text!r}: {Path(name).absolute()} is no file, folder or glob with a match, and {name!r} is not the "
            f"id OWNER/NAME of a hub dataset either: give one of these, or {PYTHON_DOCS}"
        )
    _check_options(text, kind, given)
    values: dict[str, Any] = dict(given)
    for option, what in (("limit", "a number of documents"), ("every", "a number of sequences")):
        if option in given:
            values[option] = _count(text, option, given[option], what)
    if "part" in given:
        values["part"] = _part(text, given["part"])
    return TextSource(text=text, kind=kind, name=name, paths=paths, **values)


def read_documents(text: str, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
    """Yield the documents of ``text`` one after the other; a large text file comes in consecutive chunks.

    Args:
        text: Name of the text, see the head of this module.
        tokenizer: Whose chat template turns rows of messages into text; of no use for plain text.

    Raises:
        ValueError: The text can't be read; the message says what was found where.

    >>> next(read_documents("python-docs::limit=1")).splitlines()[0]
    'The "assert" statement'
    """
    for _, piece in _pieces(parse_text(text), tokenizer):
        yield piece


def read_stream(text: str, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
    r"""Yield the pieces of one long string: the documents of ``text`` joined by ``"\n\n"``.

    Args:
        text: Name of the text.
        tokenizer: As in :func:`read_documents`.
    """
    for place, (first, piece) in enumerate(_pieces(parse_text(text), tokenizer)):
        yield "\n\n" + piece if first and place else piece


def source_identity(source: TextSource) -> str:
    """Return a fingerprint that changes when the text does: by content, by size and time of files, or by revision."""
    parts = [f"{entry.name}={getattr(source, entry.name)}" for entry in fields(source) if entry.name != "text"]
    if source.kind == "docs":
        parts += [sys.version, *(key + topic for key, topic in sorted(_topics().items()))]
    paths = source.paths
    if source.kind == "hub" and Path(source.name).is_dir():
        paths = tuple(sorted(path for path in Path(source.name).rglob("*") if path.is_file()))
    for path in paths:
        state = path.stat()
        parts.append(f"{path} {state.st_size} {state.st_mtime_ns}")
    return sha256_of(*parts)


def _options(text: str, tail: str) -> dict[str, str]:
    """Return the pairs of ``key=value,key=value``."""
    given: dict[str, str] = {}
    for pair in tail.split(","):
        key, equals, value = (side.strip() for side in pair.partition("="))
        if not (key and equals and value) or key in given:
            raise ValueError(f"text {text!r}: expected key=value once for each key after '::', got {pair!r}")
        given[key] = value
    return given


def _check_options(text: str, kind: str, given: dict[str, str]) -> None:
    """Raise when an option is unknown or has no meaning for this kind of source."""
    source = {"docs": PYTHON_DOCS, "files": "local files", "hub": "hub datasets"}[kind]
    for key in given:
        if key == "part" and kind == "hub":
            raise ValueError(
                f"text {text!r}: a streamed dataset has no known end of which to take a part=: "
                "name another split with split=, or take its first N documents with limit=N"
            )
        if key not in OPTIONS[kind]:
            raise ValueError(f"text {text!r}: unknown option {key!r}; {source} take {', '.join(OPTIONS[kind])}")


def _count(text: str, option: str, value: str, what: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"text {text!r}: {option}={value} is not {what}, expected 1 or more")
    return int(value)


def _part(text: str, value: str) -> tuple[Fraction, Fraction]:
    match = PART.fullmatch(value)
    begin, end = (Fraction(number) / 100 for number in match.groups()) if match else (Fraction(0), Fraction(0))
    if not 0 <= begin < end <= 1:
        raise ValueError(
            f"text {text!r}: part={value} is not a share, expected A%-B% with 0 <= A < B <= 100, as 0%-50%"
        )
    return begin, end


def _local_files(text: str, name: str) -> tuple[Path, ...]:
    """Return the absolute paths that ``name`` names, sorted; none when nothing is there."""
    path = Path(name).expanduser()
    try:
        is_file, is_dir = path.is_file(), bool(name) and path.is_dir()
    except OSError:  # too long for a path
        return ()
    if is_file:
        if kind_of(path) is None:
            raise ValueError(
                f"text {text!r}: the ending {path.suffix!r} is not one that is read: {', '.join(SUFFIXES)}"
            )
        return (path.resolve(),)
    if is_dir:
        found = [file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts)]
    else:
        found = _matches(path)
    files = sorted(file.resolve() for file in found if file.is_file())
    known = tuple(file for file in files if kind_of(file) is not None)
    if len(known) < len(files):
        _log.warning("text %r: %d of %d files are left out, their endings are unknown", text, len(files) - len(known),
                     len(files))  # fmt: skip
    if not known and (files or is_dir):
        raise ValueError(f"text {text!r}: no file there has an ending that is read: {', '.join(SUFFIXES)}")
    return known


def _matches(pattern: Path) -> list[Path]:
    """Return what matches a glob; without a wildcard nothing does, as there is no such file."""
    if not any(letter in str(pattern) for letter in "*?["):
        return []
    root = Path(pattern.anchor)
    return list(root.glob(str(pattern.relative_to(root))))


def _pieces(source: TextSource, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[tuple[bool, str]]:
    """Yield each piece of text and whether it begins a document."""
    for document in islice(_documents(source, tokenizer), source.limit):
        first = True
        for piece in document():
            yield first, piece
            first = False


def _documents(source: TextSource, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Document]:
    """Return the documents of the part that is asked for, each read only when it is called."""
    if source.kind == "docs":
        return _docs_documents(source.part)
    as_text = partial(record_text, field=source.field, tokenizer=tokenizer)
    if source.kind == "hub":
        return _hub_documents(source, as_text)
    if source.part is None:
        return file_documents(source.paths, as_text)
    if len(source.paths) == 1 and kind_of(source.paths[0]) == "plain":
        return iter([partial(lines_in_part, source.paths[0], *source.part)])
    count = count_documents(source.paths)
    begin, end = (int(share * count) for share in source.part)
    return islice(file_documents(source.paths, as_text), begin, end)


def _docs_documents(part: tuple[Fraction, Fraction] | None) -> Iterator[Document]:
    """Yield the topics of Python's documentation in alphabetical order, all or those of a part.

    A topic belongs to the part in which its middle lies when all stand in the order of their hashes: shares are
    balanced by characters, hold every kind of topic, and hardly move from one version of Python to the next.
    """
    topics = _topics()
    begin, end = part or (Fraction(0), Fraction(1))
    total, before, chosen = sum(map(len, topics.values())), 0, []
    for key in sorted(topics, key=lambda key: hashlib.sha256(key.encode()).digest()):
        if begin <= Fraction(2 * before + len(topics[key]), 2 * total) < end:
            chosen.append(key)
        before += len(topics[key])
    for key in sorted(chosen):
        yield partial(iter, (topics[key],))


def _topics() -> dict[str, str]:
    """Return the topics of ``pydoc``, longest first, without what a longer one already says.

    A sixth of the text stands there twice, a chapter and then its sections, which would put the same paragraphs into
    both halves of the text. A topic of which more than half is in longer ones is left out, and so is each paragraph.
    """
    from pydoc_data.topics import topics

    kept: dict[str, str] = {}
    seen: set[str] = set()
    for key in sorted(topics, key=lambda key: (-len(topics[key]), key)):
        paragraphs = [(paragraph, " ".join(paragraph.split())) for paragraph in topics[key].split("\n\n")]
        new = [paragraph for paragraph, words in paragraphs if words not in seen]
        if 2 * sum(map(len, new)) > len(topics[key]):
            kept[key] = "\n\n".join(new)
            seen.update(words for _, words in paragraphs if len(words) >= REPEATED)
    return kept


def _hub_documents(source: TextSource, as_text: Callable[[Any, str], str]) -> Iterator[Document]:
    """Yield the rows of a dataset of the hub, or of a local folder of that layout, without downloading it first."""
    import datasets

    try:
        rows = datasets.load_dataset(
            source.name, source.config, split=source.split, revision=source.revision, streaming=True
        )
        for number, row in enumerate(rows, 1):
            yield partial(_one, as_text, row, f"{source.name} row {number}")
    except Exception as error:  # builders, file systems and HTTP clients each raise their own kinds
        raise _unreachable(source, error) from error


def _one(as_text: Callable[[Any, str], str], row: Any, where: str) -> Iterator[str]:
    yield as_text(row, where)


def _unreachable(source: TextSource, error: Exception) -> ValueError:
    """Return the sentence for a dataset that could not be opened or read."""
    here = "" if source.text.startswith(HUB) else f"there is no file or folder {Path(source.name).absolute()}, and "
    reason = (str(error).strip().splitlines() or [""])[0]
    return ValueError(
        f"text {source.text!r}: {here}the hub dataset {source.name!r} (config {source.config or 'default'}, split "
        f"{source.split}) could not be read: {type(error).__name__}: {reason}. Check the spelling of name, config= and "
        "split= and the connection, or download the data and give the path of its files"
    )


def named_texts(entries: Sequence[str]) -> dict[str, str]:
    """Return the texts to score by name, each given as ``NAME=TEXT``, or as ``TEXT``, which its file names.

    Raises:
        ValueError: Two have the same name.

    >>> named_texts(["wiki=a/test.txt", "b/c4.jsonl::part=50%-100%"])
    {'wiki': 'a/test.txt', 'c4': 'b/c4.jsonl::part=50%-100%'}
    """
    texts: dict[str, str] = {}
    for name, text in map(_named_text, entries):
        if name in texts:
            raise ValueError(f"two texts to score are called {name!r}: name them, as NAME=TEXT")
        texts[name] = text
    return texts


def _named_text(entry: str) -> tuple[str, str]:
    """Return name and text of ``NAME=TEXT``, or of ``TEXT``, which then names itself by its file."""
    named = re.fullmatch(r"([\w.-]+)=(.+)", entry, flags=re.DOTALL)
    if named:
        return named[1], named[2]
    return Path(entry.partition("::")[0]).stem, entry
