"""Input moments against sums taken token by token, and what stops a collection."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lowrank_pl.calibration.input_moments import InputMoments, collect_input_moments
from lowrank_pl.calibration.measures import Passes
from lowrank_pl.models.targets import Target, find_targets
from lowrank_pl.models.tiny import tiny_model


def by_hand(tokens):
    """Sums of x x' and |x| over rows, one row at a time in float64."""
    rows = [row.double() for row in tokens.reshape(-1, tokens.shape[-1])]
    return sum(torch.outer(row, row) for row in rows), sum(row.abs() for row in rows), len(rows)


def assert_same(moments, reference, *, rtol=1e-6):
    second, absolute, tokens = reference
    mean = second / tokens
    torch.testing.assert_close(moments.second_moment, mean, rtol=rtol, atol=rtol * mean.abs().max().item())
    torch.testing.assert_close(moments.mean_absolute, absolute / tokens, rtol=rtol, atol=0)
    assert moments.tokens == tokens


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, length, 6, generator=generator) for batch, length in [(2, 5), (1, 3), (4, 1)]]


def test_streamed_equals_one_shot(batches):
    flat = torch.cat([batch.reshape(-1, 6) for batch in batches])
    streamed, whole = InputMoments(6), InputMoments(6)
    for batch in batches:
        streamed.add(batch)
    whole.add(flat)
    for moments in (streamed, whole):
        assert moments.second_moment.dtype == torch.float64
        assert_same(moments, by_hand(flat))


def test_bfloat16_inputs_are_summed_in_wider_types():
    tokens = torch.full((1000, 3), 1.0078125, dtype=torch.bfloat16)
    moments = InputMoments(3)
    moments.add(tokens)
    assert moments.second_moment[0, 1].item() == pytest.approx(1.0078125**2, rel=1e-6)
    assert moments.mean_absolute[0].item() == 1.0078125


@pytest.mark.parametrize("size", [3e19, 1e30, 3e38])
def test_massive_activations_overflow_nothing(size):
    tokens = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    tokens[:, 2] = size
    moments = InputMoments(4)
    moments.add(tokens)
    assert torch.isfinite(moments.second_moment).all()
    assert_same(moments, by_hand(tokens))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_not_counted(bad):
    moments = InputMoments(2)
    with pytest.raises(ValueError, match="the inputs hold NaN or infinity"):
        moments.add(torch.tensor([[1.0, bad]]))
    assert moments.tokens == 0
    assert moments.second_moment.abs().sum() == 0


def watched_inputs(model, names, sequences):
    """Inputs of modules for all sequences at once, by hooks of our own."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0]}))
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=sequences)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_collected_moments_are_those_of_the_inputs(family, sequences):
    model = tiny_model(family)
    targets = find_targets(model).modules
    collected = collect_input_moments(model, targets, Passes(sequences[:5], batch_size=2))
    assert list(collected) == list(dict.fromkeys(target.group for target in targets))
    inputs = watched_inputs(model, [target.name for target in targets], sequences[:5])
    for target in targets:
        assert_same(collected[target.group], by_hand(inputs[target.name]), rtol=1e-4)


def test_modules_with_the_same_input_share_one_entry(llama, sequences):
    targets = find_targets(llama).modules
    collected = collect_input_moments(llama, targets, Passes(sequences[:1]))
    kinds = [name.removeprefix("model.layers.0.") for name in collected if ".layers.0." in name]
    assert kinds == ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    some = find_targets(llama, include=["*v_proj", "*up_proj"]).modules
    alone = collect_input_moments(llama, some, Passes(sequences[:1]))
    torch.testing.assert_close(
        alone["model.layers.1.self_attn.v_proj"].second_moment,
        collected["model.layers.1.self_attn.q_proj"].second_moment,
    )


def test_model_is_left_as_it_was(llama, sequences):
    llama.train()
    collect_input_moments(llama, find_targets(llama).modules, Passes(sequences[:1]))
    assert all(module.training for module in llama.modules())
    assert not any(module._forward_pre_hooks for module in llama.modules())
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_inputs_that_are_not_finite_name_module_and_batch(llama, sequences):
    targets = find_targets(llama).modules
    with torch.no_grad():
        llama.get_submodule("model.embed_tokens").weight[sequences[2, 5]] = float("inf")
    first = next(i for i, row in enumerate(sequences) if (row == sequences[2, 5]).any())
    message = (
        rf"the inputs hold NaN or infinity: at module model.layers.0.self_attn.q_proj in calibration batch {first}; "
        "check the checkpoint, and if it was loaded in half precision, load it in float32"
    )
    with pytest.raises(ValueError, match=message):
        collect_input_moments(llama, targets, Passes(sequences))
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_late_damage_is_named_where_it_first_shows(llama, sequences):
    with torch.no_grad():
        llama.get_submodule("model.layers.1.post_attention_layernorm").weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"at module model.layers.1.mlp.gate_proj in calibration batch 0"):
        collect_input_moments(llama, find_targets(llama).modules, Passes(sequences))


def test_fewer_tokens_than_features_is_a_warning(llama, sequences, caplog):
    targets = find_targets(llama).modules
    with caplog.at_level(logging.WARNING):
        collect_input_moments(llama, targets, Passes(sequences[:1, :40]))
    assert caplog.messages == [
        "2 inputs saw fewer tokens than they have features (model.layers.0.mlp.down_proj: 40 tokens, 96 features): "
        "their second moment is singular and rests on damping; give more calibration text"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        collect_input_moments(llama, targets, Passes(sequences[:2]))
    assert caplog.messages == []


class Twice(nn.Module):
    """A model that calls one linear layer twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 4, bias=False)

    def forward(self, input_ids, use_cache):
        x = nn.functional.one_hot(input_ids, 4).float()
        return self.map(self.map(x))


def test_module_called_twice_counts_both_inputs():
    model = Twice()
    target = Target("map", 0, "map", (4, 4), "map")
    moments = collect_input_moments(model, [target], Passes(torch.tensor([[0, 1, 2, 3]])))["map"]
    assert moments.tokens == 8
    once = torch.eye(4, dtype=torch.float64)
    weight = model.map.weight.detach().double()
    torch.testing.assert_close(8 * moments.second_moment, once + weight @ weight.T, rtol=1e-6, atol=1e-6)
