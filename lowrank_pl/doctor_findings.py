"""What a check of ``lowrank doctor`` found; exports make the same checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Finding", "Health", "some"]

Health = Literal["healthy", "warning", "sick"]
"""From good to bad; a sick model must not be used, a warning is for a person to weigh."""

NAMED = 3
"""Modules or tensors named in a sentence; the figures have all."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        name: The check.
        health: How bad it is.
        said: What was found.
        figures: What was measured or is named in full, as JSON values.
        advice: What to do, unless it is healthy.
    """

    name: str
    health: Health
    said: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""

    @property
    def sentence(self) -> str:
        """What was found and what to do."""
        return f"{self.said}; {self.advice}" if self.advice else self.said


def some(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are, for a sentence.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
