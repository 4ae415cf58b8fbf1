"""Files that are either complete or absent: atomic writes, destinations, locks, hashes and the cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

__all__ = [
    "LOCK",
    "at_home",
    "atomic_directory",
    "atomic_write",
    "cache_root",
    "canonical_json",
    "check_output_files",
    "check_output_folder",
    "is_special",
    "locked",
    "sha256_of",
    "sweep_files",
    "write_json",
]

_log = logging.getLogger(__name__)

LOCK = ".lock"
"""File in a folder that belongs to one process at a time: that process holds a lock on it (``locked``)."""

_DAY = 86_400  # seconds


def cache_root() -> Path:
    """Return the folder for token caches and factor stores: ``$LOWRANK_HOME`` or ``~/.cache/lowrank_pl``."""
    return at_home(os.environ.get("LOWRANK_HOME") or "~/.cache/lowrank_pl")


def at_home(path: str | Path) -> Path:
    """Return ``path`` with the home folder for ``~``, which a shell leaves as it is in ``--output=~/x`` and in YAML."""
    # Path.expanduser raises if there is no such user.
    return Path(os.path.expanduser(path))  # noqa: PTH111


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


def check_output_files(*paths: str | Path | None, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise unless a file can be written to each of ``paths``, so that a mistake fails now, not after the work.

    Args:
        *paths: Where files will be written; None stands for no file.
        inputs: Files that the command reads; a name that is no file stands for none.

    Raises:
        ValueError: A path is a folder, one of ``inputs`` or given twice, or its folder does not exist and can't be
            made.
    """
    given = [Path(path) for path in paths if path is not None]
    read = {os.path.realpath(at_home(one)) for one in inputs if one is not None}
    for path in given:
        _check_parents(path)
        if path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder: name a file, such as {str(path / 'name.json')!r}")
        if is_special(path):
            continue
        if os.path.realpath(path) in read:
            raise ValueError(f"{str(path)!r} is read by this command, which would overwrite it: name another file")
        if [os.path.realpath(one) for one in given].count(os.path.realpath(path)) > 1:
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
    if not os.access(path if is_special(path) else above, os.W_OK):
        raise ValueError(f"{str(path)!r} can't be written: you may not write to {str(above)!r}; name another place")


def atomic_write(path: str | Path, data: str | bytes | Callable[[BinaryIO], object], *, sweep: bool = True) -> Path:
    """Write ``data`` to ``path`` so that a reader sees the old file or the complete new one, never a part.

    A link stays, and the file that it leads to is written. A device or a FIFO, such as ``/dev/stdout``, is written to.
    What killed processes have left of ``path`` is removed first, and logged.

    Args:
        path: The file.
        data: What it holds, or a function that writes this to a file, so that it is never in memory as a whole.
        sweep: Whether to look for what killed processes have left, which lists the whole folder.

    Raises:
        OSError: The disk is full or the folder is not writable; ``path`` is then unchanged.
    """
    path = Path(path)
    if is_special(path):
        with path.open("ab") as special:
            _write(special, data)
        return path
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    if sweep:
        _sweep(target)
    try:
        with _temporary(target, ".tmp") as temporary:
            with temporary.open("wb") as file:
                _write(file, data)
                file.flush()
                os.fsync(file.fileno())
            _apply_umask(temporary, 0o666)
            os.replace(temporary, target)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)  # a full disk names no file
        raise
    return path


def _write(file: BinaryIO, data: str | bytes | Callable[[BinaryIO], object]) -> None:
    if callable(data):
        data(file)
    else:
        file.write(data.encode() if isinstance(data, str) else data)


def is_special(path: Path) -> bool:
    """Tell whether ``path`` is a device, a FIFO, or a file that this process has open, as ``/dev/stdout`` may be."""
    if not path.exists():
        return False
    mode = path.stat().st_mode
    is_open = str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return is_open or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _hidden(path: Path) -> str:
    """Return how the names of temporary files beside ``path`` begin; file systems allow 255 bytes for a whole name."""
    name = path.name if len(path.name) <= 60 else f"{path.name[:40]}-{sha256_of(path.name)[:12]}"
    return f".{name}."


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON, atomically, with its keys in the given order."""
    return atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block succeeds and is removed when it fails.

    Its files get the permissions that a plain ``open`` gives. An older folder at ``path`` is replaced only at the end,
    so a failure or Ctrl-C loses nothing. A link stays, and the folder that it leads to is replaced. What killed
    processes have left beside it is removed first, and logged.

    Args:
        path: The folder to create.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    with _temporary(path, ".tmp", folder=True) as building:
        _apply_umask(building, 0o777)
        yield building
        for file in building.rglob("*"):
            # safetensors makes weights readable by their owner only, but an export is there to be shared.
            if file.is_file():
                _apply_umask(file, 0o666)
        _swap(building, path)


@contextmanager
def _temporary(path: Path, suffix: str, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new file or folder beside ``path``, under a lock that ends with this process; remove what is left of it.

    Args:
        path: Its name begins like that of ``path``.
        suffix: How its name ends.
        folder: Whether it is a folder.
    """
    # Another process may just be sweeping the lock's file, and would sweep what is made here as well.
    for _ in range(3):
        made = path.with_name(f"{_hidden(path)}{secrets.token_hex(4)}{suffix}")
        lock = FileLock(f"{made}.lock")
        try:
            # Before the file is made: what a killed process leaves then always has a lock that can be taken.
            lock.acquire(timeout=0)
        except Timeout:
            continue
        except (OSError, NotImplementedError):
            # Some network file systems know no locks. What is left there is swept by its age.
            _remove(Path(lock.lock_file))
        break
    try:
        if folder:
            made.mkdir(0o700)
        else:
            made.touch(0o600, exist_ok=False)
        yield made
    finally:
        _remove(made)
        _remove(Path(lock.lock_file))
        lock.release()


def sweep_files(folder: Path) -> None:
    """Remove what killed processes have left of any file that they were writing to ``folder``."""
    _sweep(folder / "file", names=r"\..+\.\w{8}\.tmp")


def _sweep(path: Path, *, names: str | None = None) -> None:
    """Remove what killed processes have left of ``path``; put an older folder back if it was about to be replaced.

    Args:
        path: The file or the folder.
        names: The names of what to remove beside it, as a regular expression; by default of what is left of it.
    """
    names = names or rf"{re.escape(_hidden(path))}\w{{8}}\.(?:tmp|old)"
    ours = re.compile(rf"({names})(\.lock)?")
    found = {match[1] for one in path.parent.iterdir() if (match := ours.fullmatch(one.name))}
    for left in map(path.with_name, sorted(found)):
        lock = FileLock(f"{left}.lock")
        try:
            # What has no lock is of an earlier version, or on a file system without locks.
            if not Path(lock.lock_file).exists() and time.time() - left.stat().st_mtime < _DAY:
                continue
            lock.acquire(timeout=0)
        except (Timeout, OSError, NotImplementedError):
            continue
        if (left / "old").exists() and not path.exists():
            os.replace(left / "old", path)
            _log.warning("put %s back, which a killed run was about to replace", path)
        there = left.exists()
        _remove(left)
        _remove(Path(lock.lock_file))
        lock.release()
        if there and not left.exists():
            _log.warning("removed %s, which a killed run had left", left)


def _remove(path: Path) -> None:
    """Remove a file or a folder, as far as this process may."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _swap(building: Path, path: Path) -> None:
    """Replace ``path`` by ``building``; put the old folder back if that fails."""
    if not path.exists():
        os.replace(building, path)
        return
    with _temporary(path, ".old", folder=True) as old:
        try:
            os.replace(path, old / "old")
            os.replace(building, path)
        except BaseException:
            if not path.exists():
                os.replace(old / "old", path)
            raise


def _apply_umask(path: Path, mode: int) -> None:
    """Give ``path`` the mode of a plain ``open`` or ``mkdir``; ``mkstemp`` and ``mkdtemp`` make it private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)
