"""Documents from local files: plain text, JSON, JSON lines and parquet; all but parquet also compressed with gzip."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import IO, Any

__all__ = [
    "SUFFIXES",
    "AsText",
    "Document",
    "count_documents",
    "file_documents",
    "kind_of",
    "lines_in_part",
    "row_document",
]

Document = Callable[[], Iterator[str]]
"""A document that is not read yet: calling it yields its text in one or more pieces."""

KINDS = {".txt": "plain", ".md": "plain", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SUFFIXES = (*KINDS, *(f"{suffix}.gz" for suffix in KINDS if suffix != ".parquet"))
CHUNK = 1 << 20
PARQUET_ROWS = 256
AsText = Callable[[Any, str], str]
"""Returns the text of a row, given the row and its place for error messages."""


def kind_of(path: Path) -> str | None:
    """Return ``"plain"``, ``"json"`` or ``"parquet"`` by the suffix of ``path``; None for any other suffix.

    >>> kind_of(Path("a.txt.gz"))
    'plain'
    """
    if path.suffix != ".gz":
        return KINDS.get(path.suffix)
    kind = KINDS.get(path.with_suffix("").suffix)
    return None if kind == "parquet" else kind


def file_documents(paths: Sequence[Path], as_text: AsText) -> Iterator[Document]:
    """Yield the documents of the files in order: a plain file is one document; of other files, each row is one.

    Args:
        paths: Files of a known kind.
        as_text: Returns the text of a row, given the row and its place for error messages.
    """
    for path in paths:
        if kind_of(path) == "plain":
            yield partial(_chunks, path)
            continue
        for where, row in _rows(path):
            yield partial(row_document, as_text, row, where)


def count_documents(paths: Sequence[Path]) -> int:
    """Return the number of documents that ``file_documents`` would yield."""
    return sum(1 if kind_of(path) == "plain" else sum(1 for _ in _rows(path)) for path in paths)


def lines_in_part(path: Path, begin: Fraction, end: Fraction) -> Iterator[str]:
    """Yield the lines of a plain file whose first character lies in the part from ``begin`` to ``end``.

    Args:
        path: A plain text file.
        begin: Beginning of the part, as a fraction of the file's characters.
        end: End of the part, as a fraction of the file's characters.
    """
    total = sum(map(len, _chunks(path)))
    place = 0
    with _opened(path) as file:
        while place < end * total and (line := file.readline(CHUNK)):
            if place >= begin * total:
                yield line
            place += len(line)


def _chunks(path: Path) -> Iterator[str]:
    """Yield a plain file in chunks of about a million characters, each of which ends with a line."""
    with _opened(path) as file:
        while chunk := file.read(CHUNK):
            yield chunk + file.readline(CHUNK)


def row_document(as_text: AsText, row: Any, where: str) -> Iterator[str]:
    """Yield the text of a row; bound to its arguments, this is a ``Document``."""
    yield as_text(row, where)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Return the rows of a file, each after its place for error messages."""
    if kind_of(path) == "parquet":
        return _parquet_rows(path)
    with _opened(path) as file:
        listed = file.read(256).lstrip().startswith("[")
    return _listed_rows(path) if listed else _json_lines(path)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line.rstrip(), path, number)


def _listed_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        rows = _parsed(file.read(), path, 1)
    for number, row in enumerate(rows, 1):
        yield f"{path} entry {number}", row


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{line + error.lineno - 1}: not valid JSON: {error.msg} at column {error.colno}"
        ) from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Open a text file, compressed or not; errors while it is read become a ``ValueError`` that names the file."""
    try:
        with io.TextIOWrapper(_binary(path), encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError:
        raise _undecodable(path) from None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _binary(path: Path) -> io.BufferedReader | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} can't be read: {type(error).__name__}: {error}")


def _undecodable(path: Path) -> ValueError:
    """Return an error that says which byte of the file is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    place, line = 0, 1
    with _binary(path) as file:
        while True:
            block = file.read(CHUNK)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # The decoder prepends the bytes that it held back from the last block.
                held = len(error.object) - len(block)
                line += block[: max(0, error.start - held)].count(b"\n")
                return ValueError(
                    f"{path} is not UTF-8 text: byte {place - held + error.start}, in line {line}, is "
                    f"0x{error.object[error.start]:02x}; convert the file, for example with iconv"
                )
            place += len(block)
            line += block.count(b"\n")
