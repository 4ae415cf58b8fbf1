"""Commands that must fail, for tests of the command line."""

from __future__ import annotations

import pytest

from lowrank_pl.cli.app import main


def failing(capsys, *words, status=1):
    """Run a command that must fail; return its one sentence."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == status
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "usage:" not in shown.err
    sentences = [line for line in shown.err.splitlines() if line.startswith("lowrank: ")]
    assert len(sentences) == 1
    assert shown.err.splitlines()[-1] == sentences[0]
    return sentences[0].removeprefix("lowrank: error: ")
