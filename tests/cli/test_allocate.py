"""The command ``allocate`` as a Python function: the plan that it writes, and the settings that it passes on."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from lowrank_pl import RankPlan
from lowrank_pl.cli.allocate import AllocatorsDecomposition, allocate
from lowrank_pl.cli.app import main
from lowrank_pl.cli.export import export
from lowrank_pl.export.health.examine import diagnose
from lowrank_pl.models.base import Base
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.text.sequences import Calibration

TEXT = "python-docs::part=0%-10%"


def test_allocate_writes_a_plan_with_its_origin(plan_file, tmp_path):
    plan = RankPlan.load(plan_file)
    assert plan.method == "uniform"
    assert 0.49 < plan.keep_targeted <= 0.5
    assert plan.order is not None
    assert plan.origin["store"] == str(tmp_path / "store")
    assert plan.origin["calibration"] == {"text": TEXT, "length": 32, "windows": 8}
    shown = (tmp_path / "shown.txt").read_text()
    assert f"uniform: kept {plan.keep_targeted:.4%} of the targeted parameters (50.0 % requested)" in shown
    assert "uniform: kept 49." in shown
    assert "module type" in shown


def test_allocate_passes_its_settings_on(tmp_path):
    plan = allocate(
        Base("random:gpt2", dtype="bfloat16"),
        keep=0.6,
        decomposition=AllocatorsDecomposition(kind="svd"),
        output=tmp_path / "plan.json",
        json=tmp_path / "figures.json",
        calibration=Calibration(TEXT, 32, 4),
        constraints=Constraints(exclude=("*.c_proj",), multiple_of=2, floors={"*.c_attn": 0.7}),
    )
    assert not any("c_proj" in name for name in plan.modules)
    assert {entry.rank % 2 for entry in plan.modules.values() if entry.rank} == {0}
    assert plan.origin["decomposition"]["kind"] == "svd"
    assert plan.bytes_per_parameter == 2
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["kept_targeted"] == plan.keep_targeted <= 0.6
    with pytest.raises(ValueError, match="no allocator is called 'best'"):
        allocate(Base("random:gpt2"), method="best")


def test_a_setting_of_the_decomposition_leaves_the_kind_to_the_allocator(tmp_path):
    words = ["allocate", "random:llama", "--method", "fisher", "--decomposition.damping", "1e-5", "--text", TEXT]
    main([*words, "--length", "32", "--sequences", "4", "--output", str(tmp_path / "plan.json")])
    made_by = RankPlan.load(tmp_path / "plan.json").origin["decomposition"]
    assert (made_by["kind"], made_by["damping"]) == ("two_sided", 1e-5)


def test_several_words_of_a_setting_are_a_list(monkeypatch):
    monkeypatch.setattr("lowrank_pl.methods.allocate.make_allocator", lambda name, **given: sys.exit(str(given)))
    with pytest.raises(SystemExit, match=r"\{'ratios': \[0\.3, 0\.5\], 'sequences': 4\}"):
        main(
            [
                "allocate",
                "random:llama",
                "--method",
                "strs",
                "--settings.ratios",
                "0.3",
                "0.5",
                "--settings.sequences",
                "4",
            ]
        )


def test_embeddings_go_all_the_way_from_the_command_to_the_export(tmp_path, capsys):
    constraints = Constraints(include=("*", "embeddings"))
    given = {"calibration": Calibration(TEXT, 32, 4), "constraints": constraints, "output": tmp_path / "plan.json"}
    plan = allocate(Base("random:gpt2"), method="fisher", keep=0.5, store=tmp_path / "store", **given)
    told = capsys.readouterr().out
    assert "transformer.wte" in told
    shutil.rmtree(tmp_path / "store")
    folder = export(tmp_path / "plan.json", output=tmp_path / "model", json=tmp_path / "figures.json")
    assert "`transformer.wte` of rank" in (folder / "README.md").read_text()
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) == pytest.approx(plan.bytes, rel=0.1)
    assert not [found for found in diagnose(folder).findings if found.health == "broken"]


def test_a_budget_in_bytes_refuses_embeddings_before_factors_are_made(tmp_path):
    with pytest.raises(ValueError, match="gives embeddings bits but no rank: leave out --include embeddings"):
        allocate(
            Base("random:gpt2"),
            keep_bytes=0.4,
            calibration=Calibration(TEXT, 32, 4),
            constraints=Constraints(include=("*", "embeddings")),
            output=tmp_path / "plan.json",
        )
