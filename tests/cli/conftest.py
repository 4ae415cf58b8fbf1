"""What the tests of the command line share."""

from __future__ import annotations

import logging

import pytest

from lowrank_pl.cli.allocate import allocate
from lowrank_pl.models.base import Base
from lowrank_pl.text.sequences import Calibration


@pytest.fixture(autouse=True)
def _logging_as_before():
    levels = {name: logging.getLogger(name).level for name in ("httpx", "lowrank_pl.plans.budget")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).filters.clear()


@pytest.fixture
def plan_file(tmp_path, capsys):
    """The plan of ``allocate`` at keep 0.5 on ``random:llama``; what it printed is in ``shown.txt``."""
    allocate(
        Base("random:llama"),
        method="uniform",
        keep=0.5,
        output=tmp_path / "plan.json",
        store=tmp_path / "store",
        calibration=Calibration("python-docs::part=0%-10%", 32, 8),
    )
    (tmp_path / "shown.txt").write_text(capsys.readouterr().out)
    return tmp_path / "plan.json"
