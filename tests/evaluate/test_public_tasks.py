"""Public releases on local files: lm-eval's own requests and scores, refusals by row, few-shot examples, long rows."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api import task as lm_eval_task
from lm_eval.tasks import TaskManager

from lowrank_pl.evaluate import lm_eval_adapter
from lowrank_pl.evaluate.local_tasks import LocalTask, named_tasks
from lowrank_pl.evaluate.public_tasks import MMLU_SUBJECTS, RELEASES, PublicTask
from lowrank_pl.evaluate.settings import TaskSettings
from lowrank_pl.evaluate.zero_shot import ZeroShot
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from tests.helpers.fuzzing import counted

DOCS = Path(__file__).parents[2] / "docs" / "evaluating.md"
LABELS = ["A", "B", "C", "D"]
ARC = [
    {
        "id": "1",
        "question": "Which is wet?",
        "choices": {"text": ["sand", "sea"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    {
        "id": "2",
        "question": "Hot?",
        "choices": {"text": ["sun", "ice", "fog", "dew"], "label": LABELS},
        "answerKey": "A",
    },
]
MMLU = [
    {"question": f" {place}: {subject}?", "subject": subject, "choices": ["a", "b b", "", "d"], "answer": place % 4}
    for place, subject in enumerate(MMLU_SUBJECTS)
    for _ in range(1 + place % 2)
]
HUB = {
    "arc_challenge": ARC,
    "arc_easy": ARC,
    "boolq": [
        {"question": "is it wet", "passage": "Rain -- Rain is water.", "idx": 0, "label": 1},
        {"question": "is it dry", "passage": "Rain -- Rain is water.", "idx": 1, "label": 0},
    ],
    "hellaswag": [
        {
            "ind": 4,
            "activity_label": "Baking",
            "ctx_a": "[header] How to bake [title] Mix.",
            "ctx_b": ctx_b,
            "ctx": "-",
            "endings": ["  stirs it. [step] Then waits.", "flies", "sings a  song", "sleeps"],
            "label": label,
        }
        for ctx_b, label in (("she", "0"), ("", "3"))
    ],
    "mathqa": [
        {"Problem": "1+1 ?", "Rationale": "-", "options": "a ) 1 , b ) 2 , c ) 1 , 0 , d ) 4 , e ) n", "correct": "b"},
        {"Problem": "x ?", "Rationale": "-", "options": "a ) 3 , b ) 2 , c ) 5 , d ) 4 , e ) of these", "correct": "e"},
    ],
    "mmlu": MMLU,
    "nq_open": [
        {"question": "who wrote it", "answer": ["The Author", "O'Neil"]},
        {"question": "when", "answer": ["1900"]},
    ],
    "openbookqa": [
        {"id": "7", "question_stem": "Sun", "choices": {"text": ["hot", "icy"], "label": LABELS[:2]}, "answerKey": "A"},
        {"id": "8", "question_stem": "Who?", "choices": {"text": ["me", "you"], "label": ["A", "B"]}, "answerKey": "B"},
    ],
    "piqa": [
        {"goal": "boil water", "sol1": "heat it", "sol2": "eat it up", "label": 0},
        {"goal": "cut", "sol1": "sing", "sol2": "use a knife", "label": 1},
    ],
    "winogrande": [
        {"sentence": "The cup fits the box as the _ is small.", "option1": "cup", "option2": "box", "answer": "1"},
        {"sentence": "Ann asked Eve, so _ replied to her.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ],
}  # fmt: skip
"""Rows as on the hub."""

AUTHORS = {
    "arc_easy": [
        {
            "id": row["id"],
            "question": {
                "stem": row["question"],
                "choices": [
                    {"text": text, "label": label}
                    for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
                ],
            },
            "answerKey": row["answerKey"],
        }
        for row in ARC
    ],
    "boolq": [
        {"question": row["question"], "title": "Rain", "passage": "Rain is water.", "answer": bool(row["label"])}
        for row in HUB["boolq"]
    ],
    "mmlu": [{**row, "answer": LABELS[row["answer"]]} for row in MMLU],
    "piqa": [{**row, "label": str(row["label"])} for row in HUB["piqa"]],
}
"""Rows as the authors publish them."""


def write(path, rows):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answered(results):
    """The requests, the scores of rows and the metrics of results."""
    rows = {
        name: [
            (one["arguments"], {key: one[key] for key in one["metrics"]}, one["target"], one["filtered_resps"])
            for one in samples
        ]
        for name, samples in results["samples"].items()
    }
    return rows, results["results"], results["n-samples"], results.get("group_subtasks")


def by_lm_eval(monkeypatch, name, rows, examples=(), fewshot=None):
    """Results on rows that lm-eval loads itself, as from the hub."""
    release = RELEASES[name]

    def load_dataset(path, name=None, **_):
        assert path == release.hub
        subjects = {row.get("subject") for row in rows}
        assert name == release.config or name in subjects
        return {
            split: datasets.Dataset.from_list([row for row in given if row.get("subject", name) == name] or rows[:1])
            for split, given in ((release.split, rows), (release.examples, examples))
        }

    folder = Path(lm_eval.tasks.__file__).parent / release.folder
    own = functools.partial(TaskManager, include_defaults=False)
    with monkeypatch.context() as patch:
        patch.setattr(lm_eval_task.datasets, "load_dataset", load_dataset)
        patch.setattr("lowrank_pl.evaluate.lm_eval_adapter.TaskManager", own)
        tasks = ZeroShot([name], TaskSettings([folder], fewshot=fewshot), trust_remote_code=True)
    return tasks.results(tiny_model("llama"), byte_tokenizer())


@pytest.mark.parametrize("name", sorted(HUB))
def test_requests_and_scores_are_those_of_lm_eval(name, tmp_path, monkeypatch):
    path = write(tmp_path / f"{name}.jsonl", HUB[name])
    found = ZeroShot([str(path)]).results(tiny_model("llama"), byte_tokenizer())
    assert answered(found) == answered(by_lm_eval(monkeypatch, name, HUB[name]))
    metrics = {
        "boolq": {"acc"}, "mmlu": {"acc"}, "winogrande": {"acc"}, "nq_open": {"exact_match"},
    }.get(name, {"acc", "acc_norm"})  # fmt: skip
    assert {key.split(",")[0] for key in found["results"][name] if "," in key and "stderr" not in key} == metrics


@pytest.mark.parametrize("name", sorted(AUTHORS))
def test_an_authors_release_is_the_same_task(name, tmp_path):
    authors = PublicTask(name, write(tmp_path / "authors.jsonl", AUTHORS[name])).rows()
    assert authors == PublicTask(name, write(tmp_path / "hub.jsonl", HUB[name])).rows()


@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_other_kinds_of_files_hold_the_same_rows(ending, tmp_path):
    files = [write(tmp_path / f"hellaswag{one}", HUB["hellaswag"]) for one in (".jsonl", ending)]
    first, second = (named_tasks([str(file)])[0].rows() for file in files)
    assert first == second


def test_any_of_the_answers_of_nq_open_is_an_exact_match(tmp_path, monkeypatch):
    path = write(tmp_path / "nq_open.jsonl", HUB["nq_open"])
    monkeypatch.setattr(lm_eval_adapter.MemoryLM, "generate_until", lambda *_, **__: [" the author", " 1901"])
    found = ZeroShot([str(path)]).results(tiny_model("llama"), byte_tokenizer())
    assert [one["exact_match"] for one in found["samples"]["nq_open"]] == [1, 0]


def test_mmlu_is_weighted_by_the_size_of_subjects(tmp_path):
    path = write(tmp_path / "mmlu.jsonl", MMLU)
    found = ZeroShot([str(path)]).results(tiny_model("llama"), byte_tokenizer())
    right = [one["acc"] for rows in found["samples"].values() for one in rows]
    assert len(right) == len(MMLU)
    assert found["results"]["mmlu"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_a_group_and_a_subject_of_mmlu_are_read_from_the_whole_file(tmp_path):
    path = write(tmp_path / "all.jsonl", MMLU)
    loaded = ZeroShot([f"mmlu_stem={path}"]).loaded
    assert set(loaded["groups"]) == {"mmlu_stem"}
    assert len(loaded["tasks"]) == 19
    assert list(ZeroShot([f"mmlu_anatomy={path}"]).loaded["tasks"]) == ["mmlu_anatomy"]


def test_the_subjects_are_those_of_lm_eval():
    folder = Path(lm_eval.tasks.__file__).parent / RELEASES["mmlu"].folder
    assert {path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml")} == set(MMLU_SUBJECTS)


@pytest.mark.parametrize("name", ["mmlu", "nq_open", "winogrande"])
def test_few_shot_examples_come_from_the_file_beside(name, tmp_path, monkeypatch):
    examples = HUB[name][::-1]
    write(tmp_path / f"{name}.{RELEASES[name].examples}.jsonl", examples)
    path = write(tmp_path / f"{name}.jsonl", HUB[name])
    found = ZeroShot([f"{tmp_path}/"], TaskSettings(fewshot=1)).results(tiny_model("llama"), byte_tokenizer())
    assert answered(found) == answered(by_lm_eval(monkeypatch, name, HUB[name], examples, fewshot=1))
    assert set(found["n-shot"].values()) == {1}
    assert found["configs"][next(iter(found["samples"]))]["local_file"] == str(path)


def test_few_shot_without_a_file_of_examples_is_refused(tmp_path):
    path = write(tmp_path / "piqa.jsonl", HUB["piqa"])
    message = r"fewshot is 5, .* no file .*piqa\.train\.jsonl .*split=\"train\"\).to_json\(\"piqa.train.jsonl\"\)"
    with pytest.raises(ValueError, match=message):
        ZeroShot([str(path)], TaskSettings(fewshot=5))


def changed(name, **changes):
    return {key: value for key, value in {**HUB[name][0], **changes}.items() if value is not ...}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("arc_easy", changed("arc_easy", answerKey="E"), "answerKey is 'E', expected one of the labels 1, 2"),
        ("arc_easy", changed("arc_easy", choices={"text": ["a"], "label": ["A", "B"]}), "1 choices with 2 labels"),
        ("boolq", {"question": "q", "passage": "p", "answer": True}, "the column 'title' is missing"),
        ("boolq", changed("boolq", label=-1), r"label is -1 \(rows of a split whose answers are not public\)"),
        ("hellaswag", changed("hellaswag", label="4"), "label is '4', expected the index of the answer, 0 to 3"),
        ("hellaswag", changed("hellaswag", endings=...), "the column 'endings' is missing"),
        ("mathqa", changed("mathqa", correct="f"), "correct is 'f', expected one of a, b, c, d, e"),
        ("mathqa", changed("mathqa", options="1, 2"), "options are '1, 2', expected choices as in"),
        ("mmlu", changed("mmlu", answer="BC"), "answer is 'BC', expected the index of the answer, 0 to 3"),
        ("mmlu", changed("mmlu", answer=4), "answer is 4, expected the index of the answer, 0 to 3"),
        ("mmlu", changed("mmlu", subject="cooking"), "subject is 'cooking', expected one of the 57"),
        ("nq_open", changed("nq_open", answer="one"), "answer is 'one', expected a list of texts"),
        ("openbookqa", changed("openbookqa", question_stem=""), "question_stem is '', expected a text"),
        ("piqa", changed("piqa", label=...), "the column 'label' is missing"),
        ("piqa", changed("piqa", label=2), "label is 2, expected the index of the answer, 0 to 1"),
        ("winogrande", changed("winogrande", answer=""), r"answer is '' \(rows of a split whose answers"),
        ("winogrande", changed("winogrande", sentence="a"), "sentence has no _ where an option goes"),
        ("piqa", [1], r"expected a row of baber/piqa with the columns goal, sol1, sol2, label, got \[1\]"),
    ],
    ids=lambda value: value if isinstance(value, str) and value in RELEASES else "",
)  # fmt: skip
def test_a_row_that_is_none_of_the_task_is_named_with_the_cure(name, row, message, tmp_path):
    path = write(tmp_path / f"{name}.jsonl", [HUB[name][0], row])
    cure = re.escape(RELEASES[name].command(path.name))
    with pytest.raises(ValueError, match=rf"{name}\.jsonl, line 2.*{message}.*; write the file with {cure}"):
        ZeroShot([str(path)])


LETTERS = st.text(st.characters(exclude_categories=()), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | LETTERS | st.sampled_from(["1", "A", "e", -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS | st.just("text"), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.fuzz
@given(data=st.data())
def test_generated_rows_are_read_or_named(tmp_path_factory, data):
    name = data.draw(st.sampled_from([*sorted(set(RELEASES) - {"mmlu"}), "mmlu_abstract_algebra"]))
    release = PublicTask(name, Path()).release
    valid = HUB[name.split("_abstract")[0]][0]
    keys = [*release.columns, "answer", "title", "question"]
    row = data.draw(
        st.dictionaries(st.sampled_from(keys), VALUES, max_size=2).map(lambda drawn: valid | drawn) | VALUES
    )
    path = write(tmp_path_factory.mktemp("fuzz") / "rows.jsonl", [valid, row])
    with counted("rows of public tasks", f"{path}, line 2", release.command(path.name)):
        task = PublicTask(name, path)
        assert len(datasets.Dataset.from_list(task.rows())) == 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("piqa.jsonl", b"\n", r"piqa.jsonl holds no row of task 'piqa': write the file with python -c"),
        ("piqa.jsonl", b"{", r"piqa.jsonl, line 1 is not JSON .*columns goal, sol1, sol2, label; write"),
        ("piqa.json", b"[{]", r"piqa.json is not JSON .*: write the file with"),
        ("piqa.jsonl", b"\xff", r"piqa.jsonl is not a UTF-8 text .*: write the file with"),
        ("piqa.parquet", b"no", r"piqa.parquet can't be read as Parquet .*to_parquet\(\"piqa.parquet\"\)"),
        ("other.parquet", b"no", r"other.parquet holds no public release .* name it after its task \(arc_challenge, "),
        ("other.jsonl", b"\xff", r"other.jsonl is not a UTF-8 text .*: write one such question in every line"),
        ("other.jsonl", b'{"goal": "g"}', r"line 1 is not a multiple-choice question.*as piqa=FILE"),
    ],
)  # fmt: skip
def test_a_file_that_can_not_be_read_is_named_with_the_cure(file, content, message, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ZeroShot([f"{tmp_path}/{file}"])


def test_mmlu_without_a_subject_is_refused(tmp_path):
    path = write(tmp_path / "mmlu.jsonl", [row for row in MMLU if row["subject"] != "virology"])
    with pytest.raises(ValueError, match=r"no rows of 1 of the subjects of task 'mmlu' \(virology\)"):
        ZeroShot([str(path)])
    with pytest.raises(ValueError, match=r"has no row of subject 'virology', which task 'mmlu_other' needs"):
        ZeroShot([f"mmlu_other={path}"])


def test_a_file_with_queries_is_one_of_plain_questions(tmp_path):
    rows = [{"query": "Who?", "choices": ["me", "you"], "gold": 0}]
    path = write(tmp_path / "piqa.jsonl", rows)
    assert named_tasks([f"{path}::cue=none"]) == [LocalTask("piqa", path, cue="none")]
    write(path, HUB["piqa"])
    with pytest.raises(ValueError, match="the prompt of 'piqa' is lm-eval's own and takes no options"):
        named_tasks([f"{path}::cue=none"])


def test_a_folder_has_one_file_per_task(tmp_path):
    for name in ("arc_easy.jsonl", "arc_easy.train.jsonl", "boolq.parquet", "mine.jsonl"):
        write(tmp_path / name, HUB.get(name.split(".")[0], [{"query": "Who?", "choices": ["me", "you"], "gold": 0}]))
    write(tmp_path / "scores.json", [])
    assert [task.name for task in named_tasks([f"{tmp_path}/"])] == ["arc_easy", "boolq", "mine"]


def test_rows_longer_than_the_model_are_counted_and_named(tmp_path, caplog):
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    model.config.max_position_embeddings = 300
    long = "far " * 100
    write(tmp_path / "piqa.jsonl", [*HUB["piqa"], {**HUB["piqa"][0], "goal": long}])
    write(tmp_path / "nq_open.jsonl", [{"question": "who", "answer": ["I"]}, {"question": long, "answer": ["I"]}])
    found = ZeroShot([f"{tmp_path}/"]).results(model, tokenizer)
    assert found["n-truncated"] == {"nq_open": 1, "piqa": 1}
    assert "task piqa: 1 of 3 rows are longer than the model's 300 tokens" in caplog.text
    assert "Combined length" not in caplog.text


def test_a_model_too_short_to_generate_is_refused(tmp_path):
    model = tiny_model("llama")
    model.config.max_position_embeddings = 256
    path = write(tmp_path / "nq_open.jsonl", HUB["nq_open"])
    with pytest.raises(ValueError, match=r"'nq_open' generates up to 256 tokens, .* the model's length of 256"):
        ZeroShot([str(path)]).results(model, byte_tokenizer())


@pytest.mark.parametrize("name", sorted(RELEASES))
def test_the_page_has_the_command_of_every_task(name):
    page = DOCS.read_text()
    assert RELEASES[name].command(f"{name}.jsonl") in page
    assert all(f"`{column}`" in page for column in RELEASES[name].columns)
