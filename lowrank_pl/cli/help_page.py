"""How ``lowrank COMMAND --help`` shows defaults."""

from __future__ import annotations

from typing import Any

from cyclopts.help import DefaultFormatter, HelpPanel

__all__ = ["HelpFormatter"]


class HelpFormatter(DefaultFormatter):
    """cyclopts' formatter, without empty defaults: an empty list stands for what the description says."""

    def __call__(self, console: Any, options: Any, panel: HelpPanel) -> None:
        """Print one panel of the page."""
        entries = [entry.copy(default=entry.default or None) for entry in panel.entries]
        super().__call__(console, options, panel.copy(entries=entries))
