"""The command line."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    from lowrank_pl.cli.main import main as run

    run(argv)
