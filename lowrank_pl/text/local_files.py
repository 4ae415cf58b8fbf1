"""Which files a path, a folder or a glob stands for."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import takewhile
from pathlib import Path

from lowrank_pl.text.files import SUFFIXES, kind_of
from lowrank_pl.utils.files import at_home

__all__ = ["is_saved_dataset", "local_files"]

WILDCARD = re.compile(r"[*?\[]")

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The split that a word in a path stands for; ``datasets`` knows the same words."""

UNNAMED = "no named split"

ORDER = ("train", UNNAMED, "validation", "test")
"""The first of these that a folder has is read: files without a name for their split come before held-out ones."""

LETTER = r"[^\W\d_]"
SHARD = re.compile(r"(train|validation|valid|val|dev|test|eval)([-_.]?\d[\w.-]*)?", re.IGNORECASE)
"""Stems of files that name nothing but a split and a number."""

CARD = re.compile(
    rf"readme([-_.][a-z]{{2}}([-_][a-z]{{2}})?)?(\.|$)|(dataset_?card|licen[cs]e)(?!{LETTER})|"
    r"(copying|notice|citation|changelog|contributing)(\.|$)",
    re.IGNORECASE,
)
METADATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")

_log = logging.getLogger(__name__)


def local_files(text: str, name: str, split: str | None) -> tuple[Path, ...]:
    """Return the absolute paths of the files to read, sorted; none if ``name`` is no file, folder or glob with a match.

    Symbolic links keep their own names: in a cache of the hub, what they point to has no suffix.

    Args:
        text: The whole name of the text, for messages.
        name: A path or a glob.
        split: The split to take of a folder or glob; by default the first in ``ORDER`` of a folder, and all of a glob.

    Raises:
        ValueError: There are files, but none that can be read or none of the split.
    """
    path = at_home(name)
    try:
        is_file, is_folder = path.is_file(), bool(name) and path.is_dir()
        found = [] if is_file else list(path.rglob("*")) if is_folder else _matches(path)
        files = sorted(file for file in found if file.is_file())
    except (OSError, ValueError, NotImplementedError) as error:  # Too long for a path, or no glob, such as a**b.
        if WILDCARD.search(name):
            raise ValueError(f"text {text!r}: {name!r} is no file, and as a glob it fails: {error}") from None
        return ()
    if is_file:
        if kind_of(path) is None:
            raise ValueError(f"text {text!r}: files with the suffix {path.suffix!r} can't be read: expected {SUFFIXES}")
        if split is not None:
            raise ValueError(f"text {text!r}: split= chooses among the files of a folder or glob, {name!r} is a file")
        return (path.parent.resolve() / path.name,)
    # Names are judged below the folder, or below the part of a glob that has no wildcard.
    root = path if is_folder else Path(*takewhile(lambda part: not WILDCARD.search(part), path.parts))
    readable, left = _readable(files, root, Path() if is_folder else path.relative_to(root))
    if not readable and (files or is_folder):
        raise ValueError(f"text {text!r}: it has no file to read{_listed(left)}: expected {SUFFIXES}")
    if split is None and is_folder:
        split = next(one for one in ORDER if one in readable.values())
    taken = [file for file, own in readable.items() if split is None or _is_of(file.relative_to(root), own, split)]
    left.update(f"of {readable[file]}" for file in readable.keys() - set(taken))
    if readable and not taken:
        raise ValueError(f"text {text!r}: it has no file of split {split!r}{_listed(left)}")
    if taken:
        splits = ", ".join(sorted({readable[file] for file in taken}))
        level = logging.WARNING if left[f"of {UNNAMED}"] else logging.INFO
        _log_once(f"text {text!r}: {len(taken)} of {len(files)} files are read, of {splits}{_listed(left)}", level)
    return tuple(dict.fromkeys(file.parent.resolve() / file.name for file in taken))


def is_saved_dataset(folder: Path) -> bool:
    """Return whether ``datasets`` wrote ``folder`` with ``save_to_disk``."""
    try:
        return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    except OSError:  # The name is too long for a path.
        return False


def _matches(pattern: Path) -> list[Path]:
    """Return the paths that match a glob; a pattern without a wildcard matches nothing."""
    if not WILDCARD.search(str(pattern)):
        return []
    root = Path(pattern.anchor)
    return list(root.glob(str(pattern.relative_to(root))))


def _readable(files: Iterable[Path], root: Path, pattern: Path) -> tuple[dict[Path, str], Counter[str]]:
    """Return the files to read with the split of each, and how many are left out by the reason.

    Args:
        files: All files of the folder or glob.
        root: The folder.
        pattern: The glob inside ``root``: what it asks for by name is read, such as ``*/README.md``.
    """
    readable, left = {}, Counter[str]()
    saved = cache(_saved_names)
    for file in files:
        place = file.relative_to(root)
        if _is_hidden(place) and not _is_hidden(pattern):
            left["hidden"] += 1
        elif _is_card(file.name) and not _is_card(WILDCARD.split(pattern.name)[0]):
            left["cards, licences or metadata"] += 1
        elif kind_of(file) is None:
            left["with another suffix"] += 1
        elif file.suffix == ".arrow" and file.name not in (saved(file.parent) or file.name):
            left["not listed in state.json"] += 1
        else:
            readable[file] = _split_of(place)
    if UNNAMED in readable.values():
        # Among files without a split, a word is no more than a part of a title, such as "test_driven_development.txt".
        readable = {file: split if _is_plain(file.relative_to(root)) else UNNAMED for file, split in readable.items()}
    return readable, left


def _is_plain(place: Path) -> bool:
    """Return whether a path names its split beyond doubt: by a folder, or by a name that says nothing else."""
    stem = place.name.partition(".")[0]
    return _split_of(place.parent) != UNNAMED or SHARD.fullmatch(stem) is not None


def _is_hidden(place: Path) -> bool:
    return any(part.startswith((".", "__")) for part in place.parts)


def _is_card(name: str) -> bool:
    return bool(CARD.match(name)) or name in METADATA


def _saved_names(folder: Path) -> list[str] | None:
    """Return the names of the files that ``save_to_disk`` wrote to ``folder``: ``map`` leaves its cache beside them.

    None where another program wrote the folder.
    """
    try:
        return [file["filename"] for file in json.loads((folder / "state.json").read_bytes())["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _split_of(place: Path) -> str:
    """Return the split that a path names, in the outermost folder that names one or in the file's name.

    >>> _split_of(Path("data/train-00000-of-00002.parquet")), _split_of(Path("training_manual/test.txt"))
    ('train', 'train')
    """
    found = re.search(rf"(?<!{LETTER})({'|'.join(SPLITS)})(?!{LETTER})", str(place).lower())
    return SPLITS[found[1]] if found else UNNAMED


def _is_of(place: Path, own: str, split: str) -> bool:
    """Return whether a file, whose name says the split ``own``, is of ``split``, which may be any word."""
    wanted = SPLITS.get(split.lower(), split)
    if wanted in ORDER:
        return own == wanted
    return re.search(rf"(?<!{LETTER}){re.escape(split)}(?!{LETTER})", str(place), re.IGNORECASE) is not None


def _listed(counts: Counter[str]) -> str:
    return f"; left out: {', '.join(f'{count} {what}' for what, count in sorted(counts.items()))}" if counts else ""


@cache
def _log_once(message: str, level: int) -> None:
    """Log ``message``: a text is parsed several times in a run."""
    _log.log(level, "%s", message)
