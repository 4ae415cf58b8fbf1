"""Text by name: Python's own documentation, local files, datasets of the hub.

One string names a text everywhere: ``SOURCE[::key=value[,key=value...]]``, or several of them joined by `` + ``.

======================  ==============================================================  =============================
source                  what it is                                                      options
======================  ==============================================================  =============================
``python-docs``         the English documentation that ships with Python                ``part``, ``limit``,
                                                                                        ``every``
file, folder or glob    ``.txt .md .json .jsonl``, also with ``.gz`` or ``.zst``        ``field``, ``split``, ``part``,
                        behind it; ``.parquet .arrow``                                  ``limit``, ``every``
``OWNER/NAME``          dataset of the hub, streamed; ``hub:NAME`` says so explicitly   ``field``, ``config``,
                                                                                        ``split``, ``revision``,
                                                                                        ``limit``, ``every``
======================  ==============================================================  =============================

Of a folder, one split is taken: the files whose name, or whose folder's name, says ``train`` where there are any, such
as ``data/train-00000-of-00002.parquet``; else the files that name no split; else ``validation`` or ``test``. ``split``
names another one. Among files that name no split, a title such as ``test_driven.txt`` says none either. Dotfiles,
cards, licences and metadata are left out. A glob takes the files of all splits that it matches, or those of ``split``,
and cards only if it names them. The log says what was taken and what was left out. A folder that ``datasets`` wrote
with ``save_to_disk`` is a folder of ``.arrow`` files, with or without ``hub:`` before it.

``limit=N`` takes the first N documents.

``part=A%-B%`` takes a part of the *characters* of ``python-docs`` (whole topics, spread over the alphabet) or of a
single ``.txt`` or ``.md`` file (whole lines, in order), or of the *documents* of any other local source (in order).
Parts that do not overlap have no document and no line in common.

``every=N`` takes every N-th sequence of tokens. Of a text in a fixed order, such as an encyclopaedia, as many sequences
then cover N times as many articles.

``TEXT + TEXT`` is a mixture: its sequences come from all texts in turn, as many from each, or ``share=N`` times as many
from one of them, such as ``wiki.txt::share=3 + chats.jsonl``. When a text ends, the others go on alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowrank_pl.text.files import (
    AsText,
    Document,
    content_digest,
    count_documents,
    file_documents,
    kind_of,
    lines_in_part,
    row_document,
)
from lowrank_pl.text.local_files import is_saved_dataset, local_files
from lowrank_pl.text.records import record_text
from lowrank_pl.utils.files import at_home, sha256_of

__all__ = ["TextSource", "named_texts", "parse_mixture", "parse_text", "read_stream", "source_identity", "text_files"]

PYTHON_DOCS = "python-docs"
HUB = "hub:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MIXED = re.compile(r"\s\+\s")
PART = re.compile(r"\s*(\d+(?:\.\d+)?)%\s*-\s*(\d+(?:\.\d+)?)%\s*")

OPTIONS = {
    "docs": ("part", "limit", "every", "share"),
    "files": ("field", "split", "part", "limit", "every", "share"),
    "hub": ("field", "config", "split", "revision", "limit", "every", "share"),
}

SURROGATE = re.compile("[\ud800-\udfff]")

_APART = ("text", "share")
"""What does not change the sequences of a text."""

REPEATED = 60  # A paragraph of at least this many characters that two topics have in common is a copy.

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextSource:
    """A text's name, parsed and checked.

    Attributes:
        text: The name as given.
        kind: ``"docs"``, ``"files"`` or ``"hub"``.
        name: The source without prefix and options; an absolute path for local sources.
        paths: The files of a local source, sorted.
        share: How many sequences of a mixture it gives when each of the others gives one.
        field: Name of the field that holds the text; by default the first that is known and not empty.
        config: Configuration of a hub dataset.
        split: Split of a hub dataset; the one that was asked for of a folder or glob.
        revision: Revision of a hub dataset.
        part: Beginning and end of the part to take, as fractions.
        limit: Number of documents to take.
        every: Take every N-th sequence of tokens.
    """

    text: str = field(compare=False)
    kind: str
    name: str
    paths: tuple[Path, ...] = ()
    share: int = field(default=1, compare=False)
    field: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    part: tuple[Fraction, Fraction] | None = None
    limit: int | None = None
    every: int = 1


def parse_mixture(text: str) -> tuple[TextSource, ...]:
    """Return the parsed texts of the mixture ``text``; there is one if it is no mixture.

    Raises:
        ValueError: As ``parse_text``, for one of the texts, or one text alone has a share.

    >>> [(source.kind, source.share) for source in parse_mixture("python-docs::share=3 + allenai/c4")]
    [('docs', 3), ('hub', 1)]
    """
    names = _names(text)
    if len(names) == 1:
        source = parse_text(text)
        if source.share != 1:
            raise ValueError(
                f"text {text!r}: share={source.share} is a part of a mixture, but there is one text: join another one "
                "by ' + ', or leave share out"
            )
        return (source,)
    return tuple(map(parse_text, names))


def text_files(*texts: str) -> list[Path]:
    """Return the files that ``texts`` are read from.

    Raises:
        ValueError: As ``parse_mixture``.

    >>> text_files("python-docs")
    []
    """
    return [path for text in texts for source in parse_mixture(text) for path in source.paths]


def _names(text: str) -> list[str]:
    """Return the names of the texts of a mixture, or the one name."""
    head = text.partition("::")[0]
    # The name of a file may contain a plus sign.
    if MIXED.search(head) and at_home(head).exists():
        return [text]
    return [name.strip() for name in MIXED.split(text)]


def parse_text(text: str) -> TextSource:
    """Return the parsed name ``text``; nothing is read yet, but local files must exist.

    Raises:
        ValueError: An option or its value is invalid, or the source is neither local nor like the id of a dataset.

    >>> parse_text("python-docs::part=50%-100%,limit=3").limit
    3
    """
    name, marker, tail = text.partition("::")
    given = _options(text, tail) if marker else {}
    paths: tuple[Path, ...] = ()
    if name == PYTHON_DOCS:
        kind = "docs"
    elif name.startswith(HUB) and not is_saved_dataset(Path(name.removeprefix(HUB))):
        kind, name = "hub", name.removeprefix(HUB)
    elif paths := local_files(text, name := name.removeprefix(HUB), given.get("split")):
        kind, name = "files", os.path.realpath(at_home(name))
    elif HUB_ID.fullmatch(name) and kind_of(Path(name)) is None:
        kind = "hub"
    else:
        raise ValueError(
            f"text {text!r}: {Path(name).absolute()} is no file, folder or glob with a match, and {name!r} is not the "
            f"id OWNER/NAME of a hub dataset: give a path, the id of a dataset, or {PYTHON_DOCS}"
        )
    _check_options(text, kind, given)
    if "field" in given and paths and all(kind_of(path) == "plain" for path in paths):
        raise ValueError(f"text {text!r}: field={given['field']} was given, but plain text has no fields: leave it out")
    values: dict[str, Any] = {"split": "train", **given} if kind == "hub" else dict(given)
    counts = (("limit", "a number of documents"), ("every", "a number of sequences"), ("share", "a share"))
    for option, what in counts:
        if option in given:
            values[option] = _count(text, option, given[option], what)
    if "part" in given:
        values["part"] = _part(text, given["part"])
    return TextSource(text=text, kind=kind, name=name, paths=paths, **values)


def read_stream(text: str, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
    r"""Yield the pieces of one long string: the documents of ``text``, joined by ``"\n\n"``.

    A document is one piece, but a large text file comes in consecutive chunks.

    Args:
        text: Name of the text, as the head of this module describes it.
        tokenizer: Tokenizer whose chat template turns rows of messages into text; not needed for plain text.

    Raises:
        ValueError: The text can't be read, or is a mixture; the message says what was found, and where.

    >>> next(read_stream("python-docs::limit=1")).splitlines()[0]
    'The "assert" statement'
    """
    if len(_names(text)) > 1:
        raise ValueError(f"text {text!r} is a mixture, whose texts are read in turn as sequences: give one of them")
    for place, (first, piece) in enumerate(_pieces(parse_text(text), tokenizer)):
        yield "\n\n" + piece if first and place else piece


def source_identity(source: TextSource) -> str:
    """Return a fingerprint that changes with the text: with the content of its files, or its name and revision.

    Of more than 256 MiB of files, size and time, head, tail and a sample count; a dataset that is replaced on the hub
    under the same name and revision is not noticed.
    """
    parts = [f"{entry.name}={getattr(source, entry.name)!r}" for entry in fields(source) if entry.name not in _APART]
    if source.kind == "docs":
        parts += [sys.version, *(key + topic for key, topic in sorted(_topics().items()))]
    paths = source.paths
    if source.kind == "hub" and Path(source.name).is_dir():
        paths = tuple(sorted(path for path in Path(source.name).rglob("*") if path.is_file()))
    return sha256_of(*parts, content_digest(paths))


def _options(text: str, tail: str) -> dict[str, str]:
    """Return the options of ``key=value,key=value`` by key."""
    given: dict[str, str] = {}
    for pair in tail.split(","):
        key, equals, value = (side.strip() for side in pair.partition("="))
        if "=" in value.partition("::")[2]:  # A field may have '::' in its name.
            raise ValueError(
                f"text {text!r}: expected one '::', and options joined by ',' behind it: take "
                f"::{tail.replace('::', ',')}"
            )
        if not (key and equals and value) or key in given:
            raise ValueError(f"text {text!r}: expected key=value once for each key after '::', got {pair!r}")
        given[key] = value
    return given


def _check_options(text: str, kind: str, given: dict[str, str]) -> None:
    """Raise ``ValueError`` if an option is unknown or does not apply to this kind of source."""
    source = {"docs": PYTHON_DOCS, "files": "local files", "hub": "hub datasets"}[kind]
    for key in given:
        if key == "part" and kind == "hub":
            raise ValueError(
                f"text {text!r}: part= does not work on a streamed dataset, whose length is unknown: "
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
            f"text {text!r}: part={value} is not a part, expected A%-B% with 0 <= A < B <= 100, such as 0%-50%"
        )
    return begin, end


def _pieces(source: TextSource, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[tuple[bool, str]]:
    """Yield each piece of text and whether it begins a document; log how many have no text, and what was replaced."""
    count = empty = replaced = 0
    try:
        for document in islice(_documents(source, tokenizer), source.limit):
            count += 1
            letters, first = 0, True
            for piece in document():
                # JSON can hold half a pair of surrogates, which is no text that a tokenizer takes.
                piece, found = SURROGATE.subn("\ufffd", piece)
                letters, replaced = letters + len(piece), replaced + found
                yield first, piece
                first = False
            empty += not letters
    finally:
        if empty:
            _log.info("text %r: %d of %d documents that were read have no text", source.text, empty, count)
        if replaced:
            _log.warning("text %r: %d lone surrogates are replaced by U+FFFD", source.text, replaced)


def _documents(source: TextSource, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Document]:
    """Return the documents of the part that the source names, each read only when it is called."""
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
    begin, end = (int(fraction * count) for fraction in source.part)
    return islice(file_documents(source.paths, as_text), begin, end)


def _docs_documents(part: tuple[Fraction, Fraction] | None) -> Iterator[Document]:
    """Yield the topics of Python's documentation, all or those of a part, in alphabetical order.

    In the order of the topics' hashes, a topic belongs to the part in which its middle lies. Parts are thereby balanced
    by characters, hold every kind of topic, and hardly change from one version of Python to the next.
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
    """Return the topics of ``pydoc``, longest first, without paragraphs that a longer topic contains.

    A sixth of the text occurs twice, in a chapter and in its sections: both halves of the text would hold the same
    paragraphs. A topic is left out if longer topics contain more than half of it.
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


def _hub_documents(source: TextSource, as_text: AsText) -> Iterator[Document]:
    """Yield the rows of a hub dataset, or of a local folder of the same layout, without downloading it first."""
    import datasets

    try:
        rows = datasets.load_dataset(
            source.name, source.config, split=source.split, revision=source.revision, streaming=True
        )
        for number, row in enumerate(rows, 1):
            yield partial(row_document, as_text, row, f"{source.name} row {number}")
    except Exception as error:  # Builders, file systems and HTTP clients raise exceptions of their own.
        raise _unreachable(source, error) from error


def _unreachable(source: TextSource, error: Exception) -> ValueError:
    """Return the error for a dataset that could not be opened or read."""
    here = "" if source.text.startswith(HUB) else f"there is no file or folder {Path(source.name).absolute()}, and "
    reason = (str(error).strip().splitlines() or [""])[0]
    return ValueError(
        f"text {source.text!r}: {here}the hub dataset {source.name!r} (config {source.config or 'default'}, split "
        f"{source.split}) could not be read: {type(error).__name__}: {reason}. Check the name, config=, split= and the "
        "connection, or download the data and give the path of its files"
    )


def named_texts(entries: Sequence[str]) -> dict[str, str]:
    """Return the texts to score by name, each given as ``NAME=TEXT``, or as ``TEXT`` and then named after its file.

    Raises:
        ValueError: Two texts have the same name.

    >>> named_texts(["wiki=a/test.txt", "b/c4.jsonl::part=50%-100%"])
    {'wiki': 'a/test.txt', 'c4': 'b/c4.jsonl::part=50%-100%'}
    """
    texts: dict[str, str] = {}
    for name, text in map(_named_text, entries):
        if name in texts:
            raise ValueError(f"two texts to score are called {name!r}: give each a name, as NAME=TEXT")
        texts[name] = text
    return texts


def _named_text(entry: str) -> tuple[str, str]:
    """Return the name and the text of one entry of ``named_texts``."""
    named = re.fullmatch(r"([\w.-]+)=(.+)", entry, flags=re.DOTALL)
    if named:
        return named[1], named[2]
    return Path(entry.partition("::")[0]).stem, entry
