"""JSON files that are read again: checked whole against a schema, and against the digest that was written with them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_pl.utils.files import canonical_json, sha256_of

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["SEAL", "checked_json", "json_digest", "read_json", "sealed", "unsealed"]

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
    # The digest comes last; where only its name is damaged, it is not taken for an absent one.
    last = next(reversed(rest), SEAL)
    seal = rest.pop(SEAL, None)
    if last != SEAL and seal is None and rest[last] == json_digest({key: rest[key] for key in rest if key != last}):
        seal = f"{last}={rest[last]}"
    if seal not in (None, json_digest(rest)):
        raise ValueError(f"it was changed or damaged after it was written, by its digest under {SEAL!r}")
    return rest


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
