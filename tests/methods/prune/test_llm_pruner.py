"""LLM-Pruner: importance by hand, what is removed, and the way of the pruned model through the disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank_pl import load_compressed, save_compressed
from lowrank_pl.calibration.build import build_gradients, statistics_of
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.methods.prune.base import apply_pruning, pruned_base
from lowrank_pl.methods.prune.llm_pruner import apply_llm_pruner, structure_importance
from lowrank_pl.methods.prune.settings import LLMPruner, WidthPruning
from lowrank_pl.methods.prune.structures import Structures
from lowrank_pl.models.base import Base, load_base
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.targets import Target, find_targets, model_parameters, targeted_parameters
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from tests.helpers.unchanged import assert_untouched, state

SECOND = LLMPruner(skip_first=1, skip_last=0)
SEQUENCES = torch.arange(256).view(8, 32)


def subject_of(model):
    return Subject(model, byte_tokenizer(), SEQUENCES, base=Base("random:llama"))


def pruned(model, settings=SECOND, *, keep=0.7):
    """Prune ``model`` in place, and return what its config remembers."""
    subject = subject_of(model)
    return apply_llm_pruner(model, subject.targets, statistics_of(subject), settings, base="random:llama", keep=keep)


# -- importance ----------------------------------------------------------------------------------------------------

GRID = Structures(
    Target("m.down", 0, "down", (2, 2), "m.down"), (Target("m.up", 0, "up", (2, 2), "m.up"),), 2, consecutive=False
)
WEIGHTS = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0], [2.0, 5.0]])]
SLOPES = [torch.tensor([[1.0, -1.0], [1.0, 0.0]]), torch.tensor([[2.0, 2.0], [1.0, 0.0]])]


@pytest.mark.parametrize(
    ("importance", "aggregation", "expected"),
    [
        # Rows of w * g: 1 - 2 and 3 + 0. Columns: 2 + 2 and -2 + 0.
        ("element", "sum", [3 + 4, 3 + 2]),
        ("element", "prod", [3 * 4, 3 * 2]),
        ("element", "max", [4, 3]),
        ("element", "last", [4, 2]),
        ("vector", "sum", [1 + 4, 3 + 2]),
        ("vector", "max", [4, 3]),
    ],
)
def test_importance_by_hand(importance, aggregation, expected):
    settings = LLMPruner(importance=importance, aggregation=aggregation)
    assert structure_importance(GRID, WEIGHTS, SLOPES, settings).tolist() == expected


def test_the_neurons_and_the_head_with_the_least_importance_go(llama):
    dense, settings = tiny_model("llama"), SECOND
    gradients = build_gradients(subject_of(dense))
    origin = pruned(llama)
    mlp, attention = dense.model.layers[1].mlp, dense.model.layers[1].self_attn
    moved = {
        name: (module.weight * gradients.read(f"model.layers.1.{name}", "mean")).abs()
        for name, module in dense.model.layers[1].named_modules()
        if name.endswith("_proj")
    }
    scores = moved["mlp.gate_proj"].sum(1) + moved["mlp.up_proj"].sum(1) + moved["mlp.down_proj"].sum(0)
    kept = scores.topk(origin.left["model.layers.1.mlp"]).indices.sort().values
    assert torch.equal(llama.model.layers[1].mlp.up_proj.weight, mlp.up_proj.weight[kept])
    assert torch.equal(llama.model.layers[1].mlp.down_proj.weight, mlp.down_proj.weight[:, kept])
    by_row = [moved[f"self_attn.{name}_proj"].sum(1).view(2, -1).sum(1) for name in "qkv"]
    better = int((sum(by_row) + moved["self_attn.o_proj"].sum(0).view(2, -1).sum(1)).argmax())
    queries = attention.q_proj.weight.view(2, -1, 32)[better]
    assert torch.equal(llama.model.layers[1].self_attn.q_proj.weight, queries)
    assert settings.importance == "element"


# -- what is left --------------------------------------------------------------------------------------------------

VARIANTS = {
    "heads and neurons": SECOND,
    "neurons": LLMPruner(attention=False, skip_first=1, skip_last=0),
    "heads": LLMPruner(mlp=False, skip_first=0, skip_last=0),
    "multiples of 8": LLMPruner(skip_first=0, skip_last=0, multiple_of=8),
}


@pytest.mark.parametrize(
    ("name", "keep", "least"),
    # A head is an eighth of the linear layers of its block.
    [("heads and neurons", 0.8, 0.795), ("neurons", 0.8, 0.795), ("heads", 0.9, 0.875), ("multiples of 8", 0.8, 0.75)],
)
def test_no_more_is_left_than_was_asked_for_and_the_config_counts_it(llama, name, keep, least):
    dense = targeted_parameters(find_targets(llama)), model_parameters(llama)
    origin = pruned(llama, VARIANTS[name], keep=keep)
    targets = find_targets(llama)
    assert least <= targeted_parameters(targets) / dense[0] <= keep
    assert (origin.targeted, origin.parameters) == dense
    assert origin.left_out(targets) == dense[0] - targeted_parameters(targets)
    assert model_parameters(llama) == dense[1] - origin.left_out(targets)


def test_the_first_and_last_blocks_stay_as_they_were():
    model = tiny_model("llama", layers=4)
    before = [state(block) for block in model.model.layers]
    pruned(model, LLMPruner(skip_first=1, skip_last=1), keep=0.8)
    for place in (0, 3):
        assert_untouched(model.model.layers[place], before[place])
    assert {model.model.layers[place].mlp.up_proj.out_features < 96 for place in (1, 2)} == {True}


def test_widths_are_multiples(llama):
    assert {left % 8 for left in pruned(llama, VARIANTS["multiples of 8"]).left.values()} == {0}


def test_heads_of_multi_head_attention_are_groups_of_one():
    model = tiny_model("gpt_neox")
    assert pruned(model, VARIANTS["heads"], keep=0.93).heads_left == {
        "gpt_neox.layers.0.attention": 3, "gpt_neox.layers.1.attention": 3,
    }  # fmt: skip


def test_a_model_that_is_smaller_than_was_asked_for_is_told(llama, caplog):
    pruned(llama, VARIANTS["heads"], keep=0.95)
    assert "0.8750 of the targeted parameters are left, where keep is 0.95" in caplog.text


@pytest.mark.parametrize("family", ["phi3", "opt", "gpt2"])
def test_mlps_are_pruned_where_heads_cannot_be(family):
    model = tiny_model(family)
    origin = pruned(model, VARIANTS["neurons"])
    assert origin.heads_left == {}
    assert min(origin.left.values()) < origin.width


# -- through the disk ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2", "gemma3", "gpt_neox"])
def saved(request, tmp_path_factory):
    """A pruned model and its folder."""
    model = tiny_model(request.param)
    pruned(model)
    report = save_compressed(model, tmp_path_factory.mktemp(request.param) / "base", tokenizer=byte_tokenizer())
    return SimpleNamespace(model=model, folder=report.directory)


@torch.no_grad()
@pytest.mark.parametrize("load", [load_compressed, lambda folder: load_base(str(folder))], ids=["export", "base"])
def test_it_reloads_bit_for_bit(saved, load, sequences):
    again = load(saved.folder)
    assert torch.equal(again(sequences[:2]).logits, saved.model(sequences[:2]).logits)
    assert Origin.of(again) == Origin.of(saved.model)


@pytest.mark.parametrize("cache", [{"use_cache": True}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_a_cache_with_fewer_heads_in_some_blocks_generates_the_same(saved, sequences, cache):
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    prompt = sequences[:2, :16]
    plain = saved.model.generate(prompt, use_cache=False, **options)
    assert torch.equal(saved.model.generate(prompt, **options, **cache, disable_compile=True), plain)


def test_dense_weights_cannot_be_exported(saved, tmp_path):
    with pytest.raises(ValueError, match="linear layers have shapes that the plain config"):
        save_compressed(saved.model, tmp_path / "merged", tokenizer=byte_tokenizer(), merge=True)


@torch.no_grad()
def test_mlps_of_all_blocks_pruned_alike_need_no_code_of_ours(llama, sequences, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path))
    settings = LLMPruner(attention=False, skip_first=0, skip_last=0)
    folder, _ = pruned_base(subject_of(llama), settings, keep=0.7)
    assert "quantization_config" not in json.loads((Path(folder) / "config.json").read_text())
    origin = pruned(llama, settings)
    assert llama.config.intermediate_size == min(origin.left.values()) == 57
    assert torch.equal(load_base(folder)(sequences[:2]).logits, llama(sequences[:2]).logits)


# -- one after the other -------------------------------------------------------------------------------------------


def test_mlps_are_pruned_in_width_after_heads(llama):
    dense = targeted_parameters(find_targets(llama))
    pruned(llama, VARIANTS["heads"], keep=0.9)
    subject = subject_of(llama)
    found = apply_pruning(
        llama, subject.targets, statistics_of(subject), WidthPruning(share=0.5), base="pruned", keep=None
    )
    origin, targets = Origin.of(llama), find_targets(llama)
    assert found.any_pruned
    assert (origin.base, origin.one_width) == ("random:llama", False)
    assert origin.left_out(targets) == dense - targeted_parameters(targets)


def test_heads_are_not_pruned_twice(llama):
    pruned(llama, VARIANTS["heads"], keep=0.9)
    with pytest.raises(ValueError, match=r"1 of 2 key/value heads .*already: prune random:llama itself"):
        pruned(llama, VARIANTS["heads"], keep=0.5)


def test_the_cache_holds_the_pruned_base(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path))
    before = state(llama)
    first = pruned_base(subject_of(llama), SECOND, keep=0.7)
    assert_untouched(llama, before)
    assert pruned_base(subject_of(llama), SECOND, keep=0.7) == first
    assert pruned_base(subject_of(llama), VARIANTS["neurons"], keep=0.7)[0] != first[0]
    assert Origin.of(load_base(first[0])).method == "llm_pruner"


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "keep", "message"),
    [
        (SECOND, 1.0, r"keep is 1\.0: expected a fraction"),
        (LLMPruner(), 0.8, "skip_first 4 and skip_last 2 leave none of the 2 blocks of LlamaForCausalLM"),
        (SECOND, 0.4, r"keep 0\.4 needs 0\.6 of .*heads and MLP neurons of blocks 1 to 1 have 0\.5.*: raise keep"),
        (VARIANTS["heads"], 0.75, r"but the heads of blocks 0 to 1 have 0\.25"),
    ],
)
def test_impossible_sizes_are_refused_and_nothing_is_changed(llama, settings, keep, message):
    before = state(llama)
    with pytest.raises(ValueError, match=message):
        pruned(llama, settings, keep=keep)
    assert_untouched(llama, before)
    assert Origin.of(llama) is None


def test_a_base_smaller_than_is_to_be_kept_is_refused(llama):
    pruned(llama, VARIANTS["neurons"], keep=0.7)
    with pytest.raises(ValueError, match=r"keep is 0\.8, but earlier pruning has left only 0\.69"):
        pruned(llama, LLMPruner(mlp=False, skip_first=0, skip_last=0), keep=0.8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": False, "mlp": False}, "both false"),
        ({"keep": 0.0}, r"keep of llm_pruner is 0\.0"),
        ({"skip_first": -1}, "skip_first is -1"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"multiple_of": 8, "mlp": False}, "multiple_of is 8, which is for the widths of MLPs"),
        ({"importance": "second"}, "importance is 'second': expected one of element, vector"),
        ({"aggregation": "mean"}, "aggregation is 'mean': expected one of sum, prod, max, last"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LLMPruner(**settings)


def test_the_size_that_pruning_leaves_is_not_below_the_final_one(llama):
    with pytest.raises(ValueError, match=r"keep of llm_pruner is 0\.5, less than keep 0\.7"):
        pruned_base(subject_of(llama), LLMPruner(keep=0.5), keep=0.7)
