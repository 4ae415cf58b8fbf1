"""Lists, flags and configuration files as people write them for every command but ``fit``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cyclopts
import pytest

from lowrank_pl.cli.config_files import ConfigFileError
from lowrank_pl.cli.parameters import FLAGS, Flat, Given, Settings, split_words
from lowrank_pl.models.settings import Base
from lowrank_pl.plans.constraints import Constraints


@dataclass(frozen=True)
class Nested:
    """A nested setting."""

    kind: str = "a"
    damping: float = 0.1
    on: bool = True


def command(
    base: Flat[Base],
    *,
    keep: Sequence[float] | None = None,
    keep_curve: Sequence[float] | None = None,
    text: Sequence[str] = (),
    constraints: Flat[Constraints] = Constraints(),
    nested: Nested | None = None,
    settings: Settings | None = None,
    output: Path | None = Path("o"),
    dry_run: bool = False,
):
    """Give back what arrived."""
    return dict(locals())


def read(*words):
    app = cyclopts.App(default_parameter=FLAGS, result_action="return_value")
    app.default(command)
    found, sources = split_words(["b", *words])
    app.config = [Given(sources)]
    return app(found, exit_on_error=False, print_error=False)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text, name="x.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--keep 0.9 0.8", {"keep": [0.9, 0.8]}),
        ("--keep 0.9", {"keep": [0.9]}),
        ("--keep=0.9", {"keep": [0.9]}),
        ("--keep -0.5 1e-1", {"keep": [-0.5, 0.1]}),
        ("--keep", {"keep": []}),
        ("--keep 0.9 --keep 0.8", {"keep": [0.9, 0.8]}),
        ("--keep 0.9 --dry-run true --keep=0.8 --keep 0.6", {"keep": [0.9, 0.8, 0.6], "dry_run": True}),
        ("--keep-curve 1.0 0.5 --keep 0.5", {"keep_curve": [1.0, 0.5], "keep": [0.5]}),
        ("--keep_curve --keep 0.5", {"keep_curve": [], "keep": [0.5]}),
        ("--text one", {"text": ["one"]}),
        ("--text one two --text three", {"text": ["one", "two", "three"]}),
        ("--text [qk]_proj {a}", {"text": ["[qk]_proj", "{a}"]}),
        ("--dtype bfloat16", {"base": Base("b", dtype="bfloat16")}),
        ("--trust-remote-code --dry_run", {"base": Base("b", trust_remote_code=True), "dry_run": True}),
        ("--dry_run false", {"dry_run": False}),
        ("--include *.q_proj *.k_proj --multiple-of 8", {"constraints": Constraints(["*.q_proj", "*.k_proj"], (), 8)}),
        ('--floors {"*.q":0.9}', {"constraints": Constraints(floors={"*.q": 0.9})}),
        ("--nested.kind b", {"nested": Nested("b")}),
        ('--nested {"kind":"b"} --nested.damping 2', {"nested": Nested("b", 2)}),
        ("--nested.on=false", {"nested": Nested(on=False)}),
        ("--nested.on false", {"nested": Nested(on=False)}),
        ("--settings.rounds 5 --settings.name x-y", {"settings": {"rounds": 5, "name": "x-y"}}),
        ("--settings.damping 1e-6 --settings.ratios [0.4,0.5]", {"settings": {"damping": 1e-6, "ratios": [0.4, 0.5]}}),
        ("--settings.my-text 5", {"settings": {"my-text": 5}}),
        ("--output p/q.json", {"output": Path("p/q.json")}),
        ("--output=~/q.json", {"output": Path.home() / "q.json"}),
        ("--text ~/q.txt", {"text": ["~/q.txt"]}),
    ],
)
def test_lists_and_flags(words, expected):
    got, untouched = read(*words.split()), read()
    assert got == {**untouched, **expected}


def test_texts_stay_what_they_are():
    assert read("--text", "a: b", "c, d", '"q"', "1", "null")["text"] == ["a: b", "c, d", '"q"', "1", "null"]


@pytest.mark.parametrize(
    "words", ["more", "--kep 1", "--keep many", "--dtype int8", "--nested.kin b", "--keep 0.9,0.8"]
)
def test_words_that_mean_nothing(words):
    with pytest.raises(cyclopts.CycloptsError, match=r"more|kep|many|int8|kin|0.9,0.8"):
        read(*words.split())


# -- configuration files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("keep: [0.9, 0.8]", {"keep": [0.9, 0.8]}),
        ("keep: 0.9", {"keep": [0.9]}),
        ("keep: null", {}),
        ("text: ['a: b', c]", {"text": ["a: b", "c"]}),
        ("output: null", {"output": None}),
        ("output: ~/q", {"output": Path.home() / "q"}),
        ("dtype: bfloat16", {"base": Base("b", dtype="bfloat16")}),
        ("floors: {a.0.*: 0.9, '*': 0.5}", {"constraints": Constraints(floors={"a.0.*": 0.9, "*": 0.5})}),
        ("nested: {kind: b, damping: 1.0e-6, 'on': false}", {"nested": Nested("b", 1e-6, False)}),
        ("settings: {r: [0.4], n: null, t: true}", {"settings": {"r": [0.4], "n": None, "t": True}}),
        ("settings: {a: 1e-6, b: 1.0e-6}", {"settings": {"a": 1e-6, "b": 1e-6}}),
        ("settings: {own: {mask: {class_path: a.B}}}", {"settings": {"own": {"mask": {"class_path": "a.B"}}}}),
        ("dry_run: true", {"dry_run": True}),
        ("", {}),
    ],
)
def test_values_of_a_file(yaml_file, text, expected):
    assert read("-c", yaml_file(text)) == {**read(), **expected}


def test_the_command_line_wins_over_a_file(yaml_file):
    path = yaml_file("keep: [0.1]\ndtype: bfloat16\nnested: {kind: b, damping: 2}\n")
    for words in (["-c", path, "--keep", "0.9", "--nested.kind", "c"], ["--keep=0.9", "--nested.kind=c", f"-c={path}"]):
        got = read(*words)
        assert (got["keep"], got["base"].dtype, got["nested"]) == ([0.9], "bfloat16", Nested("c", 2))


def test_later_files_win_over_earlier_ones(yaml_file):
    words = ["-c", yaml_file("keep: [0.1]\ntext: a\n"), "--config", yaml_file("keep: [0.2]\n", "y.yaml")]
    got = read(*words)
    assert (got["keep"], got["text"]) == ([0.2], ["a"])


def test_mappings_of_files_and_flags_are_merged(yaml_file):
    first, second = yaml_file("settings: {a: 1, b: [2], c: 3}"), yaml_file("settings: {b: 4}", "y.yaml")
    assert read("-c", first, "-c", second, "--settings.c", "5")["settings"] == {"a": 1, "b": 4, "c": 5}
    assert read("-c", first, "--settings", "{b: 4, d: [5]}")["settings"] == {"a": 1, "b": 4, "c": 3, "d": [5]}


@pytest.mark.parametrize("text", ["kep: 1", "nested: {kin: b}", "include_: a"])
def test_an_unknown_key_names_itself_and_the_file(yaml_file, text):
    with pytest.raises(cyclopts.CycloptsError, match=r"kep|kin|include_") as error:
        read("-c", yaml_file(text))
    assert "x.yaml" in str(error.value)


@pytest.mark.parametrize("text", ["- a", "a: [", "5"])
def test_a_file_without_settings_names_itself(yaml_file, text):
    with pytest.raises(ConfigFileError, match=r"x\.yaml"):
        read("-c", yaml_file(text))


@pytest.mark.parametrize("text", ["keep: {a: 1}", "dtype: {'': null}", "1: 2"])
def test_names_where_none_are_taken(yaml_file, text):
    with pytest.raises(cyclopts.CycloptsError, match=r"(--keep|--dtype|\[1\]).* (in|from) .*x\.yaml"):
        read("-c", yaml_file(text))


def test_names_in_a_mapping_are_texts():
    assert read("--settings", "{1: 2020-01-01}")["settings"] == {"1": "2020-01-01"}


def test_a_value_that_is_no_yaml():
    with pytest.raises(cyclopts.CycloptsError, match=r"--settings\.a"):
        read("--settings.a", "[1")


def test_a_file_must_follow_its_flag():
    with pytest.raises(cyclopts.CycloptsError, match="-c"):
        read("-c")
