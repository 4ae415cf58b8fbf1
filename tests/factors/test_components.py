"""Exports that hold components beside their weights, so that every smaller size is cut from them."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lowrank_pl import AnySize, Constraints, RankPlan, Subject, allocate_ranks, compress, load_compressed
from lowrank_pl import save_compressed as save
from lowrank_pl.factors import compression
from lowrank_pl.factors.components import NestedComponents
from lowrank_pl.factors.compression import deployed_plan
from lowrank_pl.factors.pivoting import pivot
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.digests import changed_files
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.resize import component_bytes, nested
from lowrank_pl.utils.tensor_store import with_checksum

UP = "model.layers.0.mlp.up_proj"


def made(family, storage, dtype=torch.float32):
    """A base, a plan at keep 0.8 that leaves layers dense or pivoted, and its factors."""
    base = tiny_model(family).to(dtype)
    tokens, constraints = torch.arange(256).view(4, 64), Constraints(storage=storage)
    subject = Subject(copy.deepcopy(base), byte_tokenizer(), tokens, constraints=constraints)
    return base, *allocate_ranks(subject, keep=0.8, allocator="zs_svd")


def exported(base, plan, store, folder):
    """The folder and its plan."""
    model = compress(copy.deepcopy(base), plan, store)
    plan = deployed_plan(model, plan)
    save(model, folder, tokenizer=byte_tokenizer(), plan=AnySize(plan, store), verify=False)
    return folder, plan


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """By storage: a folder of Llama, its plan, its factors and its base."""
    home, found = tmp_path_factory.mktemp("exports"), {}
    for storage in ("factored", "auto"):
        base, plan, store = made("llama", storage)
        found[storage] = *exported(base, plan, store, home / storage), store, base
    return found


@pytest.fixture
def copied(llama, tmp_path):
    """A copy of the folder with pivoted layers, without digests, and its plan."""
    folder, plan, *_ = llama["auto"]
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "lowrank.sha256").unlink()
    return tmp_path / "copy", plan


def assert_same(model, other):
    here, there = model.state_dict(), other.state_dict()
    assert here.keys() == there.keys()
    assert [name for name in here if not torch.equal(here[name], there[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", ["factored", "auto", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cut_has_the_bits_of_the_resized_plan_exported(family, storage, dtype, tmp_path):
    base, plan, store = made(family, storage, dtype)
    folder, plan = exported(base, plan, store, tmp_path / "model")
    for keep, sized in nested(plan, [0.8, 0.65, 0.3]).items():
        assert_same(load_compressed(folder, keep=keep), compress(copy.deepcopy(base), sized, store))


def test_dense_and_pivoted_layers_are_cut(llama):
    assert llama["factored"][1].dense_modules
    assert llama["auto"][1].pivoted_modules
    for storage, kind in (("factored", LowRankLinear), ("auto", PivotedLinear)):
        model = load_compressed(llama[storage][0], keep=0.3)
        stored = {type(model.get_submodule(name)) for name in NestedComponents.of_export(*llama[storage][:2]).names}
        assert kind in stored


def test_components_that_are_not_the_first_are_found_by_number(llama, tmp_path):
    _, plan, store, base = llama["auto"]
    order = {name: torch.rand(len(score)) for name, score in plan.order.scores.items()}
    shapes = {name: entry.shape for name, entry in plan.modules.items()}
    budget = Budget(keep=0.8, shapes=shapes, model_parameters=plan.model_parameters)
    plan = replace(budget.select(order, method="hand"), fingerprint=plan.fingerprint)
    assert plan.any_k_modules
    folder, plan = exported(base, plan, store, tmp_path / "model")
    assert_same(load_compressed(folder, keep=0.4), compress(copy.deepcopy(base), nested(plan, [0.4])[0.4], store))


def test_a_cut_model_saves_and_loads_as_any_other(llama, tmp_path):
    model = load_compressed(llama["auto"][0], keep=0.4)
    model.save_pretrained(tmp_path / "again")
    assert_same(load_compressed(tmp_path / "again"), model)


def test_the_folder_is_a_model_without_its_components_too(llama, tmp_path):
    folder, *_ = llama["auto"]
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("nested"))
    assert changed_files(tmp_path / "copy") == []
    assert_same(load_compressed(tmp_path / "copy"), load_compressed(folder))
    with pytest.raises(ValueError, match=r"or export the plan with `--any_size true` .* serves its own size only, kee"):
        load_compressed(tmp_path / "copy", keep=0.4)


def test_a_refusal_says_down_to_which_size_a_folder_without_components_serves(llama, tmp_path):
    folder, plan, store, base = llama["factored"]
    sized = nested(plan, [0.6])[0.6]
    assert sized.dense_modules
    save(
        compress(copy.deepcopy(base), sized, store),
        tmp_path / "small",
        tokenizer=byte_tokenizer(),
        plan=sized,
        verify=False,
    )
    with pytest.raises(ValueError, match="This export serves sizes down to keep ") as error:
        load_compressed(tmp_path / "small", keep=0.2)
    least = float(str(error.value).rpartition(" ")[2])
    assert 0.2 < least < 0.6
    assert_same(load_compressed(tmp_path / "small", keep=least), load_compressed(folder, keep=least))
    with pytest.raises(ValueError, match=f"serves sizes down to keep {least}"):
        load_compressed(tmp_path / "small", keep=round(least - 0.01, 2))


@pytest.mark.parametrize(("storage", "dtype", "stored"), [
    ("factored", torch.bfloat16, torch.bfloat16),
    ("auto", torch.bfloat16, torch.float32),
], ids=["factors", "pivots"])  # fmt: skip
def test_components_have_the_type_of_the_weights_unless_pivots_are_computed_from_them(storage, dtype, stored, tmp_path):
    folder, plan = exported(*made("llama", storage, dtype), tmp_path / "model")
    files = [load_file(file) for file in (folder / "nested").iterdir()]
    assert {part[key].dtype for part in files for key in ("left", "right")} == {stored}
    size = sum(part[key].numel() * part[key].element_size() for part in files for key in ("left", "right"))
    assert size == component_bytes(plan)


def test_no_tensor_keeps_the_memory_of_the_components(llama):
    for storage in ("factored", "auto"):
        for part in load_compressed(llama[storage][0], keep=0.3).parameters():
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_nothing_is_written_where_the_weights_hold_all_components(llama, tmp_path):
    base = llama["factored"][3]
    subject = Subject(
        copy.deepcopy(base),
        byte_tokenizer(),
        torch.arange(256).view(4, 64),
        constraints=Constraints(storage="factored"),
    )
    plan, store = allocate_ranks(subject, keep=0.5, allocator="uniform")
    folder, plan = exported(base, plan, store, tmp_path / "model")
    assert not (folder / "nested").exists()
    assert_same(load_compressed(folder, keep=0.3), compress(copy.deepcopy(base), nested(plan, [0.3])[0.3], store))


@pytest.mark.parametrize("step", ["refit", "correction"])
def test_factors_that_were_changed_for_one_size_are_refused(llama, step):
    _, plan, store, _ = llama["auto"]
    changed = replace(plan, fingerprint={**plan.fingerprint, step: {"keep": 0.8}})
    with pytest.raises(ValueError, match=f"the factors have a {step} for keep 0.8, so .*: make the smaller sizes with"):
        AnySize(changed, store)


def test_a_plan_without_order_or_of_other_factors_is_refused(llama, tmp_path):
    _, plan, store, _ = llama["auto"]
    with pytest.raises(ValueError, match="has no component order"):
        AnySize(replace(plan, order=None), store)
    with pytest.raises(ValueError, match=r"other factors than those in .*other: .*model.* differ"):
        AnySize(plan, FactorStore({"model": "another"}, tmp_path / "other"))


def test_merged_weights_have_no_components(llama, tmp_path):
    _, plan, store, base = llama["auto"]
    with pytest.raises(ValueError, match="not cut from merged weights: leave out merge"):
        save(base, tmp_path / "merged", tokenizer=byte_tokenizer(), plan=AnySize(plan, store), merge=True)


def lose(file):
    file.unlink()


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def of_other_factors(file):
    file.write_bytes(with_checksum(load_file(file), {"factors": "others"}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose, "holds no components of these"),
        (flip, r"up_proj.safetensors is damaged \(its checksum is wrong\): copy the folder again, with its subfolder"),
        (of_other_factors, r"is damaged \(it holds components of other factors than the plan's\)"),
    ],
)
def test_damaged_components_are_named(copied, damage, said):
    folder, plan = copied
    damage(folder / "nested" / f"{UP}.safetensors")
    with pytest.raises(ValueError, match=said):
        load_compressed(folder, keep=0.3)
    assert any(UP in wrong for wrong in NestedComponents.of_export(folder, plan).check())


def test_values_that_are_not_finite_are_found(copied):
    folder, plan = copied
    file = folder / "nested" / f"{UP}.safetensors"
    parts = load_file(file)
    parts["left"][0, 0] = torch.nan
    nested_components = NestedComponents.of_export(folder, plan)
    file.write_bytes(with_checksum(parts, {"factors": nested_components._factors_digest()}))
    assert nested_components.check() == [f"{UP} has components that are NaN or infinite"]


def test_changed_components_are_an_error_before_weights_are_read(llama, tmp_path):
    folder = shutil.copytree(llama["auto"][0], tmp_path / "copy")
    flip(folder / "nested" / f"{UP}.safetensors")
    assert load_compressed(folder).num_parameters()
    with pytest.raises(ValueError, match=rf"nested/{UP}.safetensors in .* is not as it was exported, by the SHA-256"):
        load_compressed(folder, keep=0.3)


def test_a_name_with_a_path_in_it_is_refused(llama):
    folder, plan, *_ = llama["auto"]
    with pytest.raises(ValueError, match="can't be the name of a file"):
        NestedComponents.of_export(folder, plan).kept("../x", plan.modules[UP])


def test_the_plan_in_the_folder_is_the_plan_itself(llama):
    folder, plan, *_ = llama["auto"]
    assert RankPlan.load(folder / "plan.json") == plan


@pytest.fixture
def inaccurate(monkeypatch):
    """No layer can be stored pivoted."""
    monkeypatch.setattr(compression, "pivot", lambda *args, **kwargs: replace(pivot(*args, **kwargs), error=1.0))


def test_a_layer_that_can_not_be_pivoted_is_stored_as_two_factors_where_these_are_smaller(llama, inaccurate):
    folder, plan, store, base = llama["auto"]
    sized = nested(plan, [0.15])[0.15]
    assert_same(load_compressed(folder, keep=0.15), compress(copy.deepcopy(base), sized, store))


def test_a_layer_that_would_have_to_be_dense_again_is_an_error(llama, inaccurate):
    with pytest.raises(ValueError, match=r"can't be stored pivoted at rank .* make this size from the plan with"):
        load_compressed(llama["auto"][0], keep=0.75)
