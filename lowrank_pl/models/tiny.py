"""Small random models of every supported family and a byte tokenizer, for trials and tests without a download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

__all__ = ["BOS", "EOS", "FAMILIES", "MIXTURES", "PAD", "VOCABULARY", "byte_tokenizer", "tiny_model"]

HEADS = 4
EXPERTS = 4
POSITIONS = 2048
SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
PAD, BOS, EOS = 256, 257, 258
VOCABULARY = 256 + len(SPECIALS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Sizes = Mapping[str, Any]


def tiny_model(family: str, *, seed: int = 0, layers: int = 2, hidden: int = 32) -> PreTrainedModel:
    """Return a random model of ``family`` in float32 and eval mode, with the vocabulary of :func:`byte_tokenizer`.

    Weights have the scale of a trained network (standard deviation ``hidden ** -0.5``). Biases, if the family has any,
    are not zero, so that a lost bias or a wrong factor shows in the logits. There is no dropout. Equal arguments give
    equal weights, and the caller's random state is unchanged.

    Args:
        family: One of :data:`FAMILIES` or :data:`MIXTURES`.
        seed: Seed of the weights.
        layers: Number of decoder blocks.
        hidden: Width of the residual stream, a multiple of 16.

    Raises:
        ValueError: The family is unknown, or the sizes are impossible.

    >>> model = tiny_model("llama")
    >>> model(torch.arange(8)[None]).logits.shape
    torch.Size([1, 8, 261])
    """
    make = _CONFIGS.get(family) or _MIXTURES.get(family)
    if make is None:
        known = ", ".join(FAMILIES + MIXTURES)
        raise ValueError(f"random model family {family!r} is not known: expected one of {known}")
    if layers < 1 or hidden < 16 or hidden % 16:
        raise ValueError(
            f"layers={layers}, hidden={hidden}: a random model needs layers >= 1 and hidden a positive multiple of 16"
        )
    config = AutoConfig.for_model(_MODEL_TYPES.get(family, family), **make(layers, hidden))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise_biases(model)
    return model.eval()


def byte_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token ids are the bytes of the UTF-8 text, with five special tokens after them.

    Byte ``b`` is token ``b``; 256 to 260 are ``<|pad|> <|bos|> <|eos|> <|im_start|> <|im_end|>``. It carries a chat
    template, needs no download and survives ``save_pretrained`` and ``AutoTokenizer.from_pretrained``.

    Args:
        bos: Put ``<|bos|>`` before every text, as Gemma's tokenizer does. The ids are the same.

    >>> byte_tokenizer()("hé")["input_ids"]
    [104, 195, 169]
    >>> byte_tokenizer(bos=True)("h")["input_ids"]
    [257, 104]
    """
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE if bos else CHAT_TEMPLATE
    return wrapped


def _byte_letters() -> list[str]:
    """Return the printable letter that byte-level tokenizers use for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters.update({byte: chr(256 + place) for place, byte in enumerate(unprintable)})
    return [letters[byte] for byte in range(256)]


@torch.no_grad()
def _randomise_biases(model: PreTrainedModel) -> None:
    """Set every bias to random numbers: transformers starts at zero, where a lost bias has no effect."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)


def _common(layers: int, hidden: int) -> dict[str, Any]:
    """Return the entries that the configurations of all families share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": hidden**-0.5,
    }


def _gated(**extra: Any) -> Callable[[int, int], Sizes]:
    """Return a function that makes configurations with a gated MLP and fewer key than query heads."""

    def make(layers: int, hidden: int) -> Sizes:
        sizes = {"intermediate_size": hidden * 3, "num_key_value_heads": HEADS // 2, **extra}
        return _common(layers, hidden) | sizes

    return make


def _gated_heads(**extra: Any) -> Callable[[int, int], Sizes]:
    """Return :func:`_gated` for families whose configuration names the width of a head."""
    make = _gated(**extra)
    return lambda layers, hidden: {**make(layers, hidden), "head_dim": hidden // HEADS}


def _gemma(layers: int, hidden: int) -> Sizes:
    scale = {"query_pre_attn_scalar": hidden // HEADS}
    return {**_gated_heads()(layers, hidden), **scale}


def _opt(layers: int, hidden: int) -> Sizes:
    sizes = {"ffn_dim": hidden * 4, "word_embed_proj_dim": hidden, "dropout": 0.0, "init_std": hidden**-0.5}
    return _common(layers, hidden) | sizes


def _gpt2(layers: int, hidden: int) -> Sizes:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": hidden, "n_layer": layers, "n_head": HEADS, "n_positions": POSITIONS}
    kept = ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
    shared = {key: value for key, value in _common(layers, hidden).items() if key in kept}
    return {**shared, **sizes, **dropout}


def _gpt_neox(layers: int, hidden: int) -> Sizes:
    dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    # With the default 0.25, one of a head's four channels would be rotated, but rotations take pairs.
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return {**_common(layers, hidden), "intermediate_size": hidden * 4, "rope_parameters": rope, **dropout}


def _mixture(**extra: Any) -> Callable[[int, int], Sizes]:
    """Return a function that makes configurations with experts, two of which serve each token."""
    widths = {"moe_intermediate_size": 48, "num_experts_per_tok": 2}
    make = _gated(**widths, **extra)
    # Families without a width of their own for experts take that of MLPs.
    own = {"num_local_experts": {"intermediate_size": 48}, "num_experts": {}, "n_routed_experts": {}}
    narrow = next(sizes for key, sizes in own.items() if key in extra)
    return lambda layers, hidden: {**make(layers, hidden), **narrow}


def _deepseek(**extra: Any) -> Callable[[int, int], Sizes]:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    shared = {"n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": HEADS}
    return _mixture(n_routed_experts=EXPERTS, **latent, **shared, **extra)


def _jetmoe(layers: int, hidden: int) -> Sizes:
    heads = {"num_key_value_heads": HEADS // 2, "kv_channels": hidden // HEADS, "num_attention_heads": HEADS}
    experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 48}
    return {**_common(layers, hidden), **heads, **experts}


def _qwen3_next(layers: int, hidden: int) -> Sizes:
    linear = {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * (layers // 2) + ["linear_attention"] * (layers % 2),
    }  # fmt: skip
    experts = _mixture(num_experts=EXPERTS, head_dim=8, shared_expert_intermediate_size=48, norm_topk_prob=True)
    return {**experts(layers, hidden), **linear}


def _llama4(layers: int, hidden: int) -> Sizes:
    sizes = {"num_local_experts": EXPERTS, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2, "head_dim": 8}
    return {**_mixture(**sizes)(layers, hidden), "num_experts_per_tok": 1}


_CONFIGS: dict[str, Callable[[int, int], Sizes]] = {
    "llama": _gated(),
    "mistral": _gated_heads(),
    "qwen2": _gated(),
    "qwen3": _gated_heads(),
    "gemma2": _gemma,
    "gemma3": _gemma,
    "phi3": _gated(resid_pdrop=0.0, embd_pdrop=0.0),
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}

_MIXTURES: dict[str, Callable[[int, int], Sizes]] = {
    "mixtral": _mixture(num_local_experts=EXPERTS),
    "qwen2_moe": _mixture(num_experts=EXPERTS, shared_expert_intermediate_size=48, decoder_sparse_step=1),
    "qwen3_moe": _mixture(num_experts=EXPERTS, head_dim=8, norm_topk_prob=True),
    "qwen3_next": _qwen3_next,
    "olmoe": _mixture(num_experts=EXPERTS),
    "phimoe": _mixture(num_local_experts=EXPERTS),
    "granitemoe": _mixture(num_local_experts=EXPERTS),
    "jetmoe": _jetmoe,
    "deepseek_v2": _deepseek(topk_method="greedy", n_group=1, topk_group=1),
    "deepseek_v3": _deepseek(n_group=2, topk_group=1),
    "glm4_moe": _mixture(
        n_routed_experts=EXPERTS, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1
    ),
    "gpt_oss": _mixture(num_local_experts=EXPERTS, head_dim=8, sliding_window=64),
    "llama4": _llama4,
}

_MODEL_TYPES = {"gemma3": "gemma3_text", "llama4": "llama4_text"}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
"""Dense families that :func:`tiny_model` knows, as in ``random:llama``."""

MIXTURES: tuple[str, ...] = tuple(_MIXTURES)
"""Families of mixtures of experts that :func:`tiny_model` knows, as in ``random:mixtral``."""
