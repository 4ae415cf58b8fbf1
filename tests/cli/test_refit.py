"""The command ``refit`` between ``allocate`` and ``export``."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from lowrank_pl import RankPlan
from lowrank_pl.cli.app import main
from lowrank_pl.cli.export import export
from lowrank_pl.cli.refit import refit
from lowrank_pl.methods.refit.refitting import Refit

TEXT = "python-docs::part=0%-10%"


def test_a_joint_refit_from_the_command_line(plan_file, tmp_path):
    output = tmp_path / "joint.json"
    words = ["--settings.sequences", "10", "--settings.joint.method", "adamw", "--settings.joint.sweeps", "1"]
    main(["refit", str(plan_file), "--output", str(output), *words])
    joint = RankPlan.load(output).fingerprint["refit"]["joint"]
    assert (joint["method"], joint["sweeps"]) == ("adamw", 1)


@pytest.mark.parametrize("changed", [False, True])
def test_a_plan_whose_text_has_changed_is_said(tmp_path, caplog, changed):
    text, plan = tmp_path / "text.txt", tmp_path / "plan.json"
    text.write_text("one two three " * 100)
    words = ["--length", "16", "--sequences", "8", "--store", str(tmp_path / "store"), "--output", str(plan)]
    main(["allocate", "random:llama", "--text", str(text), *words])
    if changed:
        text.write_text("four five six " * 100)
    refit(plan, output=tmp_path / "refitted.json", settings=Refit(sequences=8))
    assert ("was made from another text" in caplog.text) == changed


def test_refit_goes_between_allocate_and_export(plan_file, tmp_path, capsys):
    output = tmp_path / "refitted.json"
    settings = Refit(sequences=10, margin=0.0)
    made = refit(plan_file, output=output, settings=settings, json=tmp_path / "refit.json")
    drawn = RankPlan.load(plan_file)
    assert RankPlan.load(output) == made
    assert made.keep_targeted == drawn.keep_targeted
    assert {n: m.rank for n, m in made.modules.items()} == {n: m.rank for n, m in drawn.modules.items()}
    (note,) = [note for note in made.notes if note.startswith("refitted ")]
    assert re.search(r"^refitted \d+ of 14 modules to 10 sequences, chosen on 2 of them", note)
    assert note in capsys.readouterr().out
    assert json.loads((tmp_path / "refit.json").read_text())["plan"] == str(output)
    folder = export(output, output=tmp_path / "model")
    assert RankPlan.load(folder / "plan.json").fingerprint["refit"]["windows"] != drawn.fingerprint.get("refit")
    with pytest.raises(ValueError, match=r"keep is 0.7, .* keep 0.5"):
        export(output, output=tmp_path / "larger", keep=[0.7])
    with pytest.raises(ValueError, match=r"are refitted already: give those they were made from"):
        refit(output, output=tmp_path / "twice.json", settings=settings)
    shutil.rmtree(tmp_path / "store" / "refit")
    with pytest.raises(ValueError, match=r"the refitted factors at .* are gone: refit the plan that they came from"):
        export(output, output=tmp_path / "gone")
