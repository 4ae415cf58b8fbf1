"""Smaller sizes cut from the weights of a compressed model, and from the folder of an export."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_pl import Constraints, Subject, allocate_ranks, compress, load_compressed, save_compressed
from lowrank_pl.cli.export import export
from lowrank_pl.factors.compression import deployed_plan
from lowrank_pl.factors.cutting import cut
from lowrank_pl.models.hf_layers import LowRankLinear
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.resize import nested

FAMILIES = ("llama", "gpt2")


def made(family, storage, *, keep=0.6, allocator="zs_svd"):
    """A plan at ``keep`` and its factors."""
    subject = Subject(
        tiny_model(family), byte_tokenizer(), torch.arange(256).view(4, 64), constraints=Constraints(storage=storage)
    )
    return allocate_ranks(subject, keep=keep, allocator=allocator)


def exported(family, plan, store, folder, **options):
    model = compress(tiny_model(family), plan, store)
    if options:
        model = model.to(**options)
    save_compressed(model, folder, tokenizer=byte_tokenizer(), plan=deployed_plan(model, plan), verify=False)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By storage: a folder of Llama at keep 0.6, its plan and its factors."""
    home, found = tmp_path_factory.mktemp("exports"), {}
    for storage in ("factored", "pivoted"):
        plan, store = made("llama", storage, allocator="uniform")
        found[storage] = exported("llama", plan, store, home / storage), plan, store
    return found


def assert_same(model, other):
    here, there = dict(model.named_parameters()), dict(other.named_parameters())
    assert here.keys() == there.keys()
    assert [name for name in here if not torch.equal(here[name], there[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [0.6, 0.45, 0.2])
def test_a_cut_has_the_bits_of_the_resized_plan_exported(family, keep, tmp_path):
    plan, store = made(family, "factored", allocator="uniform")
    folder = exported(family, plan, store, tmp_path / "model")
    sized = nested(plan, [keep])[keep]
    assert_same(load_compressed(folder, keep=keep), compress(tiny_model(family), sized, store))


def test_components_that_are_not_the_first_are_cut_by_the_order(tmp_path):
    plan, store = made("llama", "factored", allocator="uniform")
    drawn = torch.Generator().manual_seed(0)
    order = {name: torch.rand(len(score), generator=drawn) for name, score in plan.order.scores.items()}
    shapes = {name: entry.shape for name, entry in plan.modules.items()}
    budget = Budget(keep=0.45, shapes=shapes, model_parameters=plan.model_parameters, storage="factored")
    plan = replace(budget.select(order, method="hand"), fingerprint=plan.fingerprint)
    assert plan.any_k_modules
    folder = exported("llama", plan, store, tmp_path / "model")
    sized = nested(plan, [0.25])[0.25]
    assert_same(load_compressed(folder, keep=0.25), compress(tiny_model("llama"), sized, store))


def test_half_precision_keeps_its_bits_too(folders, tmp_path):
    _, plan, store = folders["factored"]
    folder = exported("llama", plan, store, tmp_path / "model", dtype=torch.bfloat16)
    sized = nested(plan, [0.3])[0.3]
    assert_same(load_compressed(folder, keep=0.3), compress(tiny_model("llama"), sized, store).to(torch.bfloat16))


def test_a_cut_model_saves_and_loads_as_any_other(folders, tmp_path):
    folder, *_ = folders["factored"]
    model = load_compressed(folder, keep=0.3)
    model.save_pretrained(tmp_path / "again")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_no_tensor_keeps_the_memory_of_what_was_cut_off(folders):
    model = load_compressed(folders["factored"][0], keep=0.3)
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert len(layers) == 14
    for part in (part for layer in layers for part in (layer.weight, layer.right)):
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
        assert part.is_contiguous()


def test_pivoted_layers_are_not_cut(folders):
    folder, *_ = folders["pivoted"]
    assert load_compressed(folder, keep=0.6).num_parameters() == load_compressed(folder).num_parameters()
    with pytest.raises(ValueError, match=r"cuts 14 layers, of which 14 pivoted, .* exports with --storage factored"):
        load_compressed(folder, keep=0.3)


def test_dense_layers_are_not_cut(tmp_path):
    plan, store = made("llama", "factored", keep=0.7)
    folder = exported("llama", plan, store, tmp_path / "model")
    with pytest.raises(ValueError, match=r"of which \d+ dense, e\.g\. model.*: make this size from the plan with `low"):
        load_compressed(folder, keep=0.4)


def test_plans_of_other_weights_are_refused(folders):
    folder, plan, _ = folders["factored"]
    model = load_compressed(folder)
    name, entry = next(iter(plan.modules.items()))
    other = replace(plan, modules={**plan.modules, name: replace(entry, rank=entry.rank - 1)})
    with pytest.raises(ValueError, match=f"{name} is of rank {entry.rank - 1} in the plan and of rank {entry.rank} in"):
        cut(model, other, other)


def altered(folder, target, change):
    """A copy of the export in ``folder`` with another plan; without digests, as an edited export should be."""
    shutil.copytree(folder, target)
    (target / "lowrank.sha256").unlink()
    plan = change(RankPlan.load(target / "plan.json"))
    (target / "plan.json").unlink()
    if plan is not None:
        plan.save(target / "plan.json")
    return target


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: None, "holds no plan.json, which says what to cut first: copy the plan of this export there"),
        (lambda plan: replace(plan, order=None), "has no component order, so no other size follows from it: make it"),
        (
            lambda plan: replace(plan, fingerprint={**plan.fingerprint, "refit": {"keep": 0.6}}),
            "the factors have a refit for keep 0.6, so their first components are no model of their own: make a plan",
        ),
        (
            lambda plan: replace(plan, fingerprint={**plan.fingerprint, "correction": {"keep": 0.6}}),
            "the factors have a correction for keep 0.6",
        ),
    ],
    ids=["no plan", "no order", "refit", "correction"],
)
def test_folders_that_hold_no_smaller_size_are_refused_before_weights_are_read(
    folders, tmp_path, monkeypatch, change, said
):
    folder = altered(folders["factored"][0], tmp_path / "altered", change)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError) as error:
        load_compressed(folder, keep=0.3)
    assert said in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("keep", "said"),
    [(0.7, "keep is 0.7, but the export has keep 0.6"), (0.0, "keep is 0.0: expected the fraction"), (1.5, "1.5")],
)
def test_sizes_that_the_folder_can_not_have_are_refused(folders, keep, said):
    with pytest.raises(ValueError, match=said):
        load_compressed(folders["factored"][0], keep=keep)


def test_export_writes_a_smaller_folder_that_can_be_cut_again(folders, tmp_path, capsys):
    folder, plan, store = folders["factored"]
    output = export(folder, keep=[0.45, 0.3], output=tmp_path / "sizes")
    assert sorted(path.name for path in output.iterdir()) == ["keep-0.30", "keep-0.45"]
    assert "models" in capsys.readouterr().out
    sized = nested(plan, [0.3])[0.3]
    want = compress(tiny_model("llama"), sized, store)
    assert_same(load_compressed(output / "keep-0.30"), want)
    assert_same(load_compressed(output / "keep-0.45", keep=0.3), want)
    assert RankPlan.load(output / "keep-0.30" / "plan.json").modules == sized.modules
    assert "resized from the plan of uniform at keep 0.6" in (output / "keep-0.30" / "README.md").read_text()


def test_export_of_a_folder_says_what_it_needs(folders, tmp_path):
    folder, *_ = folders["factored"]
    with pytest.raises(ValueError, match=r"is a folder: give a plan, or the sizes to cut .* with --keep"):
        export(folder, output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"is itself a model: name another folder"):
        export(folder, keep=[0.3], output=folder)
    with pytest.raises(ValueError, match=r"keep is 0\.9, but the export has keep 0.6"):
        export(folder, keep=[0.3, 0.9], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
