"""Lists and flags as people write them on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import pytest
from jsonargparse import auto_cli

from lowrank_pl.cli.arguments import readable_words


def command(
    plan: Path,
    *,
    keep: Sequence[float] | None = None,
    keep_curve: Optional[list[float]] = None,  # noqa: UP045
    names: Sequence[str] = ("x",),
    ranks: list[int] = [],  # noqa: B006
    text: str | Sequence[str] = "t",
    settings: dict[str, float] | None = None,
    dry_run: bool = False,
) -> dict[str, object]:
    """Give back what arrived."""
    return dict(locals())


def read(*words):
    got = auto_cli(
        {"command": command}, as_positional=False, args=["command", "--plan", "p", *readable_words(words, command)],
        parser_mode="yaml", exit_on_error=False,
    )  # fmt: skip
    return {name: value for name, value in got.items() if name != "plan"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--keep 0.9 0.8", {"keep": [0.9, 0.8]}),
        ("--keep 0.9", {"keep": [0.9]}),
        ("--keep=0.9", {"keep": [0.9]}),
        ("--keep=0.9,0.8", {"keep": [0.9, 0.8]}),
        ("--keep 0.9, 0.8", {"keep": [0.9, 0.8]}),
        ("--keep [0.9,0.8]", {"keep": [0.9, 0.8]}),
        ("--keep [0.9, 0.8]", {"keep": [0.9, 0.8]}),
        ("--keep=[0.9,0.8]", {"keep": [0.9, 0.8]}),
        ("--keep -0.5 1e-1", {"keep": [-0.5, 0.1]}),
        ("--keep", {"keep": []}),
        ("--keep null", {"keep": None}),
        ("--keep+ 0.9 --keep+=0.8", {"keep": [0.9, 0.8]}),
        ("--keep 0.9 --keep 0.8", {"keep": [0.9, 0.8]}),
        ("--keep 0.9 --dry-run true --keep=0.8,0.7 --keep 0.6", {"keep": [0.9, 0.8, 0.7, 0.6], "dry_run": True}),
        ("--keep_curve 1.0 --keep-curve 0.5", {"keep_curve": [1.0, 0.5]}),
        ("--names a --names b --text one --text two", {"names": ["a", "b"], "text": ["one", "two"]}),
        ("--keep_curve 1.0 0.5", {"keep_curve": [1.0, 0.5]}),
        ("--keep-curve --keep 0.5", {"keep_curve": [], "keep": [0.5]}),
        ("--keep-curve=[0.5]", {"keep_curve": [0.5]}),
        ("--names a b --ranks 3 4", {"names": ["a", "b"], "ranks": [3, 4]}),
        ("--names *.q_proj 1 null", {"names": ["*.q_proj", "1", "null"]}),
        ("--text one", {"text": "one"}),
        ("--text one two", {"text": ["one", "two"]}),
        ("--dry-run true --settings.a 3", {"dry_run": True, "settings": {"a": 3.0}}),
    ],
)
def test_lists_and_flags(words, expected):
    got = read(*words.split())
    assert {name: got[name] for name in expected} == expected
    untouched = {name: value for name, value in read().items() if name not in expected}
    assert {name: got[name] for name in untouched} == untouched


def test_texts_stay_what_they_are():
    assert read("--names", "a: b", "c, d", '"q"', "- e")["names"] == ["a: b", "c, d", '"q"', "- e"]


def test_other_words_stay():
    words = ["--plan", "a-b", "--un-known", "1", "-h", "--plan=x-y"]
    assert readable_words(words, command) == words
    assert readable_words([], command) == []


@pytest.mark.parametrize("again", ["--keep [0.8]", "--keep null", "--keep=[0.8, 0.7]"])
def test_a_whole_list_does_not_come_twice(again):
    for words in (f"--keep 0.9 {again}", f"{again} --keep 0.9"):
        with pytest.raises(ValueError, match=r"--keep was given several times, of which one is a whole list: name all"):
            readable_words(words.split(), command)


def test_c_is_config():
    assert readable_words(["-c", "x.yaml", "--keep", "1", "-c=y.yaml"], command) == [
        "--config", "x.yaml", "--keep=[1]", "--config=y.yaml",
    ]  # fmt: skip
    assert readable_words(["-cx", "--text", "a-c", "--plan", "-c.txt"], command) == [
        "-cx", "--text=a-c", "--plan", "-c.txt",
    ]  # fmt: skip


def test_lists_on_the_command_line_win_over_a_file_before_them(tmp_path):
    (tmp_path / "x.yaml").write_text("keep: [0.1]\nranks: [7]\n")
    got = read("--keep", "0.9", "-c", str(tmp_path / "x.yaml"), "--keep", "0.8")
    assert (got["keep"], got["ranks"]) == ([0.9, 0.8], [7])


def test_words_in_front_are_what_python_takes_by_position():
    assert readable_words(["x", "--keep", "1"], command) == ["--plan=x", "--keep=[1]"]
    assert readable_words(["x"], command) == ["--plan=x"]
    assert readable_words(["x", "y", "-h"], command) == ["--plan=x", "y", "-h"]
    assert readable_words(["-c", "x.yaml"], command) == ["--config", "x.yaml"]
