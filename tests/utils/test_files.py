"""Files are whole or absent, whatever goes wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from pathlib import Path

import pytest
from filelock import FileLock

from lowrank_pl.utils import files
from lowrank_pl.utils.files import atomic_directory, atomic_write, cache_root, canonical_json, sha256_of, write_json


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_write_makes_folders_and_returns_the_path(tmp_path):
    path = atomic_write(tmp_path / "a" / "b" / "c.txt", "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    assert everything_in(tmp_path) == ["a", "a/b", "a/b/c.txt"]


def test_written_files_have_the_mode_of_plain_ones(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", b"x")
        with atomic_directory(tmp_path / "folder"):
            pass
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@pytest.mark.parametrize("step", ["fsync", "replace", "fdopen"])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    atomic_write(tmp_path / "kept", "old")
    if step == "fdopen":

        class Full:
            def __init__(self, handle, _mode):
                self.handle = handle

            def __enter__(self):
                return self

            def __exit__(self, *_):
                os.close(self.handle)

            write = staticmethod(full_disk)

        monkeypatch.setattr(files.os, "fdopen", Full)
    else:
        monkeypatch.setattr(files.os, step, full_disk)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'kept'}'"):
        atomic_write(tmp_path / "kept", "new")
    with pytest.raises(OSError, match="No space left on device"):
        atomic_write(tmp_path / "fresh", "new")
    monkeypatch.undo()
    assert everything_in(tmp_path) == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


def test_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "file", "x")
    assert everything_in(tmp_path) == []


def test_json_keeps_order_and_letters(tmp_path):
    text = write_json(tmp_path / "x.json", {"b": 1, "a": "é"}).read_text(encoding="utf-8")
    assert text == '{\n  "b": 1,\n  "a": "é"\n}\n'


def test_directory_appears_whole(tmp_path):
    with atomic_directory(tmp_path / "deep" / "made") as building:
        (building / "one").write_text("1")
        assert not (tmp_path / "deep" / "made").exists()
    assert everything_in(tmp_path) == ["deep", "deep/made", "deep/made/one"]


def test_directory_replaces_an_older_one_only_at_the_end(tmp_path):
    with atomic_directory(tmp_path / "made") as building:
        (building / "old").write_text("1")
    with atomic_directory(tmp_path / "made") as building:
        (building / "new").write_text("2")
        assert everything_in(tmp_path / "made") == ["old"]
    assert everything_in(tmp_path) == ["made", "made/new"]


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_failed_directory_leaves_the_old_one(tmp_path, problem):
    with atomic_directory(tmp_path / "made") as building:
        (building / "old").write_text("1")

    def fail():
        with atomic_directory(tmp_path / "made") as building:
            (building / "new").write_text("2")
            raise problem

    with pytest.raises(problem):
        fail()
    assert everything_in(tmp_path) == ["made", "made/old"]


@pytest.mark.parametrize("failing_call", [1, 2])
def test_directory_that_cannot_be_swapped_in_leaves_the_old_one(tmp_path, monkeypatch, failing_call):
    with atomic_directory(tmp_path / "made") as building:
        (building / "old").write_text("1")
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(source)
        if len(calls) == failing_call:
            full_disk()
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="No space left"), atomic_directory(tmp_path / "made") as building:
        (building / "new").write_text("2")
    assert everything_in(tmp_path) == ["made", "made/old"]


def leave(path, suffix, *, age=0.0, lock=True):
    """A temporary folder of ``path`` as a killed process leaves it."""
    folder = path.parent / f".{path.name}.abcd_123{suffix}"
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "weights").write_text("1")
    if lock:
        Path(f"{folder}.lock").touch()
    os.utime(folder, (time.time() - age,) * 2)
    return folder


@pytest.mark.parametrize("suffix", [".tmp", ".old"])
@pytest.mark.parametrize(("age", "lock"), [(0, True), (90_000, False)])
def test_what_a_killed_process_left_is_removed_and_named(tmp_path, caplog, suffix, age, lock):
    (tmp_path / "made").mkdir()
    left = leave(tmp_path / "made", suffix, age=age, lock=lock)
    with atomic_directory(tmp_path / "made"):
        pass
    assert everything_in(tmp_path) == ["made"]
    assert caplog.messages == [f"removed {left}, which a killed run had left"]


def test_folders_that_are_in_use_stay(tmp_path, caplog):
    used, new = leave(tmp_path / "made", ".tmp"), leave(tmp_path / "made", ".old", lock=False)
    other = leave(tmp_path / "made.v2", ".tmp")
    with FileLock(f"{used}.lock"), atomic_directory(tmp_path / "made"):
        pass
    assert {used, new, other} <= {*tmp_path.iterdir()}
    assert caplog.messages == []


def test_a_folder_that_was_about_to_be_replaced_is_put_back(tmp_path, caplog):
    leave(tmp_path / "made", ".old")
    with pytest.raises(KeyError), atomic_directory(tmp_path / "made"):
        raise KeyError
    assert everything_in(tmp_path) == ["made", "made/weights"]
    assert caplog.messages[0] == f"put {tmp_path / 'made'} back, which a killed run was about to replace"


def test_canonical_json_is_the_same_for_equal_values():
    assert canonical_json({"a": (1, 2), "b": None}) == canonical_json({"b": None, "a": [1, 2]})
    assert canonical_json({"a": 1}) != canonical_json({"a": 1.5})


def test_sha256_counts_where_parts_end():
    length = (2).to_bytes(8, "little")
    assert sha256_of("ab", b"cd") == hashlib.sha256(length + b"ab" + length + b"cd").hexdigest()
    assert sha256_of(memoryview(b"ab")) == sha256_of("ab") == sha256_of(b"ab")
    assert len({sha256_of("ab", "c"), sha256_of("a", "bc"), sha256_of("abc"), sha256_of("abc", "")}) == 4


def test_cache_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("LOWRANK_HOME")
    assert cache_root() == Path.home() / ".cache" / "lowrank_pl"


def test_a_finished_folder_and_its_files_are_as_open_as_plain_ones(tmp_path):
    with atomic_directory(tmp_path / "made") as folder:
        secret = folder / "weights"
        secret.write_bytes(b"")
        secret.chmod(0o600)
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "made" / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode
