"""Adapters of PEFT that need a dense weight are refused by name on low-rank and rounded layers.

PEFT reads and writes the attribute ``weight`` of a layer and asks no layer whether that makes sense, so such adapters
would end in a size error, some of them after they have changed weights. The checks therefore wrap the two methods of
PEFT that every adapter and every merge go through. ``lowrank_pl.models.registration`` imports this module right after
PEFT.
"""

from __future__ import annotations

import functools
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from lowrank_pl.models.hf_layers import LowRankEmbedding, LowRankLinear, PivotedLinear
from lowrank_pl.models.hf_quantized import LowRankTiedHead, QuantizedEmbedding, QuantizedLinear, TiedHead

__all__ = ["dense_need"]

_LOW_RANK = (LowRankLinear, PivotedLinear)
_LINEAR = (*_LOW_RANK, QuantizedLinear, TiedHead)
_EMBEDDINGS = (QuantizedEmbedding, LowRankEmbedding)
_COMPRESSED = (*_LINEAR, *_EMBEDDINGS)
_KINDS = {"LOKR": "LoKr", "LOHA": "LoHa", "HRA": "HRA", "SHIRA": "SHiRA"}
_INITIALISATIONS = {
    "pissa": "PiSSA", "olora": "OLoRA", "loftq": "LoftQ", "corda": "CorDA", "mica": "MiCA", "lora_ga": "LoRA-GA",
}  # fmt: skip


_TOKENS = "training of single tokens"


def dense_need(config: Any) -> str:
    """Return the name of the method in a PEFT ``config`` that works on a dense weight only; empty if none does."""
    kind, start = getattr(config.peft_type, "value", config.peft_type), getattr(config, "init_lora_weights", None)
    if kind in _KINDS:
        return _KINDS[kind]
    return _INITIALISATIONS.get(start.split("_niter_")[0], "") if isinstance(start, str) else ""


def _need_of_embedding(config: Any) -> str:
    """Return what needs the dense weight of an embedding: more than needs that of a linear layer."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind == "TRAINABLE_TOKENS" or getattr(config, "trainable_token_indices", None):
        return _TOKENS
    return "DoRA" if getattr(config, "use_dora", False) else dense_need(config)


def _stored(module: Any) -> str:
    return (
        "low-rank parts" if isinstance(module, (*_LOW_RANK, LowRankEmbedding, LowRankTiedHead)) else "rounded numbers"
    )


def _checked_injection(inject: Any) -> Any:
    @functools.wraps(inject)
    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config[adapter_name]
        name, named = dense_need(config), config.target_modules
        # Not among all linear layers.
        head = getattr(model, "get_output_embeddings", lambda: None)()
        for key, module in model.named_modules():
            everywhere = isinstance(module, _LINEAR) and (named is None or named == "all-linear") and module is not head
            needed = _need_of_embedding(config) if isinstance(module, _EMBEDDINGS) else name
            if not needed or not isinstance(module, _COMPRESSED):
                continue
            if everywhere or needed == _TOKENS or self._check_target_module_exists(config, key):
                instead = "LoRA" if isinstance(module, _EMBEDDINGS) else "LoRA, DoRA"
                raise ValueError(
                    f"{needed} needs the dense weight of {key}, which is stored as {_stored(module)}: use {instead} or "
                    "another adapter, leave the layer out of target_modules, or adapt a merged export"
                )
        return inject(self, model, adapter_name, *args, **kwargs)

    return inject_adapter


def _checked_merge(check: Any) -> Any:
    @functools.wraps(check)
    def _check_merge_allowed(self: Any) -> None:
        check(self)
        for key, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), _COMPRESSED):
                raise ValueError(
                    f"the adapter of {key} can't be merged into its {_stored(module.get_base_layer())}: save it on its "
                    "own with save_pretrained, or adapt a merged export"
                )

    return _check_merge_allowed


for _name, _checked in (("inject_adapter", _checked_injection), ("_check_merge_allowed", _checked_merge)):
    # A PEFT without the method goes on without the check.
    if hasattr(BaseTuner, _name):
        setattr(BaseTuner, _name, _checked(getattr(BaseTuner, _name)))
