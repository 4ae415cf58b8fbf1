from __future__ import annotations

import hashlib

import pytest

from lowrank_pl.models.digests import DIGESTS, changed_files, check_files, write_digests


@pytest.fixture
def folder(tmp_path):
    for name in ("a.safetensors", "config.json", "README.md"):
        (tmp_path / name).write_text(name)
    write_digests(tmp_path)
    return tmp_path


def test_the_file_is_what_sha256sum_writes(folder):
    names = ("a.safetensors", "config.json")
    lines = [f"{hashlib.sha256(name.encode()).hexdigest()}  {name}" for name in names]
    assert (folder / DIGESTS).read_text().splitlines() == lines
    assert changed_files(folder) == []


def test_changed_lost_and_new_files(folder):
    (folder / "README.md").write_text("its owner's")
    (folder / "config.json").unlink()
    (folder / "model.safetensors").write_text("new")
    assert changed_files(folder) == ["model.safetensors", "config.json"]


def test_components_for_smaller_sizes_are_covered_and_read_only_for_these(folder):
    (folder / "nested").mkdir()
    (folder / "nested" / "a.safetensors").write_text("components")
    write_digests(folder)
    assert f"{hashlib.sha256(b'components').hexdigest()}  nested/a.safetensors" in (folder / DIGESTS).read_text()
    assert changed_files(folder) == []
    (folder / "nested" / "a.safetensors").write_text("others")
    (folder / "nested" / "b.safetensors").write_text("new")
    assert changed_files(folder) == ["nested/b.safetensors", "nested/a.safetensors"]
    check_files(folder)
    with pytest.raises(ValueError, match=r"nested/b.safetensors, nested/a.safetensors in .* is not as it was exported"):
        check_files(folder, nested=True)


def test_a_copy_without_the_components_is_whole(folder):
    (folder / "nested").mkdir()
    (folder / "nested" / "a.safetensors").write_text("components")
    write_digests(folder)
    (folder / "nested" / "a.safetensors").unlink()
    assert changed_files(folder) == ["nested/a.safetensors"]
    (folder / "nested").rmdir()
    assert changed_files(folder) == []


def test_a_path_out_of_the_folder_is_no_line_of_digests(folder):
    (folder / DIGESTS).write_text(f"{'0' * 64}  nested/../../secret\n")
    assert changed_files(folder) == [DIGESTS]


@pytest.mark.parametrize("place", range(0, 90, 3))
def test_a_flipped_bit_in_the_digests_is_found(folder, place):
    data = bytearray((folder / DIGESTS).read_bytes())
    data[place] ^= 1 << place % 8
    (folder / DIGESTS).write_bytes(data)
    assert changed_files(folder)


def test_without_digests_nothing_is_known(tmp_path):
    assert changed_files(tmp_path) is None
    check_files(tmp_path)


def test_weights_of_an_adapter_in_the_folder_are_no_change(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    assert changed_files(folder) == []


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("  ", " *"),
        lambda text: text.replace("  ", "  ./"),
    ],
)
def test_digests_are_read_as_other_tools_write_them(folder, rewrite):
    place = folder / "lowrank.sha256"
    place.write_bytes(rewrite(place.read_text()).encode())
    assert changed_files(folder) == []


def test_digests_that_are_none_are_named(folder):
    (folder / "lowrank.sha256").write_text("nothing")
    with pytest.raises(ValueError, match=r"lowrank\.sha256 .*restore or delete"):
        check_files(folder)
