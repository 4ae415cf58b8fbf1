"""Plans and factors become models of every family; whatever does not belong together is refused."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.compression import compress, compressed, deployed_plan, factored_layer, restore_dense
from lowrank_pl.factors.decomposition import Factors, truncate
from lowrank_pl.factors.pivoting import Pivoted
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.losses import planned_computations
from lowrank_pl.methods.masks.masked_linear import MaskedLinear, computing_with, masked_layers
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.targets import dense_weight, find_targets, replace_module
from lowrank_pl.models.tiny import FAMILIES, byte_tokenizer, tiny_model
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.plans.storage import Storage

FACTORED = Storage("factored")


def factored(family, sequences, **changes):
    model = tiny_model(family, **changes)
    targets = find_targets(model)
    return model, targets, build_factors(Subject(model, byte_tokenizer(), sequences[:4], known_targets=targets))


def drawn(targets, store, rank):
    """A plan with ``rank(target)`` for every target; an entry of its own may be returned too."""
    entries = {target.name: rank(target) for target in targets.modules}
    modules = {
        target.name: entry if isinstance(entry, ModulePlan) else ModulePlan(target.shape, entry)
        for target, entry in zip(targets.modules, entries.values(), strict=True)
    }
    return RankPlan(method="hand", keep=0.5, modules=modules, model_parameters=10**6, fingerprint=store.fingerprint)


def logits(model, sequences):
    with torch.no_grad():
        return model(input_ids=sequences[4:6]).logits


def half(target):
    return max(1, FACTORED.break_even(target.shape) // 2)


def mask_all(model, targets, store, keep=0.5):
    for target in targets.modules:
        mask = ARA().create(target.shape, store.sigma(target.name), keep, storage=FACTORED)
        factors = store.factors(target.name, mask.rank)
        replace_module(model, target.name, MaskedLinear(model.get_submodule(target.name), factors, mask))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_changes_nothing(family, sequences):
    model, targets, store = factored(family, sequences)
    before = logits(model, sequences)
    plan = drawn(targets, store, lambda target: min(target.shape))
    small = compress(model, plan, store)
    assert small is model
    assert all(isinstance(model.get_submodule(target.name), LowRankLinear) for target in targets.modules)
    torch.testing.assert_close(logits(small, sequences), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_modules_compute_with_truncated_weights(family, sequences):
    model, targets, store = factored(family, sequences)
    twin = tiny_model(family)
    dense = {target.name for target in targets.modules[1::3]}
    plan = drawn(targets, store, lambda target: None if target.name in dense else half(target))
    originals = {name: model.get_submodule(name) for name in dense}
    compress(model, plan, store)
    for target in targets.modules:
        if target.name in dense:
            assert model.get_submodule(target.name) is originals[target.name]
            continue
        layer, other = model.get_submodule(target.name), twin.get_submodule(target.name)
        assert (layer.weight.shape[1], layer.right.shape[0]) == (half(target), half(target))
        assert (layer.bias is None) == (other.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, other.bias)
        weight = (layer.weight.double() @ layer.right.double()).float().detach()
        assert torch.linalg.matrix_rank(weight) == half(target)
        # The dense twin gets the truncated weight: whatever differs then is the layer's doing.
        other.weight.data.copy_(weight.T if isinstance(other, Conv1D) else weight)
    torch.testing.assert_close(logits(model, sequences), logits(twin, sequences), rtol=1e-3, atol=1e-3)


def test_counts_of_the_plan_are_those_of_the_model(sequences):
    model, targets, store = factored("qwen2", sequences)
    total = model.num_parameters()
    plan = drawn(targets, store, half)
    plan = RankPlan(
        method="hand", keep=0.5, modules=plan.modules, model_parameters=total, fingerprint=store.fingerprint
    )
    assert compress(model, plan, store).num_parameters() == plan.kept_model_parameters


def test_index_sets(sequences):
    model, targets, store = factored("llama", sequences)
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight.double()
    plan = drawn(targets, store, lambda target: ModulePlan(target.shape, 3, (0, 2, 9)))
    whole = store.factors("model.layers.0.mlp.up_proj")
    compress(model, plan, store)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    expected = sum(torch.outer(whole.left[:, j], whole.right[j]) for j in (0, 2, 9))
    torch.testing.assert_close(layer.weight @ layer.right, expected)
    assert torch.linalg.matrix_norm(weight - (layer.weight @ layer.right).double()) < torch.linalg.matrix_norm(weight)


def test_bfloat16_models_get_bfloat16_factors(sequences):
    model, targets, store = factored("llama", sequences)
    plan = drawn(targets, store, half)
    small = compress(tiny_model("llama").bfloat16(), plan, store)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    expected = logits(compress(model, plan, store), sequences)
    assert (logits(small, sequences).float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_float16_keeps_the_digits_of_factors_of_unequal_sizes():
    left, right = torch.randn(8, 3), torch.randn(3, 8)
    whole = left @ right
    layer = factored_layer(nn.Linear(8, 8, bias=False).half(), Factors(left * 3e4, right / 3e4, torch.ones(3)))
    error = (layer.weight.double() @ layer.right.double() - whole).norm() / whole.norm()
    assert error < 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_masked_model_compresses_to_what_its_masks_compute(family, sequences):
    model, targets, store = factored(family, sequences)
    plan = drawn(targets, store, lambda target: None if target.kind.endswith("proj") else half(target))
    mask_all(model, targets, store)
    layers = masked_layers(model)
    with computing_with(layers, planned_computations(plan, layers)):
        learned = logits(model, sequences)
    small = compress(model, plan, store)
    assert not masked_layers(small)
    torch.testing.assert_close(logits(small, sequences), learned, rtol=1e-4, atol=1e-4)
    reference = compress(tiny_model(family), plan, store)
    assert {name: type(m) for name, m in small.named_modules()} == {
        name: type(m) for name, m in reference.named_modules()
    }
    for (name, mine), (_, theirs) in zip(small.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_restore_dense_undoes_masking(family, sequences):
    model, targets, store = factored(family, sequences)
    before, classes = logits(model, sequences), [type(module) for module in model.modules()]
    mask_all(model, targets, store)
    assert not torch.equal(logits(model, sequences), before)
    assert restore_dense(model) is model
    assert torch.equal(logits(model, sequences), before)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("problem", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("masked", [False, True])
def test_compressed_block_puts_everything_back(sequences, problem, masked):
    model, targets, store = factored("llama", sequences)
    if masked:
        mask_all(model, targets, store)
    before, modules = logits(model, sequences), dict(model.named_modules())
    plan = drawn(targets, store, half)
    leaving = pytest.raises(problem) if problem else nullcontext()
    with leaving, compressed(model, plan, store) as small:
        assert small is model
        inside = logits(small, sequences)
        if problem:
            raise problem
    assert not torch.allclose(inside, before)
    assert torch.equal(logits(model, sequences), before)
    assert dict(model.named_modules()) == modules


def test_failure_inside_compression_is_undone_by_the_block(sequences):
    model, targets, store = factored("llama", sequences)
    before, modules = logits(model, sequences), dict(model.named_modules())
    store.path(targets.modules[6].name).write_bytes(b"short")
    with (
        pytest.raises(ValueError, match=r"safetensors is damaged .*: delete it and run again"),
        compressed(model, drawn(targets, store, half), store),
    ):
        pass
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model, sequences), before)
    store.path(targets.modules[6].name).unlink()


def test_factors_of_another_origin_are_refused(sequences):
    model, targets, store = factored("llama", sequences)
    plan = drawn(targets, store, half)
    other = plan.with_origin({}, {**store.fingerprint, "text": "x", "damping": 1.0})
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"{re.escape(str(store.directory))}: damping, text differ\. Allocate again"):
        compress(model, other, store)
    assert dict(model.named_modules()) == modules


def test_another_model_is_refused_before_anything_changes(sequences):
    _, targets, store = factored("llama", sequences)
    plan = drawn(targets, store, half)
    shorter = tiny_model("llama", layers=1)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj.* load the model"):
        compress(shorter, plan, store)
    wider = tiny_model("llama", hidden=48)
    with pytest.raises(ValueError, match=r"q_proj .*\(32, 32\).*\(48, 48\): load the model"):
        compress(wider, plan, store)
    for model in (shorter, wider):
        assert not any(isinstance(module, LowRankLinear) for module in model.modules())


def test_compressing_twice_is_refused(sequences):
    model, targets, store = factored("llama", sequences)
    plan = drawn(targets, store, half)
    compress(model, plan, store)
    with pytest.raises(ValueError, match=r"LowRankLinear .* expected nn.Linear"):
        compress(model, plan, store)


def test_truncating_the_store_is_truncating_the_whole(sequences):
    model, targets, store = factored("gpt_neox", sequences)
    for target in targets.modules:
        whole = store.factors(target.name)
        part = truncate(whole, 3)
        read = store.factors(target.name, 3)
        assert torch.equal(part.left, read.left)
        assert torch.equal(part.right, read.right)
        weight = dense_weight(model.get_submodule(target.name))
        torch.testing.assert_close(whole.left @ whole.right, weight, rtol=1e-3, atol=1e-4)


# pivoted storage


def pivoted(target):
    return ModulePlan(target.shape, min(target.shape) // 2, storage="pivoted")


@pytest.mark.parametrize("family", FAMILIES)
def test_pivoted_modules_compute_what_their_factors_do(family, sequences):
    model, targets, store = factored(family, sequences)
    plan = drawn(targets, store, pivoted)
    expected = compress(tiny_model(family), drawn(targets, store, lambda target: min(target.shape) // 2), store)
    assert compress(model, plan, store) is model
    sides = set()
    for target in targets.modules:
        layer, other = model.get_submodule(target.name), expected.get_submodule(target.name)
        assert type(layer) is PivotedLinear
        assert layer.bias is other.bias or torch.equal(layer.bias, other.bias)
        assert layer.weight.numel() + layer.right.numel() == plan.modules[target.name].parameters
        torch.testing.assert_close(layer.dense(), other.dense(), rtol=1e-4, atol=1e-5)
        sides.add(layer.side)
    assert sides == {"out", "in"}
    torch.testing.assert_close(logits(model, sequences), logits(expected, sequences), rtol=1e-3, atol=1e-3)
    assert deployed_plan(model, plan) is plan


def test_pivots_of_index_sets_of_masked_and_of_bfloat16_models(sequences):
    model, targets, store = factored("llama", sequences)
    entry = {target.name: ModulePlan(target.shape, 3, (0, 2, 9), "pivoted") for target in targets.modules}
    plan = drawn(targets, store, lambda target: entry[target.name])
    masked = compress(mask_all(tiny_model("llama"), targets, store), plan, store)
    half = compress(tiny_model("llama").bfloat16(), plan, store)
    compress(model, plan, store)
    for name in entry:
        whole, layer = store.factors(name), model.get_submodule(name)
        expected = sum(torch.outer(whole.left[:, j], whole.right[j]) for j in (0, 2, 9))
        torch.testing.assert_close(layer.dense(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(masked.get_submodule(name).weight, layer.weight)
        other = half.get_submodule(name)
        assert (other.weight.dtype, other.pivots.dtype) == (torch.bfloat16, torch.int32)
        torch.testing.assert_close(other.dense().float(), expected, rtol=0.05, atol=0.02)


def test_a_module_whose_factors_would_be_no_smaller_stays_dense_aloud(sequences, monkeypatch, caplog):
    model, targets, store = factored("llama", sequences)
    name = targets.modules[0].name
    rank = FACTORED.break_even(targets.modules[0].shape) + 1
    plan = drawn(targets, store, lambda target: replace(pivoted(target), rank=rank) if target.name == name else None)
    monkeypatch.setattr(Pivoted, "is_accurate", False)
    dense = model.get_submodule(name)
    compress(model, plan, store)
    assert model.get_submodule(name) is dense
    assert re.match(rf"{name} stays dense.* stored pivoted in float32", caplog.messages[-1])
    changed = deployed_plan(model, plan)
    assert changed.modules[name] == ModulePlan(dense.weight.shape)
    assert changed.notes == (f"1 module could not be stored pivoted in float32: dense, e.g. {name}",)
    assert deployed_plan(model, changed) is changed


def test_a_plan_of_another_model_is_refused_for_a_while_too(sequences):
    _, targets, store = factored("llama", sequences)
    plan = drawn(targets, store, half)
    smaller = tiny_model("llama", layers=1)
    refused = pytest.raises(ValueError, match=r"model\.layers\.1\..* load the model")
    with refused, compressed(smaller, plan, store):
        pass


def test_a_module_that_cannot_be_pivoted_is_stored_as_factors_aloud(sequences, monkeypatch, caplog):
    model, targets, store = factored("llama", sequences)
    names = [target.name for target in targets.modules]
    few = {target.name: replace(pivoted(target), rank=min(target.shape) // 3) for target in targets.modules}
    plan = drawn(targets, store, lambda target: half(target) if target.name == names[5] else few[target.name])
    inaccurate = {names[2], names[3]}
    shapes = {plan.modules[name].shape for name in inaccurate}
    monkeypatch.setattr(Pivoted, "is_accurate", property(lambda found: found_shape(found) not in shapes))
    compress(model, plan, store)
    fallen = [name for name in names if plan.modules[name].shape in shapes and name != names[5]]
    assert inaccurate <= set(fallen)
    for name in names:
        expected = LowRankLinear if name in {*fallen, names[5]} else PivotedLinear
        assert type(model.get_submodule(name)) is expected
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == len(fallen)
    assert re.match(rf"{fallen[0]} is stored as two factors: .* stored pivoted in float32", warnings[0])
    changed = deployed_plan(model, plan)
    assert [name for name in names if changed.modules[name] != plan.modules[name]] == fallen
    assert {changed.modules[name].storage for name in fallen} == {"factored"}
    assert changed.notes == (
        f"{len(fallen)} modules could not be stored pivoted in float32: factored, e.g. {fallen[0]}",
    )
    assert deployed_plan(model, changed) is changed
    layers = [model.get_submodule(name) for name in names]
    assert sum(layer.weight.numel() + layer.right.numel() for layer in layers) == sum(
        changed.modules[name].parameters for name in names
    )


def found_shape(found):
    """Shape of the weight in a pivoted form."""
    layer = PivotedLinear.from_parts(found.weight, found.right, found.pivots, side=found.side)
    return layer.out_features, layer.in_features


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_a_layer_of_zeros_is_compressed_and_noted(sequences, storage):
    name = "model.layers.0.mlp.up_proj"
    model = tiny_model("llama")
    model.get_submodule(name).weight.data.zero_()
    targets = find_targets(model)
    store = build_factors(Subject(model, byte_tokenizer(), sequences[:4], known_targets=targets))
    plan = drawn(targets, store, lambda target: ModulePlan(target.shape, 4, storage=storage))
    before = logits(model, sequences)
    model.eval()
    assert torch.isfinite(before).all()
    compress(model, plan, store)
    assert not model.get_submodule(name).dense().any()
    assert deployed_plan(model, plan).zero_modules == [name]


def test_factors_that_are_zero_while_the_weight_is_not_are_refused(sequences):
    model, targets, store = factored("llama", sequences)
    name = targets.modules[0].name
    notes, factors = store.notes(name), store.factors(name)
    store.add(name, replace(factors, left=factors.left * 0), notes=notes)
    with pytest.raises(ValueError, match=rf"factors of {name} are zero .*leave it dense \(--exclude"):
        compress(model, drawn(targets, store, half), store)
    # Tests of one session share the cache.
    store.add(name, factors, notes=notes)
