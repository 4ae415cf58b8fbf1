"""Files as people have them: JSON over several lines, Arrow, compressed; and the digest of their content."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from lowrank_pl.text import files
from lowrank_pl.text.files import content_digest, count_documents, file_documents


def rows_of(path):
    return [piece for document in file_documents([path], lambda row, where: str(row)) for piece in document()]


OBJECT = json.dumps({"text": "one"}, indent=1)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (OBJECT, 1),
        (OBJECT + "\n" + OBJECT, 2),
        (f"[{OBJECT},\n{OBJECT}]", 2),
        ('[\n"a", "b"]\n[\n"c"]', 3),
        (" " * 300 + '[{"text": "one"},\n{"text": "two"}]', 2),
        ('\ufeff{"a": 1}\r\n\r\n{"a": 2}\r\n\ufeff{"a": 3}', 3),
        ('{"a": 1}{"a": 2}\n{"a": 3}', 3),
        ("[]", 0),
        ("", 0),
    ],
)
def test_json_may_be_spread_over_lines_in_any_way(tmp_path, content, rows):
    path = tmp_path / "a.json"
    path.write_bytes(content.encode())
    assert len(rows_of(path)) == count_documents([path]) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n"a": 1,\n"b" 2}', r"a.json:3: not valid JSON: Expecting ':' delimiter at column 5"),
        ('{\n"a": 1}\n\n{"a"\n', r"a.json:4: .* at column 5"),
        ('{"a": 1}\n{\n', r"a.json:2: .* at column 2"),
        ('{"a": ' + "9" * 5000 + "}", r"a.json:1: the JSON can't be read: .*4300 digits"),
        ("1\n" + "[" * 100_000, r"a.json:2: the JSON can't be read: maximum recursion"),
    ],
)
def test_bad_json_names_the_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        rows_of(path)


def test_entries_of_lists_are_named_by_line_and_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n["b", "c"]')
    found = [document.args[2] for document in file_documents([path], lambda row, where: "")]
    assert found == [f"{path}:1", f"{path}:2 entry 1", f"{path}:2 entry 2"]


@pytest.mark.parametrize("name", ["a.txt.zst", "A.TXT.GZ"])
def test_compressed_text(tmp_path, name):
    import pyarrow

    text, path = "é\n" * 9, tmp_path / name
    if name.endswith("zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(text.encode())
    else:
        path.write_bytes(gzip.compress(text.encode()))
    assert rows_of(path) == [text]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{name} can't be read"):
        rows_of(path)


@pytest.mark.parametrize("form", ["new_stream", "new_file"])
def test_arrow_files_of_both_formats(tmp_path, form):
    import pyarrow

    path, table = tmp_path / "a.arrow", pyarrow.table({"text": ["one", "two"]})
    with getattr(pyarrow.ipc, form)(str(path), table.schema) as writer:
        writer.write_table(table)
    assert rows_of(path) == ["{'text': 'one'}", "{'text': 'two'}"]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a.arrow can't be read"):
        rows_of(path)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(files, "WHOLE", 40)
    monkeypatch.setattr(files, "BLOCK", 4)


@pytest.mark.parametrize("size", [0, 3, 40])
def test_every_byte_of_small_files_counts(tmp_path, small_blocks, size):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(size))
    before = {content_digest([path])}
    for place in range(size):
        path.write_bytes(bytes(place) + b"x" + bytes(size - place - 1))
        os.utime(path, ns=(0, 0))
        before.add(content_digest([path]))
    assert len(before) == size + 1


def test_of_large_files_head_tail_sample_and_time_count(tmp_path, small_blocks):
    path = tmp_path / "a.txt"

    def digest(place, time=0):
        content = bytearray(100)
        content[place] += 1
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        return content_digest([path])

    sampled = [place for place in range(100) if digest(place) != digest(5)]
    assert len(sampled) == 40
    assert {0, 3, 96, 99} <= {*sampled}
    assert digest(5, time=1) != digest(5)


def test_small_files_among_large_ones_count_whole(tmp_path, small_blocks):
    large, small = tmp_path / "a.txt", tmp_path / "b.txt"
    large.write_bytes(bytes(100))
    small.write_bytes(bytes(20))
    before = content_digest([large, small])
    small.write_bytes(bytes(10) + b"x" + bytes(9))
    assert content_digest([large, small]) != before


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone.txt can't be read: FileNotFoundError"):
        content_digest([tmp_path / "gone.txt"])
