"""The words after ``lowrank fit``, ``heal`` and ``upcycle`` as people write them, made into what jsonargparse reads.

jsonargparse 4.53 takes a list only as ``--finish.baselines [a,b]``, flags only with the underscores of Python, and
``-c`` only for a file.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from lowrank_pl.cli.config_files import find_config

__all__ = ["SHORT", "fit_words"]

SHORT = {"model.base": "model.base.name"}
"""Flags that stand for another one on the command line."""

_SWITCH = "dry_run"
"""The flag that is true without a value; jsonargparse takes a flag either with a value or without."""


def fit_words(words: Sequence[str], groups: Mapping[str, type]) -> list[str]:
    """Return the words for LightningCLI: lists in brackets, ``-`` in flags as ``_``, ``-c NAME`` as ``--config FILE``.

    The flag of a list takes all words up to the next flag; given again, it adds to the list. A list in brackets and
    ``null`` stay as they are.

    Args:
        words: The words after ``fit``.
        groups: By the name before the dot of a flag, the class whose arguments come after it.

    Raises:
        ConfigFileError: A configuration file that does not exist.
        ValueError: The flag of a list comes several times, and once in brackets or as ``null``.

    Example:
        >>> class Run:
        ...     def __init__(self, names: Sequence[str] = (), most: int = 1) -> None: ...
        >>> fit_words(["--run.names", "a", "b", "--run.most", "2", "--other-flag", "c"], {"run": Run})
        ['--run.names=["a", "b"]', '--run.most', '2', '--other_flag', 'c']
    """
    lists = {name: element for group, made in groups.items() for name, element in _lists(group, made.__init__)}  # type: ignore[misc]
    found: list[str] = []
    given: dict[str, list[str]] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if name in ("-c", "--config"):
            found.append(f"--config={find_config(value if equals else waiting.pop(0))}" if equals or waiting else word)
            continue
        if _is_flag(name):
            name = name.removeprefix("--").replace("-", "_")
            name = SHORT.get(name, name)
            word = f"--{name}{equals}{value}"
            if name == _SWITCH and not equals and waiting[:1] not in (["true"], ["false"]):
                word = f"--{name}=true"
        if name not in lists:
            found.append(word)
            continue
        values = [value] if equals else []
        while not equals and waiting and not re.match(r"--?[A-Za-z]", waiting[0]):
            values.append(waiting.pop(0))
        if name in given:
            # Where the flag comes last, so that it still wins over a --config before it.
            found.remove(f"--{name}={_bracketed(given[name], lists[name])}")
            values = _joined(name, given[name], values)
        given[name] = values
        found.append(f"--{name}={_bracketed(values, lists[name])}")
    return found


def _is_flag(word: str) -> bool:
    return re.match(r"--[A-Za-z]", word) is not None


def _lists(above: str, function: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names of all flags that take a list, and the type of its elements."""
    for name, hint in get_type_hints(function).items():
        for kind in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
            if dataclasses.is_dataclass(kind):
                yield from _lists(f"{above}.{name}", kind.__init__)  # type: ignore[misc]
            elif (get_origin(kind) in (list, tuple, Sequence)) and get_args(kind)[0] in (str, int, float, Path):
                yield f"{above}.{name}", get_args(kind)[0]


def _joined(name: str, before: list[str], values: list[str]) -> list[str]:
    """Return the values of a list whose flag comes again."""
    if _is_whole(before) or _is_whole(values):
        raise ValueError(
            f"--{name} was given several times, once with a whole list in brackets: name all values after one --{name}"
        )
    return [*before, *values]


def _bracketed(values: list[str], element: Any) -> str:
    if _is_whole(values):
        return " ".join(values)
    # YAML reads some texts and paths as something else.
    return json.dumps(values) if element in (str, Path) else f"[{','.join(values)}]"


def _is_whole(values: list[str]) -> bool:
    """Tell whether the words are a list in brackets, or ``null``, as jsonargparse reads them."""
    whole = " ".join(values)
    return whole.startswith("[") or whole in ("null", "None")
