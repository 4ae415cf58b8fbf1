"""Documents from local files: plain text, JSON, JSON lines, parquet and Arrow."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

__all__ = [
    "SUFFIXES",
    "AsText",
    "Document",
    "content_digest",
    "count_documents",
    "file_documents",
    "kind_of",
    "lines_in_part",
    "row_document",
]

Document = Callable[[], Iterator[str]]
"""A document that is not read yet: calling it yields its text in one or more pieces."""

KINDS = {
    ".txt": "plain", ".md": "plain", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"
}  # fmt: skip
COMPRESSED = (".gz", ".zst")
SUFFIXES = f"{', '.join(KINDS)}, and text and JSON with {' or '.join(COMPRESSED)} behind it"
"""The suffixes of files that can be read, in words."""

BLANK = " \t\r\n\ufeff"
"""What may stand between JSON values: files that were joined have a byte order mark in the middle."""

WHOLE = 256 * 2**20
"""Bytes of a text up to which its cached tokens depend on all of its content."""

BLOCK = 2**16
CHUNK = 1 << 20
PARQUET_ROWS = 256
AsText = Callable[[Any, str], str]
"""Returns the text of a row, given the row and its place for error messages."""


def kind_of(path: Path) -> str | None:
    """Return ``"plain"``, ``"json"``, ``"parquet"`` or ``"arrow"`` by the suffix of ``path``; None for any other.

    >>> kind_of(Path("a.txt.gz"))
    'plain'
    """
    path = Path(path.name.lower())
    if path.suffix not in COMPRESSED:
        return KINDS.get(path.suffix)
    kind = KINDS.get(path.with_suffix("").suffix)
    return kind if kind in ("plain", "json") else None


def content_digest(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the names and the content of ``paths``.

    Of files that together exceed 256 MiB, the digest covers size, time, head, tail and evenly spaced blocks, 256 MiB
    in all.

    Raises:
        ValueError: A file can't be read.
    """
    digest, sizes = hashlib.sha256(), dict[Path, int]()
    blocks = max(2, WHOLE // BLOCK // max(1, len(paths)))
    try:
        for path in paths:
            sizes[path] = path.stat().st_size
        whole = sum(sizes.values()) <= WHOLE
        for path, size in sizes.items():
            digest.update(os.fsencode(path) + f"\0{size}\0".encode())
            places: Sequence[int] = range(0, size, BLOCK)
            if not whole and len(places) > blocks:
                digest.update(str(path.stat().st_mtime_ns).encode())
                places = [number * (size - BLOCK) // (blocks - 1) for number in range(blocks)]
            with path.open("rb") as file:
                for place in places:
                    file.seek(place)
                    digest.update(file.read(BLOCK))
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


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
    kinds = {"json": _json_rows, "parquet": _parquet_rows, "arrow": _arrow_rows}
    return kinds[cast(str, kind_of(path))](path)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the values of a JSON file, however they are spread over lines; a list stands for its entries."""
    for line, value in _json_values(path):
        if isinstance(value, list):
            yield from ((f"{path}:{line} entry {number}", row) for number, row in enumerate(value, 1))
        else:
            yield f"{path}:{line}", value


def _json_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the values of a JSON file, each after the line in which it begins.

    The file is read line by line, and whole if its first value goes on in the second line.
    """
    decode, beginning = json.JSONDecoder().raw_decode, re.compile(f"[^{BLANK}]")
    first = True
    with _opened(path) as file:
        for place, line in enumerate(file, 1):
            number, text, end = place, line.rstrip(BLANK), 0
            while found := beginning.search(text, end):
                at = found.start()
                number += text.count("\n", end, at)
                try:
                    value, end = decode(text, at)
                except json.JSONDecodeError as error:
                    if first and error.pos >= len(text):
                        text, first = (line + file.read()).rstrip(BLANK), False
                        continue
                    number += text.count("\n", at, error.pos)
                    raise ValueError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from None
                except (ValueError, RecursionError) as error:  # Thousands of digits, or of brackets in brackets.
                    raise ValueError(f"{path}:{number}: the JSON can't be read: {error}") from None
                yield number, value
                first = False
                number += text.count("\n", at, end)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    with _unreadable_named(path), parquet.ParquetFile(path) as file:
        yield from _table_rows(path, file.iter_batches(batch_size=PARQUET_ROWS))


def _arrow_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of an Arrow file, in either of its two formats: ``datasets`` writes streams."""
    from pyarrow import ipc, memory_map

    with _unreadable_named(path), memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = ipc.open_file(source)
            batches = map(file.get_batch, range(file.num_record_batches))
        else:
            source.seek(0)
            batches = ipc.open_stream(source)
        yield from _table_rows(path, batches)


def _table_rows(path: Path, batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        # Offsets in a damaged file may point anywhere in memory.
        batch.validate(full=True)
        for row in batch.to_pylist():
            number += 1
            yield f"{path} row {number}", row


@contextmanager
def _unreadable_named(path: Path) -> Iterator[None]:
    """Raise what pyarrow and ``to_pylist`` raise for damaged files as a ``ValueError`` that names the file."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Open a text file, compressed or not; errors while it is read become a ``ValueError`` that names the file."""
    try:
        try:
            with io.TextIOWrapper(_binary(path), encoding="utf-8-sig") as file:
                yield file
        except UnicodeDecodeError:
            # To find the byte, the file is read again, and may fail at another place.
            raise _undecodable(path) from None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _binary(path: Path) -> BinaryIO:
    """Open a file, decompressed by its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, pyarrow.input_stream(str(path), compression="zstd"))
    return cast(BinaryIO, gzip.open(path)) if suffix == ".gz" else path.open("rb")


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
            if not block:
                return ValueError(f"{path} is not UTF-8 text, or it changes while it is read")
            place += len(block)
            line += block.count(b"\n")
