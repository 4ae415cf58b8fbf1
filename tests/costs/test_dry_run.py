"""What a dry run says, beside what real runs of tiny models take, and that it loads and writes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_pl import Base, build_factors, find_targets
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.cli import compare as compare_module
from lowrank_pl.cli.compare import compare_workload
from lowrank_pl.cli.fit_workload import fit_workload
from lowrank_pl.cli.main import main
from lowrank_pl.costs.anatomy import anatomy, read_config
from lowrank_pl.costs.dry_run import dry_run_decompose, estimate
from lowrank_pl.costs.estimate import Phase, held_on_to
from lowrank_pl.costs.machine import machine_of
from lowrank_pl.costs.probe import ASSUMED, probe
from lowrank_pl.costs.speed import multiply_adds
from lowrank_pl.costs.workload import Learner, Machine, Workload
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.llrc import LLRC
from lowrank_pl.methods.masks.masked_linear import insert_masks, masked_layers
from lowrank_pl.methods.masks.rescaled import Rescaled
from lowrank_pl.methods.recipes import recipe
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.storage import Storage
from lowrank_pl.training import module as learner_module
from lowrank_pl.training.finish_run import FinishRun
from lowrank_pl.training.module import RankLearner
from lowrank_pl.utils.environment import total_memory
from tests.helpers import SMOKE

TWO_SIDED = Decomposition("two_sided")
ALIKE = Decomposition("two_sided", token_weights=False)


@pytest.fixture(scope="module")
def llama():
    return anatomy("random:llama", length=64)


def phase_of(found, name):
    return next(phase for phase in found.phases if phase.name == name)


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_shapes_without_values_tell_what_the_model_is(family):
    found, model = anatomy(f"random:{family}", length=16), tiny_model(family)
    head = model.get_output_embeddings().weight.numel()
    assert found.modules == find_targets(model).modules
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.multiply_adds * 16 == multiply_adds(model, torch.zeros(1, 16, dtype=torch.long)) + 16 * head


def test_large_models_are_known_by_name():
    found = anatomy("shapes:llama-3.2-1b", dtype=torch.bfloat16, length=2)
    assert (found.parameters, found.bytes, len(found.modules)) == (1_235_814_400, 2_471_628_800, 16 * 7)
    assert read_config("shapes:llama-3.1-405b").num_hidden_layers == 126


def test_activations_grow_with_the_text_and_halve_with_the_type():
    short, wide = (anatomy("random:llama", length=length).kept for length in (64, 128))
    prune = anatomy("random:llama", dtype=torch.bfloat16, length=128).kept
    assert wide == pytest.approx(short, rel=0.1)
    assert prune < 0.8 * wide


@pytest.mark.parametrize("settings", [TWO_SIDED, ALIKE], ids=["weighted", "alike"])
def test_stores_take_the_disk_that_was_said(llama, tmp_path, settings):
    model, sequences = tiny_model("llama"), torch.arange(256).view(4, 64)
    build_factors(
        Subject(model, byte_tokenizer(), sequences, known_targets=find_targets(model)),
        settings=settings,
        directory=tmp_path / "factors",
    )
    work = Workload(sequences=4, length=64, decompositions=(settings,))
    said = estimate(llama, work, Machine()).totals()["disk"]
    # Headers and notes of files of some kilobytes are the rest.
    assert said <= bytes_in(tmp_path) <= 1.1 * said


@pytest.mark.parametrize("mask", [ARA(), Rescaled(), LLRC()])
def test_masked_layers_hold_the_factors_that_were_said(llama, mask, tmp_path):
    model, sequences = tiny_model("llama"), torch.arange(256).view(4, 64)
    targets = find_targets(model)
    store = build_factors(
        Subject(model, byte_tokenizer(), sequences, known_targets=targets), settings=TWO_SIDED, directory=tmp_path / "f"
    )
    insert_masks(model, store, mask, {target.name: 0.5 for target in targets.modules}, storage=Storage("auto"))
    real = sum(layer.left.nbytes + layer.right.nbytes for layer in masked_layers(model).values())
    work = Workload(keeps=(0.5,), length=64, learners=[Learner("learning", mask, steps=1, length=64)])
    assert phase_of(estimate(llama, work, Machine()), "learning").device["factors"] == real


def test_sharding_spreads_what_is_frozen_and_gathers_it_in_every_pass(llama):
    work = Workload(keeps=(0.5,), learners=[Learner("learning", ARA(), steps=3, length=64)])
    one, eight = (
        phase_of(estimate(llama, work, machine), "learning")
        for machine in (Machine("cuda"), Machine("cuda", 8, sharded=True))
    )
    assert eight.device["dense weights"] == one.device["dense weights"] / 8
    assert eight.device["factors"] == one.device["factors"] / 8
    assert eight.device["activations"] == one.device["activations"]
    assert eight.tokens == 8 * one.tokens
    whole = one.device["dense weights"] + one.device["factors"]
    assert (one.sent, eight.sent) == (0, 3 * 2 * whole * 7 / 8)


def test_a_base_that_is_read_in_shares_is_whole_nowhere(llama):
    def needs(kind, shared):
        settings, learners = Decomposition(kind), [Learner("learning", ARA(), steps=3, length=64)]
        work = Workload(
            sequences=16, length=64, decompositions=(settings,), learners=learners, shared=shared,
            streamed=shared and settings.block_by_block,
        )  # fmt: skip
        return estimate(llama, work, Machine("cuda", 8, sharded=True))

    shares, whole, gradients = needs("whitened", True), needs("whitened", False), needs("two_sided", True)
    assert [phase.name for phase in shares.phases] == ["moments of inputs", "decomposition", "load shares", "learning"]
    assert phase_of(shares, "load shares").device == {"dense weights": llama.bytes / 8}
    assert phase_of(shares, "load shares").read == llama.bytes / 8
    for phase in shares.phases:
        assert not [what for what, size in phase.host.items() if "weights" in what and size]
    # The sequences of one process, two of sixteen.
    assert phase_of(shares, "moments of inputs").host["hidden states"] == 2 * 64 * llama.hidden * llama.itemsize
    for phase, host in (
        ("load", "dense weights before they move"),
        ("learning", "dense weights before they are sharded"),
    ):
        assert phase_of(whole, phase).host[host] == llama.bytes
    back = phase_of(gradients, "weighted moments")
    assert back.host["hidden states before every block"] == len(llama.blocks) * 2 * 64 * llama.hidden * llama.itemsize
    assert "dense weights" not in {**back.host, **back.device}
    assert phase_of(gradients, "learning").host["dense weights before they are sharded"] == 0
    loaded = "every process loads the whole base into main memory before it is sharded"
    assert [loaded in found.notes for found in (shares, whole, gradients)] == [False, True, False]


@pytest.mark.parametrize(("memory", "forced", "waits"), [(2, None, False), (1.9, None, True), (9, True, True)])
def test_models_that_a_device_has_no_room_for_wait_in_main_memory(llama, memory, forced, waits):
    work = Workload(keeps=(0.5,), scored=64, score_length=64, models=3, exports=True, waiting=forced)
    found = estimate(llama, work, Machine("cuda", 8, sharded=True, memory=memory * llama.bytes))
    scoring, export = phase_of(found, "scoring"), phase_of(found, "export")
    assert (scoring.host if waits else scoring.device)["dense weights"] == llama.bytes
    assert ("compressed model" in export.host, export.device == {}) == (waits, waits)
    assert ("model of a fresh process" in export.beside) == waits
    assert any("scored and exported from main memory" in note for note in found.notes) == waits
    if waits:
        assert scoring.device["weights of a layer"] == llama.vocabulary * llama.hidden * llama.itemsize
        assert scoring.beside == {}


@pytest.mark.parametrize(("base", "shared"), [("shapes:llama-3.2-1b", True), ("random:llama", False)])
def test_fit_knows_which_base_is_read_in_shares(base, shared, capsys):
    fsdp = str(Path(SMOKE).parent / "strategy" / "fsdp.yaml")
    main(["fit", "-c", SMOKE, "-c", fsdp, "--model.base.name", base, "--trainer.devices", "8", "--dry_run", "h100"])
    said = capsys.readouterr().out
    assert ("load shares" in said) == ("each process reads its own share of the base" in said) == shared
    assert ("every process loads the whole base" in said) != shared


@pytest.mark.parametrize(("settings", "name"), [(TWO_SIDED, "weighted moments"), (ALIKE, "output gradients")])
def test_a_memory_budget_makes_groups_of_blocks_and_more_passes(llama, settings, name):
    def gradients(memory):
        work = Workload(sequences=4, length=64, decompositions=(settings,), memory=memory)
        return phase_of(estimate(llama, work, Machine()), name)

    whole, parts = gradients(None), gradients(1)
    assert parts.device[f"sums of {name}"] == whole.device[f"sums of {name}"] / 2
    assert parts.tokens == 2 * whole.tokens
    assert parts.disk == whole.disk


def test_a_cpu_holds_on_to_its_most():
    first, then = held_on_to([Phase("a", {"x": 2.0}, {"y": 3.0}), Phase("b", {"x": 1.0})])
    assert first.host == {"y": 3.0}
    assert then.host == {"freed before, not given back": 4.0}


def test_speeds_are_measured_and_leave_nothing_behind(llama, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("LOWRANK_HOME", str(home))
    found = probe(llama, read_config("random:llama"), dtype=torch.float32, device="cpu", length=32)
    assert all(speed > 0 for speed in (*found.multiply_adds.values(), found.disk))
    assert "one block" in found.source
    assert list(tmp_path.iterdir()) == []
    assert Phase("p", disk={"x": 2 * found.disk}, read=found.disk).seconds(found) == pytest.approx(3)


def test_fit_says_it_and_loads_nothing(tmp_path, monkeypatch, capsys):
    refuse_to_load(monkeypatch)
    run, figures = tmp_path / "run", tmp_path / "needs.json"
    main(["fit", "-c", SMOKE, "--run", str(run), "--json", str(figures), "--dry_run"])
    said = capsys.readouterr().out
    assert "learning" in said
    assert "measured here" in said
    found = json.loads(figures.read_text())
    assert found["phases"][0]["name"] == "load"
    assert found["total"]["memory"] > 0
    assert not run.exists()


def test_fit_is_right_about_its_tokens(tmp_path, monkeypatch):
    # A dry run takes nothing off for what a cache holds.
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))
    options = ["fit", "-c", SMOKE, "--run", str(tmp_path / "run"), "--finish.prompts", "[]"]
    main([*options, "--json", str(tmp_path / "needs.json"), "--dry_run", "h100"])
    said = json.loads((tmp_path / "needs.json").read_text())["total"]["tokens"]
    seen = []

    def count(module, args):
        if isinstance(module, torch.nn.Embedding):
            seen.append(args[0].numel())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        main(options)
    finally:
        handle.remove()
    # What was exported is scored in another process.
    assert sum(seen) == pytest.approx(said, rel=0.2)


def test_compare_says_it_and_loads_nothing(tmp_path, monkeypatch, capsys):
    refuse_to_load(monkeypatch)
    main([
        "compare", "random:llama", "--methods", "uniform", "best", "--scores", "t=x.txt", "--score_sequences", "{t: 2}",
        "--score_length", "32", "--run", str(tmp_path / "run"), "--dry-run",
    ])  # fmt: skip
    said = capsys.readouterr().out
    for name in ("moments of inputs", "weighted moments", "learning best", "gradient norms", "refit", "scoring"):
        assert name in said
    assert not (tmp_path / "run").exists()


def test_narrowing_is_counted_before_all_else(llama, tmp_path, monkeypatch, capsys):
    refuse_to_load(monkeypatch)
    main(["fit", "-c", SMOKE, "--run", str(tmp_path / "run"), "--model.prune.share", "null", "--dry_run"])
    said = capsys.readouterr().out
    assert said.index("weighted moments, all features") < said.index("widths of MLPs") < said.index("learning")
    assert "what comes after the narrowing is counted as if nothing were left out: it is less" in said
    settings = {"sequences": 4, "length": 32, "score_length": 32, "score_sequences": {}, "texts": ()}

    def work(names, keeps):
        return compare_workload({name: recipe(name) for name in names}, keeps=keeps, **settings)

    one, two = (
        phase_of(estimate(llama, work(["best+narrow", "fisher+narrow"], keeps), Machine()), "widths of MLPs")
        for keeps in ([0.5], [0.5, 0.6])
    )
    # Recipes share what is narrowed alike, sizes have widths of their own.
    assert two.work["double"] == 2 * one.work["double"] > 0
    assert two.disk["narrowed bases"] == 2 * llama.bytes
    assert not any("width" in phase.name for phase in estimate(llama, work(["best"], [0.5]), Machine()).phases)


def refuse_to_load(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was loaded")

    for module in (learner_module, compare_module):
        monkeypatch.setattr(f"{module.__name__}.load_base", refuse)
    monkeypatch.setattr("lowrank_pl.cli.compare.load_tokenizer", refuse)
    monkeypatch.setattr("lowrank_pl.training.data.load_tokenizer", refuse)


def test_factors_alone_are_made_block_by_block(llama):
    def needs(settings, base="shapes:llama-3.2-1b"):
        return dry_run_decompose(base, decomposition=settings, sequences=4, length=64, dtype="bfloat16", speeds="h100")

    model = anatomy("shapes:llama-3.2-1b", dtype=torch.bfloat16, length=64)
    whitened, alike, weighted = needs(Decomposition()), needs(ALIKE), needs(Decomposition("two_sided"))
    assert [phase.name for phase in whitened.phases] == ["moments of inputs", "decomposition"]
    assert [phase.name for phase in alike.phases] == ["moments of inputs", "output gradients", "decomposition"]
    assert [phase.name for phase in weighted.phases] == ["weighted moments", "decomposition"]
    for found in (whitened, alike, weighted):
        for phase in found.phases:
            assert phase.device["weights of a block"] + phase.device["weights around"] < model.bytes
    state = 4 * 64 * model.hidden * model.itemsize
    for found, name in ((alike, "output gradients"), (weighted, "weighted moments")):
        phase = phase_of(found, name)
        assert phase.host["hidden states before every block"] == len(model.blocks) * state
        assert phase.host["gradients by a hidden state"] == state
    # Where inputs are measured for themselves, the way forward is made for that.
    assert phase_of(alike, "output gradients").tokens == phase_of(whitened, "moments of inputs").tokens == 4 * 64
    assert phase_of(weighted, "weighted moments").tokens == 2 * 4 * 64
    assert phase_of(weighted, "weighted moments").read == 4 * model.bytes
    made = needs(Decomposition(), "random:llama")
    assert next(phase.name for phase in made.phases) == "load"
    again = needs(Decomposition("two_sided", at_keep=0.5))
    assert phase_of(again, "weighted moments").device["dense weights"] == model.bytes


def test_too_little_memory_is_said(capsys):
    settings = Decomposition("two_sided")
    dry_run_decompose("shapes:llama-3.2-1b", decomposition=settings, sequences=2, length=64, speeds="h100")
    assert "TOO LITTLE" not in capsys.readouterr().out
    dry_run_decompose("shapes:llama-3.1-405b", decomposition=settings, sequences=2, length=64, speeds="h100")
    assert "TOO LITTLE GPU MEMORY: 80.00 GB, and more is needed for weighted moments, d" in capsys.readouterr().out


def test_what_memory_has_no_room_for_is_measured_block_by_block(llama):
    work = Workload(sequences=16, length=64, decompositions=(Decomposition("two_sided"),))

    def needs(**changes):
        machine = Machine("cuda", memory=changes.pop("memory_of", None))
        return phase_of(estimate(llama, replace(work, **changes), machine), "weighted moments")

    whole = needs()
    sums = whole.device["sums of weighted moments"]
    assert needs(memory_of=llama.bytes + 2 * sums) == needs(memory=int(sums)) == whole
    for little in (needs(memory_of=llama.bytes + sums), needs(memory=int(sums) - 1)):
        assert little.device["sums of weighted moments"] == sums / 2
        assert little.device["dense weights"] == llama.bytes
        assert little.host["hidden states before every block"] == 2 * 16 * 64 * llama.hidden * llama.itemsize
        assert (little.tokens, little.work["forward"], little.read) == (
            2 * whole.tokens, 1.5 * whole.work["forward"], 0
        )  # fmt: skip


def test_what_is_not_known_is_said(llama):
    work = compare_workload(
        {"uniform": recipe("uniform")},
        keeps=[0.5],
        sequences=2,
        length=32,
        score_length=32,
        score_sequences={},
        texts=["t"],
    )
    assert any("scoring is left out" in note for note in estimate(llama, work, Machine()).notes)


def test_devices_as_lightning_takes_them():
    assert machine_of("auto", "8", 8, speeds="h100", sharded=True) == Machine("cuda", 64, sharded=True, memory=80e9)
    assert machine_of("cpu", [0, 1]) == Machine("cpu", 2, memory=total_memory())
    assert machine_of("cpu", "auto") == Machine("cpu", memory=total_memory())
    assert ASSUMED["h100"].multiply_adds["forward"] == 1e14


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_not_measured():
    with pytest.raises(ValueError, match=r"device 'cuda' can't be measured here.*--dry_run h100"):
        machine_of("cuda")


def test_impossible_input(tmp_path):
    with pytest.raises(ValueError, match=r"the shapes of 'llama-9' are not known: expected one of .*llama-3-70b"):
        anatomy("shapes:llama-9")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"can't read the configuration in .*check its config.json, or give shapes:"):
        read_config(str(tmp_path))
    with pytest.raises(ValueError, match="no fraction to keep was given"):
        Workload(keeps=())
    with pytest.raises(ValueError, match="windows is 0: expected a whole number of at least 1"):
        Workload(sequences=0)
    with pytest.raises(ValueError, match="0 processes were asked for"):
        Machine(processes=0)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({}, 8),
        ({"max_epochs": 3}, 24),
        ({"max_steps": 5}, 5),
        ({"max_steps": 200, "max_epochs": 2}, 16),
        ({"max_steps": 200, "max_epochs": -1}, 200),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 8),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 6),
    ],
)
def test_the_first_limit_ends_learning(limits, steps):
    data = {
        "learning": {"length": 64, "sequences": 8}, "statistics": {"length": None, "sequences": None},
        "validation": {"sequences": 0}, "batch_size": 1,
    }  # fmt: skip
    trainer = {
        "max_steps": -1, "max_epochs": None, "limit_train_batches": None, "accumulate_grad_batches": 1,
        "val_check_interval": None, "check_val_every_n_epoch": 1, "num_sanity_val_steps": 0, "limit_val_batches": None,
    }  # fmt: skip
    learner = RankLearner(Base("random:llama"), keep=0.5)
    work = fit_workload(learner, data, {**trainer, **limits}, FinishRun(), machine_of("cpu", 1))
    assert work.learners[0].steps == steps
