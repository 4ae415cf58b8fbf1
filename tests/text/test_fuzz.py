"""Generated rows, files and names: each is text, or a ``ValueError`` that names it."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from lowrank_pl.models.tiny import byte_tokenizer
from lowrank_pl.text import files
from lowrank_pl.text.records import FIELDS, ROLES
from lowrank_pl.text.sources import parse_text, read_stream
from tests.helpers.fuzzing import counted

pytestmark = pytest.mark.fuzz

# Half of a pair of surrogates is a letter too, in JSON.
LETTERS = st.text(st.characters(exclude_categories=()), max_size=5)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | LETTERS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3), max_leaves=6
)
PART = st.fixed_dictionaries({}, optional={"type": st.sampled_from(["text", "image_url"]) | VALUES, "text": VALUES})
CONTENT = LETTERS | st.lists(PART | LETTERS, max_size=3) | VALUES
ROLE = st.sampled_from([*ROLES, "USER", "Critic"]) | VALUES
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": ROLE, "from": ROLE, "content": CONTENT, "value": CONTENT, "tool_calls": VALUES}
)
TURN = st.fixed_dictionaries({"role": st.sampled_from([*ROLES]), "content": LETTERS | st.lists(PART, max_size=2)})
CHAT = st.lists(TURN, max_size=4) | st.lists(MESSAGE | VALUES, max_size=3)
ROW = st.dictionaries(st.sampled_from(FIELDS), CHAT | LETTERS | VALUES, min_size=1, max_size=2) | VALUES

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def read(path):
    """Return the text of a file; every piece is text that a tokenizer takes."""
    text = "".join(read_stream(str(path), tokenizer=TOKENIZER))
    text.encode()
    return text


@given(row=ROW)
def test_rows(folder, row):
    path = folder / "rows.jsonl"
    path.write_text('{"text": "first"}\n' + json.dumps(row))
    with counted("rows", f"{path}:2"):
        assert read(path).startswith("first")


@given(row=ROW)
def test_rows_of_tables(folder, row):
    path = folder / "rows.arrow"
    try:
        table = pyarrow.Table.from_pylist([{"text": "first", "messages": None}, row])
    except (pyarrow.ArrowException, TypeError, AttributeError, UnicodeError, OverflowError):
        return  # No column has such values.
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    with counted("rows of tables", f"{path}"):
        assert read(path).startswith("first")


def sample_files():
    """Return a small valid file of every kind, by suffix."""
    rows = [{"text": "one \u00e9"}, {"text": ""}, {"messages": [{"role": "user", "content": "Hi"}]}]
    lines = "\n".join(map(json.dumps, rows)).encode()
    table = pyarrow.Table.from_pylist(rows[:2])
    sink, columns = pyarrow.BufferOutputStream(), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    parquet.write_table(table, columns)
    packed = pyarrow.compress(lines, "zstd", asbytes=True)
    return {
        ".txt": "\ufeffone \u00e9\r\ntwo".encode(), ".jsonl": lines, ".json": json.dumps(rows, indent=1).encode(),
        ".jsonl.gz": gzip.compress(lines, mtime=0), ".jsonl.zst": packed, ".arrow": sink.getvalue().to_pybytes(),
        ".parquet": columns.getvalue().to_pybytes(),
    }  # fmt: skip


SAMPLES = sample_files()
CHANGE = st.tuples(st.integers(0, 2000), st.integers(0, 20), st.binary(max_size=8))


@given(suffix=st.sampled_from([*SAMPLES]), changes=st.lists(CHANGE, max_size=3), content=st.none() | st.binary())
def test_bytes(folder, suffix, changes, content):
    path = folder / f"bytes{suffix}"
    data = SAMPLES[suffix] if content is None else content
    for place, length, new in changes:
        place %= len(data) + 1
        data = data[:place] + new + data[place + length :]
    path.write_bytes(data)
    with counted(f"bytes of {suffix}", str(path)):
        read(path)


FRAGMENTS = [
    *"{}[]:,1- \n\ufeff\u2028",
    '"text"',
    "null",
    '"a',
    "\r\n",
    "9" * 5000,
    '{"text": "x"}',
    '{\n"text": "x"\n}\n',
]


@given(parts=st.lists(st.sampled_from(FRAGMENTS)))
def test_pieces_of_json(folder, parts):
    path = folder / "pieces.json"
    path.write_bytes("".join(parts).encode())
    with counted("pieces of JSON", f"{path}:"):
        read(path)


@given(rows=st.lists(st.dictionaries(LETTERS, VALUES, min_size=1), min_size=1, max_size=4), layout=st.integers(0, 2))
def test_rows_come_back_from_any_layout(folder, rows, layout):
    path = folder / "layout.json"
    values, indent = [rows] if layout == 2 else rows, [None, 1, "\t"][layout]
    path.write_text("\n".join(json.dumps(value, indent=indent) for value in values))
    found = [row for _, row in files._rows(path)]
    assert json.dumps(found) == json.dumps(rows)


OPTION = st.sampled_from(["part=0%-50%", "limit=1", "split=x", "field", "="]) | LETTERS


@pytest.fixture(scope="module")
def _in_folder(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.mark.usefixtures("_in_folder")
@given(
    start=st.sampled_from(["python-docs", "hub:", "a/b", "a.txt", "*", ""]) | LETTERS,
    end=LETTERS,
    options=st.just("") | st.lists(OPTION).map(lambda options: "::" + ",".join(options)),
)
def test_names(start, end, options):
    text = start + end + options
    if text.startswith(("/", "~")) or ".." in text:
        return  # A real folder, which may be large.
    with counted("names", repr(text)):
        parse_text(text)
