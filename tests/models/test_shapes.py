"""Blocks of the shapes of large models, with random weights."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.models.base import load_base, load_tokenizer, resolve_base
from lowrank_pl.models.shapes import SHAPES, random_blocks
from lowrank_pl.models.targets import find_targets


def test_blocks_have_the_shapes_of_the_large_model():
    model = load_base("layers:llama-3.2-1b", dtype=torch.bfloat16)
    shapes = {target.kind: target.shape for target in find_targets(model).modules}
    assert shapes == {
        "self_attn.q_proj": (2048, 2048),
        "self_attn.k_proj": (512, 2048),
        "self_attn.v_proj": (512, 2048),
        "self_attn.o_proj": (2048, 2048),
        "mlp.gate_proj": (8192, 2048),
        "mlp.up_proj": (8192, 2048),
        "mlp.down_proj": (2048, 8192),
    }
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(model.model.layers) == 1
    assert model.lm_head.weight.numel() < 0.02 * model.num_parameters()
    assert load_tokenizer("layers:llama-3.2-1b")("ab")["input_ids"] == [97, 98]


def test_all_shapes_are_those_of_published_models():
    # Parameters of all blocks and the last norm, of so many blocks; from the models' cards and their vocabularies.
    sizes = {
        "llama-2-7b": (32, 6_738_415_616 - 2 * 32_000 * 4096),
        "llama-2-13b": (40, 13_015_864_320 - 2 * 32_000 * 5120),
        "llama-3.2-1b": (16, 1_235_814_400 - 128_256 * 2048),
        "llama-3-8b": (32, 8_030_261_248 - 2 * 128_256 * 4096),
        "llama-3-70b": (80, 70_553_706_496 - 2 * 128_256 * 8192),
        "llama-3.1-405b": (126, 405_853_388_800 - 2 * 128_256 * 16384),
        "qwen2.5-7b": (28, 7_615_616_512 - 2 * 152_064 * 3584),
        "granite-3.0-1b-a400m": (24, 1_334_628_352 - 49_155 * 1024),
        "mixtral-8x7b": (32, 46_702_792_704 - 2 * 32_000 * 4096),
        "qwen3-30b-a3b": (48, 30_532_122_624 - 2 * 151_936 * 2048),
        # Without the first three blocks, which have no experts: 583,483,392 parameters each.
        "deepseek-v3": (58, 671_026_404_352 - 2 * 129_280 * 7168 - 3 * 583_483_392),
    }
    assert sizes.keys() == SHAPES.keys()
    for name, (blocks, parameters) in sizes.items():
        with torch.device("meta"):
            model = random_blocks(name)
        block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
        assert blocks * block + model.model.norm.weight.numel() == parameters, name


def test_layers_by_name():
    one, two = resolve_base("layers:llama-3-8b"), resolve_base("layers:llama-3-8b:2")
    assert (one.name, one.shapes, one.blocks) == ("layers-llama-3-8b", "llama-3-8b", 1)
    assert (two.name, two.shapes, two.blocks) == ("layers-llama-3-8b-2", "llama-3-8b", 2)
    with torch.device("meta"):
        assert len(random_blocks("llama-3-8b", blocks=2).model.layers) == 2


@pytest.mark.parametrize(
    ("base", "text"),
    [
        ("layers:llama-4", "'layers:llama-4': unknown shapes; expected one of llama-2-7b, .*llama-3-8b"),
        ("layers:llama-3-8b:0", "'0' .*; write layers:llama-3-8b:2"),
        ("layers:llama-3-8b:many", "'many' .*; write layers:llama-3-8b:2"),
        ("nowhere/at/all", "give a hub id, .*random:FAMILY or layers:NAME"),
    ],
)
def test_layers_refused(base, text):
    with pytest.raises(ValueError, match=text):
        resolve_base(base)


def test_random_blocks_refuses():
    with pytest.raises(ValueError, match=r"'llama-4' .*expected one of llama-2-7b"):
        random_blocks("llama-4")
    with pytest.raises(ValueError, match=r"0 blocks of llama-3-8b .*at least 1"):
        random_blocks("llama-3-8b", blocks=0)
