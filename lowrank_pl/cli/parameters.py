"""How cyclopts reads the flags of commands without a Trainer: lists, dataclasses as flags, configuration files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import cyclopts
from cyclopts import Parameter
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict

from lowrank_pl.cli.config_files import find_config, parse_value, read_config
from lowrank_pl.utils.files import at_home

__all__ = ["FLAGS", "Flat", "Given", "Settings", "Source", "split_words"]

T = TypeVar("T")

Source = tuple[str, dict[str, Any]]
"""Settings by name, and where they come from."""


Flat = Annotated[T, Parameter(name="*")]
"""A dataclass whose fields are flags of the command itself: ``--length``, not ``--calibration.length``."""


def _value(_: Any, tokens: Sequence[cyclopts.Token]) -> Any:
    values = [parse_value(token.value) for token in tokens]
    return values[0] if len(values) == 1 else values


Settings = dict[str, Annotated[Any, Parameter(converter=_value, n_tokens=-1)]]
"""Values of any type by name: ``--settings.rounds 5``; several words are a list."""


def _shown_default(value: Any) -> str:
    values = value if isinstance(value, (list, tuple)) else [value]
    return " ".join(map(str, values)) if value is not None and value != {} else ""


FLAGS = Parameter(
    # A list takes all words up to the next flag. Texts and globs may begin with "[", which is no JSON there.
    consume_multiple=True,
    json_list=False,
    # No --no-x beside every --x: `--x=false` says it too.
    negative=(),
    show_default=_shown_default,
    # Flags are called as in Python, so that YAML has the same names. The name of a model is the flag --base.
    name_transform=lambda name: "base" if name == "name" else name,
)
"""How all parameters are read, unless one says something else."""


def split_words(words: Sequence[str]) -> tuple[list[str], list[Source]]:
    """Return the words as cyclopts reads them, and what ``Given`` adds to them: files, and mappings between braces.

    ``-`` in the name of a flag becomes ``_``, and ``--flag true`` becomes ``--flag=true``.

    Raises:
        ConfigFileError: A file that does not exist or can't be read.

    >>> split_words(["allocate", "b", "--trust-remote-code", "true", "--floors", "{'*.q_proj': 0.9}"])
    (['allocate', 'b', '--trust_remote_code=true'], [('--floors', {'floors': {'*.q_proj': 0.9}})])
    """
    found: list[str] = []
    files: list[Source] = []
    mappings: list[Source] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        flag, equals, value = word.partition("=")
        if flag in ("-c", "--config"):
            if not equals and not waiting:
                raise cyclopts.CycloptsError(msg=f"{flag} is followed by no file")
            path = find_config(value if equals else waiting.pop(0))
            settings = read_config(path)
            if isinstance(settings.get("model"), dict):
                raise cyclopts.CycloptsError(
                    msg=f"{path} is a configuration of `lowrank fit`, heal or upcycle: name one of this command"
                )
            files.append((str(path), settings))
            continue
        # Behind a dot stands a name of the user's, such as that of a text.
        word = re.sub(r"^--[A-Za-z][\w-]*", lambda name: f"--{name[0][2:].replace('-', '_')}", word)
        last = found[-1] if found and re.fullmatch(r"--[\w.]+", found[-1]) else None
        if last is not None and (mapping := _mapping(word)):
            mappings.append((found.pop(), {last[2:]: mapping}))
        elif last is not None and word in ("true", "false"):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found, [*files, *mappings]


def _mapping(word: str) -> dict[str, Any] | None:
    """Return the mapping that ``word`` is in YAML, if it is one."""
    try:
        found = parse_value(word) if word.startswith("{") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) and None not in found.values() else None


class Given:
    """Fills in what flags have left out, from ``sources``; later sources win. Expands ``~`` in paths.

    cyclopts' own reader of YAML drops every value of a mapping in the file if a flag gives one of them, and takes lists
    in a mapping apart. Here mappings are merged, and their values arrive as YAML has them.

    Args:
        sources: The settings, each with the name of the file or the flag that they come from.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def __call__(self, app: cyclopts.App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Add the settings to ``arguments``, as cyclopts asks of a source of configuration."""
        for source, settings in reversed(self._sources):
            plain = dict(settings)
            for name, value in settings.items():
                argument = arguments.get(f"--{name}", None)
                if isinstance(value, dict) and argument is not None and not argument.children:
                    kinds = (argument.hint, *get_args(argument.hint))
                    if not any((get_origin(kind) or kind) is dict for kind in kinds):
                        raise cyclopts.CycloptsError(
                            msg=f"{argument.name} is {value} in {source}: expected a value, without names"
                        )
                    _merge(argument, plain.pop(name), source)
            Dict(plain, source=source, use_commands_as_keys=False)(app, commands, arguments)
        for argument in arguments:
            if _holds_path(argument.hint):
                argument.tokens[:] = [token.evolve(value=str(at_home(token.value))) for token in argument.tokens]


def _holds_path(hint: Any) -> bool:
    return hint is Path or any(map(_holds_path, get_args(hint)))


def _merge(argument: cyclopts.Argument, values: dict[str, Any], source: str) -> None:
    given = {token.keys[:1] for token in argument.tokens}
    for key, value in values.items():
        if (key,) not in given:
            flag = f"{argument.name}.{key}"
            argument.append(cyclopts.Token(keyword=flag, value=json.dumps(value), source=source, keys=(key,)))
