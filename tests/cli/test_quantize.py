"""``quantize`` between ``allocate`` and ``export``, and ``allocate`` with a budget in bytes."""

from __future__ import annotations

import pytest

from lowrank_pl import RankPlan
from lowrank_pl.cli.app import main
from lowrank_pl.cli.quantize import quantize
from lowrank_pl.methods.quantize import Rounding

BASE = ["random:llama", "--text", "python-docs::part=0%-10%", "--sequences", "4", "--length", "32"]


def test_quantize_goes_between_allocate_and_export(plan_file, tmp_path, capsys):
    output = tmp_path / "quantized.json"
    made = quantize(plan_file, settings=Rounding(bits=8), output=output, json=tmp_path / "figures.json")
    assert RankPlan.load(output) == made
    assert made.bits == {"8 bits": 14}
    assert "of its bytes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="rounded already"):
        quantize(output, output=tmp_path / "twice.json")


def test_allocate_takes_a_budget_in_bytes(tmp_path, capsys):
    main(["allocate", *BASE, "--keep_bytes", "0.3", "--settings.sequences", "1", "--output", str(tmp_path / "p.json")])
    plan = RankPlan.load(tmp_path / "p.json")
    assert plan.method == "bytes"
    assert plan.keep_bytes <= 0.3
    assert plan.requested == f"{int(0.3 * plan.model_parameters * 4):,} bytes"
    shown = capsys.readouterr().out
    assert f"{plan.requested} requested" in shown
    assert "of its bytes" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "bytes"], "add --keep_bytes 0.3 or --bytes 60MB"),
        (["--method", "energy", "--bytes", "60MB"], "--method energy was given with a budget in bytes"),
        (["--keep", "0.5", "--keep_bytes", "0.5"], "--keep 0.5 was given with a budget in bytes"),
        (["--keep_bytes", "0.5", "--settings.rounds", "3"], "bytes has no setting 'rounds'"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(words, message, capsys):
    with pytest.raises(SystemExit):
        main(["allocate", "no/such/model", *words])
    assert message in capsys.readouterr().err
