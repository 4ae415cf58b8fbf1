"""Figures as PNG files; kept apart from formatting, so that only what draws imports matplotlib."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from lowrank_pl.utils.files import atomic_write

__all__ = ["save_figure"]


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` to ``path`` as PNG, whole or not at all, and return the path."""
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return atomic_write(path, picture.getvalue())
