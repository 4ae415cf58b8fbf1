"""Stores on disk: resumed, refused, read in part, and never half written."""

from __future__ import annotations

import errno
import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from lowrank_pl.factors.decomposition import decompose
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.utils import files
from lowrank_pl.utils.files import cache_root
from lowrank_pl.utils.tensor_store import TensorStore, read_manifest, tensor_digest
from tests.helpers.fork_server import OURS


@pytest.fixture
def factors():
    return decompose(torch.randn(7, 10, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def store(tmp_path, factors):
    store = FactorStore({"model": "a", "damping": 1e-6}, tmp_path / "store")
    store.add("block.0.q", factors, notes={"square_root": "eigen"})
    return store


def test_resume_goes_on_where_work_stopped(store, factors):
    again = FactorStore({"damping": 1e-6, "model": "a"}, store.directory)
    names = ["block.1.q", "block.0.q", "block.0.v"]
    assert again.missing(names) == ["block.1.q", "block.0.v"]
    assert "block.0.q" in again
    assert 5 not in again
    again.add("block.0.v", factors)
    assert store.missing(names) == ["block.1.q"]


def test_default_folder_is_named_by_the_fingerprint():
    one, two = FactorStore({"model": "a"}), FactorStore({"model": "b"})
    assert one.directory != two.directory
    assert one.directory.parent == two.directory.parent == cache_root() / "factors"
    assert FactorStore({"model": "a"}).directory == one.directory
    assert TensorStore("statistics", {"model": "a"}).digest != one.digest


def test_existing_store_needs_no_fingerprint(store):
    found = FactorStore.existing(store.directory)
    assert (found.fingerprint, found.digest) == (store.fingerprint, store.digest)
    with pytest.raises(ValueError, match=r"nowhere: .*manifest\.json"):
        FactorStore.existing(store.directory / "nowhere")
    with pytest.raises(ValueError, match=r"manifest\.json: expected a folder"):
        FactorStore.existing(store.directory / "manifest.json")


def test_store_of_something_else_is_refused_with_what_differs(store):
    message = rf"{re.escape(str(store.directory))}.* model is 'a' there and 'b' here; text is None .* another folder"
    with pytest.raises(ValueError, match=message):
        FactorStore({"model": "b", "text": "t", "damping": 1e-6}, store.directory)
    with pytest.raises(ValueError, match=r"factors store: expected a statistics store"):
        TensorStore("statistics", {"model": "a"}, store.directory)
    assert FactorStore.existing(store.directory).fingerprint["model"] == "a"


def test_folders_of_other_things_are_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.* name an empty or new folder"):
        FactorStore({}, tmp_path)
    with pytest.raises(ValueError, match=r"note\.txt.* name an empty or new folder"):
        FactorStore({}, tmp_path / "note.txt")
    (tmp_path / "empty").mkdir()
    assert FactorStore({}, tmp_path / "empty").missing(["a"]) == ["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", r"manifest\.json.* delete the folder .*"),
        (b"[]", r"manifest\.json.* delete the folder"),
        (b'{"schema": 1}', r"manifest\.json.*'digest'.* delete the folder"),
        (b"\xff\xff", r"manifest\.json.* delete the folder"),
        (b'{"schema": 9}', r"manifest\.json has schema 9: .* 1"),
    ],
)
def test_damaged_manifest(store, text, message):
    (store.directory / "manifest.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        FactorStore({"model": "a", "damping": 1e-6}, store.directory)
    with pytest.raises(ValueError, match=message):
        read_manifest(store.directory)


def test_manifest_says_what_the_store_was_made_from(store):
    data = json.loads((store.directory / "manifest.json").read_text())
    assert data["fingerprint"] == {"model": "a", "damping": 1e-6}
    assert (data["schema"], data["kind"], data["digest"]) == (1, "factors", store.digest)


def test_partial_reads_equal_full_reads(store, factors):
    whole = store.factors("block.0.q")
    torch.testing.assert_close(whole.left, factors.left.float(), rtol=0, atol=0)
    torch.testing.assert_close(whole.right, factors.right.float(), rtol=0, atol=0)
    assert torch.equal(store.sigma("block.0.q"), factors.sigma)
    for rank in (1, 3, 7):
        part = store.factors("block.0.q", rank)
        assert torch.equal(part.left, whole.left[:, :rank])
        assert torch.equal(part.right, whole.right[:rank])
        assert torch.equal(part.sigma, whole.sigma[:rank])
        assert part.left.is_contiguous()
        assert part.right.is_contiguous()
    for rows in (slice(2, 5), slice(5, 99), slice(7, 7)):
        part = store.factors("block.0.q", rows)
        assert torch.equal(part.left, whole.left[:, rows])
        assert torch.equal(part.right, whole.right[rows])
        assert torch.equal(part.sigma, whole.sigma[rows])
    picked = store.factors("block.0.q", torch.tensor([1, 2, 6]))
    assert torch.equal(picked.left, whole.left[:, [1, 2, 6]])
    assert torch.equal(picked.right, whole.right[[1, 2, 6]])
    assert store.notes("block.0.q") == {"square_root": "eigen"}


def test_absent_and_damaged_files_are_named_with_the_cure(store):
    absent = r"block\.9: build it again"
    for read in (store.sigma, store.factors, store.notes):
        with pytest.raises(ValueError, match=absent):
            read("block.9")
    path = store.path("block.0.q")
    data = path.read_bytes()
    for damaged in (data[:-10], data[:30], b"", b"not safetensors at all"):
        path.write_bytes(damaged)
        message = r"block\.0\.q\.safetensors is damaged .* delete it and run again"
        for read in (store.sigma, store.factors, store.notes):
            with pytest.raises(ValueError, match=message):
                read("block.0.q")
    path.unlink()
    assert store.missing(["block.0.q"]) == ["block.0.q"]


@pytest.mark.parametrize("where", [0.5, 0.999])
def test_a_flipped_bit_is_found(store, where):
    path = store.path("block.0.q")
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 16
    path.write_bytes(data)
    message = r"block\.0\.q\.safetensors is damaged .*checksum.* delete it and run again"
    with pytest.raises(ValueError, match=message):
        FactorStore.existing(store.directory).factors("block.0.q")


@pytest.mark.parametrize("read", [FactorStore.sigma, FactorStore.factors, FactorStore.notes])
def test_a_file_of_another_store_is_refused(store, factors, tmp_path, read):
    other = FactorStore({"model": "b", "damping": 1e-6}, tmp_path / "other")
    other.add("block.0.q", factors)
    store.path("block.0.q").write_bytes(other.path("block.0.q").read_bytes())
    with pytest.raises(ValueError, match=r"block\.0\.q\.safetensors is damaged .*for the store .* delete it and run"):
        read(store, "block.0.q")


def test_a_flipped_bit_in_the_header_is_found(store):
    path = store.path("block.0.q")
    data = path.read_bytes()
    assert data.count(b"eigen") == 1
    path.write_bytes(data.replace(b"eigen", b"digen"))
    with pytest.raises(ValueError, match=r"damaged .*digest.* delete it"):
        FactorStore.existing(store.directory).notes("block.0.q")


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_the_note_of_seconds_is_found(store, factors, bit):
    store.add("block.0.q", factors, notes={"seconds": "7"})
    path = store.path("block.0.q")
    data = bytearray(path.read_bytes())
    data[data.index(b'"seconds":"7"') + 11] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged .* delete it"):
        FactorStore.existing(store.directory).seconds(["block.0.q"])


@pytest.mark.parametrize("former", ["sha256_of_sigma", "sha256_of_sigma_and_notes"])
def test_files_of_earlier_versions_are_read_and_checked_as_a_whole(store, factors, former):
    tensors = {"left": factors.left.float(), "right": factors.right.float(), "sigma": factors.sigma.double()}
    store.write("block.0.q", tensors, notes={"seconds": "7", former: "of an earlier version"})
    assert store.notes("block.0.q") == {"seconds": "7"}
    path = store.path("block.0.q")
    path.write_bytes(path.read_bytes().replace(b'"seconds":"7"', b'"seconds":"6"'))
    with pytest.raises(ValueError, match=r"damaged .*checksum.* delete it"):
        FactorStore.existing(store.directory).notes("block.0.q")


def test_a_flipped_bit_in_a_spectrum_is_found(store):
    path = store.path("block.0.q")
    data = bytearray(path.read_bytes())
    with safe_open(path, framework="pt") as file:
        place = data.index(file.get_tensor("sigma").numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged .*singular values.* delete it"):
        store.sigma("block.0.q")


def test_singular_values_and_notes_are_read_without_the_factors(store, factors):
    path = store.path("block.0.q")
    data = bytearray(path.read_bytes())
    with safe_open(path, framework="pt") as file:
        data[data.index(file.get_tensor("left").numpy().tobytes())] ^= 1
    path.write_bytes(data)
    again = FactorStore.existing(store.directory)
    assert torch.equal(again.sigma("block.0.q"), factors.sigma)
    assert again.notes("block.0.q")["square_root"] == "eigen"
    with pytest.raises(ValueError, match=r"damaged .*checksum.* delete it"):
        again.factors("block.0.q")


def test_a_changed_fingerprint_is_found(store):
    place = store.directory / "manifest.json"
    place.write_text(place.read_text().replace('"a"', '"b"'))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*digest.* delete the folder"):
        FactorStore.existing(store.directory)


@pytest.mark.parametrize("name", ["../block.0.q", "/tmp/x", "a/b"])
def test_names_that_lead_out_of_the_folder_are_refused(store, name):
    with pytest.raises(ValueError, match="expected a module's name"):
        store.factors(name)


CLAIM = """
import sys, time
from pathlib import Path
from lowrank_pl.factors.store import FactorStore
with FactorStore.existing(sys.argv[1]).locked():
    Path(sys.argv[2]).touch()
    time.sleep(600)
"""


def test_a_store_that_another_run_fills_is_waited_for_and_a_killed_one_gives_it_back(store, caplog, tmp_path):
    words = [sys.executable, "-c", CLAIM, str(store.directory), str(tmp_path / "claimed")]
    other = OURS.start(words, output=tmp_path)
    while not (tmp_path / "claimed").exists():
        assert other.poll() is None
        time.sleep(0.01)
    entered = threading.Event()

    def claim():
        with store.locked():
            entered.set()

    waiting = threading.Thread(target=claim)
    waiting.start()
    assert not entered.wait(0.5)
    assert "another run is filling the factors store at" in caplog.text
    other.kill()
    other.wait()
    assert entered.wait(20)
    waiting.join()


def test_a_file_without_a_checksum_is_read(store, factors):
    path = store.path("block.0.q")
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    path.write_bytes(save(tensors, metadata={"digest": store.digest, "square_root": "eigen"}))
    assert torch.equal(FactorStore.existing(store.directory).sigma("block.0.q"), factors.sigma)


def test_a_store_is_swept_once_when_it_is_filled(store, factors, monkeypatch):
    left = store.directory / ".block.9.q.safetensors.abcd_123.tmp"
    for path in (left, Path(f"{left}.lock")):
        path.touch()
    swept = []
    monkeypatch.setattr(
        files, "_sweep", lambda *given, sweep=files._sweep, **named: swept.append(sweep(*given, **named))
    )
    with store.filling(["block.1.q", "block.2.q"]) as missing:
        assert not left.exists()
        for name in missing:
            store.add(name, factors)
    assert swept == [None]
    store.add("block.3.q", factors)
    assert len(swept) == 2


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_nothing_of_the_module(store, factors, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(path.name for path in store.directory.iterdir())
    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match="No space left on device"):
        store.add("block.1.q", factors)
    monkeypatch.undo()
    assert sorted(path.name for path in store.directory.iterdir()) == before
    assert store.missing(["block.1.q"]) == ["block.1.q"]
    store.add("block.1.q", factors)
    assert torch.equal(store.sigma("block.1.q"), factors.sigma)


def test_full_disk_at_the_manifest_leaves_a_folder_that_the_next_run_takes(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        FactorStore({"a": 1}, tmp_path / "store")
    monkeypatch.undo()
    assert FactorStore({"a": 1}, tmp_path / "store").missing(["x"]) == ["x"]


def test_tensors_are_stored_from_any_layout_and_type(tmp_path):
    store = TensorStore("demo", {}, tmp_path / "s")
    strided = torch.arange(12.0).view(3, 4).T
    store.write("x", {"a": strided, "b": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)})
    assert torch.equal(store.read("x", "a"), strided)
    assert torch.equal(store.read("x", "a", rows=2), strided[:2])
    assert torch.equal(store.read("x", "a", columns=2), strided[:, :2])
    assert store.read("x", "b").dtype == torch.bfloat16
    assert store.notes("x") == {}


def test_digest_sees_name_type_shape_and_value():
    base = torch.arange(6.0)
    variants = [
        [("a", base)],
        [("b", base)],
        [("a", base.view(2, 3))],
        [("a", base.view(torch.int32))],
        [("a", base + 1e-6)],
        [("a", base.bfloat16())],
        [("a", base), ("b", torch.empty(0))],
        [("a", base[:3]), ("a", base[3:])],
    ]
    assert len({tensor_digest(variant) for variant in variants}) == len(variants)
    assert tensor_digest([("a", base.view(3, 2).T)]) == tensor_digest([("a", base.view(3, 2).T.contiguous())])
    assert tensor_digest([("a", torch.tensor(2.0))]) != tensor_digest([("a", torch.tensor([2.0]))])
