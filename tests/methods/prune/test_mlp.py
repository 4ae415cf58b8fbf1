"""Pruned MLPs of every family, of one width and of several, and their way through the disk."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from lowrank_pl import allocate_ranks, load_compressed, save_compressed
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.compression import compress
from lowrank_pl.factors.decomposition import square_root
from lowrank_pl.methods.prune.mlp import find_hidden_neurons, prune_model, pruned_config
from lowrank_pl.models.base import load_base
from lowrank_pl.models.targets import dense_weight, find_targets
from lowrank_pl.models.tiny import FAMILIES, byte_tokenizer, tiny_model
from tests.helpers.fork_server import STRANGER
from tests.helpers.pruned_models import ragged
from tests.helpers.unchanged import assert_untouched, state

# -- one width for all ---------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model, sequences):
    return model(input_ids=sequences[:4]).logits


@pytest.fixture(scope="module", params=FAMILIES)
def pruned(request, sequences):
    """A tiny model pruned to 40 hidden neurons, with all that it was before."""
    model = tiny_model(request.param)
    before, hidden = state(model), find_hidden_neurons(model, find_targets(model))
    fed = {}
    for mlp in hidden:
        model.get_submodule(mlp.reader.name).register_forward_pre_hook(
            lambda _, args, name=mlp.reader.name: fed.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    config = pruned_config(model, hidden, 40)
    whole = logits_of(model, sequences)
    for mlp in hidden:
        model.get_submodule(mlp.reader.name)._forward_pre_hooks.clear()
    assert_untouched(model, before)  # by what finds out how it can be pruned
    moments = {name: torch.cat(parts).T @ torch.cat(parts) for name, parts in fed.items()}
    nats = prune_model(
        model, hidden, [40, 40], lambda reader: (moments[reader.name], square_root(torch.eye(reader.shape[0])))
    )
    return model, config, hidden, whole, nats


def test_every_block_has_an_mlp_and_pruning_costs_something(pruned):
    _, _, hidden, _, nats = pruned
    assert [mlp.reader.block for mlp in hidden] == [0, 1]
    assert nats > 0


def test_a_model_made_from_the_pruned_config_is_the_pruned_model(pruned, sequences):
    model, config, *_ = pruned
    assert model.config.to_dict() == config.to_dict()
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits_of(fresh.eval(), sequences), logits_of(model, sequences))


def test_the_down_projection_compensates_for_what_was_pruned(pruned, sequences, request):
    model, _, hidden, whole, _ = pruned
    plain = tiny_model(request.node.callspec.params["pruned"])
    for mlp in hidden:
        with torch.no_grad():
            dense_weight(plain.get_submodule(mlp.reader.name))[:, 40:] = 0
    part, cut = logits_of(model, sequences), logits_of(plain, sequences)
    assert (part - whole).norm() < 0.7 * (cut - whole).norm()


# -- what can't be pruned ------------------------------------------------------------------------------------------


def test_an_mlp_whose_code_is_unknown_is_left_alone_and_the_config_cannot_say_so(llama):
    # What its linear layers compute is not looked at.
    llama.model.layers[0].mlp.forward = lambda x: x
    hidden = find_hidden_neurons(llama, find_targets(tiny_model("llama")))
    assert [mlp.reader.block for mlp in hidden] == [1]
    with pytest.raises(ValueError, match=r"no setting of LlamaConfig .* width 40"):
        pruned_config(llama, hidden, 40)


def test_a_model_without_targeted_mlps_is_refused(llama):
    only = find_targets(llama, include=["self_attn.*"])
    with pytest.raises(ValueError, match=r"no MLP .* in LlamaForCausalLM"):
        find_hidden_neurons(llama, only)


def test_mlps_of_several_widths_are_refused(llama):
    mlp = llama.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = (nn.Linear(32, 48, bias=False) for _ in range(2))
    mlp.down_proj = nn.Linear(48, 32, bias=False)
    with pytest.raises(ValueError, match=r"\[48, 96\] wide: expected one width"):
        find_hidden_neurons(llama, find_targets(llama))


def test_experts_are_not_pruned():
    model = load_base("random:qwen2_moe")
    with pytest.raises(ValueError, match=r"Qwen2MoeForCausalLM is a mixture of experts, .* by ranks alone"):
        find_hidden_neurons(model, find_targets(model))


def test_a_width_above_the_present_one_is_refused(llama):
    with pytest.raises(ValueError, match=r"a width of 97 .* expected 1 to 96"):
        prune_model(llama, find_hidden_neurons(llama, find_targets(llama)), [40, 97], lambda _: None)


# -- a width of its own for every MLP ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, sequences, tmp_path_factory):
    """A saved model of two widths: its class, its logits and its folder."""
    model, folder = ragged(request.param), tmp_path_factory.mktemp(request.param)
    report = save_compressed(model, folder / "base", tokenizer=byte_tokenizer())
    assert report.modules == 0
    return type(model), logits_of(model, sequences), report.directory


@pytest.fixture(scope="module")
def compressed_again(saved, sequences):
    """The base of two widths with low-rank layers, its plan, and how many modules are targets."""
    base = load_base(str(saved[2]))
    plan, factors = allocate_ranks(Subject(base, byte_tokenizer(), sequences[:4]), allocator="uniform", keep=0.5)
    return compress(base, plan, factors), plan


def test_the_folder_says_which_schema_it_is_of(saved):
    said = json.loads((saved[2] / "config.json").read_text())["quantization_config"]
    assert said["schema"] == 3


def test_as_a_base_it_is_dense_of_its_own_class_and_has_nothing_to_say_of_a_quantization(saved, sequences):
    kind, whole, folder = saved
    base = load_base(str(folder))
    assert type(base) is kind
    assert not hasattr(base.config, "quantization_config")
    assert torch.equal(logits_of(base, sequences), whole)


def test_it_loads_as_an_export(saved, sequences):
    _, whole, folder = saved
    assert torch.equal(logits_of(load_compressed(folder), sequences), whole)


def test_low_rank_layers_on_top_of_it_survive_an_export(compressed_again, sequences, tmp_path):
    small, plan = compressed_again
    export = save_compressed(small, tmp_path / "small", tokenizer=byte_tokenizer(), plan=plan)
    assert torch.equal(logits_of(load_compressed(export.directory), sequences), logits_of(small, sequences))
    assert export.modules == len(plan.modules) - len(plan.dense_modules)


def test_dense_weights_of_two_widths_cannot_be_exported(compressed_again, tmp_path):
    with pytest.raises(ValueError, match=r"shapes that the plain config of \w+ can't describe, .*: export the factors"):
        save_compressed(compressed_again[0], tmp_path / "merged", tokenizer=byte_tokenizer(), merge=True)
    assert not (tmp_path / "merged").exists()


def test_a_loader_that_does_not_know_the_format_stops(tmp_path):
    folder = save_compressed(ragged("llama"), tmp_path / "base", tokenizer=byte_tokenizer()).directory
    code = f"from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
    done = STRANGER.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "mismatched" in done.stderr
