"""Configuration files of the command line: ``-c FILE``, or ``-c NAME`` for one that lowrank_pl ships."""

from __future__ import annotations

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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"{path} holds no YAML: {error}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ConfigFileError(f"{path} holds no settings: expected YAML with lines like `keep: 0.8`")
    return settings


def parse_value(text: str) -> Any:
    """Return the value that YAML 1.2 gives ``text``, of which JSON is a part.

    >>> parse_value("1e-6"), parse_value("[a, 2]"), parse_value("null")
    (1e-06, ['a', 2], None)
    """
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML reads YAML 1.1, to which 1e-6 is a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _shipped() -> Path:
    """Return the folder of the shipped files: in the package where it was installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
