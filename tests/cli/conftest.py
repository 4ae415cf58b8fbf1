"""What the tests of the command line share."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def _logging_as_before():
    levels = {name: logging.getLogger(name).level for name in ("httpx", "lowrank_pl.plans.budget")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).filters.clear()
