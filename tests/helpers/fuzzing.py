"""What came of generated inputs: a result, or an error that names the input. Anything else is a find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

OUTCOMES: Counter[tuple[str, str]] = Counter()
"""How often each outcome came of each kind of input; ``make fuzz`` prints it."""


@contextmanager
def counted(what: str, *named: str) -> Iterator[None]:
    """Count one input of the kind ``what``: it may end in a ``ValueError`` whose message has all of ``named``."""
    outcome = "results"
    try:
        yield
    except ValueError as error:
        if missing := [name for name in named if name not in str(error)]:
            raise AssertionError(f"{type(error).__name__} does not name {missing}: {error}") from error
        outcome = "clean errors"
    OUTCOMES[what, outcome] += 1
