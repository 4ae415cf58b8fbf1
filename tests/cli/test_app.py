"""The command ``lowrank``: quick answers, help, and one clear sentence for every mistake."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from importlib import import_module

# Its loggers keep the stderr of the moment at which it is imported, which must be none that a test captures.
import lightning.pytorch  # noqa: F401
import pytest

from lowrank_pl.cli.app import COMMANDS, TRAINING_COMMANDS, flags_of, main
from tests.helpers.commands import failing
from tests.helpers.run_folder import plan_of

HEAVY = {"torch", "transformers", "lightning", "matplotlib", "scipy", "datasets"}
TEXT = ["--text", "python-docs::part=0%-10%", "--length", "32", "--sequences", "4"]


def function_of(command):
    module, _, name = COMMANDS[command][0].partition(":")
    return getattr(import_module(module), name)


def in_fresh_process(code, **environment):
    """Run ``code`` in a new process; return what it printed."""
    given = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**given, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- quick answers -------------------------------------------------------------------------------------------------


def test_help_version_and_mistyped_commands_import_nothing_heavy():
    quick = [name for name in COMMANDS if name not in TRAINING_COMMANDS]
    words = [[], ["--help"], ["--version"], ["fitt"], ["allocate", "--kep", "1"], *([name, "--help"] for name in quick)]
    code = f"""
import sys
from lowrank_pl.cli.app import main
for words in {words}:
    try:
        main(words)
    except SystemExit:
        pass
print(" ".join(sorted({HEAVY} & set(sys.modules))))
"""
    assert in_fresh_process(code).splitlines()[-1] == ""


def test_waiting_threads_of_openmp_rest_unless_told_otherwise():
    code = """
import os
from lowrank_pl.cli.app import main
main(["--version"])
print(os.environ["OMP_WAIT_POLICY"])
"""
    assert in_fresh_process(code).splitlines()[-1] == "PASSIVE"
    assert in_fresh_process(code, OMP_WAIT_POLICY="ACTIVE").splitlines()[-1] == "ACTIVE"


# -- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(capsys, words):
    main(words)
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", "", capsys.readouterr().out).split())
    for name, (_, sentence) in COMMANDS.items():
        assert f" {name} {sentence}" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_has_the_first_sentence_of_each_docstring(command):
    assert inspect.getdoc(function_of(command)).split("\n\n")[0] == COMMANDS[command][1]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("evaluate", ["MODEL --model", "--text", "Sequences per forward", "--limit", "--json"]),
        ("evaluate-plan", ["PLAN --plan", "--keep_curve", "--base", "--store"]),
        (
            "allocate",
            ["BASE --base", "--dtype", "--decomposition.kind", "--storage", "Every rank is a multiple of this"],
        ),
        ("export", ["--merge", "Write dense weights instead of factors"]),
        ("doctor", ["DIRECTORY --directory", "the one that the folder's plan names", "--prompts"]),
        ("report", ["RUN --run", "Folder of lowrank fit, export or compare", "--output", "--scores"]),
        ("refit", ["PLAN --plan", "--settings.sequences"]),
        ("prune", ["BASE --base", "--keep", "--share", "--by_block"]),
        ("rotate", ["BASE --base", "--seed", "--output"]),
        ("compare", ["BASE --base", "--score_sequences", "--recipes"]),
        ("bench", ["What to measure", "--storage", "--repeats"]),
    ],
)
def test_every_argument_is_a_flag_with_its_docstring(capsys, monkeypatch, command, words):
    monkeypatch.setenv("COLUMNS", "200")
    main([command, "--help"])
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", "", capsys.readouterr().out).split())
    for word in words:
        assert word in shown


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in TRAINING_COMMANDS])
def test_every_flag_is_explained(command):
    assert [flag.name for flag in flags_of(command) if flag.show and not flag.parameter.help] == []


# -- commands ------------------------------------------------------------------------------------------------------


def test_allocate_export_evaluate(tmp_path, capsys):
    plan, model = str(tmp_path / "plan.json"), str(tmp_path / "model")
    main(["allocate", "random:llama", "--keep", "0.6", *TEXT, "--output", plan, "--json", f"{plan}.figures"])
    main(["export", plan, "--output", model, "--json", str(tmp_path / "export.json")])
    main(["evaluate", model, *TEXT, "--json", str(tmp_path / "scores.json")])
    allocated, exported, scored = (
        json.loads((tmp_path / name).read_text()) for name in ("plan.json.figures", "export.json", "scores.json")
    )
    assert allocated["plan"] == plan
    assert exported["kept_targeted"] <= 0.6
    assert f" {scored['perplexity']:.4f} " in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--config={}", "-c={}", "--config {}", "-c {}"])
def test_a_command_reads_its_settings_from_yaml(tmp_path, capsys, flag):
    config = tmp_path / "evaluate.yaml"
    config.write_text("model: random:llama\ntext: python-docs\nlength: 16\nsequences: 2\n")
    main(["evaluate", *flag.format(config).split(), "--sequences", "3"])
    assert " 45 " in capsys.readouterr().out


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in TRAINING_COMMANDS])
def test_an_unknown_key_of_a_file_is_an_error(command, tmp_path, capsys):
    (tmp_path / "none.yaml").write_text("none: 1\n")
    message = failing(capsys, command, "-c", tmp_path / "none.yaml", status=2)
    assert "none" in message
    assert "none.yaml" in message


# -- mistakes ------------------------------------------------------------------------------------------------------


def test_an_unknown_command(capsys):
    message = failing(capsys, "fitt", status=2)
    assert "'fitt'" in message
    assert "'fit'" in message
    assert all(name in message for name in COMMANDS)


def test_an_old_command_is_told_its_new_name(capsys):
    assert "'prune'" in failing(capsys, "narrow", "random:llama", status=2)


@pytest.mark.parametrize(
    ("words", "new"),
    [
        ("allocate random:llama --windows 4", "--sequences"),
        ("evaluate --plan p --text python-docs", "lowrank evaluate-plan"),
        ("refit p --settings.windows 4", "--settings.sequences"),
        ("decompose random:llama --dry_run h100", "without a value"),
    ],
)
def test_an_old_flag_is_told_its_new_name(capsys, words, new):
    assert new in failing(capsys, *words.split(), status=2)


def test_words_that_mean_nothing(capsys):
    message = failing(capsys, "evaluate", "random:llama", "--length", "many", status=2)
    assert "many" in message
    assert "`lowrank evaluate --help`" in message
    assert "none.yaml" in failing(capsys, "evaluate", "-c", "none.yaml", status=2)
    assert "--base" in failing(capsys, "allocate", status=2)
    assert "more" in failing(capsys, "export", "plan.json", "more", status=2)


def test_words_that_would_change_the_terminal_are_escaped(capsys):
    assert "'no\\x1b[31m'" in failing(capsys, "no\x1b[31m", status=2)
    assert "no\\x1b plan" in failing(capsys, "export", "no\x1b\nplan")


@pytest.mark.parametrize("keep", ["0", "1.5", "-0.1"])
def test_an_impossible_keep(capsys, tmp_path, keep):
    message = failing(capsys, "allocate", "random:llama", "--keep", keep, "--output", tmp_path / "plan.json")
    assert f"keep is {float(keep)}: expected" in message
    assert not (tmp_path / "plan.json").exists()


def test_a_model_that_does_not_exist(capsys):
    assert "no such file or folder" in failing(capsys, "evaluate", "./none", "--text", "python-docs")


def test_a_text_that_can_not_be_read(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff\xfe\xfa" * 100)
    assert str(text) in failing(capsys, "evaluate", "random:llama", "--text", text)


@pytest.mark.parametrize(
    "words",
    [
        "allocate no/model --output",
        "allocate no/model --json",
        "bench decode --base no/model --json",
        "compare no/model --json",
        "decompose no/model --json",
        "doctor no/model --json",
        "evaluate no/model --text python-docs --json",
        "evaluate-plan no.json --text python-docs --json",
        "evaluate-plan no.json --text python-docs --keep_curve 0.5 --output",
        "export no.json --json",
        "fit -c smoke --model.base no/model --json",
        "prune no/model --keep 0.5 --json",
        "rotate no/model --json",
        "refit no.json --output",
        "refit no.json --json",
        "report no/run --output",
    ],
)
def test_a_folder_where_a_file_is_meant_is_refused_before_anything_is_loaded(capsys, tmp_path, words):
    assert "is a folder: name a file" in failing(capsys, *words.split(), tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        "compare no/model --run",
        "export {plan} --output",
        "fit -c smoke --run",
        "prune no/model --keep 0.5 --output",
        "rotate no/model --output",
    ],
)
def test_a_file_where_a_folder_is_meant_is_refused_before_anything_is_loaded(capsys, tmp_path, words):
    path = plan_of().save(tmp_path / "plan.json")
    assert "is a file: name a folder" in failing(capsys, *words.format(plan=path).split(), path)


@pytest.mark.parametrize(
    "words",
    [
        "allocate no/model --text {text} --json {text}",
        "doctor no/model --text {text} --json {text}",
        "evaluate no/model --text mine={text}::part=0%-50% --json {text}",
        "evaluate no/model --tasks {task} --json {task}",
        "evaluate-plan {plan} --text {text} --json {plan}",
        "evaluate-plan {plan} --text {text} --base {model} --json {model}/config.json",
        "evaluate-plan {plan} --text {text} --json {text}",
        "export {plan} --json {plan}",
        "export {plan} --base {model} --json {model}/config.json",
        "fit -c smoke --data.learning.text {text} --json {text}",
        "fit -c smoke --model.base.name {model} --json {model}/config.json",
        "heal -c heal --model.plan {model} --json {model}/config.json",
        "heal -c heal --model.plan {plan} --model.teacher {model} --json {model}/config.json",
        "heal -c heal --model.plan {plan} --json {plan}",
        "quantize {plan} --json {plan}",
        "quantize {plan} --base {model} --output {model}/config.json",
        "refit {plan} --json {plan}",
        "refit {plan} --base {model} --json {model}/config.json",
        "report no/run --scores {text} --output {text}",
        "upcycle -c upcycle --model.base.name {model} --json {model}/config.json",
    ],
)
def test_a_file_that_is_read_is_not_overwritten(capsys, tmp_path, words):
    (tmp_path / "text.txt").write_text("A text.")
    (tmp_path / "task.jsonl").write_text('{"query": "Who?", "choices": ["me", "you"], "gold": 0}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    plan_of().save(tmp_path / "plan.json")
    named = {name.partition(".")[0]: tmp_path / name for name in ("text.txt", "task.jsonl", "plan.json", "model")}
    assert "which would overwrite it: name another file" in failing(capsys, *words.format(**named).split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("evaluate no/model --text python-docs --limit 5", "without --tasks has no use for limit, which is 5"),
        ("evaluate no/model --text python-docs --fewshot 1", "without --tasks has no use for fewshot"),
        ("evaluate no/model --text python-docs --max_new_tokens 40", "without --prompts has no use for max_new_tokens"),
        ("evaluate no/model --prompts A --length 16", "without --text has no use for length, which is 16"),
        ("evaluate no/model --prompts A --batch_size 2", "without --text has no use for batch_size"),
        ("evaluate-plan no.json --text python-docs --output a.png", "without --keep_curve has no use for output"),
    ],
)
def test_settings_without_an_effect_are_refused(capsys, words, said):
    assert said in failing(capsys, *words.split())


def test_a_full_disk(capsys, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    words = ["evaluate", "random:llama", "--text", "python-docs", "--length", "16", "--sequences", "2"]
    main(words)
    capsys.readouterr()
    monkeypatch.setattr("os.fsync", full)
    said = failing(capsys, *words, "--json", tmp_path / "scores.json")
    assert f"the disk is full at '{tmp_path / 'scores.json'}' (No space left on device): free some space" in said
    assert [*tmp_path.iterdir()] == []


def test_no_memory_is_one_sentence(capsys, monkeypatch):
    def fail(_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr("lowrank_pl.plans.plan.RankPlan.load", fail)
    assert "memory ran out (" in failing(capsys, "export", "none.json")


def test_a_full_disk_in_the_thread_of_tensorboard_is_one_line(caplog, tmp_path):
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    before = threading.excepthook
    try:
        main(["--version"])
        writer = EventFileWriter(str(tmp_path))
        writer._async_writer._writer.write = lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        writer._async_writer._byte_queue.put(b"event")
        writer._async_writer._worker.join()
    finally:
        threading.excepthook = before
    (said,) = caplog.messages
    assert said.startswith("TensorBoard's events can't be written: the disk is full (No space left on device)")


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("LOWRANK_DEBUG", "1")
    with pytest.raises(ValueError, match="no plan at"):
        main(["export", "none.json"])


def test_mistakes_of_ours_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("lowrank_pl.plans.plan.RankPlan.load", lambda _: {}["key"])
    with pytest.raises(KeyError, match="key"):
        main(["export", "none.json"])


def test_only_expected_warnings_are_silenced():
    main(["--version"])
    with pytest.warns(UserWarning, match="something else"):
        warnings.warn("something else", UserWarning, stacklevel=1)


def test_lightnings_advertisements_are_silenced(caplog):
    main(["--version"])
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.warning("Tip: For seamless remote access")
    log.warning("something else")
    assert caplog.messages == ["something else"]
