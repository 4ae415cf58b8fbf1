"""Decoder blocks with the shapes of large models and random weights, to measure speed without a download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lowrank_pl.models.tiny import BOS, EOS, PAD, VOCABULARY

__all__ = ["SHAPES", "random_blocks", "whole_config"]


def random_blocks(name: str, *, blocks: int = 1, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model of ``blocks`` decoder blocks with the shapes of the large model ``name``, in eval mode.

    Its vocabulary is that of ``byte_tokenizer``, so that embeddings and head cost almost nothing beside the blocks:
    measurements hold for the linear layers of the large model, not for the whole model. Equal arguments give equal
    weights, and the caller's random state is unchanged.

    Args:
        name: One of :data:`SHAPES`.
        blocks: Number of blocks.
        dtype: Type of the weights.

    Raises:
        ValueError: The name is unknown, or ``blocks`` is below 1.

    >>> model = random_blocks("llama-3.2-1b", dtype=torch.bfloat16)
    >>> model.get_submodule("model.layers.0.mlp.up_proj")
    Linear(in_features=2048, out_features=8192, bias=False)
    """
    kind, sizes = _known(name)
    if blocks < 1:
        raise ValueError(f"{blocks} blocks of {name} were requested: expected a whole number of at least 1")
    config = AutoConfig.for_model(
        kind, num_hidden_layers=blocks, vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        **sizes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def whole_config(name: str) -> PreTrainedConfig:
    """Return the configuration of the large model ``name`` with all blocks and its whole vocabulary.

    Nothing is downloaded: the configuration is enough to estimate what a run needs.

    Args:
        name: One of :data:`SHAPES`.

    Raises:
        ValueError: The name is unknown.

    >>> whole_config("llama-3-70b").num_hidden_layers
    80
    """
    kind, sizes = _known(name)
    blocks, vocabulary, tied = WHOLE[name]
    whole = {**sizes, **UNLIKE.get(name, {})}
    return AutoConfig.for_model(
        kind, num_hidden_layers=blocks, vocab_size=vocabulary, tie_word_embeddings=tied, **whole
    )


def _known(name: str) -> tuple[str, Mapping[str, Any]]:
    if name not in SHAPES:
        raise ValueError(f"the shapes of {name!r} are not known: expected one of {', '.join(SHAPES)}")
    return SHAPES[name]


def _sizes(hidden: int, intermediate: int, heads: int, key_heads: int, **more: Any) -> Mapping[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 8192,
        **more,
    }


SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama-2-7b": ("llama", _sizes(4096, 11008, 32, 32)),
    "llama-2-13b": ("llama", _sizes(5120, 13824, 40, 40)),
    "llama-3.2-1b": ("llama", _sizes(2048, 8192, 32, 8)),
    "llama-3-8b": ("llama", _sizes(4096, 14336, 32, 8)),
    "llama-3-70b": ("llama", _sizes(8192, 28672, 64, 8)),
    "llama-3.1-405b": ("llama", _sizes(16384, 53248, 128, 8)),
    "qwen2.5-7b": ("qwen2", _sizes(3584, 18944, 28, 4)),
    "granite-3.0-1b-a400m": (
        "granitemoe",
        _sizes(1024, 512, 16, 8, num_local_experts=32, num_experts_per_tok=8),
    ),
    "mixtral-8x7b": ("mixtral", _sizes(4096, 14336, 32, 8, num_local_experts=8, num_experts_per_tok=2)),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        _sizes(
            2048,
            6144,
            32,
            4,
            head_dim=128,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
        ),
    ),
    "deepseek-v3": (
        "deepseek_v3",
        _sizes(
            7168,
            18432,
            128,
            128,
            moe_intermediate_size=2048,
            n_routed_experts=256,
            num_experts_per_tok=8,
            n_shared_experts=1,
            n_group=8,
            topk_group=4,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            first_k_dense_replace=0,
        ),
    ),
}
"""Model type and sizes of a block by name of the large model, as in ``layers:llama-3-8b``."""

WHOLE: Mapping[str, tuple[int, int, bool]] = {
    "llama-2-7b": (32, 32_000, False),
    "llama-2-13b": (40, 32_000, False),
    "llama-3.2-1b": (16, 128_256, True),
    "llama-3-8b": (32, 128_256, False),
    "llama-3-70b": (80, 128_256, False),
    "llama-3.1-405b": (126, 128_256, False),
    "qwen2.5-7b": (28, 152_064, False),
    "granite-3.0-1b-a400m": (24, 49_155, True),
    "mixtral-8x7b": (32, 32_000, False),
    "qwen3-30b-a3b": (48, 151_936, False),
    "deepseek-v3": (61, 129_280, False),
}
"""Number of blocks, size of the vocabulary, and whether the head is tied to the embeddings, by name of the model."""

UNLIKE: Mapping[str, Mapping[str, Any]] = {"deepseek-v3": {"first_k_dense_replace": 3}}
"""Sizes of the whole model where some blocks are unlike the others, by name of the model."""
