"""A run that is killed while it writes, wherever that is: nothing wrong stays behind, the next one makes the rest."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from lowrank_pl.cli.app import main

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
ALLOCATE = "allocate --base random:llama --method fisher --keep 0.5 --decomposition.kind two_sided --text python-docs"
ALLOCATE += " --length 64 --sequences 16 --output plan.json"
ALIKE = ALLOCATE.replace("plan.json", "alike.json") + " --decomposition.token_weights false"
REFIT = "refit --plan plan.json --settings.sequences 8 --output refitted.json"
EXPORT = "export --plan refitted.json --output model"
# What each step writes, in files of the cache or folders beside it.
STEPS = {
    "statistics": ALIKE, "output_gradients": ALIKE, "weighted_moments": ALLOCATE, "factors": ALLOCATE,
    "gradient_norms": REFIT, "refit": REFIT, "model": EXPORT,
}  # fmt: skip


def in_a_child(home, commands, *, kind="", kill_at=0):
    """Run ``commands`` in a process of their own that dies before its ``kill_at``-th file of a kind gets its name.

    Returns:
        The signal that ended it, 0 for none, and how many files of each kind it wrote.
    """
    written = home / "written.json"
    written.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        try:
            os.chdir(home)
            os.environ["LOWRANK_HOME"] = str(home / "cache")
            _count_renames(Counter(), kind, kill_at, written)
            for command in commands:
                main(command.split())
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status), json.loads(written.read_text()) if written.exists() else {}


def _count_renames(seen, kind, kill_at, written):
    rename = os.replace

    def counting(source, target, **options):
        found = _kind_of(Path(target))
        seen[found] += 1
        if (found, seen[found]) == (kind, kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **options)
        written.write_text(json.dumps(seen))

    os.replace = counting


def _kind_of(path):
    if path.suffix == ".safetensors":
        return "refit" if "refit" in path.parts else path.parent.parent.name
    return path.name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed, and what it wrote."""
    home = tmp_path_factory.mktemp("whole")
    killed, written = in_a_child(home, [ALIKE, ALLOCATE, REFIT, EXPORT])
    assert not killed
    return home, written


@pytest.mark.parametrize(
    ("kind", "kill_at"),
    [
        ("statistics", 3),
        ("output_gradients", 5),
        ("weighted_moments", 4),
        ("factors", 6),
        ("gradient_norms", 7),
        ("refit", 4),
        ("model", 1),
    ],
)
def test_a_killed_run_loses_at_most_the_file_it_was_at(tmp_path, whole, kind, kill_at):
    theirs, files = whole
    steps = list(dict.fromkeys(STEPS.values()))
    commands = steps[: steps.index(STEPS[kind]) + 1]
    killed, before = in_a_child(tmp_path, commands, kind=kind, kill_at=kill_at)
    assert killed == signal.SIGKILL
    assert before.get(kind, 0) == kill_at - 1
    killed, after = in_a_child(tmp_path, commands)
    assert not killed
    assert after[kind] == files[kind] - (kill_at - 1)
    for name in ("plan.json", "refitted.json"):
        if (tmp_path / name).exists():
            mine, other = (json.loads((home / name).read_text())["modules"] for home in (tmp_path, theirs))
            assert mine == other
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        assert _values(path) == _values(theirs / path.relative_to(tmp_path))
    if kind == "model":
        name = "model/model.safetensors"
        assert (tmp_path / name).read_bytes() == (theirs / name).read_bytes()


def _values(path):
    """The tensors' bytes, which come behind the header: notes tell how long each took."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]
