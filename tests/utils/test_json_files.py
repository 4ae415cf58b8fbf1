"""JSON files are read whole, or refused by the path of the wrong field."""

from __future__ import annotations

import pytest

from lowrank_pl.utils.json_files import checked_json, read_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [1, "2"]}', r"^a\[1\]: .* '2' was given$"),
        ('{"b.c": [null]}', r'^\["b.c"\]\[0\]: '),
        ('{"a": [1], "a": [2]}', '"a" is there twice: remove one'),
        ('{"a": [1.5, 2.5, 3.5, 4.5]}', "; and 1 more$"),
        ('{"a": [1', "^Invalid JSON: .* line 1"),
        (b'{"a\xff": []}', "^Invalid JSON: "),
        ("[" * 100_000, "^Invalid JSON: recursion"),
        ('{"a": [' + "1" * 5000 + "]}", "Invalid JSON|a.0.: |digits"),
    ],
)
def test_wrong_values_are_named_by_their_path(text, message):
    with pytest.raises(ValueError, match=message):
        checked_json(text, dict[str, list[int]])


def test_an_unreadable_file_is_named_with_the_advice(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} is not a list \(.*\): delete it"):
        read_json(tmp_path, list[int], what="a list", advice="delete it")
