"""The metadata of model cards, as huggingface_hub reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from lowrank_pl.report import card_metadata
from lowrank_pl.report.card_metadata import front_matter, refreshed_front_matter
from lowrank_pl.report.model_card import model_card, refresh_card
from lowrank_pl.report.run_record import Exported, RunRecord, read_run
from lowrank_pl.report.scores import Row, Summary
from tests.helpers.run_folder import HOSTILE, TASKS, plan_of, write_run

ROWS = (Row("dense", 20.7), Row("learned", 23.456789123))


def record_of(base="org/model-1B", rows=ROWS, text="python-docs::part=90%-100%"):
    plan = plan_of(origin={"base": base})
    protocol = {"text": text, "windows": 20, "length": 512}
    return RunRecord(Path("run"), plan, Exported(Path("run/model")), Summary(rows, {"protocol": protocol}))


def metadata(record, tmp_path, **options):
    """What huggingface_hub reads back from the card of ``record``."""
    (tmp_path / "README.md").write_text(model_card(record, **options), encoding="utf-8")
    return metadata_load(tmp_path / "README.md")


def results(data):
    _, found = model_index_to_eval_results(data["model-index"])
    return {(one.dataset_name, one.metric_name): one.metric_value for one in found}


def test_the_hub_files_the_model_under_its_base(tmp_path):
    data = metadata(record_of(rows=()), tmp_path, license="apache-2.0")
    assert data == {
        "base_model": "org/model-1B",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["low-rank", "compression", "lowrank_pl"],
    }


def test_measured_perplexities_are_results_with_the_dense_model_beside(tmp_path):
    text = "python-docs::part=90%-100%, 20 sequences of 512 tokens"
    data = metadata(record_of(), tmp_path)
    assert results(data) == {(text, "perplexity"): 23.4568, (text, "perplexity of the dense model"): 20.7}
    (model,) = data["model-index"]
    assert model["results"][0]["dataset"]["type"] == "python-docs"


def test_nothing_measured_is_no_result(tmp_path):
    assert "model-index" not in metadata(record_of(rows=(Row("learned", float("inf")),)), tmp_path)


def test_results_name_files_without_their_folders():
    front = front_matter(record_of(text="validation sequences of /home/me/wiki.txt::part=5%"))
    assert "/home/me" not in front
    assert "name: validation sequences of wiki.txt::part=5%, 20 sequences of 512 tokens" in front


def test_scores_of_lowrank_evaluate_are_results(tmp_path):
    run = write_run(tmp_path / "run")
    folder = str(run / "model")
    score = {"text": "c4.txt", "windows": 4, "length": 64, "tokens": 252}
    for name, model, perplexity in (("own", folder, 31.5), ("base", "org/model", 30.25), ("cut", f"{folder} at", 99.0)):
        one = {"model": model, "dtype": "float32", "texts": {"c4": {**score, "perplexity": perplexity}}}
        (run / f"{name}.json").write_text(json.dumps(one))
    (run / "tasks.json").write_text(json.dumps({**TASKS, "model_name": folder}))
    found = results(metadata(read_run(run), tmp_path))
    text = "c4.txt, 4 sequences of 64 tokens"
    assert found[text, "perplexity"] == 31.5
    assert found[text, "perplexity of the dense model"] == 30.25
    assert found["piqa", "acc"] == 0.6789
    assert 99.0 not in found.values()


def test_the_whole_card_is_one_that_huggingface_hub_reads_and_writes():
    card = ModelCard(model_card(record_of(base="org/m", text=HOSTILE), license="mit"))
    assert card.data.eval_results[0].metric_value == 23.4568
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_the_licence_is_that_of_the_bases_card(tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    data = metadata(record_of(base=str(base)), tmp_path)
    assert (data["license"], data["license_name"], "license_link" in data) == ("other", "own", False)
    monkeypatch.setattr(card_metadata, "try_to_load_from_cache", lambda *_: str(base / "README.md"))
    assert metadata(record_of(), tmp_path)["license_link"] == "https://huggingface.co/org/model-1B/blob/main/LICENSE"


@pytest.mark.parametrize(
    "text", ["", "no metadata", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlanguage: en\n---\n"]
)
def test_a_licence_that_is_not_known_is_left_out(text, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(text)
    assert "license" not in metadata(record_of(base=str(base)), tmp_path)


def test_refreshing_adds_results_and_keeps_every_letter_of_the_owner(tmp_path):
    run = write_run(tmp_path / "run")
    card = run / "model" / "README.md"
    card.write_text("---\n# mine\nlicense:   mit\ntags: [a, b]\n---\n\nby `lowrank_pl`\n")
    assert refresh_card(read_run(run))
    assert card.read_text().startswith("---\n# mine\nlicense:   mit\ntags: [a, b]\nmodel-index:\n- name: model with ")
    assert 16.34 in results(metadata_load(card)).values()
    before = card.read_text()
    assert refresh_card(read_run(run))
    assert card.read_text() == before


def test_a_new_figure_replaces_the_old_one_and_other_results_stay():
    old = front_matter(record_of())
    other = front_matter(record_of(text="c4", rows=(Row("learned", 9.0),)))
    both = refreshed_front_matter(old.replace("tags:", "language: en\ntags:"), other)
    both = refreshed_front_matter(both, front_matter(record_of(rows=(Row("learned", 22.0),))))
    data = card_metadata._read(both)
    assert data["language"] == "en"
    assert sorted(results(data).values()) == [9.0, 20.7, 22.0]


def test_metadata_that_can_not_be_read_stays(caplog):
    old = "---\nlicense: [\n---\n"
    assert refreshed_front_matter(old, front_matter(record_of())) == old
    assert "left without new results" in caplog.text


def test_an_index_in_an_unusual_layout_is_written_anew():
    old = front_matter(record_of()).replace("  results:", "# a remark\n  results:")
    data = card_metadata._read(refreshed_front_matter(old, front_matter(record_of(rows=(Row("learned", 22.0),)))))
    assert sorted(results(data).values()) == [20.7, 22.0]


@pytest.mark.parametrize("base", ["~no-such-user/x", "x/" * 3000, "a" * 5000, HOSTILE, "/", ""], ids=range(6))
def test_a_plan_may_name_anything_as_its_base(base, tmp_path):
    assert "license" not in metadata(record_of(base=base), tmp_path)
