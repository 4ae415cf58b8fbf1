"""The sizes of a model, counted from its configuration alone: no weight is read or takes memory.

The model is built and run on tensors that have shapes and types but no values. Targets and the memory of a backward
pass are therefore counted by the code that a real run executes, for every model family.
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

from lowrank_pl.models.base import Base, pop_shapes, read_config, resolve_base
from lowrank_pl.models.hf_format import reshape
from lowrank_pl.models.shapes import random_blocks, whole_config
from lowrank_pl.models.targets import EmbeddingTarget, Target, decoder_blocks, first_argument
from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.plans.constraints import Constraints

__all__ = ["Activations", "ModelSizes", "config_of", "model_sizes"]

SHAPES_FORM = "shapes"
"""``shapes:NAME`` stands for a whole large model by name, of which only the shapes exist."""


@dataclass(frozen=True)
class Activations:
    """Bytes a token that a backward pass through the whole model needs.

    Args:
        kept: What autograd saves, the inputs of all targets included.
        kept_with_outputs: The same with the outputs of all targets.
        watched: Only the inputs and the outputs of all targets.
    """

    kept: float
    kept_with_outputs: float
    watched: float


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model. Parameters are counted as numbers, not as bytes.

    Args:
        itemsize: Bytes of one number in the model's type.
        parameters: All parameters, tied ones once.
        blocks: Parameters of each decoder block.
        modules: The targets.
        hidden: Width of the hidden state between blocks.
        vocabulary: Logits of a token.
        activations: Bytes a token of activations.
        packed: Whether the weights are in a GGUF file, which is unpacked to float32 while it is loaded.
        embeddings: Embeddings and head, as far as they are targets.
    """

    itemsize: int
    parameters: int
    blocks: tuple[int, ...]
    modules: tuple[Target, ...]
    hidden: int
    vocabulary: int
    activations: Activations
    packed: bool = False
    embeddings: tuple[EmbeddingTarget, ...] = ()

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
        return sum(rows * columns for rows, columns in self.shapes)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes of the targets, embeddings last."""
        return [target.shape for target in self.modules] + [target.shape for target in self.embeddings]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one token's forward pass: blocks and head, without the attention between tokens."""
        return sum(self.blocks) + self.vocabulary * self.hidden

    @property
    def input_widths(self) -> dict[str, int]:
        """Width of every distinct input of targets, by group."""
        return {target.group: target.shape[1] for target in self.modules}

    @property
    def largest(self) -> int:
        """Parameters of the largest layer: a target, the embeddings or the head."""
        return max(self.vocabulary * self.hidden, *(target.shape[0] * target.shape[1] for target in self.modules))


def model_sizes(base: Base, *, length: int = 512, constraints: Constraints = Constraints()) -> ModelSizes:
    """Return the sizes of ``base``, reading no more than its configuration.

    Args:
        base: Any base that can be loaded. The name ``shapes:NAME`` stands for a whole large model by name.
        length: Tokens of a sequence, on which the attention's share of the activations depends.
        constraints: Which linear layers are targets.

    Raises:
        ValueError: The base doesn't exist, its configuration can't be read, or no target is left.

    Example:
        >>> found = model_sizes(Base("shapes:llama-3-70b", dtype="bfloat16"), length=16)
        >>> found.parameters, len(found.modules)
        (70553706496, 560)
    """
    config = config_of(base)
    shapes = pop_shapes(config)
    with FakeTensorMode():
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=base.torch_dtype, trust_remote_code=base.trust_remote_code
        )
        reshape(made, shapes)
        model = made.eval().requires_grad_(False)
        found = constraints.targets(model)
        targets = found.modules
        head: Any = model.get_output_embeddings().weight
        activations = _activations(model, targets, torch.zeros(1, length, dtype=torch.long))
    return ModelSizes(
        itemsize=base.torch_dtype.itemsize,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=tuple(sum(p.numel() for p in block.parameters()) for block in decoder_blocks(model)[1]),
        modules=targets,
        hidden=model.config.get_text_config().hidden_size,
        vocabulary=head.shape[0],
        activations=activations,
        packed=not base.name.startswith(f"{SHAPES_FORM}:") and resolve_base(base.name).gguf_file is not None,
        embeddings=found.embeddings,
    )


def config_of(base: Base) -> PreTrainedConfig:
    """Return the configuration of ``base`` without reading a weight; ``shapes:NAME`` is a name as well.

    Raises:
        ValueError: There is no configuration, or it can't be read.
    """
    scheme, _, name = base.name.partition(":")
    if scheme == SHAPES_FORM:
        return whole_config(name)
    spec = resolve_base(base.name)
    # Random models are made rather than loaded; on tensors without values they take no memory either.
    if spec.family is not None:
        return tiny_model(spec.family).config
    if spec.shapes is not None:
        with FakeTensorMode():
            return random_blocks(spec.shapes, blocks=spec.blocks).config
    if spec.gguf_file is None:
        try:
            return read_config(spec, trust_remote_code=base.trust_remote_code)
        except ValueError as error:
            raise ValueError(f"{error}, or give shapes:NAME for a large model by name (shapes:llama-3-70b)") from error
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(spec.path, gguf_file=spec.gguf_file)
    except Exception as error:  # transformers and gguf raise classes of their own
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ValueError(f"can't read the configuration of {base.name!r}: {cause}") from error
    # It describes the packed blocks of the file, which load_base unpacks: with it the model would count as quantised.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _activations(model: PreTrainedModel, targets: Sequence[Target], tokens: Tensor) -> Activations:
    """Return what a backward pass over ``tokens`` ``[1, length]`` needs, counted on tensors without values."""
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
    kept = {**saved.found, **inputs.found}
    sizes = (_total(found) for found in (kept, {**kept, **outputs.found}, {**inputs.found, **outputs.found}))
    return Activations(*(size / tokens.shape[1] for size in sizes))


def _total(found: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


class _Storages:
    """Tensors by the memory that they lie in, without the memory of the model's parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
        # Holds the tensors themselves: the address of freed memory may be given to another tensor.
        self.found: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address not in self._own:
            self.found.setdefault(address, tensor.detach())


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


@contextmanager
def _differentiable_embeddings(model: PreTrainedModel) -> Iterator[None]:
    hook: Callable[..., Tensor] = lambda _module, _args, output: output.requires_grad_()  # noqa: E731
    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
