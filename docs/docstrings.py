"""A griffe extension that makes examples and references in this package's docstrings readable on the pages."""

from __future__ import annotations

import re
from inspect import cleandoc
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"(?<=\n\n)>>> (?:.+\n?)+")
_SECTION = re.compile(r"^Example:$", re.M)
_ROLE = re.compile(r":[a-z]+:(`+[^`]+`+)")


class Docstrings(Extension):
    """Turns doctests outside of sections into code blocks, and removes the roles of Sphinx."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of the object that griffe has just read."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


def readable(docstring: str) -> str:
    """Return ``docstring`` with fenced doctests outside of sections, and without roles."""
    # The section of one example is read as Markdown, that of several as doctests.
    docstring = _SECTION.sub("Examples:", cleandoc(docstring))
    fenced = _EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", f"{docstring}\n")
    return _ROLE.sub(lambda found: "`" + found[1].strip("`") + "`", fenced).rstrip()
