"""Forecasts beside what real runs of tiny models take, and what is printed of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from lowrank_pl import build_factors, find_targets
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.costs import forecast
from lowrank_pl.costs.estimate import Speeds
from lowrank_pl.costs.forecast import estimate, print_forecast
from lowrank_pl.costs.machine import Machine
from lowrank_pl.costs.model_sizes import model_sizes
from lowrank_pl.costs.workload import Learner, Preparation, Refits, Run, Scoring, Step, Workload
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.llrc import LLRC
from lowrank_pl.methods.masks.masked_linear import insert_masks, masked_layers
from lowrank_pl.methods.masks.rescaled import Rescaled
from lowrank_pl.methods.prune.settings import LLMPruner, WidthPruning
from lowrank_pl.methods.refit.settings import Joint
from lowrank_pl.models.base import Base
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.storage import Storage
from lowrank_pl.text.sequences import Calibration

LENGTH = 64
WHITENED = Decomposition()
WEIGHTED = Decomposition("two_sided")
ALIKE = Decomposition("two_sided", token_weights=False)
SPEEDS = Speeds("nowhere", dict.fromkeys(("model", "float32", "float64", "svd", "disk"), 1e9))
ONE = Machine()
EIGHT = Machine("cuda", 8, sharded=True, memory=1e9)
LEARNER = Learner("learning", ARA(), Step(LENGTH), steps=3)


@pytest.fixture(scope="module")
def llama():
    return model_sizes(Base("random:llama"), length=LENGTH)


@pytest.fixture(scope="module")
def large():
    return model_sizes(Base("shapes:llama-3.2-1b", dtype="bfloat16"), length=LENGTH)


def preparing(*decompositions, sequences=4, **settings):
    return Preparation(Calibration(length=LENGTH, sequences=sequences), decompositions, **settings)


def phases(model, work, machine=ONE):
    return {phase.name: phase for phase in estimate(Run(model, work, machine)).phases}


def factors(model, directory, settings):
    sequences = torch.arange(256).view(4, LENGTH)
    return build_factors(Subject(model, byte_tokenizer(), sequences), settings=settings, directory=directory)


# -- beside real runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [WEIGHTED, ALIKE], ids=["weighted", "alike"])
def test_stores_take_the_forecast_disk(llama, tmp_path, settings):
    factors(tiny_model("llama"), tmp_path / "factors", settings)
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    told = estimate(Run(llama, Workload(preparation=preparing(settings)), Machine())).disk_bytes()
    # The rest are headers and notes of files of a few kilobytes.
    assert told <= taken <= 1.1 * told


@pytest.mark.parametrize("mask", [ARA(), Rescaled(), LLRC()])
def test_masked_layers_hold_the_forecast_factors(llama, mask, tmp_path):
    model = tiny_model("llama")
    store = factors(model, tmp_path / "factors", WEIGHTED)
    ratios = {target.name: 0.5 for target in find_targets(model).modules}
    insert_masks(model, store, mask, ratios, storage=Storage("auto"))
    held = sum(layer.left.nbytes + layer.right.nbytes for layer in masked_layers(model).values())
    work = Workload(keeps=(0.5,), learners=[replace(LEARNER, mask=mask)])
    assert phases(llama, work)["learning"].device["factors"] == held


# -- memory that adapts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "name"), [(WEIGHTED, "weighted moments"), (ALIKE, "output gradients")])
def test_a_memory_budget_halves_the_sums_of_two_blocks_and_adds_a_forward_pass(llama, settings, name):
    whole, parts = (
        phases(llama, Workload(preparation=preparing(settings, memory=memory)))[name] for memory in (10**9, 1)
    )
    assert parts.device[f"sums of {name}"] == whole.device[f"sums of {name}"] / 2
    assert parts.work["model"] == 1.5 * whole.work["model"]
    assert parts.disk == whole.disk


def test_sums_that_fill_most_of_the_free_gpu_memory_are_measured_block_by_block(llama):
    work = Workload(preparation=preparing(WEIGHTED))
    enough = Machine("cuda", memory=1e9)
    sums = phases(llama, work, enough)["weighted moments"].device["sums of weighted moments"]
    little = replace(enough, memory=llama.bytes + sums)
    assert phases(llama, work, little)["weighted moments"].device["sums of weighted moments"] == sums / 2
    more = replace(enough, memory=llama.bytes + 2 * sums)
    assert phases(llama, work, more)["weighted moments"].device["sums of weighted moments"] == sums


def test_block_by_block_keeps_the_hidden_states_before_every_block(llama):
    phase = phases(llama, Workload(preparation=preparing(WEIGHTED, memory=1)))["weighted moments"]
    state = 4 * LENGTH * llama.hidden * llama.itemsize
    assert phase.host["hidden states before every block"] == len(llama.blocks) * state
    assert phase.host["gradients by a hidden state"] == state


@pytest.mark.parametrize(
    ("settings", "here", "on_disk"),
    [
        ({"cache": "disk", "by_block": True}, False, True),
        ({"cache": "ram", "by_block": True}, True, False),
        ({"by_block": True}, True, True),
        ({"by_block": True}, False, False),
        # A base that is loaded whole has no choice.
        ({"cache": "ram", "memory": 1}, True, True),
    ],
)
@pytest.mark.parametrize("decomposition", [WHITENED, WEIGHTED])
def test_hidden_states_are_counted_where_they_wait(llama, monkeypatch, decomposition, settings, here, on_disk):
    monkeypatch.setattr("lowrank_pl.calibration.hidden_states.available_memory", lambda: 0)
    work = Workload(preparation=preparing(decomposition, **settings))
    found = estimate(Run(llama, work, Machine(processes=2, here=here)))
    first = next(phase for phase in found.phases if phase.name in ("moments of inputs", "weighted moments"))
    states = 2 * (1 if decomposition is WHITENED else len(llama.blocks) + 1) * LENGTH * llama.hidden * llama.itemsize
    assert sum(first.scratch.values()) == (2 * states if on_disk else 0)
    assert sum(size for what, size in first.host.items() if "hidden state" in what) == (0 if on_disk else states)


def test_too_little_memory_with_hidden_states_on_disk_has_another_cure(monkeypatch, capsys):
    monkeypatch.setattr(forecast, "total_memory", lambda: 1000.0)
    work = Workload(preparation=preparing(WHITENED, by_block=True, cache="disk"))
    print_forecast(Base("random:llama"), work, ONE)
    assert re.search("TOO LITTLE RAM: the hidden states are on disk already; .*--memory", capsys.readouterr().out)


def test_a_gpu_that_is_not_here_is_counted_at_its_least(llama):
    work = Workload(preparation=preparing(WEIGHTED))
    elsewhere, little = (
        phases(llama, work, machine)
        for machine in (Machine("cuda", here=False), Machine("cuda", memory=float(llama.bytes)))
    )
    assert elsewhere["weighted moments"] == little["weighted moments"]


# -- one block at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (WHITENED, ["moments of inputs", "decomposition"]),
        (ALIKE, ["moments of inputs", "output gradients", "decomposition"]),
        (WEIGHTED, ["weighted moments", "decomposition"]),
    ],
)
def test_one_block_at_a_time_never_holds_the_model(large, settings, names):
    found = phases(large, Workload(preparation=preparing(settings, by_block=True)), Machine("cuda"))
    assert list(found) == names
    for phase in found.values():
        assert phase.device["weights of a block"] + phase.device["weights around"] < large.bytes


def test_weights_are_read_for_every_way_through_the_model(large):
    def read(settings, name):
        work = Workload(preparation=preparing(settings, by_block=True))
        return phases(large, work, Machine("cuda"))[name].work["disk"] / large.bytes

    assert read(WEIGHTED, "weighted moments") == 4
    # The hidden states are there from the moments of inputs: only the way back is left.
    assert (read(ALIKE, "moments of inputs"), read(ALIKE, "output gradients")) == (3, 1)


@pytest.mark.parametrize(("sizes", "part"), [("large", "a moment while it is stored"), ("llama", "activations")])
def test_the_larger_of_measuring_and_storing_is_counted(sizes, part, request):
    work = Workload(preparation=preparing(WEIGHTED, by_block=True))
    device = phases(request.getfixturevalue(sizes), work, Machine("cuda"))["weighted moments"].device
    assert {"a moment while it is stored", "activations"} & set(device) == {part}


# -- several processes ---------------------------------------------------------------------------------------------


def test_sharding_spreads_frozen_weights_and_factors_and_gathers_layers(llama):
    one, eight = (
        phases(llama, Workload(keeps=(0.5,), learners=[LEARNER]), machine)["learning"].device
        for machine in (Machine("cuda", memory=1e9), EIGHT)
    )
    assert eight["dense weights"] == one["dense weights"] / 8
    assert eight["factors"] == one["factors"] / 8
    assert eight["activations"] == one["activations"]
    assert eight["layers gathered"] > 0


def shared(settings, reads_shares):
    return Workload(
        preparation=preparing(settings, sequences=16, by_block=reads_shares), learners=[LEARNER],
        reads_shares=reads_shares,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [WHITENED, WEIGHTED])
def test_a_base_that_is_read_in_shares_is_whole_nowhere(llama, settings):
    found = phases(llama, shared(settings, True), EIGHT)
    assert "load" not in found
    assert found["load shares"].device == {"dense weights": llama.bytes / 8}
    for phase in found.values():
        assert not [what for what, size in phase.host.items() if "dense weights" in what and size]


def test_a_process_keeps_the_hidden_states_of_its_own_sequences(llama):
    found = phases(llama, shared(WHITENED, True), EIGHT)
    assert found["moments of inputs"].host["hidden states"] == 2 * LENGTH * llama.hidden * llama.itemsize


def test_a_base_that_can_not_be_read_in_shares_is_loaded_whole_by_every_process(llama):
    found = phases(llama, shared(WHITENED, False), EIGHT)
    assert found["load"].host["dense weights before they move"] == llama.bytes
    assert found["learning"].host["dense weights before they are sharded"] == llama.bytes


@pytest.mark.parametrize(("reads_shares", "told"), [(True, False), (False, True)])
def test_a_note_tells_of_bases_that_every_process_loads(llama, reads_shares, told):
    notes = estimate(Run(llama, shared(WHITENED, reads_shares), EIGHT)).notes
    assert any("loads the whole base" in note for note in notes) == told


@pytest.mark.parametrize(("memory", "forced", "waits"), [(2, None, False), (1.9, None, True), (9, True, True)])
def test_models_that_a_device_has_no_room_for_are_scored_from_main_memory(llama, memory, forced, waits):
    scoring = Scoring(3, tokens=LENGTH, length=LENGTH, from_main_memory=forced)
    work = Workload(keeps=(0.5,), scoring=scoring, exports=True)
    found = phases(llama, work, replace(EIGHT, memory=memory * llama.bytes))
    assert (found["scoring"].host if waits else found["scoring"].device)["dense weights"] == llama.bytes
    assert ("compressed model" in found["export"].host) == waits
    assert ("model of a fresh process" in found["export"].fresh) == waits


@pytest.mark.parametrize("forced", [False, True])
def test_a_note_tells_of_a_refit_that_the_run_refuses(llama, forced):
    scoring = Scoring(1, tokens=LENGTH, length=LENGTH, from_main_memory=forced)
    notes = estimate(Run(llama, Workload(learners=[LEARNER], refits=Refits(1, 4), scoring=scoring), EIGHT)).notes
    assert any("--finish.refit null" in note for note in notes) == forced


# -- other phases --------------------------------------------------------------------------------------------------


def test_pruning_is_counted_for_every_fraction(llama):
    one, two = (
        phases(llama, Workload(keeps=keeps, preparation=preparing(WHITENED, prunings=(WidthPruning(),))))
        for keeps in ((0.5,), (0.5, 0.6))
    )
    assert list(one)[:3] == ["load", "weighted moments before pruning", "widths of MLPs"]
    assert two["widths of MLPs"].work["float64"] == 2 * one["widths of MLPs"].work["float64"] > 0
    assert two["widths of MLPs"].disk["pruned bases"] == 2 * llama.bytes


def test_llm_pruner_measures_gradients_and_writes_a_base_for_every_fraction(llama):
    found = phases(llama, Workload(keeps=(0.5, 0.6), preparation=preparing(WHITENED, prunings=(LLMPruner(),))))
    assert list(found)[:3] == ["load", "weight gradients before pruning", "heads and neurons"]
    assert found["heads and neurons"].disk["bases pruned by llm_pruner"] == 2 * llama.bytes
    assert "widths of MLPs" not in found


def test_what_measures_in_the_compressed_model_measures_everything_twice(llama):
    once, twice = (
        phases(llama, Workload(preparation=preparing(settings)))["weighted moments"]
        for settings in (WEIGHTED, Decomposition("two_sided", at_keep=0.5))
    )
    assert twice.work["model"] == 2 * once.work["model"]


def test_the_first_process_refits_scores_and_exports_alone(llama):
    work = Workload(
        preparation=preparing(WEIGHTED), learners=[LEARNER], refits=Refits(1, 4), scoring=Scoring(2, 64), exports=True
    )
    found = phases(llama, work, Machine("cuda", 2, memory=1e9))
    assert [name for name, phase in found.items() if phase.waiting is not None] == ["refit", "scoring", "export"]


def test_a_joint_refit_costs_passes_and_memory(llama):
    alone, joint = (
        phases(llama, Workload(preparation=preparing(WEIGHTED), refits=Refits(1, 4, passes)))["refit"]
        for passes in (0, Joint().passes)
    )
    assert joint.work["model"] > 5 * alone.work["model"]
    assert sum(joint.device.values()) > sum(alone.device.values())


def test_a_refit_keeps_inputs_of_experts_for_one_batch():
    model, length = model_sizes(Base("random:qwen3_moe"), length=32), 32
    work = Workload(preparation=Preparation(Calibration(length=length), (WEIGHTED,)), refits=Refits(1, 4))
    found = phases(model, work)["refit"]
    widths = {target.group: target.shape[1] for target in model.modules if target.block == 0 and not target.experts}
    assert found.host["inputs of a block's layers"] == 4 * length * sum(widths.values()) * model.itemsize
    # Two of the four experts serve each token: 32 features for gate and up, and 48 for down.
    assert found.device["inputs of a batch's experts, in both models"] == 2 * length * 2 * (32 + 48) * model.itemsize


# -- what is printed -----------------------------------------------------------------------------------------------


def test_a_run_elsewhere_is_told_no_time(capsys, tmp_path):
    machine = Machine("cuda", 8, sharded=True, here=False)
    figures = tmp_path / "needs.json"
    print_forecast(Base("random:llama"), shared(WEIGHTED, True), machine, output=figures)
    told = capsys.readouterr().out
    assert "GPU memory of a process" in told
    assert "RAM of the 8 processes of a node" in told
    assert "time" not in told
    assert "fits" not in told
    assert json.loads(figures.read_text())["speeds"] is None


def test_a_run_here_is_told_whether_it_fits_and_how_long_it_takes(capsys):
    print_forecast(Base("random:llama"), Workload(preparation=preparing(WHITENED, sequences=1)), Machine())
    summary = capsys.readouterr().out.split("fits\n")[1]
    assert [line.split()[0] for line in summary.splitlines()[1:]] == ["RAM", "disk", "time"]
    assert summary.count("yes") == 2


@pytest.mark.parametrize(
    ("name", "told"),
    [("total_memory", "TOO LITTLE RAM: .*--cache disk"), ("_free_disk", "TOO LITTLE disk: .*LOWRANK_HOME")],
)
def test_too_little_is_told_with_its_cure(monkeypatch, capsys, name, told):
    monkeypatch.setattr(forecast, name, lambda: 1000.0)
    print_forecast(Base("random:llama"), Workload(preparation=preparing(WHITENED, sequences=1)), ONE)
    assert re.search(told, capsys.readouterr().out)


def test_too_little_gpu_memory_is_told_with_its_cure(monkeypatch, capsys):
    monkeypatch.setattr(forecast, "probe", lambda *_, **__: SPEEDS)
    print_forecast(Base("random:llama"), Workload(preparation=preparing(WEIGHTED)), Machine("cuda", memory=1000.0))
    assert re.search("TOO LITTLE GPU memory of a process: .*lowrank decompose", capsys.readouterr().out)


def test_embeddings_among_the_targets_are_forecast(capsys):
    constraints, machine = Constraints(include=("*", "embeddings")), Machine(here=False)
    work = Workload(preparation=replace(preparing(WEIGHTED), by_block=True))
    plain = print_forecast(Base("random:llama"), work, machine)
    found = print_forecast(Base("random:llama"), work, machine, constraints=constraints)
    assert "embedding moments" in capsys.readouterr().out
    assert found.disk_bytes() > plain.disk_bytes()


@pytest.mark.parametrize("kind", ["whitened", "two_sided"])
def test_experts_cost_products_by_their_tokens_and_memory_by_their_number(kind):
    model = model_sizes(Base("random:qwen3_moe"), length=32)
    dense = replace(model, idle=(), shares={})
    work = Workload(preparation=Preparation(Calibration(sequences=8, length=32), (Decomposition(kind),), by_block=True))

    def phases(sizes, memory=1e9):
        return estimate(Run(sizes, work, Machine("cuda", memory=memory, here=False))).phases

    for mixture, other in zip(phases(model), phases(dense), strict=True):
        assert mixture.disk == other.disk
        assert mixture.work.get("svd") == other.work.get("svd")
        if "model" in mixture.work:
            assert mixture.work["model"] < 0.75 * other.work["model"]
            assert mixture.work["float32"] < 0.75 * other.work["float32"]
    if kind == "two_sided":
        # Where the sums of a block don't fit, they are measured in parts, in more passes.
        (whole, _), (parts, _) = phases(model), phases(model, memory=4e5)
        assert parts.device["sums of weighted moments"] < whole.device["sums of weighted moments"]
        assert parts.work["model"] > whole.work["model"]


def test_factors_that_experts_share_are_made_beside_separate_ones():
    apart = model_sizes(Base("random:mixtral"), length=LENGTH)
    one = model_sizes(Base("random:mixtral"), length=LENGTH, constraints=Constraints(shared_experts=True))

    def disk(model, *decompositions, **settings):
        work = Workload(preparation=preparing(*decompositions, **settings))
        return phases(model, work)["decomposition"].disk["factors"]

    assert disk(apart, shared=[WHITENED]) == disk(one, WHITENED)
    assert disk(apart, WHITENED, shared=[WHITENED]) == disk(apart, WHITENED) + disk(one, WHITENED)


def test_what_dropping_experts_costs_is_measured_in_a_pass_of_its_own():
    mixture, name = model_sizes(Base("random:mixtral"), length=LENGTH), "losses of dropped experts"
    without = phases(mixture, Workload(preparation=preparing(WEIGHTED)))
    found = phases(mixture, Workload(preparation=preparing(WEIGHTED, dropping=True)))
    assert found.keys() - without.keys() == {name}
    assert found[name].device["sums of losses of dropped experts"] == 2 * 8 * (4 * 4 + 2 * 4)
