"""Checks of settings: an error says what was given and what was expected."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal, get_args, get_origin, get_type_hints

__all__ = ["check_choices", "check_counts", "check_numbers", "check_unused", "checked_settings"]


def check_choices(given: Mapping[str, tuple[object, Any]]) -> None:
    """Check settings that have one of a few values.

    Args:
        given: By the setting's name, its value and the ``Literal`` of the values that it may have.

    Raises:
        ValueError: A value is none of them.

    >>> from typing import Literal
    >>> check_choices({"side": ("top", Literal["left", "right"])})
    Traceback (most recent call last):
    ValueError: side is 'top': expected one of left, right
    """
    for name, (value, literal) in given.items():
        if value not in get_args(literal):
            raise ValueError(f"{name} is {value!r}: expected one of {', '.join(get_args(literal))}")


def check_counts(given: Mapping[str, Any], *, least: int = 1) -> None:
    """Check settings that count something.

    Args:
        given: The value by the setting's name; None is left to the setting's default.
        least: The smallest value.

    Raises:
        ValueError: A value is too small or no whole number.

    >>> check_counts({"steps": 0})
    Traceback (most recent call last):
    ValueError: steps is 0: expected a whole number of at least 1
    """
    for name, value in given.items():
        # numpy's whole numbers are counts too, and True and False are none.
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
            raise ValueError(f"{name} is {value!r}: expected a whole number of at least {least}")


def check_numbers(given: Mapping[str, tuple[float, float]], *, above: bool = False) -> None:
    """Check settings that have a smallest value.

    Args:
        given: By the setting's name, its value and the smallest value.
        above: Whether the smallest value itself is refused.

    Raises:
        ValueError: A value is too small, infinite or NaN.

    >>> check_numbers({"damping": (-1.0, 0)})
    Traceback (most recent call last):
    ValueError: damping is -1.0: expected a finite number of at least 0
    """
    for name, (value, bound) in given.items():
        if not (bound < value if above else bound <= value) or math.isinf(value):
            word = "above" if above else "of at least"
            raise ValueError(f"{name} is {value}: expected a finite number {word} {bound:g}")


def check_unused(command: str, given: Mapping[str, Any]) -> None:
    """Check that no setting was given that would have no effect.

    Args:
        command: The command, and what makes these settings useless.
        given: By the setting's name, its value; None where it was not given.

    Raises:
        ValueError: A setting was given.

    >>> check_unused("bench svd", {"compile": None, "keep": 0.5})
    Traceback (most recent call last):
    ValueError: bench svd has no use for keep, which is 0.5: leave it out
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{command} has no use for {name}, which is {value!r}: leave it out")


def checked_settings(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as the type hints of a constructor say; a single value stands for a sequence of one.

    Args:
        kind: The class whose constructor takes the settings.
        given: The values by the settings' names.

    Raises:
        ValueError: A value of another type.

    >>> from collections.abc import Sequence
    >>> class Grid:
    ...     def __init__(self, ratios: Sequence[float] = (), rounds: int = 0) -> None: ...
    >>> checked_settings(Grid, {"ratios": 0.5})
    {'ratios': [0.5]}
    >>> checked_settings(Grid, {"rounds": 2.5})
    Traceback (most recent call last):
    ValueError: rounds is 2.5: expected int
    """
    try:
        hints = get_type_hints(kind.__init__) if given else {}  # type: ignore[misc]
    except NameError:
        # Another package may import the types of its hints for type checkers alone.
        hints = {}
    return {name: _of_type(name, value, hints[name]) if name in hints else value for name, value in given.items()}


def _of_type(name: str, value: Any, hint: Any) -> Any:
    # Slow to import.
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    if get_origin(hint) is Literal:
        check_choices({name: (value, hint)})
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint)
    except PydanticUserError:
        # A type of another package that pydantic can't check.
        return value
    for tried in (value, [value]):
        try:
            return adapter.validate_python(tried)
        except ValidationError:
            pass
    expected = inspect.formatannotation(hint).replace("collections.abc.", "")
    raise ValueError(f"{name} is {value!r}: expected {expected}")
