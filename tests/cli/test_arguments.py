"""Lists and flags of ``lowrank fit`` as people write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from lowrank_pl.cli.arguments import fit_words
from tests.helpers import ROOT


@dataclass
class Group:
    names: Sequence[str] = ("x",)
    sizes: tuple[float, ...] = ()


class Made:
    def __init__(
        self, names: Sequence[str] = (), ranks: list[int] | None = None, group: Group | None = None, most: int = 1
    ) -> None: ...


def words(text):
    return fit_words(text.split(), {"run": Made})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--run.names a b", ['--run.names=["a", "b"]']),
        ("--run.names a", ['--run.names=["a"]']),
        ("--run.names=a", ['--run.names=["a"]']),
        ("--run.names", ["--run.names=[]"]),
        ("--run.names [a,b]", ["--run.names=[a,b]"]),
        ("--run.names [a, b]", ["--run.names=[a, b]"]),
        ("--run.ranks null", ["--run.ranks=null"]),
        ("--run.ranks 3 4 --run.most 2", ["--run.ranks=[3,4]", "--run.most", "2"]),
        ("--run.names *.q 1 null", ['--run.names=["*.q", "1", "null"]']),
        ("--run.names a --run.most 2 --run.names b", ["--run.most", "2", '--run.names=["a", "b"]']),
        ("--run.group.names a b", ['--run.group.names=["a", "b"]']),
        ("--run.group.sizes 0.5 -1", ["--run.group.sizes=[0.5,-1]"]),
        ("--seed-everything 1 --un-known.some-flag x-y", ["--seed_everything", "1", "--un_known.some_flag", "x-y"]),
        ("--model.base x", ["--model.base.name", "x"]),
        ("--model.base=x --model.base.name y", ["--model.base.name=x", "--model.base.name", "y"]),
        ("-h --print_config", ["-h", "--print_config"]),
        ("--run dry_run --dry-run", ["--run", "dry_run", "--dry_run=true"]),
    ],
)
def test_lists_and_flags(given, expected):
    assert words(given) == expected


def test_texts_stay_what_they_are():
    assert fit_words(["--run.names", "a: b", "c, d"], {"run": Made}) == ['--run.names=["a: b", "c, d"]']


@pytest.mark.parametrize("again", ["--run.names [a]", "--run.names null", "--run.names=[a, b]"])
def test_a_whole_list_does_not_come_twice(again):
    for given in (f"--run.names x {again}", f"{again} --run.names x"):
        with pytest.raises(ValueError, match=r"--run\.names .* after one --run\.names"):
            words(given)


@pytest.mark.parametrize("given", ["-c smoke", "-c=smoke", "--config smoke", "--config=smoke", "-c smoke.yaml"])
def test_shipped_files_are_found_by_name(given, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert words(given) == [f"--config={ROOT / 'configs' / 'smoke.yaml'}"]


def test_a_file_here_wins_over_a_shipped_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").write_text("")
    assert words("-c smoke") == ["--config=smoke"]
