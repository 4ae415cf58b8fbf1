"""``lowrank bench``: every combination is measured, and what a case has no use for is refused."""

from __future__ import annotations

import json

import pytest
import torch

from lowrank_pl.cli.app import main
from lowrank_pl.cli.bench import bench
from lowrank_pl.utils.json_files import unsealed
from tests.helpers.commands import failing


@pytest.mark.parametrize("case", ["decode", "prefill"])
def test_bench_measures_every_combination(case, tmp_path, capsys):
    figures = bench(
        case, base="random:llama", length=8, batch_size=[1, 2], dtype=["float32", "bfloat16"], repeats=1,
        json=tmp_path / "speed.json",
    )  # fmt: skip
    assert unsealed(json.loads((tmp_path / "speed.json").read_text())) == figures
    assert figures["machine"]["torch"] == torch.__version__
    assert figures["settings"] == {"repeats": 1, "multiple_of": 1, "compile": False, "record": False}
    rows = figures["rows"]
    kinds = [(row["dtype"], row["batch"]) for row in rows]
    assert list(dict.fromkeys(kinds)) == [("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2)]
    forms = [("dense", 1.0), *((form, keep) for form in ("factored", "pivoted") for keep in (0.8, 0.6, 0.5))]
    assert [(row["storage"], row["keep"]) for row in rows] == forms * 4
    for row in rows:
        assert (row["case"], row["base"], row["length"]) == (case, "random:llama", 8)
        assert ("multiply_adds" in row) == (case == "prefill")
        tokens = row["batch"] * (8 if case == "prefill" else 1)
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
        assert row["ratio_to_limit"] == pytest.approx(row["ratio_to_dense"] / row["limit"])
    for first in range(0, len(rows), 7):
        dense, *others = rows[first : first + 7]
        cost = "bytes" if case == "decode" else "multiply_adds"
        for row in others:
            assert row["ratio_to_dense"] == pytest.approx(dense["seconds"] / row["seconds"])
            assert row["limit"] == pytest.approx(dense[cost] / row[cost])
            assert row["limit"] > 1
    assert "times dense" in capsys.readouterr().out


def test_bench_takes_one_value_or_several(capsys):
    figures = bench(
        "decode", base="random:gpt2", keep=0.7, storage=["pivoted"], length=4, batch_size=1, dtype="float32", repeats=1,
        multiple_of=2,
    )  # fmt: skip
    assert [(row["storage"], row["keep"]) for row in figures["rows"]] == [("dense", 1.0), ("pivoted", 0.7)]
    assert figures["settings"]["multiple_of"] == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("case", "options", "text"),
    [
        (
            "decode",
            {"inactive_gate_stride": 4},
            "decode has no use for inactive_gate_stride, which is 4: leave it out",
        ),
        ("step", {"inactive_gate_stride": 0}, "inactive_gate_stride is 0: .*at least 1"),
        ("svd", {"keep": 0.8}, "svd has no use for keep, which is 0.8"),
        ("step", {"sequences": 2}, "step has no use for sequences, which is 2"),
        ("statistics", {"keep": 0.5}, "statistics has no use for keep, which is 0.5"),
        ("statistics", {"sequences": 0}, "sequences is 0: .*at least 1"),
        ("statistics", {"dtype": ["float32", "bfloat16"]}, "dtype is float32, bfloat16: bench statistics takes one"),
        ("step", {"multiple_of": 8}, "step has no use for multiple_of, which is 8"),
        ("step", {"compile": True}, "step has no use for compile, which is True"),
        ("step", {"keep": [0.8, 0.5]}, "keep is 0.8, 0.5: bench step takes one value"),
        ("step", {"keep": 2.0}, "keep is 2.0"),
        ("step", {"batch_size": [1, 16]}, "batch_size is 1, 16: bench step takes one value"),
        ("prefill", {"keep": []}, "keep is empty: .*such as 0.8"),
        ("prefill", {"dtype": []}, "dtype is empty: .*such as float32"),
        ("prefill", {"keep": [0.8, 0.0]}, "keep is 0.0"),
        ("prefill", {"batch_size": [1, 0]}, "batch_size is 0: .*at least 1"),
        ("decode", {"length": 0}, "length is 0: .*at least 1"),
        ("decode", {"multiple_of": 0}, "multiple_of is 0: .*at least 1"),
        ("decode", {"repeats": 0}, "repeats is 0: .*at least 1"),
    ],
)
def test_bench_refuses_what_it_can_not_use(case, options, text):
    with pytest.raises(ValueError, match=text):
        bench(case, base="random:llama", **options)


def test_bench_statistics_writes_and_prints_both_times(tmp_path, capsys):
    figures = bench(
        "statistics", base="random:llama", length=16, sequences=2, repeats=1, json=tmp_path / "statistics.json"
    )
    assert unsealed(json.loads((tmp_path / "statistics.json").read_text())) == figures
    (row,) = figures["rows"]
    assert (row["base"], row["dtype"], row["sequences"], row["length"]) == ("random:llama", "float32", 2, 16)
    shown = capsys.readouterr().out
    for name in ("frozen_seconds", "statistics_seconds", "ratio_to_frozen", "threads"):
        assert name in shown


def test_bench_compares_learning_steps_with_the_frozen_model(tmp_path, capsys):
    figures = bench(base="random:llama", length=32, batch_size=2, repeats=2, json=tmp_path / "bench.json")
    assert list(figures) == ["random:llama", "random:llama_pivoted"]
    row, pivoted = figures.values()
    for prefix, form in (("", "step"), ("exact_", "exact"), ("plain_", "plain")):
        assert row[f"{prefix}ratio_to_frozen"] == pytest.approx(row[f"{form}_seconds"] / row["frozen_seconds"])
    assert row["tokens"] == 64
    assert (row["storage"], row["keep"], row["every"]) == ("factored", 0.8, 8)
    # 1.2 times the parameters of all targets, whose share of the model is what the dense weights have.
    assert 1 < row["weights_ratio"] < 2.2
    assert pivoted["weights_ratio"] > row["weights_ratio"]
    assert unsealed(json.loads((tmp_path / "bench.json").read_text())) == figures
    assert "plain_ratio_to_frozen" in capsys.readouterr().out


def test_drivers_are_measured(capsys, tmp_path):
    figures = bench("svd", base="random:llama", repeats=1, device="cpu", json=tmp_path / "svd.json")
    assert {(row["shape"], row["driver"]) for row in figures["rows"]} == {
        (shape, driver) for shape in ("16 x 32", "32 x 32", "32 x 96", "96 x 32") for driver in ("polar", "lapack")
    }
    assert all(row["seconds"] > 0 and row["error"] < 1e-14 and row["orthogonality"] < 1e-13 for row in figures["rows"])
    assert (tmp_path / "svd.json").exists()
    assert "orthogonality" in capsys.readouterr().out


def test_only_a_gpu_records_steps():
    with pytest.raises(ValueError, match=r"on cpu: .*cuda"):
        bench("decode", base="random:llama", length=4, repeats=1, device="cpu", record=True)


# -- from the command line ------------------------------------------------------------------------------------------


def test_bench_writes_figures(tmp_path, capsys):
    main(
        ["bench", "--base", "random:llama", "--length", "16", "--repeats", "1", "--json", str(tmp_path / "bench.json")]
    )
    assert json.loads((tmp_path / "bench.json").read_text())["random:llama"]["step_seconds"] > 0
    assert "ratio_to_frozen" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["decode", "prefill"])
def test_bench_names_its_case_in_front(case, tmp_path, capsys):
    words = ["bench", case, "--base", "random:llama", "--length", "4", "--repeats", "1", "--keep", "0.8", "0.5"]
    words += ["--batch-size", "1", "2", "--dtype", "bfloat16", "--storage", "pivoted"]
    main([*words, "--json", str(tmp_path / "speed.json")])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["case"], row["dtype"], row["batch"], row["storage"], row["keep"]) for row in rows] == [
        (case, "bfloat16", batch, *kind)
        for batch in (1, 2)
        for kind in (("dense", 1.0), ("pivoted", 0.8), ("pivoted", 0.5))
    ]
    shown = capsys.readouterr()
    assert "of limit" in shown.out
    assert f"bench {case}: 100%" in shown.err


def test_bench_settings_from_yaml(tmp_path):
    config = tmp_path / "bench.yaml"
    config.write_text(
        "case: decode\nbase: random:llama\nkeep: 0.5\nlength: 4\nrepeats: 1\nbatch_size: 1\ndtype: float32\n"
    )
    main(["bench", "-c", str(config), "--json", str(tmp_path / "speed.json")])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["keep"] for row in rows] == [1.0, 0.5, 0.5]


def test_bench_names_unknown_cases(capsys):
    assert "decod" in failing(capsys, "bench", "decod", status=2)
    assert "more" in failing(capsys, "bench", "decode", "more", status=2)
