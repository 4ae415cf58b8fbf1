"""A griffe extension: examples and references of this package's docstrings as the pages can show them."""

from __future__ import annotations

import re
from inspect import cleandoc
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"(?<=\n\n)>>> (?:.+\n?)+")
_ROLE = re.compile(r":[a-z]+:(`+[^`]+`+)")


class Docstrings(Extension):
    """Shows bare doctests as code, and names without the roles that other tools know."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of what griffe has just read."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


def readable(docstring: str) -> str:
    """Return a docstring whose doctests outside of sections are fenced, and whose roles are gone."""
    fenced = _EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", f"{cleandoc(docstring)}\n")
    return _ROLE.sub(lambda found: "`" + found[1].strip("`") + "`", fenced).rstrip()
