"""Digests of the files of an exported folder, in a file that ``sha256sum -c lowrank.sha256`` reads too.

A damaged file of weights loads without an error and computes something else. The digests find this, but they prove
nothing about who wrote the folder.

This file needs only the standard library. Every export with low-rank factors holds a copy, as part of the remote code.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path

__all__ = ["DIGESTS", "NESTED", "changed_files", "check_files", "listed_files", "unchecked", "write_digests"]

_log = logging.getLogger(__name__)

DIGESTS = "lowrank.sha256"
"""Name of the file with the digests."""

NESTED = "nested"
"""Name of the subfolder with components that only smaller sizes read (``lowrank_pl.factors.components``)."""

_CARD = "README.md"  # its owner edits it
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_LINE = rf"([0-9a-f]{{64}}) [ *](?:\./)?((?:{NESTED}/)?[^/\\\0]+)"
_CHECKING: ContextVar[bool] = ContextVar("lowrank_checking", default=True)


def write_digests(folder: Path) -> None:
    """Write the SHA-256 of every file in ``folder``, and in its subfolder ``nested``, except for the model card."""
    names = sorted(name for name in _files(folder) if name not in (_CARD, DIGESTS))
    lines = [f"{digest}  {name}\n" for name, digest in zip(names, _digests(folder, names), strict=True)]
    (folder / DIGESTS).write_text("".join(lines), encoding="utf-8", newline="\n")


def listed_files(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 of each file as ``write_digests`` found it, by its name; None if the list can't be read."""
    try:
        text = (folder / DIGESTS).read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    # As `sha256sum` writes it too, with * or ./ before a name, and as git leaves it on Windows.
    parsed = [re.fullmatch(_LINE, line) for line in re.split(r"\r?\n", text) if line]
    return None if None in parsed else {found[2]: found[1] for found in parsed if found}


def changed_files(folder: Path, *, nested: bool = True) -> list[str] | None:
    """Return the names of files that are missing or not as ``write_digests`` found them; None without digests.

    Weight files without a digest are among them, and the file with the digests if it can't be read. The subfolder
    ``nested`` may be left out of a copy as a whole: the model in its own size does not need it.

    Args:
        folder: The folder.
        nested: Whether to read the files in the subfolder too.
    """
    if not (folder / DIGESTS).is_file():
        return None
    listed = listed_files(folder)
    if listed is None:
        return [DIGESTS]
    nested = nested and (folder / NESTED).is_dir()
    stored = {name: digest for name, digest in listed.items() if nested or not _is_nested(name)}
    known = [name for name in stored if (folder / name).is_file()]
    digests = dict(zip(known, _digests(folder, known), strict=True))
    # Not those that from_pretrained leaves alone, such as the weights of an adapter.
    weights = [name for name in _files(folder) if _WEIGHTS.fullmatch(name) or (nested and _is_nested(name))]
    unlisted = [name for name in weights if name not in stored]
    return [*unlisted, *(name for name, digest in stored.items() if digests.get(name) != digest)]


def check_files(folder: Path, *, nested: bool = False) -> None:
    """Compare the files of ``folder`` with their digests, if it has any, and log changes of all but the weights.

    A file is read once per process. ``LOWRANK_VERIFY=0`` in the environment switches the check off.

    Args:
        folder: The folder.
        nested: Whether to read the files in the subfolder ``nested`` too, which are as large as the weights or larger.

    Raises:
        ValueError: A weight file differs, or the digests can't be read.
    """
    if not _CHECKING.get() or os.environ.get("LOWRANK_VERIFY") == "0":
        return
    changed = changed_files(folder, nested=nested) or []
    if changed == [DIGESTS]:
        raise ValueError(f"{folder / DIGESTS} holds no digests as `sha256sum` writes them: restore or delete it")
    weights = [name for name in changed if name.endswith(".safetensors")]
    if weights:
        raise ValueError(
            f"{', '.join(weights)} in {str(folder)!r} is not as it was exported, by the SHA-256 in {DIGESTS}: if a "
            f"model was saved here again, by save_pretrained or push_to_hub, delete {DIGESTS}; otherwise the files are "
            "damaged, so copy the folder again. LOWRANK_VERIFY=0 loads it unchecked"
        )
    if changed:
        _log.warning(
            "%s in %s: changed or lost since the export, by the SHA-256 in %s", ", ".join(changed), folder, DIGESTS
        )


@contextmanager
def unchecked() -> Iterator[None]:
    """Let ``check_files`` do nothing inside the block."""
    token = _CHECKING.set(False)
    try:
        yield
    finally:
        _CHECKING.reset(token)


def _files(folder: Path) -> list[str]:
    """Return the files in ``folder`` and in its subfolder ``nested``, as they are called in the file of digests."""
    inside = [file for file in (folder / NESTED).glob("*") if file.is_file()]
    return [file.name for file in folder.iterdir() if file.is_file()] + [f"{NESTED}/{file.name}" for file in inside]


def _is_nested(name: str) -> bool:
    return name.startswith(f"{NESTED}/")


def _digests(folder: Path, names: list[str]) -> list[str]:
    files = [(folder / name).resolve() for name in names]
    stats = [file.stat() for file in files]
    size = sum(stat.st_size for stat in stats)
    if size > 1e9:
        _log.info("computing the SHA-256 of %.1f GB in %s", size / 1e9, folder)
    # hashlib releases the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda file, stat: _digest(file, stat.st_size, stat.st_mtime_ns), files, stats))


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, written: int) -> str:
    """Return the SHA-256 of a file; its size and its time of writing are only part of what is remembered."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
