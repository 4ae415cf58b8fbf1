"""Words of the command line as people write them, made into what jsonargparse reads.

What is special: jsonargparse 4.53 takes a list only as ``--keep [0.9,0.8]`` or one ``--keep+`` each, and flags only
with the underscores of Python.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["readable_words"]


def readable_words(words: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """Return the words for jsonargparse: ``--keep 0.9 0.8`` as ``--keep=[0.9,0.8]``, ``--keep-curve`` with ``_``.

    A flag is a list's where the parameter of its name takes one. It has the words up to the next flag; none make an
    empty list. A list in brackets, ``null`` and ``--keep+`` stay as they are.

    Args:
        words: The words after the command's name.
        function: What the command runs.

    Example:
        >>> def export(*, keep: Sequence[float] | None = None, names: Sequence[str] = (), plan: str = "") -> None: ...
        >>> readable_words(["--keep", "0.9", "0.8", "--plan", "p", "--names", "a: b"], export)
        ['--keep=[0.9,0.8]', '--plan', 'p', '--names=["a: b"]']
    """
    hints = {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
    written: list[str] = []
    waiting = list(words)
    while waiting:
        flag, equals, value = _python_name(waiting.pop(0), hints).partition("=")
        hint = hints.get(flag.removeprefix("--")) if flag.startswith("--") else None
        if _element(hint) is None:
            written.append(f"{flag}{equals}{value}")
            continue
        values = [value] if equals else []
        while not equals and waiting and not _is_flag(waiting[0]):
            values.append(waiting.pop(0))
        written.append(f"{flag}={_as_list(values, hint)}")
    return written


def _python_name(word: str, hints: dict[str, Any]) -> str:
    """Return a flag with underscores where that is the name of a parameter."""
    found = re.match(r"--([A-Za-z][\w-]*)", word)
    if found is None:
        return word
    name = found[1].replace("-", "_")
    return f"--{name}{word[found.end() :]}" if name in hints else word


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _element(hint: Any) -> Any:
    """Return the type of a list's elements; None where ``hint`` is no list."""
    found = (one for one in _alternatives(hint) if get_origin(one) in (list, Sequence))
    return next((get_args(one)[0] for one in found), None)


def _as_list(values: list[str], hint: Any) -> str:
    whole = " ".join(values)
    if whole.startswith("[") or whole in ("null", "None") or (len(values) == 1 and str in _alternatives(hint)):
        return whole
    # Texts may hold whatever YAML reads as something else; numbers may have had commas between them already.
    return json.dumps(values) if _element(hint) is str else f"[{','.join(value.strip(',') for value in values)}]"
