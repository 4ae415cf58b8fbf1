"""Files are whole or absent, whatever goes wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from contextlib import nullcontext
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
from filelock import FileLock

from lowrank_pl.utils import files
from lowrank_pl.utils.files import (
    atomic_directory,
    atomic_write,
    cache_root,
    canonical_json,
    check_output_files,
    check_output_folder,
    locked,
    sha256_of,
    write_json,
)


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_write_makes_folders_and_returns_the_path(tmp_path):
    path = atomic_write(tmp_path / "a" / "b" / "c.txt", "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    assert everything_in(tmp_path) == ["a", "a/b", "a/b/c.txt"]


def test_a_function_writes_a_file(tmp_path):
    assert atomic_write(tmp_path / "file", lambda file: file.write(b"x")).read_bytes() == b"x"
    assert everything_in(tmp_path) == ["file"]


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


class Full(BytesIO):
    """A file on a full disk."""

    write = full_disk


@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    atomic_write(tmp_path / "kept", "old")
    if step == "write":
        monkeypatch.setattr(files.Path, "open", lambda *_: Full())
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


@pytest.mark.parametrize("in_use", [False, True])
def test_what_a_killed_process_left_of_a_file_is_removed_unless_in_use(tmp_path, caplog, in_use):
    left, lock = tmp_path / ".plan.json.abcd_123.tmp", tmp_path / ".plan.json.abcd_123.tmp.lock"
    left.write_text("half")
    with FileLock(lock) if in_use else nullcontext(lock.touch()):
        atomic_write(tmp_path / "plan.json", "whole")
        assert left.exists() == in_use
    assert caplog.messages == ([] if in_use else [f"removed {left}, which a killed run had left"])


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
    monkeypatch.setenv("LOWRANK_HOME", "~/own")
    assert cache_root() == Path.home() / "own"
    monkeypatch.delenv("LOWRANK_HOME")
    assert cache_root() == Path.home() / ".cache" / "lowrank_pl"


def test_a_finished_folder_and_its_files_are_as_open_as_plain_ones(tmp_path):
    with atomic_directory(tmp_path / "made") as folder:
        secret = folder / "weights"
        secret.write_bytes(b"")
        secret.chmod(0o600)
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "made" / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


# -- destinations --------------------------------------------------------------------------------------------------


def test_a_fifo_is_written_to_and_stays_one(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    check_output_files(fifo, fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    atomic_write(fifo, "figures")
    assert os.read(reader, 99) == b"figures"
    os.close(reader)
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_a_link_to_a_file_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "file")
    check_output_files(link)
    atomic_write(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "new"


def test_a_link_to_a_folder_stays_and_its_folder_is_replaced(tmp_path):
    (tmp_path / "disk" / "old").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk")
    with atomic_directory(link) as building:
        (building / "new").touch()
    assert link.is_symlink()
    assert everything_in(tmp_path / "disk") == ["new"]


def test_a_name_of_255_bytes_is_written(tmp_path):
    path = tmp_path / ("ü" * 127 + "x")
    check_output_files(path)
    assert atomic_write(path, "x").read_text() == "x"
    with atomic_directory(tmp_path / ("f" * 255)):
        pass


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("folder", "is a folder: name a file"),
        ("file/below", "is a file: name another folder"),
        ("x" * 256, "give a shorter name"),
        ("dangling/file", "which does not exist: make it first"),
        ("nowhere", "which does not exist: make it first"),
    ],
)
def test_a_file_that_can_not_be_written_is_refused_before_the_work(tmp_path, name, cure):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "unmounted")
    (tmp_path / "nowhere").symlink_to(tmp_path / "unmounted" / "file")
    with pytest.raises(ValueError, match=cure):
        check_output_files(None, tmp_path / name)
    assert not (tmp_path / "unmounted").exists()


def test_one_file_for_two_outputs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="for two files: name another one"):
        check_output_files(tmp_path / "a", tmp_path / "." / "a")


def test_an_output_that_is_also_an_input_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "read")
    with pytest.raises(ValueError, match=r"is read by this command, .*: name another file"):
        check_output_files(tmp_path / "link", inputs=["python-docs", None, str(tmp_path / "." / "read")])
    check_output_files(tmp_path / "other", "/dev/stdout", inputs=[tmp_path / "read", "/dev/stdout"])


def test_a_file_where_a_folder_is_meant_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: name a folder"):
        check_output_folder(tmp_path / "file")


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="name another place"):
        check_output_files(tmp_path / "file")


def test_a_lock_that_is_held_is_refused_and_free_once_released(tmp_path):
    lock = tmp_path / ".lock"
    here = partial(locked, lock, "learning", otherwise="name another folder")
    with here(), pytest.raises(ValueError, match="another run is learning: name another folder"), here():
        pass
    with here():
        pass
