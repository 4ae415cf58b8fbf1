"""The pivoted layer computes what its merged matrix does, trains, moves, compiles and refuses what does not fit."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowrank_pl.factors.pivoting import pivot
from lowrank_pl.models.hf_layers import PivotedLinear, low_rank_embedding
from lowrank_pl.models.tiny import tiny_model

SIDES = pytest.mark.parametrize("side", ["out", "in"])


def made(side, bias=True, dtype=torch.float32, rank=4):
    """A layer ``[12, 8]`` or ``[8, 12]`` with pivots that are not the first rows or columns."""
    m, n = (8, 12) if side == "out" else (12, 8)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((m, rank), (rank, n)))
    found = pivot(left, right, dtype=dtype)
    assert found.side == side
    assert found.pivots.tolist() != list(range(rank))
    offset = torch.randn(m, generator=generator).to(dtype) if bias else None
    return PivotedLinear.from_parts(found.weight, found.right, found.pivots, side=side, bias=offset)


@SIDES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (1,), (), (0,)])
def test_the_layer_computes_what_its_merged_weight_does(side, bias, shape):
    layer = made(side, bias)
    x = torch.randn(*shape, layer.in_features)
    torch.testing.assert_close(layer(x), functional.linear(x, layer.dense(), layer.bias))
    strided = torch.randn(*shape, 2 * layer.in_features)[..., ::2]
    torch.testing.assert_close(layer(strided), functional.linear(strided, layer.dense(), layer.bias))


@SIDES
def test_indices_put_the_pivots_first_and_both_groups_in_order(side):
    layer = made(side)
    others = [index for index in range(8) if index not in layer.pivots]
    order = [*layer.pivots.tolist(), *others]
    if side == "in":
        assert [index for part in layer._indices() for index in part.tolist()] == order
    else:
        assert layer._indices()[0].tolist() == [order.index(index) for index in range(8)]


@SIDES
def test_the_merged_weight_is_that_of_the_factors(side):
    m, n = (8, 12) if side == "out" else (12, 8)
    left, right = torch.randn(m, 5), torch.randn(5, n)
    found = pivot(left, right, dtype=torch.float64)
    layer = PivotedLinear.from_parts(found.weight, found.right, found.pivots, side=side)
    torch.testing.assert_close(layer.dense(), left.double() @ right.double())


@SIDES
@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)]
)
def test_parts_are_merged_in_a_wider_type(side, dtype, wide):
    layer = made(side, dtype=dtype)
    others = (layer.weight.to(wide) @ layer.right.to(wide)).to(dtype)
    kept = layer.right if side == "out" else layer.weight
    rest = sorted(set(range(8)) - set(layer.pivots.tolist()))
    dense = layer.dense() if side == "out" else layer.dense().T
    assert torch.equal(dense[layer.pivots], kept if side == "out" else kept.T)
    assert torch.equal(dense[rest], others if side == "out" else others.T)


def test_only_numbers_and_pivots_are_stored():
    for side in ("out", "in"):
        layer = made(side, bias=False)
        assert {name: (list(part.shape), part.dtype) for name, part in layer.state_dict().items()} == {
            "weight": ([4, 4] if side == "out" else [12, 4], torch.float32),
            "right": ([4, 12] if side == "out" else [4, 4], torch.float32),
            "pivots": ([4], torch.int32),
        }
        assert sum(part.numel() for part in layer.parameters()) == 4 * (12 + 8 - 4)
        assert [name for name, _ in layer.named_buffers()] == ["pivots"]
        layer(torch.ones(layer.in_features))
        assert len(layer.state_dict()) == 3


def test_the_weight_never_has_the_dense_shape_nor_that_of_gpt2():
    for m, n in itertools.product(range(2, 8), repeat=2):
        for rank, side in itertools.product(range(1, min(m, n)), ("out", "in")):
            layer = PivotedLinear(n, m, rank, side=side, device="meta")
            assert layer.weight.shape not in ((m, n), (n, m))
            assert layer(torch.ones(3, n, device="meta")).shape == (3, m)


@pytest.mark.parametrize("rank", [0, 6, 7])
def test_ranks_and_sides_that_cannot_be_are_refused(rank):
    text = rf"rank {rank} .*\[6, 9\] .*: expected 1 to 5"
    with pytest.raises(ValueError, match=text):
        PivotedLinear(9, 6, rank, side="out")
    with pytest.raises(ValueError, match=r"'left' .* expected one of out, in"):
        PivotedLinear(9, 6, 3, side="left")


def test_from_parts_keeps_the_tensors_and_takes_views():
    weight, right, pivots = torch.randn(5, 3), torch.randn(3, 9), torch.tensor([1, 2, 7])
    layer = PivotedLinear.from_parts(weight, right, pivots, side="out")
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert layer.right.data_ptr() == right.data_ptr()
    assert (layer.in_features, layer.out_features, layer.rank, layer.bias) == (9, 8, 3, None)
    assert repr(layer) == "PivotedLinear(in_features=9, out_features=8, rank=3, side=out, bias=False)"
    strided = PivotedLinear.from_parts(torch.randn(3, 9).T, torch.randn(5, 3).T, pivots, side="in")
    assert strided.weight.is_contiguous()
    assert strided.right.is_contiguous()
    assert (strided.in_features, strided.out_features) == (8, 9)


WEIGHT, RIGHT, PIVOTS = torch.ones(5, 3), torch.ones(3, 9), torch.tensor([0, 2, 3])


@pytest.mark.parametrize(
    ("parts", "options", "text"),
    [
        ((WEIGHT, torch.ones(2, 9), PIVOTS), {"side": "out"}, r"\[5, 3\], \[2, 9\], \[3\]: expected \[out - rank, ran"),
        ((WEIGHT, RIGHT, PIVOTS[:2]), {"side": "in"}, r"\[2\]: expected \[out, rank\], \[rank, in - rank\], a bias of"),
        ((WEIGHT, RIGHT, PIVOTS), {"side": "out", "bias": torch.ones(5)}, r"a bias of \[out\] and pivots of \[rank\]"),
        ((WEIGHT, RIGHT.double(), PIVOTS), {"side": "out"}, "torch.float32 on cpu, torch.float64 on cpu: expected one"),
        ((WEIGHT, RIGHT, PIVOTS), {"side": "left"}, "'left' .*: expected one of out, in"),
        ((WEIGHT, RIGHT[:, :3], PIVOTS), {"side": "out"}, r"rank 3 .*\[8, 3\] .*: expected 1 to 2"),
        (
            (WEIGHT, RIGHT, PIVOTS - 1),
            {"side": "out"},
            r"\[-1, 1, 2\].* 3 ascending indices below 8",
        ),
        (
            (WEIGHT, RIGHT, PIVOTS + 5),
            {"side": "out"},
            r"\[5, 7, 8\].* 3 ascending indices below 8",
        ),
        ((WEIGHT, RIGHT, PIVOTS + 9), {"side": "in"}, r"\[9, 11, 12\].* 3 ascending .* below 12"),
        ((WEIGHT, RIGHT, PIVOTS.flip(0)), {"side": "out"}, r"\[3, 2, 0\].* 3 ascending"),
        ((WEIGHT, RIGHT, PIVOTS * 0 + 1), {"side": "in"}, r"\[1, 1, 1\].* 3 ascending"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, options, text):
    with pytest.raises(ValueError, match=text):
        PivotedLinear.from_parts(*parts, **options)


@SIDES
def test_a_fresh_layer_is_finite(side):
    fresh = PivotedLinear(9, 7, 3, side=side)
    assert all(parameter.isfinite().all() for parameter in fresh.parameters())
    assert fresh.pivots.tolist() == [0, 1, 2]
    x = torch.randn(2, 9)
    torch.testing.assert_close(fresh(x), functional.linear(x, fresh.dense(), fresh.bias))


@SIDES
@pytest.mark.parametrize("shape", [(2, 3), ()])
def test_gradients(side, shape):
    layer = made(side, dtype=torch.float64)
    x = torch.randn(*shape, layer.in_features, dtype=torch.float64, requires_grad=True)
    parts = dict(layer.named_parameters())
    names, values = list(parts), [part.detach().clone().requires_grad_() for part in parts.values()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


@SIDES
def test_the_layer_learns_after_inference(side):
    layer = made(side)
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    with torch.inference_mode():
        before = other(torch.ones(2, layer.in_features))
    loss = other(torch.ones(2, layer.in_features)).square().sum()
    loss.backward()
    torch.optim.SGD(other.parameters(), lr=1e-5).step()
    assert other(torch.ones(2, layer.in_features)).square().sum() < before.square().sum()


@SIDES
def test_copies_casts_and_autocast(side):
    layer = made(side)
    x = torch.randn(2, layer.in_features)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        assert other._derived[0] is other.pivots
    for dtype in (torch.bfloat16, torch.float64):
        cast = copy.deepcopy(layer).to(dtype)
        assert (cast.weight.dtype, cast.pivots.dtype) == (dtype, torch.int32)
        assert torch.equal(cast.pivots, layer.pivots)
        torch.testing.assert_close(cast(x.to(dtype)).float(), expected, rtol=0.05, atol=0.1)


def loaded_in_place(empty, state):
    empty.load_state_dict(state)


def loaded_by_assignment(empty, state):
    empty.load_state_dict(state, assign=True)


def set_one_by_one(empty, state):
    """As transformers and accelerate do."""
    for name, value in state.items():
        setattr(empty, name, value if name == "pivots" else nn.Parameter(value))


@SIDES
@pytest.mark.parametrize("load", [loaded_in_place, loaded_by_assignment, set_one_by_one])
@pytest.mark.parametrize("start", ["cpu", "meta", "run"])
def test_the_order_follows_the_pivots_however_they_are_loaded(side, load, start):
    layer = made(side)
    x = torch.randn(2, layer.in_features)
    device = "meta" if start == "meta" else "cpu"
    empty = PivotedLinear(layer.in_features, layer.out_features, 4, side=side, device=device)
    if start == "meta" and load is loaded_in_place:
        empty.to_empty(device="cpu")
    if start == "run":
        empty(x)
    load(empty, layer.state_dict())
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize(
    ("pivots", "text"),
    [([0, 1, 1, 2], r"\[0, 1, 1, 2\]..."), ([0, 1, 2, 8], "4 ascending indices below 8"), ([-1, 1, 2, 3], r"\[-1, 1")],
)
@SIDES
def test_pivots_that_are_damaged_are_refused_by_name(side, pivots, text):
    model = nn.ModuleDict({"up": made(side)})
    state = model.state_dict() | {"up.pivots": torch.tensor(pivots, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=f"up: the pivots .*{text}"):
        model.load_state_dict(state)
    del state["up.pivots"]
    with pytest.raises(RuntimeError, match=r'Missing key.* "up.pivots"'):
        model.load_state_dict(state)


@SIDES
def test_the_layer_compiles_into_one_graph(side):
    layer = made(side)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for shape in ((2,), (1,), (2, 3)):
        x = torch.randn(*shape, layer.in_features)
        torch.testing.assert_close(compiled(x), layer(x))
    x = torch.randn(2, layer.in_features, requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


@SIDES
def test_the_indices_are_made_inside_a_graph_too(side):
    layer = made(side)
    x = torch.randn(2, layer.in_features)
    expected = layer(x)
    moved = copy.deepcopy(layer)
    moved.pivots = moved.pivots.clone()
    torch.compiler.reset()
    compiled = torch.compile(moved, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_embeddings_of_low_rank_look_up_and_are_copied(family):
    embedding = low_rank_embedding(tiny_model(family).get_input_embeddings(), 4)
    with torch.no_grad():
        for part in (embedding.weight, embedding.right):
            part.normal_()
    ids = torch.tensor([[3, 1], [2, 3]])
    found = embedding(ids)
    scale = getattr(embedding, "embed_scale", torch.tensor(1.0))
    torch.testing.assert_close(found, embedding.dense()[ids] * scale)
    for again in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert torch.equal(again(ids), found)
