"""A base of which each process loads its share: the same factors, weights and masks as of one that all load whole."""

from __future__ import annotations

import json
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.sharded_build import open_shared
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.masked_linear import computing_with, insert_masks, masked_layers
from lowrank_pl.models.base import Base, load_base, loads_in_parts
from lowrank_pl.models.lazy import open_skeleton
from lowrank_pl.models.targets import find_targets
from lowrank_pl.models.tiny import FAMILIES, byte_tokenizer, tiny_model
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.storage import Storage
from lowrank_pl.training import module as learner_module
from lowrank_pl.training.sharding import own_rows, shard_frozen
from lowrank_pl.utils.distributed import cooperating
from tests.helpers.tiny_training import make_data, make_learner, make_trainer
from tests.helpers.two_processes import as_torchrun_says, in_two_processes

WHITENED, TWO_SIDED = Decomposition(), Decomposition("two_sided")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# GPT-2 ties its head, stores weights the other way round and has biases; Gemma has odd buffers and ties too.
CASES = [("llama", "bfloat16"), ("gpt2", "float32"), ("gemma3", "bfloat16")]


def save(folder, family="llama"):
    """Save a tiny model in many files; its odd vocabulary can't be halved."""
    tiny_model(family).save_pretrained(folder / family, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(folder / family)
    return str(folder / family)


def opened(base, dtype="float32"):
    return open_shared(Base(base, dtype=dtype), Constraints(), torch.device("cpu"))


def subject_of(shared, count=5):
    return Subject(shared.skeleton.model, byte_tokenizer(), sequences(count), known_targets=shared.targets)


def sequences(count=5):
    return torch.randint(256, (count, 48), generator=torch.Generator().manual_seed(0))


def never(*_, **__):
    raise AssertionError("the base was loaded whole")


@contextmanager
def loading_whole(load):
    """Let bases be loaded whole by ``load``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Base, "load", load)
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes say that ran ``two_processes``, and their folder."""
    folder = tmp_path_factory.mktemp("pair")
    for family in {family for family, _ in CASES}:
        save(folder, family)
    in_two_processes(two_processes, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], folder


def two_processes(rank, folder):
    said = {"factors": make_factors(folder), "learned": learn(rank, folder)}
    for family, dtype in CASES:
        check_weights(rank, folder, family, dtype)
    # On the second process there are no such files.
    assert opened(str(folder / "llama") if rank == 0 else "random:llama") is None
    (folder / f"{rank}.json").write_text(json.dumps(said))


def make_factors(folder):
    """Make factors both ways, of more and fewer sequences than processes; return how many layers were decomposed."""
    base, tokenizer = str(folder / "llama"), byte_tokenizer()
    whole, made, add = load_base(base), [], FactorStore.add
    with cooperating(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactorStore, "add", lambda store, name, *a, **k: (made.append(name), add(store, name, *a, **k)))
        for count, settings in product((5, 1), (WHITENED, TWO_SIDED)):
            made.clear()
            shared = opened(base)
            how = {"settings": settings, "directory": folder / f"shared-{settings.kind}-{count}"}
            with loading_whole(never):
                ours = shared.factors(subject_of(shared, count), **how)
            how["directory"] = folder / f"whole-{settings.kind}-{count}"
            theirs = build_factors(Subject(whole, tokenizer, sequences(count), known_targets=shared.targets), **how)
            mine = len(made) // 2
            assert made[:mine] == made[mine:], "not the share that is made of a model loaded whole"
            assert_equal_factors(ours, theirs, shared.targets.modules)
            assert all(parameter.is_meta for parameter in shared.skeleton.model.parameters())
    return mine


def assert_equal_factors(ours, theirs, targets):
    assert ours.digest == theirs.digest
    for name in (target.name for target in targets):
        assert {**ours.notes(name), "seconds": ""} == {**theirs.notes(name), "seconds": ""}
        for key in ("left", "sigma", "right"):
            assert torch.equal(ours.read(name, key), theirs.read(name, key)), (key, name)


def check_weights(rank, folder, family, dtype):
    """Compare what this process holds, and computes, with a model that was loaded whole."""
    base, tokens = str(folder / family), sequences(1)
    shared, whole = opened(base, dtype), load_base(base, dtype=DTYPES[dtype])
    how = {"settings": Decomposition("svd"), "directory": folder / f"{family}{rank}"}
    store = build_factors(Subject(whole, byte_tokenizer(), tokens, known_targets=shared.targets), **how)
    model = shared.skeleton.model
    for one, empty in ((model, True), (whole, False)):
        starts = {target.name: 0.5 for target in shared.targets.modules}
        insert_masks(one, store, ARA(), starts, storage=Storage("factored"), empty=empty)
    learning = [parameter for layer in masked_layers(model).values() for parameter in layer.mask.parameters()]
    shard_frozen(model, store, learning, torch.device("cpu"), shared.skeleton)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, theirs in whole.named_parameters(remove_duplicate=False):
        ours = parameters.pop(name)
        if isinstance(ours, DTensor):
            assert len(ours.to_local()) == len(range(*own_rows(len(theirs), rank, 2).indices(len(theirs)))), name
            ours = ours.full_tensor()
        assert torch.equal(ours, theirs), name
    assert not parameters
    assert sum(isinstance(one, DTensor) for one in model.parameters()) == len(list(model.parameters())) - len(learning)
    tied = [one.get_output_embeddings().weight is one.get_input_embeddings().weight for one in (model, whole)]
    assert tied == 2 * [family != "llama"]
    for choice in ("mask", "dense"):
        with (
            torch.no_grad(),
            computing_with(masked_layers(model), choice),
            computing_with(masked_layers(whole), choice),
        ):
            assert torch.equal(model(input_ids=tokens).logits, whole(input_ids=tokens).logits), (family, choice)


def learn(rank, folder):
    """Learn in both ways from both types, and compare; return whether masks moved."""
    moved = []
    for dtype in DTYPES:
        (start, shared), (_, whole) = (learned(rank, folder, dtype, way) for way in ("shared", "whole"))
        assert shared.keys() == whole.keys()
        assert all(torch.equal(value, whole[name]) for name, value in shared.items())
        moved.append(not any(torch.equal(value, start[name]) for name, value in shared.items()))
    return moved


def learned(rank, folder, dtype, way):
    """Return masks before and after learning on both processes, with the base read in shares or loaded whole."""
    start = {}
    with as_torchrun_says(rank), pytest.MonkeyPatch.context() as patch:
        if way == "shared":
            patch.setattr(Base, "load", never)
        else:
            patch.setattr(learner_module, "open_shared", lambda *_, **__: None)
        learner = make_learner(str(folder / "llama"), dtype=dtype, store=folder / f"{way}-{dtype}")
        strategy = ModelParallelStrategy(save_distributed_checkpoint=False)
        first = LambdaCallback(on_train_start=lambda *_: start.update(copied(learner)))
        trainer = make_trainer(
            strategy=strategy, devices=2, max_steps=3, accumulate_grad_batches=2, callbacks=[first]
        )  # fmt: skip
        trainer.fit(learner, make_data(statistics_sequences=3))
    return start, copied(learner)


def copied(learner):
    return {name: value.clone() for name, value in learner.state_dict().items()}


def test_two_processes_learn_the_masks_that_they_learn_from_a_base_loaded_whole(pair):
    for said in pair[0]:
        assert said["learned"] == [True] * 2


def test_each_decomposes_its_share(pair):
    assert sum(said["factors"] for said in pair[0]) == len(find_targets(tiny_model("llama")).modules)
    assert all(said["factors"] > 0 for said in pair[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_buffers_are_those_of_a_loaded_model(family, dtype, tmp_path):
    base = save(tmp_path, family)
    models = open_skeleton(base, dtype=DTYPES[dtype]).model, load_base(base, dtype=DTYPES[dtype])
    ours, theirs = (dict(model.named_buffers()) for model in models)
    assert ours.keys() == theirs.keys()
    for name, buffer in theirs.items():
        assert ours[name].dtype == buffer.dtype
        assert torch.equal(ours[name], buffer), name


def test_factors_that_need_gradients_are_made_without_the_whole_base(tmp_path):
    base, how = save(tmp_path), {"settings": TWO_SIDED, "directory": tmp_path / "factors"}
    shared = opened(base)
    with loading_whole(never):
        made, again = (shared.factors(subject_of(shared), **how) for _ in range(2))
    assert again.digest == made.digest
    assert not again.missing(target.name for target in shared.targets.modules)


def test_what_is_measured_in_the_compressed_model_is_found_or_made_of_the_whole_base(tmp_path, caplog):
    settings = Decomposition("two_sided", at_keep=0.5)
    base, how = save(tmp_path), {"settings": settings, "directory": tmp_path / "factors"}
    shared, loaded = opened(base), []
    with loading_whole(lambda _: loaded.append(1) or load_base(base)):
        made = shared.factors(subject_of(shared), **how)
    assert loaded == [1]
    assert "every process loads the whole base into memory to make its factors: at_keep measures in" in caplog.text
    assert "run `lowrank decompose` with the same base" in caplog.text
    with loading_whole(never):
        again = shared.factors(subject_of(shared), **how)
    assert again.digest == made.digest


@pytest.mark.parametrize("base", ["random:llama", "layers:llama-3.2-1b"])
def test_a_base_that_is_made_and_not_read_is_loaded_whole_and_said(base, caplog):
    assert opened(base) is None
    assert not loads_in_parts(base)
    assert f"{base} is loaded whole by every process before it is sharded: its random weights are made" in caplog.text


def test_names_tell_what_can_be_shared(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert loads_in_parts("shapes:llama-3-70b")
    assert loads_in_parts("meta-llama/Llama-3.2-1B")
    assert not loads_in_parts(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["energy", "strs"])
def test_a_start_is_allocated_on_a_base_without_weights(name, tmp_path, caplog):
    base, data, loaded = save(tmp_path), make_data(), []
    plans = []
    for shared in (opened(base), None):
        learner = make_learner(base, start=name, decomposition=Decomposition("asvd"))
        model = load_base(base) if shared is None else shared.skeleton.model
        subject = Subject(model, data.tokenizer, data.statistics_sequences, known_targets=find_targets(load_base(base)))
        with loading_whole(lambda _: loaded.append(1) or load_base(base)):
            learner.build(model, data, sharded=shared is not None, shared=shared)
            plans.append(learner._start_plan(subject))
    assert plans[0].modules == plans[1].modules
    assert loaded == ([1, 1] if name == "strs" else [])
    assert (f"loads the whole base into memory, because {name} runs it" in caplog.text) == bool(loaded)
