"""Words of the command line as people write them, made into what jsonargparse reads.

What is special: jsonargparse 4.53 takes a list only as ``--keep [0.9,0.8]`` or one ``--keep+`` each, and flags only
with the underscores of Python; ``-c`` is a word of LightningCLI alone, and of a flag given twice the last one wins.
Of parameters that Python takes by position it makes all flags, required or not, or all places (``as_positional``).
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["bare_flags", "readable_options", "readable_words"]


def readable_words(words: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """Return the words for jsonargparse: ``--keep 0.9 0.8`` as ``--keep=[0.9,0.8]``, ``-c`` as ``--config``.

    A flag is a list's where the parameter of its name takes one, with ``-`` or ``_`` in it. It has the words up to the
    next flag; none make an empty list, and those of a flag that comes several times make one list. A list in brackets,
    ``null`` and ``--keep+`` stay as they are. Words before the first flag are the values of the parameters that Python
    takes by position.

    Args:
        words: The words after the command's name.
        function: What the command runs.

    Raises:
        ValueError: A list's flag comes several times, and once in brackets or as ``null``.

    Example:
        >>> def export(*, keep: Sequence[float] | None = None, names: Sequence[str] = (), plan: str = "") -> None: ...
        >>> readable_words(["--keep", "0.9", "0.8", "--plan", "p", "--names", "a: b"], export)
        ['--keep=[0.9,0.8]', '--plan', 'p', '--names=["a: b"]']
    """
    hints = {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
    named = _named([re.sub(r"^-c(?=$|=)", "--config", word) for word in words], function)
    return _with_lists([_python_name(word, hints) for word in named], hints)


def readable_options(words: Sequence[str], groups: Mapping[str, type]) -> list[str]:
    """Return the words for LightningCLI likewise: lists as they are written elsewhere, ``-`` in flags as ``_``.

    Args:
        words: The words after the command's name.
        groups: By what stands before the dot of a flag, the class whose arguments they are.

    Raises:
        ValueError: As in ``readable_words``.

    Example:
        >>> class Run:
        ...     def __init__(self, names: Sequence[str] = (), most: int = 1) -> None: ...
        >>> readable_options(["--run.names", "a", "b", "--run.most", "2", "--other-flag", "c"], {"run": Run})
        ['--run.names=["a", "b"]', '--run.most', '2', '--other_flag', 'c']
    """
    hints = {
        f"{group}.{name}": hint
        for group, made in groups.items()
        for name, hint in get_type_hints(made.__init__).items()  # type: ignore[misc]
        if _element(hint) in (str, int, float, Path)
    }
    flagged = [re.sub(r"^--[A-Za-z][\w.-]*", lambda flag: f"--{flag[0][2:].replace('-', '_')}", word) for word in words]
    return _with_lists(flagged, hints)


def _with_lists(words: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """Return the words with one value behind every flag whose hint is a list's."""
    written: list[str] = []
    lists: dict[str, list[str]] = {}
    waiting = list(words)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        hint = hints.get(flag.removeprefix("--")) if flag.startswith("--") else None
        if _element(hint) is None:
            written.append(f"{flag}{equals}{value}")
            continue
        values = [value] if equals else []
        while not equals and waiting and not _is_flag(waiting[0]):
            values.append(waiting.pop(0))
        if flag in lists:
            # Where it comes last, so that it still wins over a --config before it.
            written.remove(f"{flag}={_as_list(lists[flag], hint)}")
            values = _joined(flag, lists[flag], values)
        lists[flag] = values
        written.append(f"{flag}={_as_list(values, hint)}")
    return written


def bare_flags(words: Sequence[str], name: str) -> list[str]:
    """Return the words with ``=true`` behind the flag ``name`` wherever no value follows it.

    >>> bare_flags(["fit", "--dry-run", "--run", "r", "--dry_run", "h100"], "dry_run")
    ['fit', '--dry_run=true', '--run', 'r', '--dry_run', 'h100']
    """
    found: list[str] = []
    for place, word in enumerate(words):
        if word.replace("-", "_") != f"__{name}":
            found.append(word)
        elif place + 1 == len(words) or _is_flag(words[place + 1]):
            found.append(f"--{name}=true")
        else:
            found.append(f"--{name}")
    return found


def _named(words: list[str], function: Callable[..., Any]) -> list[str]:
    """Return the words with a flag for each one before the first flag, as far as ``function`` takes it by position."""
    before = next((place for place, word in enumerate(words) if _is_flag(word)), len(words))
    parameters = inspect.signature(function).parameters.values()
    by_position = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    named = [f"--{name}={word}" for name, word in zip(by_position, words[:before], strict=False)]
    return [*named, *words[len(named) :]]


def _joined(flag: str, before: list[str], values: list[str]) -> list[str]:
    """Return the values of a list's flag that comes again."""
    if _is_whole(before) or _is_whole(values):
        raise ValueError(
            f"{flag} was given several times, of which one is a whole list: name all values after one {flag}"
        )
    return [*before, *values]


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
    if _is_whole(values) or (len(values) == 1 and str in _alternatives(hint)):
        return " ".join(values)
    # Texts and paths may hold whatever YAML reads as something else; numbers may have had commas between them already.
    return (
        json.dumps(values) if _element(hint) in (str, Path) else f"[{','.join(value.strip(',') for value in values)}]"
    )


def _is_whole(values: list[str]) -> bool:
    """Tell whether the words are a list in brackets, or ``null``, as jsonargparse reads them."""
    whole = " ".join(values)
    return whole.startswith("[") or whole in ("null", "None")
