"""A transformers model made faster to run: what computes its layers is chosen by time, once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank_pl.models.hf_experts import SplitExperts, split_modules
from lowrank_pl.models.hf_layers import LowRankEmbedding
from lowrank_pl.serving.fused_layers import FUSED, TYPES, fuse
from lowrank_pl.serving.grouped_experts import GROUPED, group_experts, ungroup
from lowrank_pl.serving.integer_layers import INTEGER, use_integer_kernels, use_packed_kernels
from lowrank_pl.serving.onednn_layers import ONEDNN, use_onednn

__all__ = ["Optimized", "optimize_for_inference", "optimized"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Optimized:
    """What :func:`optimize_for_inference` has chosen.

    Attributes:
        timed: What was timed: on a GPU each group of layers with the same input of which some are compressed, on a CPU
            each matrix; on both each block of experts.
        one_token: How many of them no longer torch's usual product computes for one token.
        few_tokens: The same for 2 to 16 tokens.
        many_tokens: The same for more; on a GPU only for experts.
    """

    timed: int
    one_token: int
    few_tokens: int
    many_tokens: int


def optimize_for_inference(model: PreTrainedModel) -> Optimized:
    """Let what is fastest on this machine compute the linear layers of a model, and return how much has changed.

    On a GPU, kernels compute compressed layers for up to 16 tokens, as in decoding: two launches for all layers that
    read the same input, such as query, key and value, and one for each rounded matrix. On a CPU, oneDNN computes all
    layers in float32, dense ones and the head too, and torch's kernels for packed integers compute rounded layers in
    bfloat16. On both, the experts of a block are computed together. All are timed beside what torch computes now, and
    taken only where they are faster; this takes seconds.
    Torch computes the rest, and everything while gradients are enabled. Sums are rounded differently than by torch's
    products, as these differ from one size to another.

    Names and values of the parameters stay, so that adapters still fit. On a GPU rows of weights are moved to multiples
    of 16 bytes, which takes up to 7 numbers a row. Experts that are computed together become parts of one tensor: it is
    padded on a GPU, and holds an identity beside each dense expert and in each pivoted one. A layer that is moved or
    converted afterwards is computed by torch again. Such a model can't be exported: load the folder again for that.

    Args:
        model: A model, compressed or not.

    Raises:
        ValueError: The model is on a GPU and Triton isn't installed.
    """
    restore(model)
    linear = {name: module for name, module in model.named_modules() if type(module) in (*FUSED, *INTEGER)}
    _report_others(model, linear)
    low_rank = next((name for name, module in model.named_modules() if isinstance(module, LowRankEmbedding)), None)
    if low_rank is not None:
        logger.info("%s is of low rank: torch looks its rows up, and computes a head that is tied to it", low_rank)
    # Hooks of accelerate call the forward pass that the layer had before.
    linear = {name: module for name, module in linear.items() if "forward" not in vars(module)}
    try:
        return _optimize(model, linear)
    except BaseException:
        restore(model)
        raise


def _optimize(model: PreTrainedModel, linear: Mapping[str, nn.Linear]) -> Optimized:
    rounded = [m for m in linear.values() if type(m) in INTEGER]
    floats = {name: m for name, m in linear.items() if type(m) not in INTEGER}
    # A launch for each expert would take longer than its product.
    inside = {id(layer) for _, experts in split_modules(model) for layer in experts.modules()}
    on_gpu = {
        name: m for name, m in floats.items() if m.weight.is_cuda and m.weight.dtype in TYPES and id(m) not in inside
    }
    on_cpu = [m for m in floats.values() if m.weight.device.type == "cpu" and m.weight.dtype == torch.float32]
    packed = [m for m in rounded if m.weight.device.type == "cpu" and m.weight.dtype == torch.bfloat16]
    packed_on_gpu = [m for m in rounded if m.weight.is_cuda and m.weight.dtype in TYPES]
    others = len(rounded) - len(packed) - len(packed_on_gpu)
    if others:
        logger.warning(
            "%d of %d rounded layers are not optimised: kernels compute them in bfloat16 on a CPU, and on a GPU",
            *(others, len(rounded)),
        )
    faster = fuse(model, on_gpu) if any(type(layer) is not nn.Linear for layer in on_gpu.values()) else []
    if on_cpu and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        faster += use_onednn(on_cpu)
    faster += use_integer_kernels(packed)
    if packed_on_gpu:
        faster += use_packed_kernels(packed_on_gpu)
    faster += group_experts(model)
    counts = Counter(count for choice in faster for count, chosen in choice.items() if chosen)
    found = Optimized(len(faster), counts["one"], counts["few"], counts["many"])
    if faster:
        logger.info(
            "of %d products, others than torch's are faster: %d for one token, %d for a few, %d for many",
            *vars(found).values(),
        )
    else:
        logger.warning(
            "nothing to optimise in %s: neither a compressed layer on a GPU nor a layer of float32 on a CPU",
            type(model).__name__,
        )
    return found


def _report_others(model: PreTrainedModel, linear: Mapping[str, nn.Module]) -> None:
    """Warn of the compressed layers that stay as they are."""
    hooked = sum("forward" in vars(module) for module in linear.values())
    ours = {kind.__name__ for kind in (*FUSED, *INTEGER)} - {nn.Linear.__name__}
    foreign = sum(type(m).__name__ in ours for name, m in model.named_modules() if name not in linear)
    if hooked:
        logger.warning("%d layers have hooks of accelerate and are not optimised: load to one device", hooked)
    if foreign:
        logger.warning(
            "%d compressed layers are of the folder's own code and are not optimised: import lowrank_pl before "
            "loading, or call load_compressed",
            foreign,
        )


def restore(model: nn.Module) -> None:
    """Undo :func:`optimize_for_inference`: torch computes all layers."""
    for module in list(model.modules()):
        if isinstance(module, SplitExperts) and type(module) in GROUPED.values():
            ungroup(module)
    plain = {kind: own for kinds in (FUSED, ONEDNN, INTEGER) for own, kind in kinds.items()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) in plain:
            module.__class__ = plain[type(module)]
            for name in ("group", "number", "faster", "integers"):
                vars(module).pop(name, None)


@contextmanager
def optimized(model: PreTrainedModel) -> Iterator[None]:
    """Optimise ``model`` while the block runs."""
    try:
        optimize_for_inference(model)
        yield
    finally:
        restore(model)
