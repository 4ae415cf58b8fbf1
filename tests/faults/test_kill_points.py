"""The program that kills commands: it kills where it says, and finds results that differ."""

from __future__ import annotations

import pytest

from tests.faults.kill_points import Outcome, Runner


@pytest.fixture(scope="module")
def decomposed(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("killed"))
    return runner, *runner.whole("decompose")


def test_a_file_that_is_torn_is_written_again(decomposed):
    runner, changes, expected = decomposed
    kill_at = next(n for n, change in enumerate(changes, 1) if n % 2 and change.startswith("fsync factors/.model."))
    assert runner.killed("decompose", kill_at, expected) == Outcome("same bits")


def test_other_bits_are_found(decomposed):
    runner, changes, expected = decomposed
    other = {**expected, "out.json": "other"}
    assert runner.killed("decompose", len(changes), other) == Outcome("other bits", "out.json")
