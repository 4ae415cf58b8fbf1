"""Masked layers against explicit matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_pl.factors.decomposition import Factors, decompose, truncate
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.ars import ARS
from lowrank_pl.methods.masks.base import ModelMasks
from lowrank_pl.methods.masks.fermi import Fermi
from lowrank_pl.methods.masks.llrc import LLRC
from lowrank_pl.methods.masks.masked_linear import (
    MaskedLinear,
    choose_computation,
    computing_with,
    masked_layers,
    planned_computation,
)
from lowrank_pl.methods.masks.rescaled import Rescaled
from lowrank_pl.models.base import load_base
from lowrank_pl.models.targets import find_targets, replace_module
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.storage import Storage

FACTORED = Storage("factored")

OUT, IN = 20, 28


@pytest.fixture(params=["linear", "linear without bias", "conv1d"])
def layer(request):
    """A layer, its dense weight [out, in] and its bias."""
    torch.manual_seed(0)
    if request.param == "conv1d":
        module = Conv1D(OUT, IN)
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    else:
        module = nn.Linear(IN, OUT, bias=request.param == "linear")
    return module.requires_grad_(False)


def weight_and_bias(module):
    bias = torch.zeros(OUT) if module.bias is None else module.bias
    return (module.weight.T if isinstance(module, Conv1D) else module.weight), bias


def mask_in(module, keep=0.6):
    weight, _ = weight_and_bias(module)
    factors = decompose(weight.float())
    mask = ARA().create((OUT, IN), factors.sigma, keep, storage=FACTORED)
    return MaskedLinear(module, truncate(factors, mask.rank), mask)


@pytest.fixture
def x():
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1))


def reference(module, x, gate):
    """Each token's output by explicit matrices in float64: W rebuilt from its gated singular triples."""
    weight, bias = weight_and_bias(module)
    U, S, V = torch.linalg.svd(weight.double(), full_matrices=False)
    matrix = sum(g * s * torch.outer(u, v) for g, s, u, v in zip(gate, S, U.T, V, strict=False))
    return torch.stack([matrix @ row.double() + bias.double() for row in x.reshape(-1, IN)]).reshape(*x.shape[:-1], OUT)


def close(measured, expected, tolerance=1e-4):
    torch.testing.assert_close(measured.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_mask_gates_components(layer, x):
    masked = mask_in(layer)
    gate = masked.mask().tolist()
    assert 0 < sum(gate) < len(gate)
    close(masked(x), reference(layer, x, gate))


def test_gate_values_between_zero_and_one_scale_components(layer, x):
    masked = mask_in(layer)
    gate = torch.linspace(1, 0, masked.mask.rank)
    masked.mask.forward = lambda: gate
    close(masked(x), reference(layer, x, gate.tolist()))


METHODS = {
    "ara": ARA(),
    "prefixes": LLRC(any_k=False, start_high=1.0, start_low=0.1, noise="logistic"),
    "subsets": LLRC(start_high=1.0, start_low=0.1, noise="logistic"),
    "ars": ARS(start=0.5),
    "rescaled": Rescaled(),
    "fermi": Fermi(),
}


def masked_by(method, modules):
    """Return masked layers that have come to a step of ``method``, and what is below them, all in float64."""
    layers = {}
    shapes = {name: (module.out_features, module.in_features) for name, module in modules.items()}
    budget = Budget(keep=0.6, shapes=shapes, model_parameters=10_000, bytes_per_parameter=8, storage="factored")
    for name, module in modules.items():
        factors = decompose(module.weight.float())
        mask = method.create(shapes[name], factors.sigma, 0.6, storage=FACTORED)
        layers[name] = MaskedLinear(module, truncate(factors, mask.rank), mask)
    masks = {name: layer.mask for name, layer in layers.items()}
    method.advance(ModelMasks(masks, method.shared_module(masks)), 3, budget)
    return layers


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_skip_inactive_components_compute_what_their_masks_say(name):
    torch.manual_seed(0)
    modules = {n: nn.Linear(IN, OUT, bias=n == "a").double().requires_grad_(False) for n in "ab"}
    method = METHODS[name]
    layers = masked_by(method, modules)
    x = torch.randn(2, 16, IN, dtype=torch.float64, requires_grad=True)
    parameters = [parameter for layer in layers.values() for parameter in layer.mask.parameters()]

    def outcome():
        y = torch.cat([layer(x) for layer in layers.values()])
        return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters], allow_unused=True, retain_graph=True)]

    expected = outcome()
    assert all(layer.active is None for layer in layers.values())
    choose_computation(layers, float("inf"))
    active = [None if layer.active is None else layer.active.components for layer in layers.values()]
    for one, two in zip(outcome(), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    if name == "fermi":
        assert active == [None, None]
    elif name in ("subsets", "ars"):
        assert any(isinstance(part, torch.Tensor) for part in active)
    else:
        assert all(isinstance(part, int) and part < layers["a"].mask.rank for part in active)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"ars"}))  # whose gates lie in a network that masks share
def test_everything_a_mask_returns_is_on_its_device(name):
    # On another device than where they are made, as on a GPU.
    modules = {n: nn.Linear(IN, OUT, bias=False).requires_grad_(False) for n in "ab"}
    mask = masked_by(METHODS[name], modules)["a"].mask
    mask.to("meta")
    active = mask.active()
    said = [mask(), mask.ratio(), mask.kept(), *([] if active is None else [active])]
    assert {part.device.type for part in said} == {"meta"}


def test_mixed_precision_takes_the_plain_way(layer, x):
    masked = mask_in(layer)
    choose_computation({"a": masked}, float("inf"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert masked.mask.logits.grad.abs().sum() > 0


def test_dense_computation_is_the_layer_itself(layer, x):
    masked = mask_in(layer)
    masked.computation = "dense"
    torch.testing.assert_close(masked(x), layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 13])
def test_a_rank_keeps_the_first_components(layer, x, rank):
    masked = mask_in(layer)
    masked.computation = rank
    close(masked(x), reference(layer, x, [1.0] * rank))


def test_indices_keep_those_components(layer, x):
    masked = mask_in(layer)
    masked.computation = torch.tensor([0, 3, 7])
    close(masked(x), reference(layer, x, [float(j in (0, 3, 7)) for j in range(masked.mask.rank)]))


def test_only_the_mask_learns(layer, x):
    masked = mask_in(layer)
    learning = [name for name, parameter in masked.named_parameters() if parameter.requires_grad]
    assert learning == ["mask.logits"]
    upstream = torch.randn(3, 5, OUT, generator=torch.Generator().manual_seed(2))
    inputs = x.clone().requires_grad_()
    (masked(inputs) * upstream).sum().backward()
    assert all(p.grad is None for name, p in masked.named_parameters() if name != "mask.logits")
    # d loss / d gate_j = sum over tokens of (upstream . u_j s_j) (v_j . x); the gate's own slope is that of p
    weight, _ = weight_and_bias(layer)
    U, S, V = torch.linalg.svd(weight.double(), full_matrices=False)
    slopes = [
        sum(
            (up.double() @ U[:, j]) * S[j] * (V[j] @ row.double())
            for up, row in zip(upstream.reshape(-1, OUT), x.reshape(-1, IN), strict=True)
        ).item()
        for j in range(masked.mask.rank)
    ]
    alpha = masked.mask.logits.detach().double().softmax(0)
    D = len(alpha) - 1
    M = torch.tensor(
        [[float(j < masked.mask.rank * (D - i) // D) for j in range(masked.mask.rank)] for i in range(D + 1)]
    ).double()
    expected = (alpha[:, None] * (M - alpha @ M)) @ torch.tensor(slopes).double()
    torch.testing.assert_close(masked.mask.logits.grad.double(), expected, rtol=1e-3, atol=1e-5)
    gate = masked.mask().detach().double()
    matrix = (U[:, : len(gate)] * S[: len(gate)] * gate) @ V[: len(gate)]
    close(inputs.grad, (upstream.double() @ matrix))


def test_bfloat16_base_with_float32_mask(layer, x):
    masked = mask_in(layer.bfloat16())
    assert {p.dtype for name, p in masked.named_parameters() if name != "mask.logits"} == {torch.bfloat16}
    assert masked.mask.logits.dtype == torch.float32
    output = masked(x.bfloat16())
    assert output.dtype == torch.bfloat16
    close(output, reference(layer, x.bfloat16(), masked.mask().tolist()), 0.1)
    output.float().square().sum().backward()
    assert masked.mask.logits.grad.dtype == torch.float32
    before = masked.mask.logits.detach().clone()
    torch.optim.AdamW(masked.mask.parameters(), lr=1e-3).step()
    assert ((masked.mask.logits.detach() - before).abs() > 1e-4).any()


def test_dense_brings_the_layer_back(layer, x):
    masked = mask_in(layer)
    back = masked.original()
    assert type(back) is type(layer)
    assert torch.equal(back.weight, layer.weight)
    assert back.weight.is_contiguous()
    assert (back.bias is None) == (layer.bias is None)
    assert back.bias is None or torch.equal(back.bias, layer.bias)
    assert torch.equal(back(x), layer(x))
    assert repr(back) == repr(layer)
    assert list(back.state_dict()) == list(layer.state_dict())
    assert not any(parameter.requires_grad for parameter in back.parameters())


def test_linear_shares_memory_with_its_masked_form():
    layer = nn.Linear(IN, OUT)
    masked = mask_in(layer)
    assert masked.weight.data_ptr() == layer.weight.data_ptr() == masked.original().weight.data_ptr()
    assert masked.bias.data_ptr() == layer.bias.data_ptr()


def test_parameters_are_contiguous_for_fsdp(layer):
    masked = mask_in(layer)
    assert all(parameter.is_contiguous() for parameter in masked.parameters())
    assert (masked.in_features, masked.out_features, masked.weight.shape) == (IN, OUT, (OUT, IN))
    assert f"in_features={IN}, out_features={OUT}, components={masked.mask.rank}" in repr(masked)


def test_computations_hold_inside_the_block_only():
    model = nn.ModuleDict({"a": mask_in(nn.Linear(IN, OUT)), "b": mask_in(nn.Linear(IN, OUT)), "c": nn.Linear(2, 2)})
    layers = masked_layers(model)
    assert list(layers) == ["a", "b"]
    layers["b"].computation = 3
    with computing_with(layers, "dense"):
        assert [layer.computation for layer in layers.values()] == ["dense", "dense"]
        with computing_with(layers, {"a": 2, "b": "mask"}):
            assert [layer.computation for layer in layers.values()] == [2, "mask"]
    assert [layer.computation for layer in layers.values()] == ["mask", 3]
    with pytest.raises(KeyError), computing_with(layers, {"a": "dense"}):
        pass
    with pytest.raises(KeyboardInterrupt), computing_with(layers, "dense"):
        raise KeyboardInterrupt
    assert [layer.computation for layer in layers.values()] == ["mask", 3]


def test_computation_of_a_plan():
    layer = mask_in(nn.Linear(IN, OUT))
    assert planned_computation(layer, None, None) == "dense"
    assert planned_computation(layer, 4, None) == 4
    assert torch.equal(planned_computation(layer, 2, (1, 5)), torch.tensor([1, 5]))
    assert planned_computation(layer, layer.mask.rank, None) == layer.mask.rank
    assert planned_computation(layer, layer.mask.rank + 1, None) == "dense"


@pytest.mark.parametrize("method", [ARA(), Fermi(), Rescaled()], ids=lambda method: method.name)
def test_nearly_full_ranks_are_not_stored_with_pivoted_storage_and_compute_densely(method):
    size, storage = 60, Storage("pivoted")
    sigma = 0.9 ** torch.arange(size, dtype=torch.float64)

    def layer_at(keep):
        dense = nn.Linear(size, size, bias=False).requires_grad_(False)
        factors = decompose(dense.weight)
        mask = method.create((size, size), sigma, keep, storage=storage)
        if method.name == "rescaled":
            budget = Budget(keep=keep, shapes={"a": (size, size)}, model_parameters=size * size, storage="pivoted")
            masks = {"a": mask}
            method.advance(ModelMasks(masks, method.shared_module(masks)), 0, budget)
        return MaskedLinear(dense, truncate(factors, mask.rank), mask)

    rank = layer_at(0.5).mask.rank
    # k (2 n - k) numbers and k indices: what the last 13 of 60 components cost is 3 % of the dense weight.
    assert rank == 47
    assert storage.ratio((size, size), torch.tensor(47.0)) <= 0.97 < storage.ratio((size, size), torch.tensor(48.0))
    for keep, computation in ((0.5, "mask"), (0.95, "mask"), (0.99, "dense"), (1.0, "dense")):
        layer = layer_at(keep)
        choose_computation({"a": layer}, method.dense_from)
        assert layer.computation == computation, keep
        assert len(layer.mask()) == len(layer.mask.kept()) == rank


def test_gumbel_masks_gate_all_components_with_pivoted_storage():
    mask = LLRC().create((60, 60), torch.ones(60, dtype=torch.float64), 1.0, storage=Storage("pivoted"))
    assert mask.rank == 60
    assert mask.dense_beyond == float("inf")


def test_a_step_takes_the_masks_of_experts_together_and_gives_none_to_those_without_tokens(sequences):
    model = load_base("random:mixtral")
    layers = {}
    for target in find_targets(model, include=["*experts*"]).modules:
        dense, (rows, columns) = model.get_submodule(target.name), target.shape
        mask = ARA().create(target.shape, torch.ones(min(target.shape)), 0.6, storage=Storage("pivoted"))
        factors = Factors(torch.randn(rows, mask.rank), torch.randn(mask.rank, columns), torch.ones(mask.rank))
        layers[target.name] = MaskedLinear(dense, factors, mask)
        replace_module(model, target.name, layers[target.name])
    choose_computation(layers, 1.0)
    assert all(layer.gate is not None for layer in layers.values())
    seen = set()
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(sequences[:1, :1]).logits.square().mean().backward()
    reached = {name for name, layer in layers.items() if layer.mask.logits.grad.any()}
    assert reached == seen
    assert len(seen) == 2 * 2 * 3
