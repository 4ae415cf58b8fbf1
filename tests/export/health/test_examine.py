"""The findings of ``lowrank doctor`` on healthy folders, and on each defect made on purpose."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_pl import ModulePlan, RankPlan, load_compressed, token_windows
from lowrank_pl.cli.allocate import allocate
from lowrank_pl.cli.app import main
from lowrank_pl.cli.export import export
from lowrank_pl.evaluate import likelihood as evaluate
from lowrank_pl.evaluate.generation import Continuation
from lowrank_pl.export.export import save_compressed
from lowrank_pl.export.health import quality as doctor_quality
from lowrank_pl.export.health.diagnosis import Diagnosis, Finding
from lowrank_pl.export.health.examine import diagnose
from lowrank_pl.export.health.quality import Prompts, check_generation, check_text
from lowrank_pl.export.health.tokenizer import check_tokenizer
from lowrank_pl.export.health.weights import check_plan, check_weights, tensors_of
from lowrank_pl.export.reload import ExportError
from lowrank_pl.models.base import Base
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.plan import ZERO
from lowrank_pl.text.sequences import Calibration, tokenizer_fingerprint

TEXT = "python-docs::part=0%-10%"
UP = "model.layers.0.mlp.up_proj"
QUICK = {"text": Calibration(TEXT, length=32, sequences=2), "prompts": Prompts(())}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A tiny Llama compressed to half its size, as factors and merged."""
    home = tmp_path_factory.mktemp("doctor")
    plan = home / "plan.json"
    allocate(Base("random:llama"), keep=0.5, output=plan, store=home / "store", calibration=Calibration(TEXT, 32, 8))
    with pytest.MonkeyPatch.context() as patch:
        # The first test has the fresh process look at one of them.
        patch.setattr("lowrank_pl.export.export.check_reload", lambda *_, **__: None)
        export(plan, output=home / "small")
        export(plan, output=home / "merged", merge=True)
    return home


@pytest.fixture
def copied(exports, tmp_path, monkeypatch):
    """A copy of the export to damage; the fresh process is left out, since nothing but it would take the time."""
    monkeypatch.setattr("lowrank_pl.export.health.examine.compare_reload", lambda *_, **__: None)
    return shutil.copytree(exports / "small", tmp_path / "small")


def found(diagnosis):
    """The findings by name, each health and sentence."""
    return {finding.name: (finding.health, finding.sentence) for finding in diagnosis.findings}


# -- healthy ---------------------------------------------------------------------------------------------------------


def test_a_healthy_export(exports, capsys, caplog, monkeypatch):
    monkeypatch.chdir(exports)
    folder, figures = Path("small"), exports / "figures.json"
    words = ["--text", TEXT, "--length", "32", "--sequences", "4", "--prompts", "A list", "--max_new_tokens", "8"]
    main(["doctor", str(folder), *words, "--json", str(figures)])
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1].startswith(f"{exports / folder} is healthy: 13 checks passed")
    assert "4 of 4 sequences to score hold text that is also learned from" in caplog.text
    assert "prompt    'A list'\n  before  " in shown
    read = json.loads(figures.read_text())
    names = ["code", "digests", "loads", "weights", "factors", "types", "plan", "counts"]
    names += ["token ids", "BOS", "tokenizer", "quality"]
    assert list(read["findings"]) == [*names, "generation"]
    assert {read["findings"][name]["health"] for name in names} == {"healthy"}
    assert read["directory"] == str(exports / folder)
    plan = RankPlan.load(folder / "plan.json")
    counts = read["findings"]["counts"]
    assert (counts["parameters"], counts["bytes"]) == (plan.kept_model_parameters, plan.bytes)
    tokens = token_windows(TEXT, byte_tokenizer(), length=32, sequences=4)
    expected = evaluate.divergence(load_compressed(folder), tiny_model("llama"), tokens)
    quality = read["findings"]["quality"]
    assert (quality["kl"], quality["excess_nats"]) == pytest.approx((expected.kl, expected.excess_nats))
    assert quality["agreement"] == pytest.approx(expected.agreement)
    assert [set(sample) for sample in read["samples"]] == [{"prompt", "model", "dense"}]


def test_a_merged_export(exports, monkeypatch):
    monkeypatch.setattr("lowrank_pl.export.health.examine.compare_reload", lambda *_, **__: None)
    says = found(diagnose(exports / "merged", **QUICK))
    assert says["plan"][1].endswith("factors were merged into dense weights")
    assert says["merged ranks"] == ("healthy", "no merged weight has more than its planned rank")
    assert {health for health, _ in says.values()} == {"healthy"}


def test_every_expert_of_a_merged_mixture_is_examined(tmp_path, monkeypatch):
    plan = tmp_path / "plan.json"
    mixture = Base("random:mixtral")
    allocate(mixture, keep=0.6, output=plan, store=tmp_path / "store", calibration=Calibration(TEXT, 32, 8))
    monkeypatch.setattr("lowrank_pl.export.export.check_reload", lambda *_, **__: None)
    export(plan, output=tmp_path / "merged", merge=True)
    says = found(diagnose(tmp_path / "merged", **QUICK))
    assert says["loads"][0] == "healthy"
    assert (says["plan"][0], says["plan"][1][:14]) == ("healthy", "all 32 modules")
    assert says["merged ranks"] == ("healthy", "no merged weight has more than its planned rank")


def test_a_plain_checkpoint(tmp_path, monkeypatch):
    tiny_model("gpt2").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    diagnosis = diagnose(tmp_path, **{**QUICK, "prompts": Prompts(["A list"], max_new_tokens=4)})
    says = found(diagnosis)
    assert not {"plan", "counts", "tokenizer", "merged ranks"} & set(says)
    assert says["loads"][0] == "healthy"
    assert "no dense model to compare with" in says["generation"][1]
    assert diagnosis.samples[0].dense is None
    monkeypatch.setattr("lowrank_pl.export.health.examine.compare_reload", lambda *_, **__: None)
    says = found(diagnose(tmp_path, base="random:gpt2", **QUICK))
    assert says["tokenizer"] == ("healthy", "it makes the same tokens as the base's")
    assert "0.000 nats more; KL 0.000 nats, the same most likely token in 100.0 %" in says["quality"][1]


# -- defects ---------------------------------------------------------------------------------------------------------


def weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def edited(name, change):
    def damage(folder):
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return damage


def set_nan(tensors):
    tensors[f"{UP}.right"][0, 0] = torch.nan


def set_zero(tensors):
    # Of this module pivots are columns, so that these are all that there is.
    tensors[f"{UP}.weight"].zero_()


def swap(tensors):
    tensors[f"{UP}.weight"], tensors[f"{UP}.right"] = tensors[f"{UP}.right"], tensors[f"{UP}.weight"]


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def tokenizer(made):
    return lambda folder: made().save_pretrained(folder)


def larger_vocabulary():
    made = byte_tokenizer()
    made.add_tokens(["Energy"])
    return made


@pytest.mark.parametrize(
    ("damage", "name", "text"),
    [
        (
            weights(set_nan),
            "weights",
            f"NaN or infinity in {UP}.right; the folder is damaged or was edited: export it again",
        ),
        (weights(set_zero), "factors", f"{UP}.weight holds only zeros"),
        (weights(swap), "loads", "weights of other shapes than the config says"),
        (weights(swap), "plan", f"{UP} has parts of shapes ["),
        (weights(lambda tensors: tensors.pop(f"{UP}.right")), "loads", f"no {UP}.right"),
        (weights(lambda tensors: tensors.pop(f"{UP}.right")), "plan", f"{UP} is missing or not a matrix"),
        (truncate, "loads", "can't read the weights in"),
        (
            edited("plan.json", lambda plan: plan["modules"][UP].update(rank=3)),
            "plan",
            "and shape [96, 32], but the plan has rank 3 and shape [96, 32]; the folder is damaged or was edited",
        ),
        (
            edited("plan.json", lambda plan: plan["modules"][UP].update(rank="dense")),
            "plan",
            "the plan has no low rank",
        ),
        (edited("plan.json", lambda plan: plan["modules"].pop(UP)), "plan", f"{UP} is low-rank and not in the plan"),
        (
            edited("plan.json", lambda plan: plan["parameters"]["model"].update(dense=9**9)),
            "counts",
            "it is for another model",
        ),
        (lambda folder: (folder / "plan.json").write_text("{"), "plan", "Invalid JSON"),
        (
            edited("config.json", lambda config: config["quantization_config"]["modules"].update({UP: 3})),
            "loads",
            "weights of other shapes than the config says",
        ),
        (
            edited("config.json", lambda config: config["quantization_config"].update(schema=9)),
            "loads",
            "lowrank schema 9",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "loads", "not a valid JSON file"),
        (edited("config.json", lambda config: config.update(quantization_config=[1])), "loads", "AttributeError"),
        (
            tokenizer(lambda: byte_tokenizer(bos=True)),
            "tokenizer",
            "they differ in special tokens around a text, chat template; put the base's",
        ),
        (tokenizer(larger_vocabulary), "token ids", "a plain text has the token 261, but the model knows 0 to 260"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer", "give a folder with the tokenizer's files"),
    ],
)
def test_a_defect_is_found_and_named(copied, damage, name, text):
    damage(copied)
    diagnosis = diagnose(copied, **QUICK)
    health, said = found(diagnosis)[name]
    assert health == "broken"
    assert text in said
    assert diagnosis.health == "broken"
    assert "quality" not in found(diagnosis)


@pytest.mark.parametrize(
    ("damage", "name", "text"),
    [
        (
            lambda folder: (folder / "plan.json").unlink(),
            "plan",
            "there is no plan.json to compare ranks with; export with the plan",
        ),
        (
            edited("plan.json", lambda plan: plan["modules"][UP].pop("storage")),
            "plan",
            f"{UP} is stored pivoted, unlike in the plan, so that the plan's counts are wrong; save the plan that",
        ),
        (
            edited("plan.json", lambda plan: plan["bytes"].update(per_parameter=2)),
            "counts",
            " bytes, but the plan ",
        ),
        (
            edited("config.json", lambda config: config.update(bos_token_id=5)),
            "BOS",
            "the tokenizer's BOS is 257, the config's 5; set both to the base's",
        ),
        (
            edited("config.json", lambda config: config.update(pad_token_id=-1)),
            "token ids",
            "the model knows the tokens 0 to 260, but config pad is -1; check whether the base has the same ids",
        ),
    ],
)
def test_a_difference_that_may_be_intended_is_a_warning(copied, damage, name, text):
    damage(copied)
    diagnosis = diagnose(copied, **QUICK)
    health, said = found(diagnosis)[name]
    assert health == "warning"
    assert text in said
    assert diagnosis.health == "warning"
    assert f"{copied} is healthy: " in diagnosis.sentence()
    assert name in diagnosis.sentence()


def test_code_in_the_folder_is_named_and_not_run(exports, tmp_path):
    folder, marks = shutil.copytree(exports / "small", tmp_path / "small"), tmp_path / "marks"
    marks.mkdir()
    for name in ("hf_format.py", "hf_layers.py", "hashlib.py"):
        file = folder / name
        old = file.read_text() if file.exists() else ""
        mark = f"open({str(marks / name)!r}, 'w')\n"
        # A __future__ import has to be first.
        file.write_text(old.replace("\n\nimport", f"\n\n{mark}import", 1) if old else mark)
    says = found(diagnose(folder, **QUICK))
    assert says["code"][0] == "warning"
    assert "hashlib.py, hf_format.py, hf_layers.py; nothing here has run them" in says["code"][1]
    assert says["loads"][0] == "healthy"
    assert not list(marks.iterdir())


def test_a_flipped_bit_is_found_where_no_other_check_sees_it(copied):
    file = copied / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    diagnosis = diagnose(copied, **QUICK)
    assert [finding.name for finding in diagnosis.named("broken")] == ["digests"]
    assert "model.safetensors; copy the folder again" in found(diagnosis)["digests"][1]


def test_components_for_smaller_sizes_are_examined(exports, tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank_pl.export.export.check_reload", lambda *_, **__: None)
    monkeypatch.setattr("lowrank_pl.export.health.examine.compare_reload", lambda *_, **__: None)
    folder = export(exports / "plan.json", output=tmp_path / "any", any_size=True)
    health, said = found(diagnose(folder, **QUICK))["components"]
    assert (health, said.split(",")[0]) == ("healthy", "there are components of 14 layers for smaller sizes")
    (folder / "nested" / f"{UP}.safetensors").unlink()
    says = found(diagnose(folder, **QUICK))
    assert f"smaller sizes can't be cut: {UP}: " in says["components"][1]
    assert says["digests"][0] == says["components"][0] == "broken"


def test_a_merged_weight_of_another_rank_is_found(exports, tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank_pl.export.health.examine.compare_reload", lambda *_, **__: None)
    folder = shutil.copytree(exports / "merged", tmp_path / "merged")
    weights(lambda tensors: tensors[f"{UP}.weight"].normal_())(folder)
    health, said = found(diagnose(folder, **QUICK))["merged ranks"]
    assert health == "broken"
    assert f"merged weights have more than the planned rank: {UP} (rank " in said


def test_a_weight_too_many_is_found_by_the_fresh_process(exports, tmp_path):
    folder = shutil.copytree(exports / "small", tmp_path / "small")
    weights(lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))(folder)
    health, said = found(diagnose(folder, **QUICK))["loads"]
    assert (health, said) == ("broken", "reloading it finds unexpected weights: model.extra.weight; export it again")


def test_a_fresh_process_that_fails_is_quoted_in_one_line(exports, tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no such kernel')\n")
    monkeypatch.setattr("lowrank_pl.export.reload_probe.__file__", str(broken))
    health, said = found(diagnose(exports / "small", **QUICK))["loads"]
    assert health == "broken"
    assert said == (
        "a fresh process can't load it (exit status 1): RuntimeError: no such kernel; --json has its whole output"
    )


@pytest.mark.parametrize(
    ("inside", "text"),
    [
        ("notes.txt", "the folder holds no config.json but notes.txt; give the folder of a model"),
        ("model/config.json", "the folder holds no config.json but model; give "),
    ],
)
def test_a_folder_that_is_no_model(tmp_path, capsys, inside, text):
    (tmp_path / inside).parent.mkdir(exist_ok=True)
    (tmp_path / inside).write_text("{}")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(tmp_path)])
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert "loads    broken" in shown.out
    assert f"lowrank: {tmp_path} is broken: loads: {text}" in shown.err


def test_arguments_that_can_not_be_used_are_an_error(copied, tmp_path, caplog, monkeypatch):
    with monkeypatch.context() as patch:
        # No check of the model comes before the first of these errors, and no fresh process before any.
        patch.setattr("lowrank_pl.export.health.examine.compare_reload", None)
        with pytest.raises(ValueError, match="2048 positions"):
            diagnose(copied, **{**QUICK, "text": Calibration(TEXT, length=4096, sequences=1)})
        patch.setattr("lowrank_pl.export.health.examine._load", None)
        with pytest.raises(ValueError, match="is no file, folder or glob"):
            diagnose(copied, **{**QUICK, "text": Calibration("gone.txt")})
        with pytest.raises(ValueError, match="unknown family"):
            diagnose(copied, base="random:none", **QUICK)
        with pytest.raises(ValueError, match="max_new_tokens is 0: expected a whole number of at least 1"):
            Prompts(max_new_tokens=0)
    with pytest.raises(ValueError, match=r"none': give the folder of an export or of a checkpoint"):
        diagnose(tmp_path / "none")
    with pytest.raises(ValueError, match="unknown family"):
        diagnose(copied, base="random:none", **QUICK)
    with pytest.raises(ValueError, match="2048 positions"):
        diagnose(copied, **{**QUICK, "text": Calibration(TEXT, length=4096, sequences=1)})
    edited("plan.json", lambda plan: plan["origin"].update(base="./gone"))(copied)
    says = found(diagnose(copied, **QUICK))
    assert "no dense model to compare with" in says["quality"][1] or "uniform guess" in says["quality"][1]
    assert "name it with --base: base model './gone'" in caplog.text


# -- the parts -------------------------------------------------------------------------------------------------------


def hand_made(rank=8):
    """A tiny Llama of which two modules are low-rank, and its plan; a third one is planned dense."""
    model = tiny_model("llama")
    model.set_submodule(UP, LowRankLinear(32, 96, rank, bias=False))
    other = UP.replace("0", "1")
    model.set_submodule(other, PivotedLinear(32, 96, rank, side="out", bias=False))
    modules = {
        UP: ModulePlan((96, 32), rank),
        other: ModulePlan((96, 32), rank, storage="pivoted"),
        "model.layers.0.self_attn.q_proj": ModulePlan((32, 32)),
    }
    parameters = tiny_model("llama").num_parameters()
    plan = RankPlan(method="hand", keep=0.5, modules=modules, model_parameters=parameters)
    return model, plan, {UP: rank, other: {"rank": rank, "storage": "pivoted", "side": "out"}}


def test_zero_factors_are_healthy_where_the_base_is_zero_too():
    model, plan, entries = hand_made()
    model.get_submodule(UP).weight.data.zero_()
    tensors, noted = tensors_of(model), replace(plan, notes=(f"{UP}: {ZERO}",))
    assert [check_weights(tensors, entries, one.zero_modules)[1].health for one in (plan, noted)] == [
        "broken",
        "healthy",
    ]


def test_ranks_and_counts_of_both_kinds_of_layers():
    model, plan, entries = hand_made()
    shapes, counts = check_plan(plan, tensors_of(model), entries)
    assert (shapes.health, counts.health) == ("healthy", "healthy")
    pivots = 8
    assert counts.figures["parameters"] == model.num_parameters() + pivots
    model.half()
    _, counts = check_plan(plan, tensors_of(model), entries)
    assert (counts.health, counts.figures["parameters"]) == ("warning", counts.figures["planned_parameters"])


def test_dead_parts_and_mixed_types():
    model, _, entries = hand_made()
    pivoted = model.get_submodule(UP.replace("0", "1"))
    pivoted.weight.data.zero_()
    says = {finding.name: finding for finding in check_weights(tensors_of(model), entries)}
    assert says["factors"].health == "warning"
    assert "the coefficients model.layers.1.mlp.up_proj.weight are all zero; check" in says["factors"].sentence
    pivoted.right.data.zero_()
    model.model.norm.half()
    says = {finding.name: finding for finding in check_weights(tensors_of(model), entries)}
    assert says["factors"].figures["zero"] == ["model.layers.1.mlp.up_proj.right"]
    assert says["types"].message == "tensors have several types (22 in float32, 1 in float16)"
    pivoted.half()
    says = {finding.name: finding for finding in check_weights(tensors_of(model), {UP: 8})}
    assert says["types"].health == "warning"
    model.get_submodule(UP).right.data = model.get_submodule(UP).right.data.half()
    says = {finding.name: finding for finding in check_weights(tensors_of(model), entries)}
    assert says["types"].message == f"the parts of {UP} have different types"


def test_bos_rules():
    config = tiny_model("llama").config

    def bos(tokenizer):
        return next(finding for finding in check_tokenizer(tokenizer, config, 261) if finding.name == "BOS")

    plain, with_bos = bos(byte_tokenizer()), bos(byte_tokenizer(bos=True))
    assert (plain.health, plain.message) == ("healthy", "no BOS is put before texts, none before chats")
    assert with_bos.health == "healthy"
    assert with_bos.message.startswith("BOS (257) is put before every text, 1 before chats; tokenize chats that are")
    assert (with_bos.figures["in_chats"], with_bos.figures["in_chats_as_text"]) == (1, 2)
    tokenizer = byte_tokenizer(bos=True)
    template = tokenizer.chat_template
    tokenizer.chat_template = "{{ bos_token }}" + template
    assert (bos(tokenizer).health, bos(tokenizer).message) == ("warning", "a chat begins with 2 BOS")
    tokenizer.chat_template = template.removeprefix("{{ bos_token }}")
    assert (bos(tokenizer).health, bos(tokenizer).message) == (
        "warning",
        "BOS (257) is put before every text, but not before chats",
    )
    tokenizer.chat_template = "{{ raise_exception('no user may speak') }}"
    assert bos(tokenizer).message == "the chat template rejects a single user message: no user may speak"
    tokenizer.chat_template = "{{ 1 + messages[0]['content'] }}"
    assert bos(tokenizer).health == "warning"
    tokenizer.chat_template = None
    assert bos(tokenizer).message == "BOS (257) is put before every text; there is no chat template"


def test_a_model_worse_than_chance_is_broken_if_the_dense_one_is_not(sequences):
    """Three that share all but their heads: a learned one, one as it was made, and one that is sure of nonsense."""
    good, random, bad = (tiny_model("llama") for _ in range(3))
    for model in (good, bad):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    bad.lm_head.weight.data *= 3
    optimizer = torch.optim.Adam([good.lm_head.weight], lr=0.03)
    for _ in range(20):
        optimizer.zero_grad()
        good(sequences, labels=sequences).loss.backward()
        optimizer.step()
    assert check_text(good, good, sequences).health == "healthy"
    assert check_text(good, None, sequences).health == "healthy"
    assert check_text(bad, good, sequences).health == "broken"
    assert "worse than a uniform guess" in check_text(bad, good, sequences).message
    assert check_text(random, random, sequences).health == "healthy"
    assert check_text(bad, random, sequences).health == "warning"
    assert check_text(bad, None, sequences).health == "warning"
    bad.lm_head.weight.data.fill_(torch.nan)
    assert check_text(bad, None, sequences).message.startswith("the logits of sequence 0 are NaN or infinite")


@pytest.mark.parametrize(
    ("after", "before", "health", "text"),
    [
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], "healthy", "0.0 % of the 4-grams repeat, before 0.0 %"),
        ([7] * 8, [1, 2, 3, 4, 5, 6], "warning", "80.0 % of the 4-grams repeat, before 0.0 %; read the texts above"),
        ([7] * 8, [7] * 8, "healthy", "80.0 % of the 4-grams repeat, before 80.0 %"),
        ([], [1, 2], "warning", "1 of 1 prompts have no answer, before 0; 0.0 % of the 4-grams repeat"),
    ],
)
def test_generation_compared_with_the_dense_model(llama, tokenizer, monkeypatch, after, before, health, text):
    other = tiny_model("llama")
    said = {id(llama): after, id(other): before}
    monkeypatch.setattr(
        doctor_quality,
        "continuations",
        lambda model, *_, **__: [Continuation(" ".join(map(str, said[id(model)])), tuple(said[id(model)]))],
    )
    finding, samples = check_generation(llama, other, tokenizer, Prompts(["A list"], max_new_tokens=8))
    assert finding.health == health
    assert finding.sentence.startswith(text)
    assert samples[0].dense == " ".join(map(str, before))


def test_the_verdict():
    good, warning, broken, worse = (
        Finding(name, health, f"{name} says", {}, "do")
        for name, health in [("a", "healthy"), ("b", "warning"), ("c", "broken"), ("d", "broken")]
    )
    assert Diagnosis("x", [good]).sentence() == "x is healthy: 1 check passed"
    assert Diagnosis("x", [good, warning]).sentence() == "x is healthy: 2 checks passed, with warnings on b"
    assert Diagnosis("x", [good, broken, warning, worse]).sentence() == "x is broken: c (and d): c says; do"


def test_a_diagnosis_survives_json():
    diagnosis = Diagnosis("x", [Finding("a", "broken", "a says", {"wrong": ["b"]})], protocol={"windows": 2})
    values = json.loads(json.dumps(diagnosis.to_dict()))
    assert Diagnosis.from_dict(values).to_dict() == values


def test_an_older_diagnosis_that_says_sick_is_broken():
    read = Diagnosis.from_dict({"directory": "x", "findings": {"a": {"health": "sick", "said": "a says"}}})
    assert read.health == "broken"


def test_an_unknown_health_is_refused():
    with pytest.raises(ValueError, match="'fine': expected one of healthy, warning, broken"):
        Diagnosis.from_dict({"directory": "x", "findings": {"a": {"health": "fine", "said": "a says"}}})


# -- at the end of every export --------------------------------------------------------------------------------------


def test_a_broken_export_is_removed(tmp_path):
    model, plan, _ = hand_made()
    wrong = replace(plan, modules={**plan.modules, UP: ModulePlan((96, 32), 5)})
    with pytest.raises(ExportError, match=rf"the export was removed: plan: .*{UP} has rank 8 .*the plan has rank 5"):
        save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(), plan=wrong)
    model.get_input_embeddings().weight.data[200, 0] = torch.inf  # no probe reads this row
    with pytest.raises(ExportError, match=r"removed: weights: NaN or infinity in model.embed_tokens.weight"):
        save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(), plan=plan)
    assert not list(tmp_path.iterdir())


def test_an_export_logs_warnings(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("lowrank_pl.export.export.check_reload", lambda *_, **__: None)
    model, plan, _ = hand_made()
    plan = replace(plan, fingerprint={"tokenizer": tokenizer_fingerprint(byte_tokenizer())})
    with caplog.at_level(logging.WARNING):
        save_compressed(model, tmp_path / "good", tokenizer=byte_tokenizer(), plan=plan)
        save_compressed(model, tmp_path / "merged", tokenizer=byte_tokenizer(), plan=plan, merge=True)
    assert caplog.text == ""
    save_compressed(model, tmp_path / "other", tokenizer=byte_tokenizer(bos=True), plan=plan)
    assert "tokenizer: it is not, byte for byte, the one" in caplog.text
    assert (tmp_path / "other").exists()
