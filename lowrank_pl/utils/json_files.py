"""JSON files that are read again: checked whole against a schema, and against the digest that was written with them."""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_pl.utils.files import canonical_json, sha256_of, write_json

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = [
    "SEAL",
    "break_seal",
    "checked_json",
    "is_figures",
    "json_digest",
    "read_json",
    "sealed",
    "unsealed",
    "write_figures",
]

SEAL = "sha256"
"""Key of a JSON object's digest."""

_SHOWN = 3
_PLAINLY = {"missing": "is missing", "extra_forbidden": "is not a field of this file: correct or remove it"}


def checked_json(text: str | bytes, schema: Any) -> Any:
    """Return the value of JSON ``text``, as it is, after a check that it fits ``schema``.

    Args:
        text: JSON; bytes are UTF-8.
        schema: Any type that pydantic can validate: a model, a dataclass, ``dict[str, float]``, ... The check is
            strict: no text counts as a number.

    Raises:
        ValueError: ``text`` is not JSON, names a key twice, or does not fit; the message names the first wrong fields.

    Example:
        >>> checked_json('{"a": 1}', dict[str, int])
        {'a': 1}
        >>> checked_json('{"layer.0": {"a": "1"}}', dict[str, dict[str, int]])
        Traceback (most recent call last):
        ...
        ValueError: ["layer.0"].a: Input should be a valid integer, but '1' was given
    """
    # Some editors begin a file with a byte order mark.
    text = text.removeprefix("\ufeff") if isinstance(text, str) else text.removeprefix(codecs.BOM_UTF8)
    # Slow to import, and needed only where a file is read.
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(schema).validate_json(text, strict=True)
    except ValidationError as error:
        found = error.errors()
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError("; ".join(map(_sentence, found[:_SHOWN])) + more) from None
    return json.loads(text, object_pairs_hook=_without_repeated_keys)


def read_json(path: Path, schema: Any, *, what: str, advice: str) -> Any:
    """Return the value in the JSON file ``path``, after a check that it fits ``schema`` and is as it was written.

    An object, or each object of a list, may hold its digest (``sealed``), which is left out of what is returned.

    Args:
        path: The file.
        schema: As in ``checked_json``.
        what: What the file should be, such as "a run's summary".
        advice: What to do with a file that is none.

    Raises:
        ValueError: The file can't be read or does not fit; the message names the file and the first wrong fields.
    """
    try:
        value = checked_json(path.read_bytes(), schema)
        return list(map(unsealed, value)) if isinstance(value, list) else unsealed(value)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not {what} ({error}): {advice}") from None


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


def write_figures(path: str | Path, figures: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Path:
    """Write what a command found out, an object or several, each with its digest, and return the path.

    By the digests a damaged file is noticed, and one in the folder of a model is known to be no part of the model.
    """
    return write_json(path, sealed(figures) if isinstance(figures, Mapping) else list(map(sealed, figures)))


def is_figures(path: Path) -> bool:
    """Tell whether a file is like those of ``write_figures``; a plan is too."""
    try:
        found = json.loads(path.read_bytes()) if path.suffix == ".json" else None
    except (OSError, ValueError):
        return False
    objects = found if isinstance(found, list) else [found]
    # A vocabulary may have a token of that name.
    digests = [one.get(SEAL) if isinstance(one, dict) else None for one in objects]
    return bool(digests) and all(re.fullmatch("[0-9a-f]{64}", str(digest)) for digest in digests)


def break_seal(holder: dict[str, Any], whole: Any) -> None:
    """Check the digest of the JSON value ``whole``, and remove it from ``holder``, the object in it that holds it.

    Raises:
        ValueError: The value is not as it was written.
    """
    seal = holder.pop(SEAL, None)
    intact = seal in (None, json_digest(whole))
    if seal is None and holder:
        # Of the digest itself, the name may be what is damaged.
        name, last = holder.popitem()
        intact = last != json_digest(whole)
        holder[name] = last
    if not intact:
        raise ValueError(f"it was changed or damaged after it was written, by its digest under {SEAL!r}")


def _sentence(error: ErrorDetails) -> str:
    place, kind = _path(error["loc"]), error["type"]
    if kind == "value_error":
        said = str(error["ctx"]["error"])
    elif kind in _PLAINLY:
        return f"{place} {_PLAINLY[kind]}"
    elif kind == "json_invalid":
        return error["msg"]
    else:
        said = f"{error['msg']}, but {reprlib.repr(error['input'])} was given"
    return f"{place}: {said}" if place else said


def _path(parts: Sequence[str | int]) -> str:
    """Return the path of a field, with names of modules in brackets, because they hold dots themselves."""
    plain = [f".{part}" if isinstance(part, str) and part.isidentifier() else f"[{json.dumps(part)}]" for part in parts]
    return "".join(plain).removeprefix(".")


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"{json.dumps(twice)} is there twice: remove one of them")
    return values
