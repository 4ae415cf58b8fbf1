"""Text sources: every kind of source, parts and limits, and the errors for bad names and bad files."""

from __future__ import annotations

import gzip
import json

import pytest

from lowrank_pl.models.tiny import byte_tokenizer
from lowrank_pl.text import files as text_files
from lowrank_pl.text.sources import parse_text, read_stream, source_identity
from tests.helpers.novel import LINES


def documents(text, tokenizer=None):
    """Return the documents of ``text``, none of which is long enough to come in chunks."""
    return [piece.removeprefix("\n\n") for piece in read_stream(text, tokenizer=tokenizer)]


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "no/such/file.txt",
            r"no/such/file.txt .*file, folder or glob.* OWNER/NAME",
        ),
        ("nowhere", "give a path, .* or python-docs"),
        ("", "file, folder or glob"),
        ("x" * 300, "file, folder or glob"),
        ("x" * 5000, "file, folder or glob"),
        ("python-docs::halves=2", "'halves'; python-docs take part, limit"),
        ("python-docs::field=a", "unknown option 'field'"),
        ("hub:a/b::color=red", "'color'; hub datasets take field, config, split, revision, limit"),
        ("python-docs::part", "expected key=value .* 'part'"),
        ("python-docs::", "expected key=value"),
        ("python-docs::part=0%-9%::limit=1", "take ::part=0%-9%,limit=1"),
        ("python-docs::limit=1,limit=2", "once for each key"),
        ("python-docs::limit=0", "limit=0 .* documents, expected 1 or more"),
        ("python-docs::limit=many", "limit=many"),
        ("python-docs::every=0", "every=0 .* sequences, expected 1 or more"),
        ("python-docs::part=50%-20%", "part=50%-20% .* expected A%-B%"),
        ("python-docs::part=50", "0 <= A < B <= 100"),
        ("python-docs::part=0%-101%", "part=0%-101% .* expected A%-B%"),
        ("a/b::part=0%-50%", "split=, .* limit=N"),
    ],
)
def test_bad_names_say_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_text(text)


def test_endings_that_are_not_read_are_named(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=r"'.csv' .* expected .txt, .md, .jsonl, .json, .parquet"):
        parse_text(str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match=r"expected .txt, .md"):
        parse_text(str(tmp_path))
    (tmp_path / "b.txt").write_text("b")
    caplog.set_level("INFO")
    assert documents(str(tmp_path)) == documents(str(tmp_path)) == ["b"]
    assert [line.partition(": ")[2] for line in caplog.messages] == [
        "1 of 2 files are read, of no named split; left out: 1 with another suffix"
    ]


def test_names_of_the_same_file_are_equal(novel, monkeypatch):
    monkeypatch.chdir(novel.parent)
    assert parse_text("novel.txt") == parse_text(str(novel)) != parse_text("novel.txt::limit=1")


# -- sources ------------------------------------------------------------------------------------------------------


def test_halves_of_the_docs_are_balanced_and_share_no_paragraph():
    halves = [documents(f"python-docs::part={part}") for part in ("0%-50%", "50%-100%")]
    assert sorted(halves[0] + halves[1]) == sorted(documents("python-docs"))
    sizes = [sum(map(len, half)) for half in halves]
    assert 0.8 < sizes[0] / sizes[1] < 1.25
    first, second = (
        {" ".join(p.split()) for document in half for p in document.split("\n\n") if len(p) > 80} for half in halves
    )
    assert not first & second


def test_limit_takes_the_first_documents():
    assert documents("python-docs::limit=3") == documents("python-docs")[:3]


def test_text_files_come_in_chunks_that_join_to_the_whole(novel, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK", 500)
    pieces = list(read_stream(str(novel)))
    assert len(pieces) > 10
    assert all(piece.endswith("\n") for piece in pieces)
    assert "".join(pieces) == LINES


def test_parts_of_a_text_file_are_whole_lines_and_complete(novel):
    parts = ["".join(read_stream(f"{novel}::part={part}")) for part in ("0%-33.3%", "33.3%-70%", "70%-100%")]
    assert "".join(parts) == LINES
    assert all(part.endswith("\n") for part in parts)
    assert abs(len(parts[0]) / len(LINES) - 0.333) < 0.01


def test_folders_and_globs_are_read_in_order_and_compressed_files_too(tmp_path):
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("\ufefffirst", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("never")
    (tmp_path / "sub").mkdir()
    with gzip.open(tmp_path / "sub" / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "third"}\n\n{"text": null}\n"fifth"\n')
    expected = ["first", "second", "third", "", "fifth"]
    assert documents(str(tmp_path)) == expected
    assert documents(f"{tmp_path}/**/[!.]*.*") == expected
    assert documents(f"{tmp_path}/?.txt") == ["first"]
    assert documents(f"{tmp_path}::part=0%-40%") == expected[:2]
    assert documents(f"{tmp_path}::part=40%-100%,limit=2") == expected[2:4]
    assert "".join(read_stream(str(tmp_path))) == "\n\n".join(expected)


def test_a_field_may_have_two_colons_in_its_name():
    assert parse_text("hub:a/b::field=body::text,limit=3").field == "body::text"


def test_plain_text_has_no_fields(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="field=text was given, but plain text has no fields"):
        parse_text(f"{tmp_path}::field=text")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}')
    assert parse_text(f"{tmp_path}::field=text").field == "text"


def test_json_arrays_and_parquet(tmp_path):
    import datasets

    rows = [{"id": n, "body": f"row {n}"} for n in range(600)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.parquet"):
        assert documents(f"{tmp_path / name}::field=body") == [row["body"] for row in rows]
        assert documents(f"{tmp_path / name}::part=99%-100%")[0] == "row 594"


@pytest.fixture
def chats(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_chats_go_through_the_chat_template(chats):
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    assert documents(str(chats), byte_tokenizer()) == [expected, expected]


def test_a_chat_needs_a_chat_template(chats):
    with pytest.raises(ValueError, match=r"chat.jsonl:1: .* no chat template: .*::field=NAME"):
        documents(str(chats))


def test_a_chat_that_the_template_rejects(chats):
    strict = byte_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"chat.jsonl:1: .*: roles must alternate"):
        documents(str(chats), strict)


def test_a_chat_message_needs_role_and_content(chats):
    chats.write_text('{"messages": [{"who": "me"}]}')
    with pytest.raises(ValueError, match="who, expected role and content"):
        documents(str(chats), byte_tokenizer())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', r"a.jsonl:2: not valid JSON: Expecting value at column"),
        (
            "a.json",
            b'[{"text": "fine"},\n{"text" 1}]',
            r"a.json:2: not valid JSON: Expecting ':' delimiter at column 9",
        ),
        (
            "a.jsonl",
            b'{"id": 1, "title": "x"}',
            r"a.jsonl:1: .*none of the fields text, .* id, title: .*::field=NAME",
        ),
        (
            "a.jsonl",
            b'{"text": [1, 2]}',
            r"a.jsonl:1: .*'text' holds list, expected text or a list of chat messages",
        ),
        ("a.jsonl", b"17", "int, expected an object"),
        ("a.txt", b"fine\nline two \xff\xfe", r"a.txt is not UTF-8 text: byte 14, in line 2, is 0xff"),
        ("a.txt", "fine\nhé".encode()[:-1], r"a.txt is not UTF-8 text: byte 6, in line 2, is 0xc3"),
        ("a.jsonl", b'{"text": "\xff"}', "byte 10, in line 1, is 0xff"),
        ("a.txt.gz", b"this is not gzip", "a.txt.gz can't be read: BadGzipFile"),
        ("a.txt.gz", gzip.compress(LINES.encode(), mtime=0)[:-40], "a.txt.gz can't be read: EOFError"),
        ("a.txt.gz", gzip.compress(b"\xff", mtime=0)[:-8] + bytes(8), "a.txt.gz can't be read: BadGzipFile: CRC"),
        ("a.parquet", b"this is not parquet", "a.parquet can't be read: ArrowInvalid"),
    ],
)
def test_bad_files_name_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents(str(tmp_path / name))


def test_undecodable_byte_is_found_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK", 7)
    path = tmp_path / "a.txt"
    path.write_bytes("ab\ncdé\nfé".encode() + b"\xc3(")
    with pytest.raises(ValueError, match="byte 11, in line 3, is 0xc3"):
        documents(str(path))


def test_the_first_field_that_holds_something_is_taken(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    rows = [{"text": None, "messages": chat}, {"text": "x", "messages": None}, {"text": "", "content": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = documents(str(tmp_path / "a.jsonl"), byte_tokenizer())
    assert found == ["<|im_start|>user\nHi<|im_end|>\n", "x", ""]


def test_documents_without_text_are_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"messages": []}\n{"text": "x"}\n')
    assert documents(str(tmp_path / "a.jsonl")) == ["", "", "x"]
    assert "2 of 3 documents that were read have no text" in caplog.text


def test_lone_surrogates_are_replaced_and_counted(tmp_path, caplog):
    chat = [{"role": "user", "content": "\ud83d!"}]
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "a\ud83db\udc00 \U0001f600"}) + json.dumps({"messages": chat})
    )
    first, second = documents(str(tmp_path / "a.jsonl"), byte_tokenizer())
    assert first == "a\ufffdb\ufffd \U0001f600"
    assert "\ufffd!" in second
    assert "3 lone surrogates are replaced" in caplog.text


def test_missing_field_lists_the_fields(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "title": "y"}')
    with pytest.raises(ValueError, match=r"a.jsonl:1: .*'body', but text, title: .*::field=NAME"):
        documents(f"{tmp_path / 'a.jsonl'}::field=body")


# -- hub datasets -------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    (folder / "test.jsonl").write_text('{"text": "four"}\n')
    return folder


def test_hub_datasets_are_streamed(dataset):
    assert documents(f"hub:{dataset}") == ["one", "two", "three"]
    assert documents(f"hub:{dataset}::split=test,field=text") == ["four"]
    assert documents(f"hub:{dataset}::limit=2") == ["one", "two"]


@pytest.mark.parametrize("prefix", ["", "hub:"])
def test_saved_datasets_are_read(tmp_path, prefix):
    import datasets

    datasets.disable_progress_bars()
    parts = {"test": ["te"], "train": ["tr", "other"]}
    made = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": rows}) for name, rows in parts.items()})
    made.save_to_disk(tmp_path / "all")
    made["train"].save_to_disk(tmp_path / "one")
    datasets.load_from_disk(tmp_path / "one").map(lambda row: {"text": row["text"] * 2})  # leaves a cache there
    assert len(list((tmp_path / "one").glob("*.arrow"))) == 2
    for name in ("one", "all"):
        assert documents(f"{prefix}{tmp_path / name}") == ["tr", "other"]
    assert documents(f"{prefix}{tmp_path / 'all'}::split=test") == ["te"]


def test_hub_options_reach_datasets(monkeypatch):
    import datasets

    seen = []

    def load_dataset(*args, **kwargs):
        seen.append((args, kwargs))
        return iter([{"content": "text"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert documents("owner/name::config=c,split=s,revision=r") == ["text"]
    assert seen == [(("owner/name", "c"), {"split": "s", "revision": "r", "streaming": True})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("::split=nope", r"config default, split nope.*: Bad split: nope. Available.* split="),
        ("::config=nope", r"config nope, split train.*: BuilderConfig 'nope' not found.* config="),
        ("::field=nope", r"row 1: .*'nope', but text: .*::field=NAME"),
    ],
)
def test_bad_hub_options(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        documents(f"hub:{dataset}{options}")


def test_unreachable_hub_names_both_things_tried():
    expected = r"no file or folder \S+/owner/name, .* dataset 'owner/name' .* ConnectionError: .* download the data"
    with pytest.raises(ValueError, match=expected):
        documents("owner/name")


def test_identity_of_a_local_hub_folder_follows_its_files(dataset):
    before = source_identity(parse_text(f"hub:{dataset}"))
    assert before == source_identity(parse_text(f"hub:{dataset}"))
    (dataset / "train.jsonl").write_text('{"text": "other"}')
    assert before != source_identity(parse_text(f"hub:{dataset}"))


def test_the_documents_of_a_mixture_are_those_of_one_of_its_texts():
    with pytest.raises(ValueError, match=r"'python-docs \+ a.txt' is a mixture.*give one"):
        next(read_stream("python-docs + a.txt"))
