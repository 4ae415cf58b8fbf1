"""Files that are either complete or absent: atomic writes, destinations, locks, hashes and the cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

__all__ = [
    "LOCK",
    "SEAL",
    "atomic_directory",
    "atomic_write",
    "break_seal",
    "cache_root",
    "canonical_json",
    "check_output_files",
    "check_output_folder",
    "json_digest",
    "locked",
    "sealed",
    "sha256_of",
    "unsealed",
    "write_json",
]

_log = logging.getLogger(__name__)

LOCK = ".lock"
"""File in a folder that belongs to one process at a time: that process holds a lock on it (``locked``)."""


def cache_root() -> Path:
    """Return the folder for token caches and factor stores: ``$LOWRANK_HOME`` or ``~/.cache/lowrank_pl``."""
    return Path(os.environ.get("LOWRANK_HOME") or Path.home() / ".cache" / "lowrank_pl")


def canonical_json(value: Any) -> str:
    """Return ``value`` as JSON with sorted keys and no spaces, so that equal values give equal text.

    >>> canonical_json({"b": 1, "a": [1.5, None]})
    '{"a":[1.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@contextmanager
def locked(lock: Path, what: str, *, otherwise: str | None = None) -> Iterator[None]:
    """Hold the file lock ``lock`` while the block runs; wait for a process that holds it.

    The operating system releases the lock of a killed process.

    Args:
        lock: The lock file, created if absent.
        what: What a run that holds the lock is doing, for the log.
        otherwise: What to do instead of waiting, for the error; by default the block waits.

    Raises:
        ValueError: Another process holds the lock, and the block does not wait.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    file_lock = FileLock(lock)
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        if otherwise is not None:
            raise ValueError(f"another run is {what}: {otherwise}") from None
        _log.warning("another run is %s: waiting for it to end", what)
        file_lock.acquire()
    try:
        yield
    finally:
        file_lock.release()


def sha256_of(*parts: str | bytes | memoryview) -> str:
    """Return the hexadecimal SHA-256 of the parts; it also depends on where one part ends and the next begins.

    >>> sha256_of("ab", "c") == sha256_of("a", "bc")
    False
    """
    digest = hashlib.sha256()
    for part in parts:
        data = memoryview(part.encode() if isinstance(part, str) else part)
        digest.update(data.nbytes.to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


SEAL = "sha256"
"""Key of a JSON object's digest."""


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, which is the same after it was written and read again."""
    return sha256_of(canonical_json(json.loads(json.dumps(value))))


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its digest as its last entry.

    >>> unsealed(sealed({"a": 1}))
    {'a': 1}
    """
    return {**value, SEAL: json_digest(value)}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object without the digest that ``sealed`` added; files of earlier versions have none.

    Raises:
        ValueError: The object is not as it was written.
    """
    rest = dict(value)
    break_seal(rest, rest)
    return rest


def break_seal(holder: dict[str, Any], whole: Any) -> None:
    """Check the digest of the JSON value ``whole``, and remove it from ``holder``, the object in it that has it.

    Raises:
        ValueError: The value is not as it was written.
    """
    last = next(reversed(holder), SEAL)
    seal = holder.pop(SEAL, None)
    intact = seal in (None, json_digest(whole))
    if seal is None and re.fullmatch("[0-9a-f]{64}", str(holder.get(last))):
        # The digest's own name may be damaged.
        other = holder.pop(last)
        intact = other != json_digest(whole)
        holder[last] = other
    if not intact:
        raise ValueError(f"it was changed or damaged after it was written, by its digest under {SEAL!r}")


def check_output_files(*paths: str | Path | None) -> None:
    """Raise unless a file can be written to each of ``paths``, so that a mistake fails now, not after the work.

    Args:
        *paths: Where files will be written; None stands for no file.

    Raises:
        ValueError: A path is a folder or given twice, or its folder does not exist and can't be made.
    """
    given = [Path(path) for path in paths if path is not None]
    for path in given:
        _check_parents(path)
        if path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder: name a file, such as {str(path / 'name.json')!r}")
        if not _is_special(path) and [os.path.realpath(one) for one in given].count(os.path.realpath(path)) > 1:
            raise ValueError(f"{str(path)!r} is given for two files: name another one for one of them")


def check_output_folder(path: str | Path) -> None:
    """Raise unless ``path`` is a folder, or one can be made there.

    Raises:
        ValueError: It is a file, or its own folder does not exist and can't be made.
    """
    path = Path(path)
    _check_parents(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file: name a folder")


def _check_parents(path: Path) -> None:
    """Raise unless what is missing on the way to ``path`` can be made."""
    target = Path(os.path.realpath(path))
    try:
        above = next(parent for parent in target.parents if parent.exists())
        target.exists()
    except OSError as error:
        raise ValueError(f"{str(path)!r} can't be written ({error.strerror}): give a shorter name") from None
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists() and not target.parent.is_dir():
            raise ValueError(f"{str(link)!r} links to {str(link.readlink())!r}, which does not exist: make it first")
    if not above.is_dir():
        raise ValueError(f"{str(path)!r} can't be written, because {str(above)!r} is a file: name another folder")
    # A file that is there is replaced, which its folder has to allow; a device or a FIFO is written to.
    if not os.access(path if _is_special(path) else above, os.W_OK):
        raise ValueError(f"{str(path)!r} can't be written: you may not write to {str(above)!r}; name another place")


def atomic_write(path: str | Path, data: str | bytes) -> Path:
    """Write ``data`` to ``path`` so that a reader sees the old file or the complete new one, never a part.

    A link stays, and the file that it leads to is written. A device or a FIFO, such as ``/dev/stdout``, is written to.

    Raises:
        OSError: The disk is full or the folder is not writable; ``path`` is then unchanged.
    """
    path, data = Path(path), data.encode() if isinstance(data, str) else data
    if _is_special(path):
        with path.open("ab") as special:
            special.write(data)
        return path
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=_hidden(target), suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _apply_umask(Path(name), 0o666)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _is_special(path: Path) -> bool:
    """Tell whether ``path`` is a device, a FIFO, or a file that this process has open, as ``/dev/stdout`` may be."""
    if not path.exists():
        return False
    mode = path.stat().st_mode
    is_open = str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return is_open or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _hidden(path: Path) -> str:
    """Return how the names of temporary files beside ``path`` begin; file systems allow 255 bytes for a whole name."""
    return f".{path.name[:60]}."


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON, atomically, with its keys in the given order."""
    return atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block succeeds and is removed when it fails.

    Its files get the permissions that a plain ``open`` gives. An older folder at ``path`` is replaced only at the end,
    so a failure or Ctrl-C loses nothing. A link stays, and the folder that it leads to is replaced.

    Args:
        path: The folder to create.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=path.parent, prefix=_hidden(path), suffix=".tmp"))
    try:
        _apply_umask(building, 0o777)
        yield building
        for file in building.rglob("*"):
            # safetensors makes weights readable by their owner only, but an export is there to be shared.
            if file.is_file():
                _apply_umask(file, 0o666)
        _swap(building, path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _swap(building: Path, path: Path) -> None:
    """Replace ``path`` by ``building``; put the old folder back if that fails."""
    if not path.exists():
        os.replace(building, path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=_hidden(path), suffix=".old"))
    try:
        os.replace(path, old / "old")
        os.replace(building, path)
    except BaseException:
        if not path.exists():
            os.replace(old / "old", path)
        old.rmdir()
        raise
    shutil.rmtree(old)


def _apply_umask(path: Path, mode: int) -> None:
    """Give ``path`` the mode of a plain ``open`` or ``mkdir``; ``mkstemp`` and ``mkdtemp`` make it private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)
