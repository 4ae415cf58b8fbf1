"""Shipped configuration files are found by name."""

from __future__ import annotations

import pytest

from lowrank_pl.cli.config_files import ConfigFileError, find_config, read_config
from tests.helpers import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_is_found_and_read(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = str(path.relative_to(ROOT / "configs").with_suffix(""))
    assert find_config(name).samefile(path)
    assert read_config(find_config(name))


def test_a_name_of_no_file_lists_the_shipped_ones():
    with pytest.raises(ConfigFileError, match=r"bset.*allocate/strs, .*best"):
        find_config("bset")
