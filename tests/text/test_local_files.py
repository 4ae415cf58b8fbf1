"""Which files of a folder or glob are read: by the given name, one split, no cards, no dotfiles."""

from __future__ import annotations

import pytest

from lowrank_pl.text.local_files import local_files


@pytest.fixture
def clone(tmp_path):
    """A clone of a dataset repository."""
    names = (
        ".git/HEAD.txt README.md LICENSE.txt config.json train.csv data/train-0.jsonl data/train-1.jsonl test/a.jsonl"
    )
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path


def names_of(folder, split=None):
    return [path.name for path in local_files(str(folder), str(folder), split)]


def test_of_a_clone_only_the_training_rows_are_read(clone, caplog):
    caplog.set_level("INFO")
    assert names_of(clone) == ["train-0.jsonl", "train-1.jsonl"]
    left = "1 hidden, 1 of test, 1 with another suffix, 3 cards, licences or metadata"
    assert {*left.split(", ")} == {*caplog.messages[0].partition("left out: ")[2].split(", ")}, caplog.messages
    assert "2 of 8 files are read, of train" in caplog.text


def test_another_split_is_named(clone):
    assert names_of(clone, "test") == names_of(clone, "eval") == ["a.jsonl"]
    with pytest.raises(ValueError, match=r"no file of split 'validation'; left out: .* 1 of test, 2 of train"):
        names_of(clone, "validation")


def test_a_split_may_have_any_name(clone):
    (clone / "data/train_sft-0.jsonl").write_text("{}")
    assert names_of(clone, "train_sft") == ["train_sft-0.jsonl"]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ("a.txt test.txt contest.txt", "a.txt contest.txt"),
        ("test.txt dev.txt", "dev.txt"),
        ("training_data/test.txt b.txt", "test.txt"),
        ("index.md testing.md training.md", "index.md testing.md training.md"),
        ("moby_dick.txt dev_notes.txt train_journeys.txt", "dev_notes.txt moby_dick.txt train_journeys.txt"),
        ("wiki.train.txt wiki.test.txt", "wiki.train.txt"),
        ("readme_for_children.txt authors.txt README_zh.md", "authors.txt readme_for_children.txt"),
        ("README_zh.md readmes.md NOTICE notice.txt x.md", "readmes.md x.md"),
    ],
)
def test_what_is_read_of_a_folder(tmp_path, names, read):
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names_of(tmp_path) == read.split()


def test_a_glob_takes_all_splits_that_it_matches(clone, caplog):
    caplog.set_level("INFO")
    assert names_of(clone / "**" / "*.jsonl") == ["train-0.jsonl", "train-1.jsonl", "a.jsonl"]
    assert "3 of 3 files are read, of test, train" in caplog.text
    assert names_of(clone / "**" / "*.jsonl", "test") == ["a.jsonl"]


def test_a_glob_takes_cards_and_dotfiles_only_where_it_names_them(clone):
    assert names_of(clone / "**" / "*") == ["train-0.jsonl", "train-1.jsonl", "a.jsonl"]
    assert names_of(clone / "README*") == names_of(clone / "data" / ".." / "README*.md") == ["README.md"]
    assert names_of(clone / ".git" / "*") == names_of(clone / ".g*" / "*") == ["HEAD.txt"]
    assert names_of(clone / "*" / ".." / "*" / "a.jsonl") == ["a.jsonl"]


def test_links_keep_their_names(tmp_path):
    (tmp_path / "aa11").write_text("a blob of the cache")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "a.txt"
    link.symlink_to("../aa11")
    for given in (link, link.parent, link.parent / "*"):
        assert local_files("", str(given), None) == (link,)


def test_a_file_has_no_splits(clone):
    with pytest.raises(ValueError, match="split= chooses among the files of a folder or glob"):
        names_of(clone / "data" / "train-0.jsonl", "train")


@pytest.mark.parametrize("name", ["~no-such-user/x.txt", "a\0b", "x" * 5000, "hub:" + "x" * 5000])
def test_names_of_nothing(name):
    assert local_files(name, name, None) == ()


def test_bad_globs_are_named():
    with pytest.raises(ValueError, match=r"'a\*\*b' is no file, and as a glob it fails"):
        local_files("a**b", "a**b", None)
