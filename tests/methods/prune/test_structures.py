"""Key/value heads with all that belongs to them, found by what a module computes without them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_pl.methods.prune.mlp import find_mlps
from lowrank_pl.methods.prune.structures import Structures, find_heads, neurons_of, without
from lowrank_pl.models.targets import Target, dense_weight, find_targets, replaced
from lowrank_pl.models.tiny import tiny_model
from tests.helpers.unchanged import assert_untouched, state


def target(name, shape):
    return Target(f"m.{name}", 0, name, shape, f"m.{name}")


def test_channels_of_a_head_are_neighbours_and_each_part_of_a_fused_mlp_has_one_of_every_neuron():
    heads = Structures(target("o", (8, 4)), (target("q", (8, 8)), target("k", (4, 8))), 2, consecutive=True)
    assert [heads.channels(layer).T.tolist() for layer in heads.layers] == [
        [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3]], [[0, 1], [2, 3]],
    ]  # fmt: skip
    assert heads.parameters == (64 + 32 + 32) // 2
    neurons = Structures(target("down", (8, 3)), (target("gate_up", (6, 8)),), 3, consecutive=False)
    assert [neurons.channels(layer).T.tolist() for layer in neurons.layers] == [
        [[0, 3], [1, 4], [2, 5]], [[0], [1], [2]],
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_neox"])
@torch.no_grad()
def test_a_model_without_a_head_computes_what_it_does_when_the_head_is_ignored(family, sequences):
    model = tiny_model(family)
    before, targets = state(model), find_targets(model)
    heads = find_heads(model, targets, {mlp.parent for mlp in find_mlps(model, targets)})
    assert_untouched(model, before)
    assert [one.reader.block for one in heads] == [0, 1]
    first = heads[0]
    kept = torch.arange(first.count - 1)
    with replaced(model, without(model, first, kept)):
        removed = model(sequences[:2]).logits
    whole = model(sequences[:2]).logits
    dense_weight(model.get_submodule(first.reader.name))[:, first.channels(first.reader)[:, -1]] = 0
    ignored = model(sequences[:2]).logits
    assert (whole - ignored).norm() > 100 * (removed - ignored).norm()
    torch.testing.assert_close(removed, ignored)


def test_neurons_are_cut_with_their_biases():
    model = tiny_model("opt")
    neurons = neurons_of(find_mlps(model, find_targets(model))[1])
    old = model.get_submodule(neurons.writers[0].name)
    new = without(model, neurons, torch.tensor([3, 5]))[neurons.writers[0].name]
    assert isinstance(new, nn.Linear)
    assert torch.equal(new.bias, old.bias[[3, 5]])
    assert torch.equal(new.weight, old.weight[[3, 5]])


@pytest.mark.parametrize("family", ["phi3", "opt", "gpt2"])
def test_attention_that_counts_its_heads_by_the_config_is_refused(family):
    model = tiny_model(family)
    targets = find_targets(model)
    with pytest.raises(ValueError, match=r"no heads can be removed from .*\.0\..*Attention.*attention false"):
        find_heads(model, targets, {mlp.parent for mlp in find_mlps(model, targets)})


def test_heads_whose_keys_are_not_targeted_are_refused(llama):
    with pytest.raises(ValueError, match="some of its layers are not targeted"):
        find_heads(llama, find_targets(llama, include=["*.[qvo]_proj"]))


def test_no_heads_are_found_where_attention_is_not_targeted(llama):
    with pytest.raises(ValueError, match="no attention with 2 key/value heads was found in LlamaForCausalLM"):
        find_heads(llama, find_targets(llama, include=["self_attn.o_proj"]))


def test_the_only_head_of_multi_query_attention_is_not_removed(llama):
    llama.config.num_key_value_heads = 1
    with pytest.raises(ValueError, match="LlamaForCausalLM has one key/value head"):
        find_heads(llama, find_targets(llama))
