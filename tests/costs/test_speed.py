"""Speed of compressed models: what is built, counted and compared. No time is ever asserted."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_pl.costs.speed import (
    DENSE,
    RepeatableLayer,
    Speed,
    SpeedTest,
    Variant,
    measure_speed,
    multiply_adds,
    read_bytes,
    repeatable_cache,
    speed_rows,
    speed_table,
    uniform_modules,
)
from lowrank_pl.models.base import load_base
from lowrank_pl.models.hf_experts import split_modules
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.targets import find_targets
from lowrank_pl.models.tiny import FAMILIES, tiny_model
from lowrank_pl.plans.storage import Storage

VARIANTS = [DENSE, Variant("factored", 0.5), Variant("pivoted", 0.5)]


def step(model, tokens, cache):
    return model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_the_repeatable_cache_is_one_of_decoding_and_can_be_repeated(family):
    model = load_base(f"random:{family}", dtype=torch.float32)
    tokens = torch.arange(40, 61).expand(3, -1)
    cache = repeatable_cache(model, tokens)
    first, second = step(model, tokens, cache), step(model, tokens, cache)
    assert torch.equal(first, second)
    assert torch.allclose(first, model(input_ids=tokens, use_cache=False).logits[:, -1:], atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@pytest.mark.parametrize("length", [5, 8, 9, 20])
def test_the_repeatable_cache_of_a_sliding_window(family, length):
    config = tiny_model(family).config
    config.sliding_window = 8
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.arange(length).expand(2, -1)
    with torch.no_grad():
        cache = repeatable_cache(model, tokens)
        assert cache.layers[0].keys.shape[2] == min(length, 8)
        for _ in range(2):
            logits = step(model, tokens, cache)
            assert torch.allclose(logits, model(input_ids=tokens, use_cache=False).logits[:, -1:], atol=1e-5)


def test_a_layer_without_keys_has_no_repeatable_cache():
    with pytest.raises(ValueError, match=r"keys and values .*got a Linear"):
        RepeatableLayer(torch.nn.Linear(2, 2), 1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.parametrize("keep", [1.0, 0.8, 0.5, 0.01])
def test_layers_have_the_largest_rank_that_their_keep_allows(dtype, storage, keep):
    model = load_base("random:qwen2", dtype=dtype)
    targets = find_targets(model)
    prices = Storage(storage, dtype.itemsize)
    made = uniform_modules(model, targets, Variant(storage, keep))
    assert list(made) == [target.name for target in targets.modules]
    for target in targets.modules:
        new, old = made[target.name], model.get_submodule(target.name)
        m, n = target.shape
        assert type(new) is (LowRankLinear if storage == "factored" else PivotedLinear)
        assert (new.out_features, new.in_features, new.weight.dtype) == (m, n, dtype)
        assert new.bias is old.bias
        if new.rank > 1:
            assert prices.cost(target.shape, new.rank) <= keep * m * n
        assert prices.cost(target.shape, new.rank + 1) > keep * m * n or new.rank == prices.break_even(target.shape)
    multiples = uniform_modules(model, targets, Variant(storage, 0.8), multiple_of=4)
    assert {layer.rank % 4 for layer in multiples.values()} == {0}


def test_every_rank_is_at_least_one_multiple_and_layers_without_room_for_it_stay_dense(llama):
    targets = find_targets(llama)
    made = uniform_modules(llama, targets, Variant("factored", 0.01), multiple_of=20)
    assert {layer.rank for layer in made.values()} == {20}
    even = {target.name: Storage("factored", 4).break_even(target.shape) for target in targets.modules}
    assert list(made) == [name for name, rank in even.items() if rank >= 20]
    assert 0 < len(made) < len(even)


def test_pivots_lie_where_compression_puts_them_and_the_callers_random_state_stays(llama):
    state = torch.random.get_rng_state()
    made = uniform_modules(llama, find_targets(llama), Variant("pivoted", 0.5))
    assert torch.equal(state, torch.random.get_rng_state())
    up, down = made["model.layers.0.mlp.up_proj"], made["model.layers.0.mlp.down_proj"]
    assert (up.side, down.side) == ("in", "out")
    for layer in (up, down):
        layer.check_pivots()
        assert layer.pivots.tolist() != list(range(layer.rank))
        assert layer.pivots[-1] > layer.rank


def test_bytes_are_those_of_the_weights_that_a_step_reads():
    llama, tied = tiny_model("llama"), tiny_model("gpt2")
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight
    rotary = sum(buffer.nbytes for buffer in llama.buffers())
    assert read_bytes(llama) == 4 * (llama.num_parameters() - llama.model.embed_tokens.weight.numel()) + rotary
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert read_bytes(tied) == 4 * (tied.num_parameters() - tied.transformer.wpe.weight.numel())


@torch.no_grad()
def test_a_step_reads_the_experts_that_its_token_is_routed_to():
    model = load_base("random:mixtral")
    experts = [expert for _, block in split_modules(model) for expert in block]
    # Two of four serve the token in each of two blocks.
    idle = 4 * sum(sum(parameter.nbytes for parameter in expert.parameters()) for expert in experts[:1])
    assert read_bytes(model, {"input_ids": torch.tensor([[5]])}) == read_bytes(model) - idle


@pytest.mark.parametrize("case", ["decode", "prefill"])
def test_the_dense_form_of_a_mixture_has_fused_experts(case, caplog):
    model = load_base("random:qwen2_moe")
    before, seen = dict(model.named_modules()), []
    variants = [DENSE, Variant("factored", 0.5), Variant("pivoted", 0.5, optimized=True)]
    measure_speed(
        model, variants, SpeedTest(case, batch_size=2, length=8, repeats=1, record=True),
        tick=lambda _: seen.append(bool(split_modules(model))),
    )  # fmt: skip
    assert seen == [False, True, True] * 2
    assert dict(model.named_modules()) == before
    assert "a mixture's step is not recorded" in caplog.text


@pytest.mark.parametrize("length", [1, 16, 33])
def test_multiply_adds_are_those_of_the_matrices_the_attention_and_one_row_of_logits(llama, length):
    matrices = sum(target.shape[0] * target.shape[1] for target in find_targets(llama).modules)
    config = llama.config
    pairs = length * (length + 1) // 2
    attention = 2 * config.num_hidden_layers * config.hidden_size * pairs
    expected = length * matrices + attention + llama.lm_head.weight.numel()
    assert multiply_adds(llama, torch.arange(length)[None]) == expected


def test_multiply_adds_of_a_compressed_model_are_its_numbers(llama):
    targets = find_targets(llama)
    prompt = torch.arange(16)[None]
    dense = multiply_adds(llama, prompt)
    saved = 0
    for name, layer in uniform_modules(llama, targets, Variant("pivoted", 0.5)).items():
        saved += layer.in_features * layer.out_features - layer.weight.numel() - layer.right.numel()
        llama.set_submodule(name, layer)
    assert multiply_adds(llama, prompt) == dense - 16 * saved


@pytest.mark.parametrize("case", ["decode", "prefill"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_variant_is_measured_and_the_model_is_as_it_was(case, family):
    model = tiny_model(family)
    before, tokens = dict(model.named_modules()), torch.arange(8)[None]
    logits = model(tokens).logits
    turns = []
    found = measure_speed(model, VARIANTS, SpeedTest(case, batch_size=2, length=8, repeats=2), tick=turns.append)
    assert list(found) == VARIANTS
    assert turns == VARIANTS * 3
    assert dict(model.named_modules()) == before
    assert torch.equal(model(tokens).logits, logits)
    assert all(0 < one.seconds < float("inf") for one in found.values())
    assert found[DENSE].bytes == read_bytes(model)
    assert found[DENSE].multiply_adds == (multiply_adds(model, tokens) if case == "prefill" else 0)
    assert all(one.bytes < found[DENSE].bytes for one in [found[variant] for variant in VARIANTS[1:]])


def test_the_model_is_put_back_after_an_error(llama):
    before = dict(llama.named_modules())

    def stop(variant):
        if variant != DENSE:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_speed(llama, VARIANTS, SpeedTest("decode", length=4, repeats=1), tick=stop)
    assert dict(llama.named_modules()) == before


def test_compiled_variants_have_their_turns_in_a_row(llama, monkeypatch):
    compiled = []

    def compiling(model, *, dynamic):
        compiled.append(type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__)
        assert not dynamic
        return model

    monkeypatch.setattr(torch, "compile", compiling)
    turns = []
    measure_speed(llama, VARIANTS, SpeedTest("decode", length=4, repeats=2, compile=True), tick=turns.append)
    assert compiled == ["Linear", "LowRankLinear", "PivotedLinear"]
    assert turns == [variant for variant in VARIANTS for _ in range(3)]


def test_a_prompt_longer_than_the_model_is_refused(llama):
    with pytest.raises(ValueError, match=r"2049 tokens .*2048 positions: use shorter"):
        measure_speed(llama, [DENSE], SpeedTest("decode", length=2048, repeats=1))


def test_rows_are_ratios_to_the_dense_model_and_to_the_limit():
    found = {
        DENSE: Speed(2.0, 1000, 800),
        Variant("factored", 0.8): Speed(2.5, 800, 600),
        Variant("pivoted", 0.5): Speed(0.8, 500, 400),
    }
    dense, factored, pivoted = speed_rows(found, SpeedTest("decode", batch_size=16))
    assert (dense["ratio_to_dense"], dense["limit"], dense["ratio_to_limit"]) == (1.0, 1.0, 1.0)
    assert (factored["ratio_to_dense"], factored["limit"], factored["ratio_to_limit"]) == (0.8, 1.25, 0.64)
    assert (pivoted["ratio_to_dense"], pivoted["limit"], pivoted["ratio_to_limit"]) == (2.5, 2.0, 1.25)
    assert (pivoted["tokens_per_second"], pivoted["bytes"]) == (20.0, 500)
    assert [row["limit"] for row in speed_rows(found, SpeedTest("prefill"))] == [1.0, 800 / 600, 2.0]


def test_the_table_names_each_kind_once():
    measured = {DENSE: Speed(2.0, 1000), Variant("pivoted", 0.5): Speed(0.8, 500)}
    rows = [
        {"dtype": dtype, "batch": batch, **row}
        for dtype, batch in (("float32", 1), ("float32", 16), ("bfloat16", 1))
        for row in speed_rows(measured, SpeedTest("decode", batch_size=batch))
    ]
    lines = [line.split() for line in speed_table(rows).splitlines()[2:]]
    assert lines[:3] == [
        ["float32", "1", "dense", "100.0", "%", "2,000.00", "0.5", "1.00", "1.00", "100.0", "%"],
        ["pivoted", "50.0", "%", "800.00", "1.2", "2.50", "2.00", "125.0", "%"],
        [],
    ]
    assert [line[:2] for line in lines[3::3]] == [["float32", "16"], ["bfloat16", "1"]]


@pytest.mark.parametrize("keep", [0.0, 1.2])
def test_an_impossible_keep_is_refused(keep):
    with pytest.raises(ValueError, match=f"keep is {keep}: .*above 0"):
        Variant("factored", keep)
