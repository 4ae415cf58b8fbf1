"""From a model to factors: nothing twice, nothing stale, and every refusal names its module."""

from __future__ import annotations

import errno
import logging
import shutil
from contextlib import contextmanager

import pytest
import torch

from lowrank_pl.calibration import build as prepare
from lowrank_pl.calibration import roots
from lowrank_pl.calibration import statistics as collected
from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.provenance import describe_origin, preparation_notes
from lowrank_pl.calibration.stored_factors import stored_factors
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.base import Problem
from lowrank_pl.models.base import Base
from lowrank_pl.models.identity import model_fingerprint
from lowrank_pl.models.targets import dense_weight, find_targets, model_parameters
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.text.sequences import Calibration
from lowrank_pl.utils import files


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


@pytest.fixture
def work(monkeypatch):
    """Names of what was done: one ``forward`` a batch, one ``decompose`` a module, one ``root`` an input."""
    done = []

    def counting(module, name, what):
        real = getattr(module, name)

        def call(*args, **kwargs):
            done.append(what)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counting(prepare, "decompose", "decompose")
    counting(roots, "square_root", "root")
    counting(collected, "collect_input_moments", "statistics")
    return done


@pytest.fixture
def build(llama, sequences, tokenizer):
    """Build the factors of the tiny Llama, with some arguments changed."""

    def run(**changes):
        model = changes.pop("model", llama)
        arguments = {"sequences": sequences[:3], "tokenizer": tokenizer, **changes}
        targets = find_targets(model, include=arguments.pop("include", ("*",)))
        return build_factors(
            Subject(model, arguments.pop("tokenizer"), arguments.pop("sequences"), known_targets=targets), **arguments
        )

    return run


def count_forwards(model):
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_factors_minimise_the_error_on_the_calibration_text(llama, sequences, build):
    targets = find_targets(llama).modules
    store = build(settings=Decomposition(damping=0.0))
    inputs = {}
    handles = [
        llama.get_submodule(t.name).register_forward_hook(lambda _, args, __, n=t.name: inputs.update({n: args[0]}))
        for t in targets
    ]
    with torch.no_grad():
        llama(input_ids=sequences[:3])
    for handle in handles:
        handle.remove()
    for target in targets:
        x = inputs[target.name].reshape(-1, target.shape[1]).double()
        weight = dense_weight(llama.get_submodule(target.name)).double()
        sigma = store.sigma(target.name)
        for rank in (1, 5, 20):
            part = store.factors(target.name, rank)
            error = ((weight - part.left.double() @ part.right.double()) @ x.T).square().sum(0).mean().item()
            assert error == pytest.approx(sigma[rank:].square().sum().item(), rel=1e-3)


def test_nothing_is_made_twice(llama, build, work):
    forwards = count_forwards(llama)
    store = build()
    assert work.count("decompose") == 14
    assert work.count("root") == 8  # q/k/v share one, gate/up share one
    assert work.count("statistics") == 1
    assert len(forwards) == 1 + 3  # the probe of find_targets, then one a sequence
    work.clear()
    forwards.clear()
    again = build()
    assert work == []
    assert len(forwards) == 1
    assert again.directory == store.directory


def test_the_head_is_not_computed_for_moments_of_inputs(llama, build):
    calls = count_forwards(llama.lm_head)
    build()
    assert len(calls) == 1  # the probe of find_targets


def test_layers_that_the_loss_does_not_depend_on_get_the_smallest_ranks(llama, build):
    llama.model.layers[1].self_attn.o_proj.weight.data.zero_()
    store = build(settings=Decomposition("two_sided"))
    targets = find_targets(llama)
    budget = Constraints().budget(llama, targets, 0.5)
    plan = make_allocator("fisher").plan(Problem(budget, store, targets))
    assert {plan.modules[f"model.layers.1.self_attn.{name}_proj"].rank for name in "qkv"} == {1}


def test_lost_factors_of_several_sequences_a_pass_are_the_same_again(llama, build, tokenizer):
    store = build(settings=Decomposition("two_sided"), batch_size=3)
    calibration = {"text": "python-docs", "length": 32, "windows": 3}
    origin = {"store": str(store.directory), "decomposition": store.fingerprint, "calibration": calibration}
    targets = find_targets(llama)
    budget = Constraints().budget(llama, targets, 0.5)
    plan = budget.fit(dict.fromkeys(budget.shapes, 1), method="hand")
    shutil.rmtree(store.directory)
    again = stored_factors(plan.with_origin(origin, store.fingerprint, ()), llama, tokenizer)
    assert again.fingerprint["batch_size"] == 3


def test_other_damping_starts_from_the_same_statistics(llama, build, work):
    first = build()
    forwards = count_forwards(llama)
    work.clear()
    second = build(settings=Decomposition(damping=1e-2))
    assert (work.count("decompose"), work.count("root"), work.count("statistics")) == (14, 8, 0)
    assert len(forwards) == 1
    name = "model.layers.0.mlp.up_proj"
    assert not torch.allclose(first.sigma(name), second.sigma(name))


def test_plain_svd_reads_no_text(llama, build, work, sequences):
    store = build(settings=Decomposition(kind="svd"))
    assert set(work) == {"decompose"}
    weight = llama.get_submodule("model.layers.1.self_attn.o_proj").weight.double()
    torch.testing.assert_close(store.sigma("model.layers.1.self_attn.o_proj"), torch.linalg.svdvals(weight))
    work.clear()
    build(settings=Decomposition(kind="svd"), sequences=sequences[5:9])
    assert work == []


@pytest.mark.parametrize("explicit", [False, True])
def test_interrupted_decomposition_resumes_at_the_next_module(build, work, monkeypatch, tmp_path, explicit):
    directory = {"directory": tmp_path / "store"} if explicit else {}
    real = prepare.decompose

    def interrupt(*args, **kwargs):
        if work.count("decompose") == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(prepare, "decompose", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(**directory)
    monkeypatch.setattr(prepare, "decompose", real)
    work.clear()
    store = build(**directory)
    assert work.count("decompose") == 14 - 5
    assert work.count("root") == 8 - 2  # q/k/v, o and one of gate/up were done
    assert work.count("statistics") == 0
    whole = build(directory=tmp_path / "other")
    for target in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert torch.equal(store.factors(target).left, whole.factors(target).left)


def test_what_another_run_made_while_this_one_waited_is_taken(build, work, monkeypatch):
    real, theirs = prepare.FactorStore.locked, []

    @contextmanager
    def waited(store):
        if not theirs and store.kind == "factors":
            theirs.append(store.directory)
            build()
            work.clear()
        with real(store):
            yield

    monkeypatch.setattr(prepare.FactorStore, "locked", waited)
    assert build().directory == theirs[0]
    assert work == []


def test_interrupted_statistics_collect_only_what_is_missing(build, monkeypatch):
    real, groups = collected.collect_input_moments, []

    def remember(model, targets, sequences, **kwargs):
        groups.append({target.group for target in targets})
        return real(model, targets, sequences, **kwargs)

    monkeypatch.setattr(collected, "collect_input_moments", remember)
    write, saved = collected.TensorStore.write, []

    def interrupt(store, name, tensors, **kwargs):
        if store.kind == "statistics":
            if len(saved) == 3:
                raise KeyboardInterrupt
            saved.append(name)
        write(store, name, tensors, **kwargs)

    monkeypatch.setattr(collected.TensorStore, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build()
    monkeypatch.setattr(collected.TensorStore, "write", write)
    build()
    assert groups[1] == groups[0] - set(saved)
    assert len(groups[1]) == 5


def test_wider_target_list_adds_to_the_same_store(build, work):
    some = build(include=["*mlp*"])
    work.clear()
    every = build()
    assert every.directory == some.directory
    assert work.count("decompose") == 8


def test_fingerprint_follows_weights_tokenizer_text_and_settings(llama, sequences, build):
    first = build().digest
    assert build().digest == first
    assert build(sequences=sequences[:4]).digest != first
    assert build(sequences=sequences[[1, 0, 2]]).digest != first
    assert build(tokenizer=byte_tokenizer(bos=True)).digest != first
    assert build(settings=Decomposition(damping=2e-6)).digest != first
    assert build(settings=Decomposition(kind="svd")).digest != first
    before = model_fingerprint(llama)
    assert before == model_fingerprint(tiny_model("llama"))
    with torch.no_grad():
        llama.get_submodule("model.norm").weight[0] += 1e-6
    assert model_fingerprint(llama) != before
    assert build().digest != first
    assert model_fingerprint(tiny_model("llama").bfloat16()) != before
    mixture = tiny_model("deepseek_v3")
    before = model_fingerprint(mixture)
    mixture.model.layers[-1].mlp.gate.e_score_correction_bias[0] += 1
    assert model_fingerprint(mixture) != before


def test_store_of_something_else_is_refused(build, tmp_path):
    build(directory=tmp_path / "s")
    with pytest.raises(ValueError, match=r"the factors store at .*s was made from something else: damping is 1e-06"):
        build(directory=tmp_path / "s", settings=Decomposition(damping=1.0))
    with pytest.raises(ValueError, match=r"was made from something else: model is '[0-9a-f]{64}' there"):
        build(directory=tmp_path / "s", model=tiny_model("llama", seed=1))


@pytest.mark.parametrize("kind", ["whitened", "svd"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weight_names_the_module_itself(llama, build, kind, bad):
    name = "model.layers.1.self_attn.k_proj"
    with torch.no_grad():
        llama.get_submodule(name).weight[2, 3] = bad
    with pytest.raises(ValueError, match=f"the weight of {name} holds NaN or infinity: the checkpoint is damaged"):
        build(settings=Decomposition(kind=kind))


def test_activations_whose_squares_exceed_float32_are_served(llama, build):
    with torch.no_grad():
        llama.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(1e15)
        llama.get_submodule("model.layers.0.mlp.gate_proj").weight.mul_(1e6)
        llama.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(1e-21)
    store = build()
    factors = store.factors("model.layers.0.mlp.down_proj")
    weight = llama.get_submodule("model.layers.0.mlp.down_proj").weight
    assert store.sigma("model.layers.0.mlp.down_proj").isfinite().all()
    torch.testing.assert_close(factors.left @ factors.right, weight, rtol=1e-3, atol=1e-3 * weight.abs().max().item())


def test_disk_full_in_the_middle_is_resumed(build, work, monkeypatch):
    real, writes = files.os.replace, []

    def replace(source, target):
        writes.append(target)
        if len(writes) == 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="No space left on device"):
        build()
    work.clear()
    store = build()
    assert 0 < work.count("decompose") < 14
    assert not [path for path in store.directory.rglob("*") if path.suffix == ".tmp"]


def test_fallback_is_told(llama, sequences, tokenizer, caplog):
    targets = find_targets(llama)
    with caplog.at_level(logging.WARNING):
        store = build_factors(
            Subject(llama, tokenizer, sequences[:1, :20], known_targets=targets), settings=Decomposition(damping=0.0)
        )
    notes = preparation_notes(targets, store)
    eigen = [name for name in (t.name for t in targets.modules) if store.notes(name)["square_root"] == "eigen"]
    assert eigen
    assert f"square root by eigen-decomposition for {len(eigen)} modules, e.g. {eigen[0]}" in notes
    assert any("8 of 8 second moments were not positive definite after damping" in text for text in caplog.messages)
    for name in eigen:
        factors = store.factors(name)
        torch.testing.assert_close(factors.left @ factors.right, llama.get_submodule(name).weight, rtol=0, atol=1e-3)


def test_notes_count_what_was_skipped(llama, build):
    targets = find_targets(llama, exclude=["*down_proj"])
    store = build()
    assert preparation_notes(targets, store) == [
        "not targeted, excluded by pattern '*down_proj': 2 (6,144 parameters), e.g. model.layers.0.mlp.down_proj"
    ]


def test_damaged_file_is_named_in_the_notes_too(llama, build):
    store = build()
    store.path("model.layers.0.mlp.up_proj").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"up_proj.safetensors is damaged .*: delete it and run again"):
        preparation_notes(find_targets(llama), store)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "Whitened"},
            r"kind is 'Whitened': expected one of whitened, two_sided, svd, asvd, fwsvd",
        ),
        ({"damping": -1.0}, r"damping is -1.0: expected a finite number of at least 0"),
        ({"damping": float("nan")}, r"damping is nan: expected"),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Decomposition(**arguments)


def test_budget_counts_the_model(llama):
    targets = find_targets(llama, exclude=["*o_proj"])
    budget = Constraints(multiple_of=2, floors={"*": 0.1}).budget(llama.bfloat16(), targets, 0.5)
    assert budget.model_parameters == model_parameters(llama) == sum(p.numel() for p in llama.parameters())
    assert budget.total == sum(dense_weight(llama.get_submodule(t.name)).numel() for t in targets.modules)
    assert (budget.bytes_per_parameter, budget.multiple_of, budget.floors) == (2, 2, {"*": 0.1})
    tied = tiny_model("gpt2")
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert model_parameters(tied) == tied.num_parameters()


def test_origin_says_how_to_make_the_factors_again(build, llama, tokenizer, sequences):
    store = build()
    calibration = Calibration("t", length=64, sequences=9)  # of which the text had three
    subject = Subject(llama, tokenizer, sequences[:3], base=Base("b"), calibration=calibration)
    assert describe_origin(subject, Decomposition(), store) == {
        "base": "b",
        "dtype": "float32",
        "calibration": {"text": "t", "length": 64, "windows": 3},
        "decomposition": {"kind": "whitened", "damping": 1e-6},
        "store": str(store.directory.resolve()),
    }
