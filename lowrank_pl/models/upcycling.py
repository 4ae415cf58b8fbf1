"""A mixture of experts made from a dense model, which at first computes the same as the dense one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from lowrank_pl.models.eval_mode import input_device
from lowrank_pl.models.rotation import logit_difference, tolerance
from lowrank_pl.models.targets import decoder_blocks

__all__ = ["UpcyclingError", "expert_parameters", "upcycled"]

_TAKEN = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "sliding_window",
)  # fmt: skip
"""Settings that a Llama-shaped model and Mixtral share."""


class UpcyclingError(ValueError):
    """A dense model that can't be made into a mixture of experts."""


def upcycled(model: PreTrainedModel, experts: int = 4, *, chosen: int = 2, seed: int = 0) -> MixtralForCausalLM:
    """Return a Mixtral whose experts are copies of the MLPs of ``model`` (sparse upcycling, arXiv 2212.05055).

    Its routers are random. Since Mixtral's weights of the chosen experts sum to 1, it computes the logits of ``model``
    whatever they choose, until experts are trained apart. It shares no parameter with ``model``.

    Args:
        model: A dense causal language model shaped like Llama: gated MLPs, RMSNorms, attention without biases.
        experts: Experts of each block.
        chosen: Experts that serve each token.
        seed: Seed of the routers; the caller's random state is unchanged.

    Raises:
        UpcyclingError: The model has another shape, or the mixture has other logits.
        ValueError: ``chosen`` is below 1, or is not below ``experts``.

    >>> from lowrank_pl.models.tiny import tiny_model
    >>> dense = tiny_model("llama")
    >>> mixture, tokens = upcycled(dense, experts=3), torch.arange(8)[None]
    >>> torch.allclose(mixture(tokens).logits, dense(tokens).logits, atol=1e-5)
    True
    """
    if not 1 <= chosen < experts:
        raise ValueError(
            f"{chosen} of {experts} experts are to serve each token: expected at least 1 and fewer than all"
        )
    kind, source = type(model).__name__, model.config.get_text_config()
    settings = {name: getattr(source, name) for name in _TAKEN if hasattr(source, name)}
    config: Any = MixtralConfig(**settings, num_local_experts=experts, num_experts_per_tok=chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixture = MixtralForCausalLM._from_config(config, dtype=model.dtype)
    found: Any = mixture
    values = dict(model.state_dict())
    for number, block in enumerate(found.model.layers):
        mlp = f"{decoder_blocks(model)[0]}.{number}.mlp"
        try:
            gate, up, down = (values.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        except KeyError as error:
            raise UpcyclingError(
                f"{kind} can't be made into a mixture: {error} is missing, a gated MLP expected"
            ) from None
        with torch.no_grad():
            block.mlp.experts.gate_up_proj.copy_(torch.cat([gate, up]).expand(experts, -1, -1))
            block.mlp.experts.down_proj.copy_(down.expand(experts, -1, -1))
    new = {name: value for name, value in mixture.state_dict().items() if ".mlp." not in name}
    wrong = sorted(new.keys() ^ values.keys()) or [name for name in new if new[name].shape != values[name].shape]
    if wrong:
        raise UpcyclingError(
            f"{kind} can't be made into a mixture: {wrong[0]} is not as in Mixtral; expected a model shaped like "
            "Llama, whose attention has no biases or norms of its own"
        )
    mixture.load_state_dict(values, strict=False)
    mixture.generation_config = model.generation_config
    mixture.to(input_device(model)).eval()
    tokens = torch.randint(source.vocab_size, (2, 16), generator=torch.Generator().manual_seed(seed))
    difference = logit_difference(model, mixture, tokens)
    if not difference <= tolerance(model.dtype):
        raise UpcyclingError(
            f"{kind} can't be made into a mixture: its logits change by {difference:.2g} (relative root mean square), "
            "so it computes something that Mixtral does not"
        )
    return mixture


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the experts and routers of an upcycled model, by name."""
    return {name: one for name, one in model.named_parameters() if ".mlp.experts." in name or ".mlp.gate." in name}
