"""Kernels of compressed layers, run by Triton's interpreter on a CPU; tests/cuda runs them on a GPU."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch

from lowrank_pl.costs.speed import Variant, uniform_modules
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.targets import find_targets, replace_module
from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.serving import kernels
from lowrank_pl.serving.fused_layers import SharedGroup, _matrices, _part, _shared_bias, fuse
from lowrank_pl.serving.kernels import MAX_MATRICES, FusedGroup, Part, Product, Stage, Tile, padded

TILES = [Tile(8, 32, 1), Tile(4, 16, 1)]


def layers(bias):
    """Layers of 21 inputs: factored, pivoted both ways and dense, of ranks that are multiples of nothing."""
    torch.manual_seed(0)
    made = [
        LowRankLinear(21, 19, 5, bias=bias),
        PivotedLinear(21, 14, 7, side="out", bias=bias),
        PivotedLinear(21, 30, 9, side="in", bias=False),
        torch.nn.Linear(21, 11, bias=bias),
    ]
    made[1].pivots = torch.tensor([0, 1, 4, 6, 9, 12, 13], dtype=torch.int32)
    made[2].pivots = torch.tensor([0, 2, 3, 7, 8, 11, 16, 17, 20], dtype=torch.int32)
    for layer in made:
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
    return align(made)


def align(members):
    for layer in members:
        for matrix in _matrices(layer):
            matrix.data = padded(matrix.data)
    return members


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def group(request):
    members = layers(request.param)
    return members, FusedGroup([_part(layer) for layer in members], _shared_bias(members))


@pytest.mark.parametrize("tokens", [1, 2, 16])
@torch.no_grad()
def test_kernels_compute_what_the_layers_compute(group, tokens):
    members, kernels = group
    x = torch.randn(tokens, 21)
    expected = torch.cat([layer(x) for layer in members], 1)
    torch.testing.assert_close(kernels.launch(x, TILES), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.compute(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_half_precision_is_summed_in_float32():
    members = align([layer.bfloat16() for layer in layers(bias=True)])
    x = torch.randn(1, 21).bfloat16()
    found = FusedGroup([_part(layer) for layer in members], _shared_bias(members)).launch(x, TILES)
    exact = torch.cat([layer.float()(x.float()) for layer in members], 1)
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@torch.no_grad()
def test_an_infinite_value_of_one_layer_does_not_reach_another():
    members = [LowRankLinear(8, 8, 3, bias=False), LowRankLinear(8, 8, 3, bias=False)]
    members[1].right.fill_(float("inf"))
    found = FusedGroup([_part(layer) for layer in align(members)]).launch(torch.ones(1, 8), TILES)
    assert found[:, :8].isfinite().all()


def test_rows_of_odd_length_are_moved_and_keep_their_values():
    weight = torch.randn(3, 5)
    moved = padded(weight)
    assert torch.equal(moved, weight)
    assert moved.stride(0) % 8 == 0
    assert padded(whole := torch.randn(3, 16)) is whole


def test_a_stage_refuses_what_it_can_not_hold():
    weight = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=f"5 matrices.*1 to {MAX_MATRICES}"):
        Stage([Product(weight)] * (MAX_MATRICES + 1))
    with pytest.raises(ValueError, match="padded"):
        Stage([Product(torch.zeros(4, 5))])


@pytest.fixture
def chosen(monkeypatch):
    """Kernels that are always taken: there is no GPU to time them on."""
    monkeypatch.setattr(FusedGroup, "choose", lambda self, *_: self.tiles.update(one=TILES, few=TILES))


@torch.no_grad()
def test_layers_of_a_group_are_computed_once_for_an_input(chosen, monkeypatch):
    members = layers(bias=True)
    shared, x, y = SharedGroup(members), torch.randn(1, 3, 21), torch.randn(1, 3, 21)
    launched = []
    launch = FusedGroup.launch
    monkeypatch.setattr(FusedGroup, "launch", lambda *given: launched.append(1) or launch(*given))
    for input in (x, y):
        for number, layer in enumerate(members):
            torch.testing.assert_close(shared.output(number, input), layer(input), rtol=1e-5, atol=1e-5)
    assert len(launched) == 2


@torch.no_grad()
def test_what_torch_has_to_compute_is_left_to_it(chosen):
    shared = SharedGroup(layers(bias=False))
    assert shared.output(0, torch.randn(1, kernels.MAX_TOKENS + 1, 21)) is None
    with torch.enable_grad():
        assert shared.output(0, torch.randn(1, 21)) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.double().float(),
        lambda layer: setattr(layer, "weight", torch.nn.Parameter(layer.weight * 2)),
        lambda layer: setattr(layer, "bias", torch.nn.Parameter(layer.bias * 2)),
    ],
    ids=["converted", "other weight", "other bias"],
)
@torch.no_grad()
def test_layers_that_were_changed_are_left_to_torch(chosen, change, caplog):
    members, x = layers(bias=True), torch.randn(1, 21)
    shared = SharedGroup(members)
    operation = shared.kernels
    change(members[0])
    # Code that was compiled before asks the operation itself.
    torch.testing.assert_close(operation.operation(x), torch.cat([layer(x) for layer in members], 1))
    assert shared.output(1, x) is None
    assert "optimize_for_inference" in caplog.text


@torch.no_grad()
def test_biases_that_change_in_place_are_followed(chosen):
    members, x = layers(bias=True), torch.randn(1, 21)
    shared = SharedGroup(members)
    members[0].bias.add_(5)
    torch.testing.assert_close(shared.output(0, x), members[0](x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_copy_is_computed_by_torch(chosen):
    shared = SharedGroup(layers(bias=True))
    assert copy.deepcopy(shared).output(0, torch.randn(1, 21)) is None
    assert pickle.loads(pickle.dumps(shared)).output(0, torch.randn(1, 21)) is None


@torch.no_grad()
def test_an_input_that_changes_in_place_is_read_again(chosen):
    members, x = layers(bias=True), torch.randn(1, 21)
    shared = SharedGroup(members)
    shared.output(0, x)
    x.mul_(3)
    torch.testing.assert_close(shared.output(1, x), members[1](x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_inputs_of_another_type_and_without_tokens_are_left_to_torch(chosen):
    shared = SharedGroup(layers(bias=True))
    assert shared.output(0, torch.randn(1, 21).bfloat16()) is None
    assert shared.output(0, torch.randn(0, 21)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert shared.output(0, torch.randn(1, 21)) is None


def test_layers_are_freed_as_soon_as_nothing_holds_them(chosen):
    gc.disable()
    try:
        members = layers(bias=True)
        for number, layer in enumerate(members):
            vars(layer).update(group=SharedGroup(members) if not number else members[0].group, number=number)
        found = weakref.ref(members[0].weight)
        del members, layer
        assert found() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@torch.no_grad()
def test_a_model_generates_and_compiles_as_before(chosen, storage):
    model = tiny_model("qwen2").eval()
    made = uniform_modules(model, find_targets(model), Variant(storage, 0.5))
    for name, layer in made.items():
        replace_module(model, name, layer)
    tokens, greedy = torch.arange(6)[None], {"max_new_tokens": 3, "do_sample": False}
    expected, generated = model(tokens, use_cache=False).logits, model.generate(tokens, **greedy)
    assert fuse(model, made) == [{"one": True, "few": True}] * 8
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(tokens, **greedy), generated)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


def test_parts_know_their_outputs():
    assert [_part(layer).outputs for layer in layers(bias=False)] == [19, 14, 30, 11]
    assert Part(torch.zeros(3, 4)).outputs == 3


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    # In a process of its own, because the interpreter is chosen when Triton is imported.
    ended = subprocess.run(
        [sys.executable, "-m", "tests.helpers.compile_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
