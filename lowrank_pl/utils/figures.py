"""Figures as PNG files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_pl.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plain", "save_figure"]


def plain(text: str) -> str:
    r"""Return ``text`` for a figure, with dollar signs that do not begin a formula.

    >>> print(plain("$x"))
    \$x
    """
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` to ``path`` as PNG, whole or not at all, and return the path."""
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return atomic_write(path, picture.getvalue())
