from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_pl.models.hf_quantized import Grid
from lowrank_pl.serving.fused_linear import FusedLinear, Member
from tests.helpers.low_rank_models import STORAGES, low_rank_layer
from tests.helpers.rounded_models import rounded_layer

INPUTS = 24
OUTPUTS = (20, 12, 16)
STORED = ("factored", "out", "in")


def product(weight):
    made = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    return made


def layer(storage, outputs=20, rank=5, inputs=INPUTS):
    torch.manual_seed(outputs)
    if storage == "dense":
        return nn.Linear(inputs, outputs, bias=False)
    return low_rank_layer(outputs, inputs, rank, storage)


def member(module, storage, *, rows=None, columns=None):
    entry = None if storage == "dense" else module.rank
    if storage in ("out", "in"):
        entry = {"rank": module.rank, "storage": "pivoted", "side": storage}
    outputs, inputs = module.out_features, module.in_features
    made = Member("layer", outputs, inputs, entry, rows or [(0, outputs)], columns or (0, inputs))
    for name, tensor in module.state_dict().items():
        made.load(name, tensor, torch.float64)
    return made


def dense(module):
    return (module.dense() if hasattr(module, "dense") else module.weight).double()


def fused(*members):
    return FusedLinear(members, device=torch.device("cpu"), make_product=product)


@pytest.fixture
def x():
    return torch.randn(3, 7, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_members_of_unequal_rank_and_storage_compute_their_outputs_below_each_other(x):
    for first in range(len(STORAGES)):
        storages = (STORAGES * 2)[first : first + len(OUTPUTS)]
        layers = [layer(storage, outputs, 3 + outputs // 8) for storage, outputs in zip(storages, OUTPUTS, strict=True)]
        output = fused(*map(member, layers, storages))(x)
        torch.testing.assert_close(output, torch.cat([x @ dense(one).T for one in layers], -1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(8)], ids=str)
def test_rounded_matrices_are_dequantised(storage, grid, x):
    plain = layer(storage)
    rounded = rounded_layer(plain, grid).double()
    entry = {"rank": plain.rank} if storage != "dense" else {}
    if storage in ("out", "in"):
        entry |= {"storage": "pivoted", "side": storage}
    made = Member("layer", 20, INPUTS, {**entry, **grid.to_json()}, [(4, 12)], (0, INPUTS))
    for name, tensor in rounded.state_dict().items():
        made.load(name, tensor, torch.float64)
    expected = x @ rounded.dense().T
    torch.testing.assert_close(fused(made)(x), expected[..., 4:16], atol=1e-6, rtol=1e-6)


def test_a_missing_scale_is_named():
    rounded = rounded_layer(layer("dense"), Grid(4, 8))
    made = Member("layer", 20, INPUTS, {"bits": 4, "group": 8}, [(0, 20)], (0, INPUTS))
    made.load("weight_packed", rounded.weight_packed, torch.float32)
    with pytest.raises(ValueError, match=r"hold no layer\.weight: .*copy or export it again"):
        fused(made)


def test_what_reads_the_whole_input_is_one_product():
    layers = [(layer(storage, 8 + 4 * place), storage) for place, storage in enumerate(STORAGES)]
    assert fused(*(member(*one) for one in layers)).shared.weight.shape == (5 + 5 + 20, INPUTS)


@pytest.mark.parametrize("storage", STORAGES)
def test_outputs_split_over_processes_make_up_the_whole(storage, x):
    whole = layer(storage)
    # The second process's rows lie apart, as where query, key and value are one layer of the checkpoint.
    spans = [[(0, 8)], [(8, 4), (16, 4)], [(12, 4)]]
    parts = [fused(member(whole, storage, rows=rows))(x) for rows in spans]
    expected = (x @ dense(whole).T).split([8, 4, 4, 4], -1)
    for part, rows in zip(parts, ([0], [1, 3], [2]), strict=True):
        torch.testing.assert_close(part, torch.cat([expected[row] for row in rows], -1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("storage", STORAGES)
def test_inputs_split_over_processes_add_up(storage, x):
    whole = layer(storage)
    parts = [fused(member(whole, storage, columns=(start, 8)))(x[..., start : start + 8]) for start in (0, 8, 16)]
    torch.testing.assert_close(sum(parts), x @ dense(whole).T, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("storage", STORED)
def test_only_what_is_split_along_its_pivots_becomes_factors(storage):
    whole = layer(storage)
    assert member(whole, storage, rows=[(0, 8)]).unpivoted == (storage == "out")
    assert member(whole, storage, columns=(0, 8)).unpivoted == (storage == "in")
    assert not member(whole, storage).unpivoted


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("part", [{}, {"rows": [(4, 8)]}, {"columns": (6, 6)}], ids=["whole", "rows", "columns"])
def test_a_layer_of_its_own_computes_the_same(storage, part, x):
    module = layer(storage)
    begin, width = part.get("columns", (0, INPUTS))
    rows = fused(member(module, storage, **part))
    alone = member(module, storage, **part).layer(torch.device("cpu"))
    torch.testing.assert_close(alone(x[..., begin : begin + width]), rows(x[..., begin : begin + width]))


def test_a_rank_above_the_rows_of_one_process_is_fine(x):
    whole = layer("factored", rank=12)
    torch.testing.assert_close(fused(member(whole, "factored", rows=[(0, 4)]))(x), x @ dense(whole)[:4].T)


def test_memory_of_the_loader_may_be_used_again(x):
    whole = layer("out")
    made = member(whole, "out")
    expected = x @ dense(whole).T
    for tensor in whole.state_dict().values():
        tensor.zero_()
    torch.testing.assert_close(fused(made)(x), expected, atol=1e-6, rtol=1e-6)


def test_a_missing_tensor_is_named():
    made = member(layer("out"), "out")
    del made.loaded["right"]
    with pytest.raises(ValueError, match=r"no layer\.right: the folder is damaged, copy or export it again"):
        fused(made)


def test_a_tensor_of_another_shape_is_named():
    made = member(layer("factored"), "factored")
    with pytest.raises(ValueError, match=r"layer\.right has the shape \[4, 24\].*says \[5, 24\]"):
        made.load("right", torch.ones(4, INPUTS), torch.float32)
    with pytest.raises(ValueError, match=r"layer\.pivots .*no such tensor"):
        made.load("pivots", torch.arange(5), torch.float32)


@pytest.mark.parametrize("pivots", [[0, 1, 2, 3, 20], [-1, 1, 2, 3, 4], [0, 1, 3, 2, 4]])
def test_pivots_that_are_no_ascending_indices_are_refused(pivots):
    made = member(layer("out"), "out")
    made.load("pivots", torch.tensor(pivots), torch.float32)
    with pytest.raises(ValueError, match="5 ascending indices below 20; the folder is damaged"):
        fused(made)


def test_a_rank_that_cannot_be_pivoted_is_refused():
    entry = {"rank": 24, "storage": "pivoted", "side": "out"}
    with pytest.raises(ValueError, match="rank 24 of a layer of shape"):
        Member("layer", 20, INPUTS, entry, [(0, 20)], (0, INPUTS))


def test_it_exports_without_shapes_or_indices_made_while_it_runs(x):
    layers = [(layer(storage), storage) for storage in STORAGES]
    module = fused(*(member(*one) for one in layers))
    program = torch.export.export(module, (x,))
    made = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in made if any(word in name for word in ("sort", "arange", "nonzero", "isin"))]
