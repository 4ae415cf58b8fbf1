"""``python -m lowrank_pl``: the command line."""

from __future__ import annotations

from lowrank_pl.cli.app import main

if __name__ == "__main__":
    main()
