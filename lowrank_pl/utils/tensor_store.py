"""Stores of tensors on disk: one safetensors file a name, with a checksum, and a manifest of what they come from."""

from __future__ import annotations

import json
import mmap
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lowrank_pl.utils.distributed import barrier, broadcast_from_first, is_first, one_process_at_a_time, world_size
from lowrank_pl.utils.files import (
    LOCK,
    atomic_write,
    cache_root,
    canonical_json,
    locked,
    sha256_of,
    sweep_files,
    write_json,
)

__all__ = [
    "CHECKSUM_KEY",
    "DamagedError",
    "TensorStore",
    "aligned",
    "as_slice",
    "read_manifest",
    "tensor_digest",
    "total_seconds",
    "verify_checksum",
    "weight_digest",
    "with_checksum",
]

CHECKSUM_KEY = "crc32_of_file"
"""Name of the checksum in the metadata of a file."""

# The checksum of earlier versions, which covers the tensors but not the header.
_OLD_KEY = "crc32"

# Stands in the place of a checksum while it is computed.
_CHECKSUM_UNKNOWN = "00000000"


class DamagedError(Exception):
    """The bytes of a file are not those that were written."""


def with_checksum(tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a safetensors file that holds its own checksum.

    Args:
        tensors: On the CPU, contiguous.
        notes: Other metadata of the file.
    """
    data = save(dict(tensors), {**(notes or {}), CHECKSUM_KEY: _CHECKSUM_UNKNOWN})
    header = _header_bytes(data)
    old, new = (f'"{CHECKSUM_KEY}":"{value}"'.encode() for value in (_CHECKSUM_UNKNOWN, f"{zlib.crc32(data):08x}"))
    assert data[:header].count(old) == 1
    return data[:header].replace(old, new) + data[header:]


def verify_checksum(path: Path) -> None:
    """Compare a file with the checksum in its header: safetensors itself does not notice flipped bits.

    Files of versions that wrote no checksum pass.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedError: The checksum differs, or the file is empty.
    """
    if not path.stat().st_size:
        raise DamagedError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = data[: _header_bytes(data)]
        found = re.search(rb'"(%b|%b)":"([0-9a-f]{8})"' % (CHECKSUM_KEY.encode(), _OLD_KEY.encode()), header)
        if found is None:
            return
        # It was computed with a placeholder in its own place.
        start, end = found.span(2)
        before = zlib.crc32(header[:start] + _CHECKSUM_UNKNOWN.encode() + header[end:])
        with memoryview(data) as view:
            known = zlib.crc32(view[len(header) :], before if found[1] == CHECKSUM_KEY.encode() else 0)
        if int(found[2], 16) != known:
            raise DamagedError("its checksum is wrong")


def _header_bytes(data: bytes | mmap.mmap) -> int:
    # A safetensors file is the length of its header, the header (JSON), and the tensors.
    return 8 + int.from_bytes(data[:8], "little")


_ALIGNED = 64
"""Bytes that the address of a tensor in torch's memory is a multiple of."""

_SCHEMA = 1
_MANIFEST = "manifest.json"


class TensorStore:
    """A folder with one safetensors file a name, and a manifest that says what the tensors were made from.

    Each file is written completely or not at all, so the names present are the finished work. An interrupted run asks
    for the ``missing`` names and goes on with these. A folder with another fingerprint is refused, never overwritten.

    Args:
        kind: What is stored; part of the manifest.
        fingerprint: What the tensors are made from: content hashes and settings, as JSON values.
        directory: The folder; by default one named by the fingerprint under ``lowrank_pl.utils.files.cache_root()``.

    Raises:
        ValueError: ``directory`` holds something else; the message lists the differences.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> store = TensorStore("demo", {"model": "a"}, folder)
        >>> store.write("layer.0", {"x": torch.ones(2)})
        >>> store.missing(["layer.0", "layer.1"])
        ['layer.1']
        >>> TensorStore("demo", {"model": "b"}, folder)
        Traceback (most recent call last):
        ...
        ValueError: the demo store at ... was made from something else: model is 'a' there and 'b' here. ...
    """

    def __init__(self, kind: str, fingerprint: Mapping[str, Any], directory: str | Path | None = None) -> None:
        self.kind = kind
        self.fingerprint = json.loads(canonical_json(fingerprint))
        self.digest = sha256_of(kind, canonical_json(fingerprint))
        self.directory = Path(directory) if directory else cache_root() / kind / self.digest[:20]
        self._digests = {self.digest}
        self._whole: set[str] = set()
        # The folder was swept when it was locked: doing so for each of many files takes minutes.
        self._filling = False
        with one_process_at_a_time():
            if (self.directory / _MANIFEST).exists():
                self._check_manifest()
            else:
                self._create()

    def _create(self) -> None:
        if self.directory.exists() and (not self.directory.is_dir() or self._holds_other_files()):
            raise ValueError(
                f"{self.directory} is not an empty folder and holds no {self.kind} store: name an empty or new folder"
            )
        write_json(
            self.directory / _MANIFEST,
            {"schema": _SCHEMA, "kind": self.kind, "digest": self.digest, "fingerprint": self.fingerprint},
        )

    def _holds_other_files(self) -> bool:
        """Tell whether the folder holds more than the temporary file of a run killed while it wrote the manifest."""
        return any(not path.name.endswith((".tmp", ".tmp.lock")) for path in self.directory.iterdir())

    def _check_manifest(self) -> None:
        manifest = read_manifest(self.directory)
        if manifest["kind"] != self.kind:
            raise ValueError(f"{self.directory} holds a {manifest['kind']} store: expected a {self.kind} store")
        # Of the same fingerprint without keys that are None here, as an earlier version may have written it.
        self._digests.add(manifest["digest"])
        stored = manifest["fingerprint"]
        keys = sorted({*stored, *self.fingerprint})
        differing = [key for key in keys if stored.get(key) != self.fingerprint.get(key)]
        if differing:
            differences = "; ".join(
                f"{key} is {stored.get(key)!r} there and {self.fingerprint.get(key)!r} here" for key in differing
            )
            raise ValueError(
                f"the {self.kind} store at {self.directory} was made from something else: {differences}. "
                "Use the same inputs and settings, name another folder, or delete this one"
            )

    def path(self, name: str) -> Path:
        """Return the path of ``name``'s file, whether it exists or not.

        Raises:
            ValueError: The name, which may come from a plan, would lead out of the folder.
        """
        if Path(name).name != name:
            raise ValueError(f"{name!r} can't be the name of a file in {self.directory}: expected a module's name")
        return self.directory / f"{name}.safetensors"

    def __contains__(self, name: object) -> bool:
        """Tell whether ``name`` has been written."""
        return isinstance(name, str) and self.path(name).exists()

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the ``names`` that have no file yet, in order."""
        return [name for name in names if name not in self]

    def write(self, name: str, tensors: Mapping[str, Tensor], *, notes: Mapping[str, str] | None = None) -> None:
        """Write the tensors of ``name`` atomically, with ``notes`` in the file's metadata.

        Raises:
            OSError: The disk is full or not writable; no part of the file is left then.
        """
        ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        data = with_checksum(ready, {"digest": self.digest, **(notes or {})})
        atomic_write(self.path(name), data, sweep=not self._filling)
        self._whole.discard(name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store's lock while the block runs; wait for a process that holds it.

        After the wait, names that were missing may be present. The lock of a killed process is released.
        """
        with locked(self.directory / LOCK, f"filling the {self.kind} store at {self.directory}"):
            yield

    @contextmanager
    def filling(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Lock the store and yield the ``names`` that this run has to write, in order; without such names, do not lock.

        Cooperating processes get the same names, and one of them has to write each. They leave the block together when
        all names are written. The first process holds the lock.

        Raises:
            ValueError: Files that another process has written are not in this process's folder.
        """
        names = list(names)
        if broadcast_from_first(lambda: self.missing(names)):
            with self.locked() if is_first() else nullcontext():
                if is_first():
                    sweep_files(self.directory)
                self._filling = True
                try:
                    # A run that held the lock may have written them in the meantime.
                    yield broadcast_from_first(lambda: self.missing(names))
                    barrier()
                finally:
                    self._filling = False
        else:
            yield []
        self._check_shared(names)

    def _check_shared(self, names: Sequence[str]) -> None:
        absent = self.missing(names) if world_size() > 1 else []
        if absent:
            raise ValueError(
                f"{len(absent)} of {len(names)} files of the {self.kind} store that other processes wrote are not in "
                f"{self.directory}, e.g. {absent[0]}: all processes of a run need the same folder; put LOWRANK_HOME or "
                "the store (--model.store) on a file system that all nodes share"
            )

    def read(
        self, name: str, key: str, *, rows: slice | int | None = None, columns: slice | int | None = None
    ) -> Tensor:
        """Return one tensor of ``name``, or a part of it.

        Only this part is read from disk; the first access to a file also reads all of it, for its checksum.

        Args:
            name: Whose tensor.
            key: Name of the tensor in the file.
            rows: Rows to read, as a slice or as the number of first rows; all by default.
            columns: Columns to read, in the same way.

        Raises:
            ValueError: The file is absent or damaged.
        """
        with self._open(name) as file:
            view = file.get_slice(key)
            part: Tensor = view[as_slice(rows)] if columns is None else view[as_slice(rows), as_slice(columns)]
            return aligned(part.contiguous())

    @contextmanager
    def _open(self, name: str, *, check: bool = True) -> Iterator[Any]:
        """Yield the open file of ``name``; errors name the file and the cure."""
        try:
            if check and name not in self._whole:
                verify_checksum(self.path(name))
            with safe_open(self.path(name), framework="pt") as file:
                written_for = (file.metadata() or {}).get("digest")
                if written_for not in self._digests:
                    raise DamagedError(f"it was written for the store {written_for}, this one is {self.digest}")
                if check:
                    self._whole.add(name)
                yield file
        except FileNotFoundError:
            raise ValueError(
                f"the {self.kind} store at {self.directory} has nothing for {name}: build it again"
            ) from None
        except (SafetensorError, DamagedError) as error:
            raise ValueError(
                f"{self.path(name)} is damaged ({error}): delete it and run again; only this file is built again"
            ) from None

    def notes(self, name: str) -> dict[str, str]:
        """Return the notes that ``write`` stored with ``name``; raise the errors of ``read``."""
        with self._open(name) as file:
            return self._noted(file)

    @staticmethod
    def _noted(file: Any) -> dict[str, str]:
        written = (file.metadata() or {}).items()
        return {key: value for key, value in written if key not in ("digest", CHECKSUM_KEY, _OLD_KEY)}

    def seconds(self, names: Iterable[str]) -> float | None:
        """Return how many seconds it took to make ``names``; ``None`` where one of them has no such note."""
        noted = [self.notes(name).get("seconds") for name in names]
        return total_seconds(None if seconds is None else float(seconds) for seconds in noted)


def aligned(tensor: Tensor) -> Tensor:
    """Return ``tensor`` at an address as torch's own memory has: addresses affect the last bit of products."""
    return tensor if tensor.data_ptr() % _ALIGNED == 0 else tensor.clone()


def as_slice(part: slice | int | None) -> slice:
    """Return ``part`` as a slice: a number stands for as many first entries, None for all."""
    return part if isinstance(part, slice) else slice(part)


def total_seconds(parts: Iterable[float | None]) -> float | None:
    """Return the sum of ``parts``; ``None`` if one of them is ``None``.

    >>> total_seconds([1.0, 2.0]), total_seconds([1.0, None])
    (3.0, None)
    """
    total = 0.0
    for part in parts:
        if part is None:
            return None
        total += part
    return total


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of the store in ``directory``.

    Raises:
        ValueError: There is no manifest, or it is damaged or of another version.
    """
    path = directory / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] != _SCHEMA:
            raise ValueError(f"{path} has schema {manifest['schema']!r}: this version of lowrank_pl reads {_SCHEMA}")
        if manifest["digest"] != sha256_of(manifest["kind"], canonical_json(manifest["fingerprint"])):
            raise TypeError("the digest is not that of the fingerprint")
        return {key: manifest[key] for key in ("kind", "digest", "fingerprint")}
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no store at {directory}: expected a folder with {_MANIFEST}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete the folder {directory} and build it again") from None


def tensor_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of tensors."""
    parts: list[str | bytes] = []
    for name, tensor in named:
        flat = tensor.detach().cpu().contiguous()
        parts.append(f"{name} {flat.dtype} {tuple(flat.shape)}")
        parts.append(sha256_of(flat.view(-1).view(torch.uint8).numpy().data))
    return sha256_of(*parts)


def weight_digest(weight: Tensor) -> str:
    """Return the type and the SHA-256 of one weight ``[out, in]``; factors record it as their source."""
    return f"{weight.dtype}:{tensor_digest([('', weight)])}"
