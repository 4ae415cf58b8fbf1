"""Configuration files of the command line: ``-c FILE``, or ``-c NAME`` for one that lowrank_pl ships."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

__all__ = ["ConfigFileError", "find_config", "parse_value", "read_config"]


class ConfigFileError(Exception):
    """A configuration file that does not exist or can't be read; the message is for users."""


def find_config(name: str) -> Path:
    """Return the configuration file called ``name``: a path, or the name of a shipped file without its ending.

    Raises:
        ConfigFileError: There is neither.

    >>> find_config("allocate/strs").name
    'strs.yaml'
    """
    path, shipped = Path(name), _shipped() / f"{name.removesuffix('.yaml')}.yaml"
    if path.is_file():
        return path
    if shipped.is_file():
        return shipped
    names = sorted(str(file.relative_to(_shipped()).with_suffix("")) for file in _shipped().rglob("*.yaml"))
    raise ConfigFileError(f"File does not exist: {name}; the names of shipped files are {', '.join(names)}")


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file by name.

    Raises:
        ConfigFileError: It holds no YAML, or none that gives values by name.
    """
    try:
        settings = parse_value(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigFileError(f"{path} holds no YAML: {error}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigFileError(f"{path} holds no settings: expected YAML with lines like `keep: 0.8`")
    return settings


def parse_value(text: str) -> Any:
    """Return the value that YAML 1.2 gives ``text``, of which JSON is a part. All names in it are texts.

    Raises:
        ValueError: It is no YAML, or a value that JSON does not have.

    >>> parse_value("1e-6"), parse_value("[a, 2]"), parse_value("null"), parse_value("1: 2020-01-01")
    (1e-06, ['a', 2], None, {'1': '2020-01-01'})
    """
    try:
        return json.loads(json.dumps(yaml.load(text, _Loader)))
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML reads YAML 1.1, to which 1e-6 is a text and 2020-01-01 a date."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _shipped() -> Path:
    """Return the folder of the shipped files: in the package where it was installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
