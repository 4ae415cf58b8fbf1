"""What a model is made of, counted from its configuration alone: no weight is read, and none takes memory.

The model is built and run on tensors that have shapes and types but no values, so that targets, multiply-adds and
what a backward pass keeps come from the very code that a run goes through, whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lowrank_pl.costs.speed import multiply_adds
from lowrank_pl.models.base import pop_shapes, resolve_base
from lowrank_pl.models.base import read_config as read_checkpoint_config
from lowrank_pl.models.hf_format import reshape
from lowrank_pl.models.shapes import random_blocks, whole_config
from lowrank_pl.models.targets import Target, decoder_blocks, find_targets, first_argument
from lowrank_pl.models.tiny import tiny_model

__all__ = ["Anatomy", "anatomy", "read_config"]

SHAPES_FORM = "shapes"
"""``shapes:NAME`` is a whole large model by name, of which there is nothing but its shapes."""


@dataclass(frozen=True)
class Anatomy:
    """Sizes of a model. Counts of parameters are numbers, not bytes.

    Args:
        base: Its name.
        itemsize: Bytes of a number of its type.
        parameters: All of them, tied ones once.
        blocks: Parameters of each decoder block.
        modules: The maps to compress.
        hidden: Width of the stream between blocks.
        vocabulary: Logits of a token.
        multiply_adds: Of a token's forward pass, all logits included.
        kept: Bytes a token that a backward pass to the embeddings needs, the inputs of all targets included.
        kept_with_outputs: Likewise, with the outputs of all targets as well.
        watched: Bytes a token of the inputs and the outputs of all targets.
        unpacked: Whether the weights are in a GGUF, packed, and are unpacked to float32 first.
    """

    base: str
    itemsize: int
    parameters: int
    blocks: tuple[int, ...]
    modules: tuple[Target, ...]
    hidden: int
    vocabulary: int
    multiply_adds: float
    kept: float
    kept_with_outputs: float
    watched: float
    unpacked: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.itemsize

    @property
    def outside(self) -> int:
        """Parameters outside the decoder blocks: embeddings, head, last norm."""
        return self.parameters - sum(self.blocks)

    @property
    def targeted(self) -> int:
        """Parameters of the targets."""
        return sum(target.shape[0] * target.shape[1] for target in self.modules)

    @property
    def input_widths(self) -> dict[str, int]:
        """Width of every distinct input of targets, by group."""
        return {target.group: target.shape[1] for target in self.modules}

    @property
    def largest(self) -> int:
        """Parameters of the largest layer: a map, the embeddings or the head."""
        return max(self.vocabulary * self.hidden, *(target.shape[0] * target.shape[1] for target in self.modules))


def anatomy(
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    length: int = 512,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Anatomy:
    """Return the sizes of ``base``, of which no more than its configuration is read.

    Args:
        base: Anything that ``load_base`` takes, or ``shapes:NAME`` for a whole large model by name.
        dtype: Type of the weights.
        length: Tokens of a sequence; what a token costs in attention depends on it.
        include: As in ``find_targets``.
        exclude: Likewise.
        trust_remote_code: Run Python code that comes with the base.

    Raises:
        ValueError: There is no such base, its configuration can't be read, or no target is left.

    >>> found = anatomy("shapes:llama-3-70b", dtype=torch.bfloat16, length=16)
    >>> found.parameters, len(found.modules)
    (70553706496, 560)
    """
    config = read_config(base, trust_remote_code=trust_remote_code)
    shapes = pop_shapes(config)
    with FakeTensorMode():
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
        reshape(made, shapes)
        model = made.eval().requires_grad_(False)
        targets = find_targets(model, include=include, exclude=exclude).modules
        tokens = torch.zeros(1, length, dtype=torch.long)
        head: Any = model.get_output_embeddings().weight
        counted = multiply_adds(model, tokens) / length + head.numel()
        kept = _kept(model, targets, tokens)
    return Anatomy(
        base=base,
        itemsize=dtype.itemsize,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=tuple(sum(p.numel() for p in block.parameters()) for block in decoder_blocks(model)[1]),
        modules=targets,
        hidden=model.config.get_text_config().hidden_size,
        vocabulary=head.shape[0],
        multiply_adds=counted,
        kept=kept[0] / length,
        kept_with_outputs=kept[1] / length,
        watched=kept[2] / length,
        unpacked=_is_packed(base),
    )


def read_config(base: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of ``base``, without reading a weight; arguments as in :func:`anatomy`.

    Raises:
        ValueError: There is none, or it can't be read.
    """
    scheme, _, name = base.partition(":")
    if scheme == SHAPES_FORM:
        return whole_config(name)
    spec = resolve_base(base)
    # These are made, not loaded; with tensors that have no values they take no memory either.
    if spec.family is not None:
        return tiny_model(spec.family).config
    if spec.shapes is not None:
        with FakeTensorMode():
            return random_blocks(spec.shapes, blocks=spec.blocks).config
    if spec.gguf_file is None:
        try:
            return read_checkpoint_config(spec, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise ValueError(f"{error}, or give shapes:NAME for a large model by name (shapes:llama-3-70b)") from error
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(spec.path, gguf_file=spec.gguf_file)
    except Exception as error:  # transformers and gguf raise classes of their own
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ValueError(f"can't read the configuration of {base!r}: {cause}") from error
    # Of its packed blocks: it would be taken for a quantised model, which load_base unpacks.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _is_packed(base: str) -> bool:
    """Return whether the weights of ``base`` lie in a GGUF, which is unpacked as a whole."""
    return not base.startswith(f"{SHAPES_FORM}:") and resolve_base(base).gguf_file is not None


def _kept(model: PreTrainedModel, targets: Sequence[Target], tokens: Tensor) -> tuple[int, int, int]:
    """Return bytes: what autograd saves, with the inputs of ``targets``; with their outputs as well; both alone."""
    saved, inputs, outputs = _Storages(model), _Storages(model), _Storages(model)

    def save(tensor: Tensor) -> Tensor:
        saved.add(tensor)
        return tensor

    def watch(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        inputs.add(first_argument(args, kwargs))
        outputs.add(output)

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_differentiable_embeddings(model))
        for target in targets:
            module = model.get_submodule(target.name)
            stack.callback(module.register_forward_hook(watch, with_kwargs=True).remove)
        with saved_tensors_hooks(save, lambda tensor: tensor):
            model(input_ids=tokens, use_cache=False)
    with_inputs = {**saved.found, **inputs.found}
    watched = {**inputs.found, **outputs.found}
    return tuple(_total(found) for found in (with_inputs, {**with_inputs, **outputs.found}, watched))  # type: ignore[return-value]


def _total(found: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


class _Storages:
    """Tensors by the memory that they lie in, those of the model's parameters left out."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {_place(tensor) for tensor in (*model.parameters(), *model.buffers())}
        # The tensors themselves are held on to, for a place that is given back may become another's.
        self.found: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> None:
        place = _place(tensor)
        if place not in self._own:
            self.found.setdefault(place, tensor.detach())


def _place(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


@contextmanager
def _differentiable_embeddings(model: PreTrainedModel) -> Iterator[None]:
    hook: Callable[..., Tensor] = lambda _module, _args, output: output.requires_grad_()  # noqa: E731
    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
