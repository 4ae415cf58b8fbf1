"""Checkpoints of masks: written atomically, read as plain data only, and refused if they do not fit the run."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lowrank_pl.utils.files import atomic_write

__all__ = ["AtomicCheckpoints", "check_fit", "mark", "mark_of", "read_checkpoint"]

KEY = "lowrank_pl"

_FOLDER = 0x10  # The bit of a zip entry's attributes that says that it is a folder.

FORMAT = 1


_CURE = "resume from another checkpoint in its folder, or start anew without --ckpt_path"


class AtomicCheckpoints(TorchCheckpointIO):
    """Atomic checkpoint files, for ``Trainer(plugins=...)``; ``lowrank fit`` always uses it.

    Lightning writes to the system's temporary folder and moves the file afterwards. Between two disks the move is a
    copy. If the disk is full or the process is killed, half a checkpoint then replaces the last complete one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``, atomically."""
        atomic_write(path, partial(torch.save, checkpoint))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the checkpoint in ``path``, always as plain data, even if ``weights_only`` is False."""
        return read_checkpoint(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the checkpoint in the file ``path``, on the CPU, without running code that it may contain.

    Raises:
        ValueError: The file is absent, damaged, or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"no checkpoint at {path}: expected a file that a run of ours wrote, as RUN/checkpoints/last.ckpt"
        )
    _check_whole(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError):
        # The message of torch would advise to switch the protection off.
        raise ValueError(f"{path} is no checkpoint of a run of ours: it holds more than plain data") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}: expected a checkpoint of a run of ours")
    return checkpoint


def _check_whole(path: Path) -> None:
    """Compare the checksums that ``torch.save`` stores with every tensor; ``torch.load`` ignores them.

    Of an entry that is marked as a folder, by one flipped bit, ``torch.load`` reads nothing and returns whatever was in
    memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & _FOLDER]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of a run of ours ({error}): {_CURE}") from None
    if bad is not None:
        raise ValueError(f"{path} is damaged (the checksum of {bad} is wrong): {_CURE}")
    if folders:
        raise ValueError(f"{path} is damaged ({folders[0]} is marked as a folder): {_CURE}")


def mark(checkpoint: dict[str, Any], identity: Mapping[str, Any]) -> None:
    """Record in ``checkpoint`` the identity of the run that its masks belong to."""
    checkpoint[KEY] = {"format": FORMAT, **identity}


def mark_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what ``mark`` recorded in ``checkpoint``.

    Raises:
        ValueError: The checkpoint has no such record, or one of another format.
    """
    found = checkpoint.get(KEY)
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        raise ValueError("the checkpoint was not written by this version of lowrank_pl: expected one that was")
    return found


def check_fit(
    checkpoint: Mapping[str, Any], identity: Mapping[str, Any], *, former: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Check that the masks of a checkpoint belong to this run.

    Args:
        checkpoint: The checkpoint.
        identity: The identity of this run.
        former: Values of earlier versions that mean the same as this run's, by key of ``identity``.

    Raises:
        ValueError: A value of ``identity`` is another one in the checkpoint; the message says which.
    """
    theirs = mark_of(checkpoint)
    # An older version may not have recorded every key.
    differ = [
        key
        for key in identity
        if key in theirs and theirs[key] != identity[key] and theirs[key] not in (former or {}).get(key, ())
    ]
    if differ:
        said = "; ".join(_difference(key, theirs.get(key), identity[key]) for key in differ)
        raise ValueError(
            f"the checkpoint does not fit this run: {said}. Resume with the settings that it was written with, "
            "or start anew without --ckpt_path"
        )


def _difference(key: str, theirs: Any, ours: Any) -> str:
    if not isinstance(theirs, Mapping) or not isinstance(ours, Mapping):
        return f"{key} is {theirs!r} there and {ours!r} here"
    odd = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return f"{len(odd)} of {len(ours)} {key} differ, e.g. {odd[0]}: {theirs.get(odd[0])} there, {ours.get(odd[0])} here"
