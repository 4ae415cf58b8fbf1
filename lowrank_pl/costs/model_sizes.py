"""The sizes of a model, counted from its configuration alone: no weight is read or takes memory.

The model is built and run on tensors that have shapes and types but no values. Targets and the memory of a backward
pass are therefore counted by the code that a real run executes, for every model family.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lowrank_pl.models.base import Base, pop_shapes, read_config, resolve_base
from lowrank_pl.models.hf_experts import SortedExperts, SplitExperts, is_fused, routers, split_experts, split_modules
from lowrank_pl.models.hf_format import reshape
from lowrank_pl.models.shapes import random_blocks, whole_config
from lowrank_pl.models.targets import EmbeddingTarget, Target, Targets, decoder_blocks, first_argument
from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.plans.constraints import Constraints

__all__ = ["Activations", "ModelSizes", "config_of", "model_sizes"]

_log = logging.getLogger(__name__)

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
        idle: Parameters of each block that a token isn't multiplied by: those of the experts that it isn't routed to.
        shares: The fraction of the tokens that an expert sees, by the name of its module of experts.
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
    idle: tuple[int, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)

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
        return [matrix.shape for matrix in self.matrices] + [target.shape for target in self.embeddings]

    @property
    def matrices(self) -> list[Matrix]:
        """The matrices of linear layers that are decomposed; layers of experts that share a factor are one."""
        return _matrices(self.modules)

    @property
    def stacked(self) -> list[Matrix]:
        """The same where the experts of each block share factors.

        Raises:
            ValueError: No two targets are layers of experts of one block that could share one.
        """
        return _matrices(Targets(self.modules, ()).stacked().modules)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one token's forward pass: blocks and head, without the attention between tokens."""
        return sum(self.blocks) - sum(self.idle) + self.vocabulary * self.hidden

    def share(self, target: Target) -> float:
        """Return the fraction of the tokens that ``target`` sees: all, unless it belongs to an expert."""
        return self.shares.get(target.experts, 1.0)

    @property
    def targeted_for_a_token(self) -> float:
        """Parameters of the targets that a token is multiplied by."""
        return sum(self.share(target) * target.shape[0] * target.shape[1] for target in self.modules)

    @property
    def input_widths(self) -> dict[str, int]:
        """Width of every distinct input of targets, by group."""
        return {target.group: target.shape[1] for target in self.modules}

    @property
    def largest(self) -> int:
        """Parameters of the largest layer: a target, the embeddings or the head."""
        return max(self.vocabulary * self.hidden, *(target.shape[0] * target.shape[1] for target in self.modules))


@dataclass(frozen=True)
class Matrix:
    """A matrix that is decomposed.

    Args:
        shape: ``(out, in)``.
        layers: How many layers its rows are divided among.
    """

    shape: tuple[int, int]
    layers: int = 1


def _matrices(targets: Iterable[Target]) -> list[Matrix]:
    found: dict[str, Matrix] = {}
    for target in targets:
        name = target.stored_as
        rows, layers = (found[name].shape[0], found[name].layers) if name in found else (0, 0)
        found[name] = Matrix((rows + target.shape[0], target.shape[1]), layers + 1)
    return list(found.values())


def model_sizes(base: Base, *, length: int = 512, constraints: Constraints = Constraints()) -> ModelSizes:
    """Return the sizes of ``base``, reading no more than its configuration.

    Args:
        base: Any base that can be loaded. The name ``shapes:NAME`` stands for a whole large model by name.
        length: Tokens of a sequence, on which the attention's share of the activations depends.
        constraints: Which linear layers are targets.

    Raises:
        ValueError: The base doesn't exist, its configuration can't be read, no target is left, or the model's code
            computes sizes from the values of tensors.

    Example:
        >>> found = model_sizes(Base("shapes:llama-3-70b", dtype="bfloat16"), length=16)
        >>> found.parameters, len(found.modules)
        (70553706496, 560)
    """
    config = config_of(base)
    shapes = pop_shapes(config)
    with FakeTensorMode(), _values_are_not_asked_for(base):
        try:
            made = _Made(base, config, shapes, constraints)
        except ValueError:
            # Some patterns name experts by their number.
            made = _Made(base, config, shapes, constraints, every_expert=True)
        model, mixtures = made.model, made.mixtures
        head: Any = model.get_output_embeddings().weight
        activations = _activations(model, made.targets, torch.zeros(1, length, dtype=torch.long))
    prefix, blocks = decoder_blocks(model)
    sizes, idle = [sum(p.numel() for p in block.parameters()) for block in blocks], [0] * len(blocks)
    for name, mixture in mixtures.items():
        block = int(name.removeprefix(f"{prefix}.").partition(".")[0])
        sizes[block] += mixture.parameters - sum(p.numel() for p in mixture.split.parameters())
        idle[block] += round((1 - mixture.share) * mixture.parameters)
    return ModelSizes(
        itemsize=base.torch_dtype.itemsize,
        parameters=sum(sizes) + _outside(model),
        blocks=tuple(sizes),
        modules=constraints.stacked(Targets(tuple(made.all_targets()), ())).modules,
        hidden=model.config.get_text_config().hidden_size,
        vocabulary=head.shape[0],
        activations=activations,
        packed=not base.name.startswith(f"{SHAPES_FORM}:") and resolve_base(base.name).gguf_file is not None,
        embeddings=made.embeddings,
        idle=tuple(idle),
        shares={name: mixture.share for name, mixture in mixtures.items()},
    )


@contextmanager
def _values_are_not_asked_for(base: Base) -> Iterator[None]:
    """Explain an error of a model whose code needs the values of tensors."""
    try:
        yield
    except DataDependentOutputException as error:
        raise ValueError(
            f"the needs of {base.name} can't be forecast: its code asks for the values of tensors ({error}), and no "
            "weight is read for a forecast"
        ) from error


def _outside(model: PreTrainedModel) -> int:
    """Return the number of parameters outside the decoder blocks."""
    inside = {id(parameter) for parameter in decoder_blocks(model)[1].parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)


class _Made:
    """A model whose tensors have no values, and its targets.

    A mixture of hundreds of experts would take minutes to make and to run one by one. They are all alike, so one stands
    for all of them, unless ``every_expert`` is asked for.

    Args:
        base: Its name, type and code.
        config: Its configuration.
        shapes: Layers of other shapes than the configuration says.
        constraints: Which linear layers are targets.
        every_expert: Whether to make all experts.

    Attributes:
        model: The model.
        mixtures: Its mixtures, by the names of their modules of experts.
        targets: The targets in it.
        embeddings: Embeddings and head, as far as they are targets.

    Raises:
        ValueError: No target is left, or a pattern distinguishes between experts where one stands for all.
    """

    def __init__(
        self,
        base: Base,
        config: PreTrainedConfig,
        shapes: dict[str, list[int]],
        constraints: Constraints,
        *,
        every_expert: bool = False,
    ) -> None:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=base.torch_dtype, trust_remote_code=base.trust_remote_code
        )
        self.model = model.eval().requires_grad_(False)
        self.mixtures = _split(model, every_expert)
        reshape(model, shapes)
        # One expert shares nothing.
        found = replace(constraints, shared_experts=False).targets(model)
        self.targets, self.embeddings = found.modules, found.embeddings
        patterns = [*constraints.include, *constraints.exclude]
        for target in self.targets:
            if target.experts and not every_expert:
                last = target.of_expert(self.mixtures[target.experts].count - 1)
                if any(_matches(target, pattern) != _matches(last, pattern) for pattern in patterns):
                    raise ValueError(f"patterns distinguish between {target.name} and {last.name}")

    def all_targets(self) -> Iterator[Target]:
        """Yield the targets of the model with all experts."""
        for experts, members in groupby(self.targets, key=lambda target: target.experts):
            layers = list(members)
            mixture = self.mixtures.get(experts)
            if mixture is None or len(mixture.split) == mixture.count:
                yield from layers
            else:
                yield from (layer.of_expert(number) for number in range(mixture.count) for layer in layers)


def _matches(target: Target, pattern: str) -> bool:
    return fnmatchcase(target.name, pattern) or fnmatchcase(target.kind, pattern)


class _OneExpertForAll:
    """A mixture whose first expert computes as many rows as all experts together.

    Which rows an expert gets depends on numbers, and tensors here have none.

    Args:
        split: The experts that were made.
        count: How many there are.
        parameters: Parameters of all of them.
        chosen: How many of them a token is routed to, for families whose experts don't hear of it.
    """

    def __init__(self, split: SplitExperts, count: int, parameters: int, chosen: int) -> None:
        self.split, self.count, self.parameters, self.chosen = split, count, parameters, chosen
        split.forward = self.forward

    @property
    def share(self) -> float:
        """The fraction of the tokens that an expert sees."""
        return self.chosen / self.count

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return outputs of the shape that the experts of the family return."""
        outputs = self._outputs(hidden, *args, **kwargs)
        if SplitExperts.every:
            for expert in list(self.split)[1:]:
                expert(hidden[:0])
        return outputs

    def _outputs(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first = self.split[0]
        if not args and not kwargs:
            # Llama 4 has a row of every token for every expert.
            outputs: Tensor = first(hidden[: len(hidden) // self.count * self.chosen])
            places = torch.zeros(len(outputs), dtype=torch.long, device=hidden.device)
            return torch.zeros_like(hidden).index_copy(0, places, outputs)
        if isinstance(self.split, SortedExperts):
            # There is a row already for every expert that a token is routed to.
            return cast(Tensor, first(hidden))
        index, weights = (*args, *kwargs.values())
        self.chosen = index.shape[-1]
        rows = hidden[:, None].expand(-1, self.chosen, -1).reshape(-1, hidden.shape[-1])
        outputs = first(rows) * weights.reshape(-1, 1)
        return outputs.view(*index.shape, -1).sum(dim=-2)


def _split(model: PreTrainedModel, every_expert: bool) -> dict[str, _OneExpertForAll]:
    """Split the fused experts of ``model``, of which one stays, and return the mixtures; none of an unknown layout."""
    counts, sizes, whole = {}, {}, []
    for name, module in model.named_modules():
        if is_fused(module):
            own: Any = module
            parameters = dict(module.named_parameters(recurse=False))
            whole.append((own, parameters, own.num_experts))
            counts[name], sizes[name] = own.num_experts, sum(one.numel() for one in parameters.values())
            # JetMoE's routers are linear layers, known as routers by a row for every expert; there are eight.
            if not every_expert and "weight" not in parameters:
                own.num_experts = 1
                for key, parameter in parameters.items():
                    own._parameters[key] = nn.Parameter(parameter[:1], requires_grad=False)
    try:
        split_experts(model, check=False)
    except ValueError as error:
        _log.warning("experts stay fused: %s", error)
        for own, parameters, count in whole:
            own.num_experts = count
            own._parameters.update(parameters)
        return {}
    lists = {router for name, router in routers(model).items() if isinstance(model.get_submodule(name), SortedExperts)}
    for router in lists:
        _let_count(model.get_submodule(router))
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    return {name: _OneExpertForAll(split, counts[name], sizes[name], chosen) for name, split in split_modules(model)}


def _let_count(router: nn.Module) -> None:
    """Let ``router`` list how many rows each expert gets, as JetMoE's do: zeros, which ``_OneExpertForAll`` ignores."""
    forward, values = router.forward, FakeTensor.tolist

    def counting(*args: Any, **kwargs: Any) -> Any:
        FakeTensor.tolist = lambda self: [0] * self.numel()  # type: ignore[method-assign]
        try:
            return forward(*args, **kwargs)
        finally:
            FakeTensor.tolist = values  # type: ignore[method-assign]

    router.forward = counting


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
