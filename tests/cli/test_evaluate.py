"""The command ``evaluate`` as a Python function: its figures, and the type it loads in."""

from __future__ import annotations

import json

import pytest

from lowrank_pl import Base, Calibration, Constraints, load_compressed, perplexity, token_windows
from lowrank_pl.cli.allocate import allocate
from lowrank_pl.cli.evaluate import evaluate
from lowrank_pl.cli.export import export
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.utils.json_files import unsealed

TEXT = "python-docs::part=0%-10%"


def test_evaluate_gives_the_perplexity_and_its_figures(tmp_path, capsys):
    figures = evaluate(
        "random:llama", text=TEXT, length=32, sequences=4, batch_size=2, prompts=["A list"], max_new_tokens=3,
        json=tmp_path / "scores.json",
    )  # fmt: skip
    expected = perplexity(tiny_model("llama"), token_windows(TEXT, byte_tokenizer(), length=32, sequences=4))
    assert figures["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert unsealed(json.loads((tmp_path / "scores.json").read_text())) == figures
    assert (figures["windows"], figures["length"], figures["tokens"], figures["dtype"]) == (4, 32, 124, "float32")
    assert figures["parameters"] == tiny_model("llama").num_parameters()
    assert figures["tokens_per_second"] > 0
    assert list(figures["samples"]) == ["A list"]
    shown = capsys.readouterr().out
    assert f" {expected.perplexity:.4f} " in shown
    assert "'A list' -> " in shown


def test_evaluate_loads_in_the_type_asked_for():
    assert evaluate("random:llama", text=TEXT, length=32, sequences=1, dtype="bfloat16")["dtype"] == "bfloat16"


def test_evaluate_loads_a_folder_in_its_own_type(tmp_path):
    for part in (tiny_model("llama").bfloat16(), byte_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    found = evaluate(str(tmp_path / "base"), text=TEXT, length=32, sequences=1)
    assert (found["dtype"], found["directory"]) == ("bfloat16", str(tmp_path / "base"))
    assert evaluate(str(tmp_path / "base"), text=TEXT, length=32, sequences=1, dtype="float32")["dtype"] == "float32"


def test_evaluate_scores_a_smaller_size_of_an_export_under_a_name_of_its_own(tmp_path, monkeypatch):
    allocate(
        Base("random:llama"), keep=0.5, method="uniform", output=tmp_path / "plan.json", store=tmp_path / "store",
        calibration=Calibration(TEXT, 32, 8), constraints=Constraints(storage="factored"),
    )  # fmt: skip
    folder = export(tmp_path / "plan.json", output=tmp_path / "model")
    found = evaluate(str(folder), text=TEXT, keep=0.3, length=32, sequences=2)
    tokens = token_windows(TEXT, byte_tokenizer(), length=32, sequences=2)
    assert found["perplexity"] == pytest.approx(perplexity(load_compressed(folder, keep=0.3), tokens).perplexity)
    assert found["model"] == f"{folder} at keep 0.3"
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = evaluate("~/model", text=TEXT, keep=0.3, length=32, sequences=2)
    assert at_home["perplexity"] == found["perplexity"]
    with pytest.raises(ValueError, match="'random:llama' is no export of factors, so --keep can't cut it"):
        evaluate("random:llama", text=TEXT, keep=0.3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": [""]}, "the prompt '' has no token"),
        ({"prompts": ["A"], "max_new_tokens": 0}, "max_new_tokens is 0: expected a whole number of at least 1"),
        ({"position_bins": 0}, "position_bins is 0"),
        ({"position_bins": 4}, "evaluate without --text and --reference has no use for position_bins"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"length": 0}, "length is 0"),
        ({"batch_size": 2, "reference": "random:llama"}, "evaluate with --reference has no use for batch_size"),
        ({"prompts": ["A"], "max_new_tokens": 2048}, "2048 positions: give a shorter prompt or fewer max_new_tokens"),
    ],
)
def test_what_can_not_be_done_is_refused_before_anything_is_scored(settings, said, monkeypatch):
    monkeypatch.setattr("lowrank_pl.evaluate.divergence.score_texts", None)
    with pytest.raises(ValueError, match=said):
        evaluate("random:llama", **{"text": TEXT, "length": 32, "sequences": 1, **settings})


def test_figures_replace_earlier_ones_and_no_file_of_the_model(tmp_path):
    for part in (tiny_model("llama"), byte_tokenizer()):
        part.save_pretrained(tmp_path)
    for _ in range(2):
        evaluate(str(tmp_path), text=TEXT, length=32, sequences=1, json=tmp_path / "scores.json")
    with pytest.raises(ValueError, match=r"config\.json' is read by this command, which would overwrite it"):
        evaluate(str(tmp_path), text=TEXT, length=32, sequences=1, json=tmp_path / "config.json")


def test_scores_stay_where_a_later_part_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank_pl.evaluate.generation.generate_samples", lambda *_, **__: 1 / 0)
    path = tmp_path / "scores.json"
    with pytest.raises(ZeroDivisionError):
        evaluate("random:llama", text=TEXT, length=32, sequences=1, prompts=["A"], json=path)
    assert unsealed(json.loads(path.read_text()))["perplexity"] > 1
