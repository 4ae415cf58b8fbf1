"""Tasks through lm-eval: log-likelihoods by hand, prompts, refusals, differences, and the plain lm_eval command."""

from __future__ import annotations

import functools
import json
import statistics
import sys

import datasets
import pytest
import torch

from lowrank_pl.cli.app import main
from lowrank_pl.evaluate import lm_eval_adapter, zero_shot
from lowrank_pl.evaluate.local_tasks import LocalTask, named_tasks
from lowrank_pl.evaluate.paired import differences, paired_difference, task_table
from lowrank_pl.evaluate.settings import TaskSettings
from lowrank_pl.evaluate.zero_shot import ZeroShot, require_lm_eval
from lowrank_pl.export.export import save_compressed
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from tests.helpers.fork_server import STRANGER

ROWS = [
    {"query": "Question: what is wet?\n", "choices": ["water", "a stone in the desert", "sand"], "gold": 0},
    {"query": "The sun is", "choices": ["hot", "a very cold place"], "gold": 0},
    {"query": "Passage: " + "It rained. " * 9 + "\nQuestion: did it rain?", "choices": ["no", "yes"], "gold": 1},
    {"query": "Question: who?\nAnswer:", "choices": ["you", "me", "she", "they"], "gold": 2},
    {"query": "Birds", "choices": ["sing", "bark", "évaporent"], "gold": 0},
    {"query": "Question: 1 + 1?", "choices": ["2", "11"], "gold": 0},
]
PROMPTS = [
    "Question: what is wet?\nAnswer:",
    "The sun is",
    "Passage: " + "It rained. " * 9 + "\nQuestion: did it rain?\nAnswer:",
    "Question: who?\nAnswer:",
    "Birds",
    "Question: 1 + 1?\nAnswer:",
]
YAML = """
task: tiny_questions
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def yaml_file(questions, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "yaml"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(YAML % questions)
    (folder / "_shared.yaml").write_text("output_type: multiple_choice\n")
    return folder / "tiny.yaml"


def compressed():
    torch.manual_seed(0)
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = LowRankLinear(32, 96, 8, bias=False)
    model.model.layers[1].mlp.down_proj = PivotedLinear(96, 32, 8, side="out", bias=False)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def by_hand(model, tokenizer, prompt, choice):
    """Log-likelihood of a choice behind a prompt, alone and without padding, in fp64."""
    begin = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor(tokenizer(f"{prompt} {choice}")["input_ids"])
    with torch.no_grad():
        likely = model(ids[None]).logits[0].double().log_softmax(-1)
    return likely[begin - 1 : -1].gather(1, ids[begin:, None]).sum().item()


@pytest.mark.parametrize(("family", "batch_size"), [("compressed", "auto"), ("gemma2", "3")])
def test_accuracy_is_that_of_likelihoods_by_hand(questions, family, batch_size):
    model, tokenizer = (
        (compressed(), byte_tokenizer()) if family == "compressed" else (tiny_model(family), byte_tokenizer(bos=True))
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = ZeroShot([str(questions)], TaskSettings(task_batch_size=batch_size)).results(model, tokenizer)
    right, right_by_length = [], []
    for row, prompt, sample in zip(ROWS, PROMPTS, found["samples"]["questions"], strict=True):
        expected = [by_hand(model, tokenizer, prompt, choice) for choice in row["choices"]]
        assert [likelihood for likelihood, _ in sample["filtered_resps"]] == pytest.approx(expected, abs=2e-4)
        assert {argument[0] for argument in sample["arguments"]} == {prompt}
        right.append(max(range(len(expected)), key=expected.__getitem__) == row["gold"])
        scaled = [likelihood / len(choice) for likelihood, choice in zip(expected, row["choices"], strict=True)]
        right_by_length.append(max(range(len(scaled)), key=scaled.__getitem__) == row["gold"])
    results = found["results"]["questions"]
    assert results["acc,none"] == pytest.approx(sum(right) / 6)
    assert results["acc_norm,none"] == pytest.approx(sum(right_by_length) / 6)
    assert results["acc_stderr,none"] == pytest.approx(statistics.stdev(right) / 6**0.5)
    assert found["n-samples"]["questions"] == {"original": 6, "effective": 6}
    assert found["configs"]["questions"]["dataset_kwargs"] == {"data_files": {"test": str(questions)}}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_on_a_cpu_hold_so_many_tokens(questions, llama, monkeypatch):
    monkeypatch.setattr(lm_eval_adapter, "CPU_TOKENS", 64)
    shapes = []
    handle = llama.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append((kwargs.get("input_ids") if not args else args[0]).shape),
        with_kwargs=True,
    )
    ZeroShot([str(questions)]).results(llama, byte_tokenizer())
    handle.remove()
    assert max(rows for rows, _ in shapes) > 1
    assert all(rows == 1 or rows * (length + 1) <= 64 for rows, length in shapes)


def test_examples_are_others_and_rows_are_the_first(questions, llama):
    settings = TaskSettings(limit=4, fewshot=2, seed=3)
    found = ZeroShot([f"mine={questions}::cue=none"], settings).results(llama, byte_tokenizer())
    assert found["n-samples"]["mine"] == {"original": 6, "effective": 4}
    assert found["n-shot"]["mine"] == 2
    for row, sample in zip(ROWS, found["samples"]["mine"], strict=False):
        context = sample["arguments"][0][0]
        assert context.endswith(row["query"])
        shown = [f"{other['query']} {other['choices'][other['gold']]}" for other in ROWS if other != row]
        assert sum(example in context for example in shown) == 2
        assert f"{row['query']} " not in context.removesuffix(row["query"])
    again = ZeroShot([f"mine={questions}::cue=none"], settings).results(llama, byte_tokenizer())
    assert again["samples"] == found["samples"]


def test_a_cue_of_ones_own(questions, llama):
    found = ZeroShot([f"{questions}::cue=A:"], TaskSettings(limit=2)).results(llama, byte_tokenizer())
    contexts = [sample["arguments"][0][0] for sample in found["samples"]["questions"]]
    assert contexts == ["Question: what is wet?\nA:", "The sun is\nA:"]


def test_yaml_tasks_by_file_by_folder_and_by_name(yaml_file, llama):
    given = [
        ([str(yaml_file)], TaskSettings(limit=3)),
        ([f"{yaml_file.parent}/"], TaskSettings(limit=3)),
        (["tiny_questions"], TaskSettings([yaml_file.parent], limit=3)),
    ]
    with pytest.raises(ValueError, match=r"'tiny_questions' .* by tiny_questions: give it once"):
        ZeroShot([str(yaml_file), "tiny_questions"], TaskSettings([yaml_file.parent]), trust_remote_code=True)
    scores = [
        ZeroShot(*one, trust_remote_code=True).results(llama, byte_tokenizer())["samples"]["tiny_questions"]
        for one in given
    ]
    assert scores[0] == scores[1] == scores[2]
    assert [sample["arguments"][0][0] for sample in scores[0]] == [row["query"] for row in ROWS[:3]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"bad.jsonl, line 2 is not JSON .*: expected {\"query\": text"),
        ('{"query": "A", "choices": ["b", "c"], "gold": 2}', r"line 2 .*: expected .* got {\"query\": \"A\""),
        ('{"query": "A", "choices": ["b"], "gold": 0}', r"line 2 .*: expected .* got {\"query\": \"A\""),
        ('{"query": "A", "choices": ["b", "c"], "gold": true}', r"line 2 .*: expected .* got {\"query\": \"A\""),
        ("[1]", r"line 2: expected .* got \[1\]"),
    ],
)
def test_a_row_that_is_not_a_question_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        LocalTask("bad", path).rows()


def test_lines_end_where_json_lines_do(tmp_path):
    path = tmp_path / "odd.jsonl"
    odd = {**ROWS[0], "query": "one\u2028two\x85three"}
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in (odd, ROWS[1])), newline="")
    assert [row["query"] for row in LocalTask("odd", path).rows()] == [odd["query"], ROWS[1]["query"]]


def test_a_folder_needs_no_slash_and_a_file_may_begin_with_a_mark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("my tasks", "piqa"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.jsonl").write_text(json.dumps(ROWS[0]), encoding="utf-8-sig")
    [task] = named_tasks(["my tasks"])
    assert task.rows() == ROWS[:1]
    assert named_tasks(["piqa"]) == ["piqa"]


def test_more_examples_than_there_are_other_rows_are_refused(questions):
    with pytest.raises(ValueError, match=r"fewshot is 6, but .*questions\.jsonl has 6 rows, .*: give at most 5"):
        ZeroShot([str(questions)], TaskSettings(fewshot=6))
    assert ZeroShot([str(questions)], TaskSettings(fewshot=5)).loaded["tasks"]["questions"].config.num_fewshot == 5


def test_names_that_are_no_tasks_are_refused(questions, tmp_path, monkeypatch):
    for entry, message in {
        "./none.jsonl": r"there is no file .*none.jsonl",
        f"{questions}::limit=3": r"expected cue=none, cue=auto or cue=TEXT after '::', got 'limit=3'",
        "piqa::cue=none": "only a .jsonl file of questions takes a name or options",
        "x=piqa": "only a .jsonl file of questions takes a name or options",
        "./none": "expected the name of a task of lm-eval, a .yaml file",
        f"{questions},{questions}": "two tasks .* 'questions': .* NAME=FILE",
    }.items():
        with pytest.raises(ValueError, match=message):
            ZeroShot([entry])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the folder .*empty has no task: expected \.jsonl"):
        named_tasks([f"{tmp_path}/empty"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no question: expected"):
        ZeroShot([f"{tmp_path}/empty.jsonl"])
    # lm-eval's thousands of own tasks take seconds to list.
    own = functools.partial(lm_eval_adapter.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval_adapter, "TaskManager", own)
    with pytest.raises(ValueError, match=r"lm-eval [\d.]+ has no task 'piqqa': `lm_eval ls tasks` lists them"):
        ZeroShot(["piqqa"])
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        ZeroShot([str(questions), "piqa"], TaskSettings([tmp_path / "nowhere"]), trust_remote_code=True)
    (tmp_path / "hub.yaml").write_text((YAML % "x").replace("dataset_path: json", "dataset_path: no/such"))
    with pytest.raises(ValueError, match=r"could not be loaded: .*come from the hub: check the connection"):
        ZeroShot([f"{tmp_path}/hub.yaml"], trust_remote_code=True)


def test_a_task_file_is_read_only_if_it_is_trusted(yaml_file):
    for given in ([[str(yaml_file)]], [["piqa"], TaskSettings([yaml_file.parent])]):
        with pytest.raises(ValueError, match=r"can run Python code; give --trust_remote_code"):
            ZeroShot(*given)


def test_a_file_with_the_name_of_a_task_is_no_task_file(yaml_file, monkeypatch):
    monkeypatch.chdir(yaml_file.parent)
    yaml_file.rename("tiny_questions")
    with pytest.raises(ValueError, match="has no task 'tiny_questions'"):
        ZeroShot(["tiny_questions"])


def test_tasks_that_allow_no_examples_are_named(yaml_file, caplog):
    yaml_file.write_text(f"{yaml_file.read_text()}num_fewshot: 0\n")
    ZeroShot([str(yaml_file)], TaskSettings(fewshot=1), trust_remote_code=True)
    assert "allow no examples, and are asked without: tiny_questions" in caplog.text


def test_settings_that_can_not_be_are_refused():
    for given, message in (
        ({"limit": 0}, "limit is 0: expected .* 1 or more"),
        ({"fewshot": -1}, "fewshot is -1: expected .* 0 or more"),
        ({"task_batch_size": "0"}, "task_batch_size is '0': expected auto or .* at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskSettings(**given)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(zero_shot, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install lm-eval"):
        require_lm_eval()


def results_of(**scores):
    """Results as of lm-eval: tasks of 0/1 answers."""
    return {
        "results": {
            name: {"acc,none": statistics.mean(given), "acc_stderr,none": statistics.stdev(given) / len(given) ** 0.5}
            for name, given in scores.items()
        },
        "n-samples": {name: {"effective": len(given)} for name, given in scores.items()},
        "samples": {
            name: [{"doc_id": place, "filter": "none", "acc": one} for place, one in enumerate(given)]
            for name, given in scores.items()
        },
    }


def test_differences_are_paired_also_of_groups():
    dense = results_of(a=[1, 1, 0, 1], b=[0, 1, 1, 1, 1, 0])
    small = results_of(a=[1, 0, 0, 1], b=[0, 0, 1, 1, 1, 1])
    both = [1, 1, 0, 1, 0, 1, 1, 1, 1, 0], [1, 0, 0, 1, 0, 0, 1, 1, 1, 1]
    for results, scores in zip((dense, small), both, strict=True):
        results["results"]["all"] = {"acc,none": statistics.mean(scores), "acc_stderr,none": 0.1}
        results["group_subtasks"] = {"all": ["a", "b"]}
    found = differences(small, dense)
    assert found["a"]["acc,none"] == -0.25
    assert found["a"]["acc_paired_stderr,none"] == pytest.approx(statistics.stdev([0, -1, 0, 0]) / 2)
    changes = [one - other for other, one in zip(*both, strict=True)]
    assert found["all"]["acc_paired_stderr,none"] == pytest.approx(statistics.stdev(changes) / 10**0.5)
    small["results"]["all"]["acc,none"] = 0.55  # a mean of tasks, not of items
    assert differences(small, dense)["all"]["acc_paired_stderr,none"] is None
    assert [line.split()[0] for line in task_table(small, dense).splitlines()[2:]] == ["all"]
    with pytest.raises(ValueError, match="1 and 2 scores were given: expected equally many, at least two"):
        paired_difference([1], [1, 0])


def test_the_table_ends_with_the_mean_over_tasks():
    dense, small = results_of(a=[1, 1, 0, 1], b=[0, 1]), results_of(a=[1, 0, 0, 1], b=[1, 1])
    small["results"]["b"]["acc_stderr,none"] = "N/A"
    *_, last = task_table(small, dense).splitlines()
    errors = [statistics.stdev(given) / len(given) ** 0.5 for given in ([0, -1, 0, 0], [1, 0])]
    expected = f"+0.1250 ± {(errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2:.4f}"
    assert last.split()[:2] == ["mean", "acc"]
    assert last.endswith(expected)
    assert " 0.7500  " in last
    assert task_table(dense).splitlines()[0].split() == ["task", "metric", "rows", "score"]


def test_evaluate_runs_tasks_beside_the_reference(questions, tmp_path, capsys):
    path = tmp_path / "scores.json"
    words = ["evaluate", "random:llama", "--tasks", f"mine={questions}", "--limit", "5"]
    main([*words, "--reference", "random:qwen2", "--json", str(path)])
    figures = json.loads(path.read_text())["tasks"]
    for key, family in (("model", "llama"), ("reference", "qwen2")):
        expected = ZeroShot([f"mine={questions}"], TaskSettings(limit=5)).results(tiny_model(family), byte_tokenizer())
        assert figures[key]["results"] == expected["results"]
        assert figures[key]["config"]["limit"] == 5
        assert "samples" not in figures[key]
    change = figures["difference"]["mine"]["acc,none"]
    ours, theirs = (figures[key]["results"]["mine"]["acc,none"] for key in ("model", "reference"))
    assert change == ours - theirs
    shown = capsys.readouterr().out
    assert f"{change:+.4f} ± {figures['difference']['mine']['acc_paired_stderr,none']:.4f}" in shown
    assert "Detecting" not in shown


def test_the_plain_lm_eval_command_reads_an_export(questions, yaml_file, tmp_path):
    model, tokenizer = compressed(), byte_tokenizer()
    save_compressed(model, tmp_path / "small", tokenizer=tokenizer, verify=False)
    run = "import sys; sys.modules['lowrank_pl'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    words = [
        "--model", "hf", "--model_args", f"pretrained={tmp_path / 'small'},trust_remote_code=True",
        "--include_path", str(yaml_file.parent), "--tasks", "tiny_questions", "--device", "cpu", "--batch_size", "2",
        "--output_path", str(tmp_path / "out"), "--log_samples",
    ]  # fmt: skip
    done = STRANGER.run([sys.executable, "-c", run, *words], capture_output=True, timeout=1200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    expected = ZeroShot([str(yaml_file)], trust_remote_code=True).results(model, tokenizer)
    found = json.loads(results.read_text())
    assert found["results"]["tiny_questions"]["acc,none"] == expected["results"]["tiny_questions"]["acc,none"]
    for line, sample in zip(samples.read_text().splitlines(), expected["samples"]["tiny_questions"], strict=True):
        likelihoods = [float(one[0]) for one in json.loads(line)["filtered_resps"]]
        assert likelihoods == pytest.approx([one[0] for one in sample["filtered_resps"]], abs=1e-3)
