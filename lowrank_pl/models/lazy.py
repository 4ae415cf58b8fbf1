"""Lazily loaded models: parts of a model get their weights from the checkpoint's files only while they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from lowrank_pl.models.base import pop_shapes, read_config, resolve_base, split_known_experts
from lowrank_pl.models.digests import check_files
from lowrank_pl.models.forward import forward_until
from lowrank_pl.models.hf_experts import SplitExperts, split_modules
from lowrank_pl.models.hf_format import reshape
from lowrank_pl.models.targets import Targets, body_of, decoder_blocks, find_targets
from lowrank_pl.utils.distributed import is_first

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter

__all__ = ["Blocks", "NotBlockwiseError", "Shards", "Skeleton", "WholeModel", "explain_not_blockwise", "open_skeleton"]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies.

    Args:
        file: The file.
        key: Its name there.
        expert: The row of it that is wanted, of a tensor that holds those of all experts; None for all of it.
        take: What has to be done to the tensor.
    """

    file: str
    key: str
    expert: int | None = None
    take: Callable[[Tensor], Tensor] | None = None

    def read(self, part: tuple[slice, ...]) -> Tensor:
        # Opened for each read: pages that were read count as memory while their file is open.
        with safe_open(self.file, framework="pt") as shard:
            if self.expert is None and self.take is None:
                tensor: Tensor = shard.get_slice(self.key)[part] if part else shard.get_tensor(self.key)
                return tensor
            if self.expert is None:
                tensor = shard.get_tensor(self.key)
            else:
                tensor = shard.get_slice(self.key)[self.expert : self.expert + 1][0]
        tensor = tensor if self.take is None else self.take(tensor)
        return tensor[part] if part else tensor


class Shards:
    """The tensors in a checkpoint's safetensors files that a model loads unchanged, possibly under another name.

    Tensors of experts may also be parts of fused ones, or be fused by transformers while it loads them.

    Args:
        path: Folder or hub id of the checkpoint.
        model: The model that loads them, with fused experts; it needs no weights itself.

    Attributes:
        shapes: Shape of each tensor, by its name in the model.

    Raises:
        OSError: The checkpoint has no such files.
    """

    def __init__(self, path: str, model: PreTrainedModel) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        files: dict[str, str] = {}
        for file in _files(path):
            with safe_open(file, framework="pt") as shard:
                for key in sorted(shard.keys()):
                    shapes[key], files[key] = tuple(shard.get_slice(key).get_shape()), file
        names, self._merged = _names(files, model)
        self.shapes = {name: shapes[key] for key, name in names.items()}
        self._places = {name: _Place(files[key], key) for key, name in names.items()}
        self._in_files = {key: (_Place(files[key], key), shapes[key]) for key in files if key not in names}

    def split_experts(self, model: PreTrainedModel) -> None:
        """Find the parameters of the separate experts that ``model`` has by now.

        Raises:
            NotBlockwiseError: Transformers makes the fused parameters in a way that is not understood.
        """
        for module_name, module in split_modules(model):
            inside = f"{module_name}."
            fused = [name for name in self._places if name.startswith(inside) and "." not in name[len(inside) :]]
            for name in fused:
                self._split_fused(inside, module, name)
            for name in [name for name in self._merged if name.startswith(inside)]:
                self._find_sources(inside, module, name)

    def _split_fused(self, inside: str, module: SplitExperts, name: str) -> None:
        """Replace the fused parameter ``name`` of a ``module`` by its parts."""
        place, shape = self._places.pop(name), self.shapes.pop(name)
        fused = name.removeprefix(inside)
        for part, found in module.parts(fused, torch.empty(shape[1:], device="meta")).items():

            def take(stored: Tensor, part: str = part) -> Tensor:
                return module.parts(fused, stored)[part]

            for number in range(len(module)):
                own = _name_of(inside, number, part)
                self._places[own], self.shapes[own] = replace(place, expert=number, take=take), tuple(found.shape)

    def _find_sources(self, inside: str, module: SplitExperts, name: str) -> None:
        """Find the tensors that transformers puts together to the fused parameter ``name`` of a ``module``.

        It is asked to do so with the numbers of one expert, among which those of each part are then found again.
        """
        merged = self._merged.pop(name)
        samples: dict[str, Tensor] = {}
        for pattern, keys in merged.sources.items():
            # As many dimensions as in the files, and numbers of its own.
            shape = (3, 5)[: len(self._in_files[keys[0]][1])] if keys else ()
            samples[pattern] = 15 * len(samples) + torch.arange(math.prod(shape)).view(shape)
        fused = name.removeprefix(inside)
        for part, sample in module.parts(fused, merged.of_one_expert(samples)).items():
            keys = next((merged.sources[key] for key, given in samples.items() if torch.equal(given, sample)), [])
            if len(keys) != len(module):
                raise NotBlockwiseError(f"transformers makes {name} of its files in a way that is not known")
            for number, key in enumerate(keys):
                own = _name_of(inside, number, part)
                self._places[own], self.shapes[own] = self._in_files[key]

    def read(self, name: str, part: tuple[slice, ...] = ()) -> Tensor:
        """Return the tensor of the model's name ``name``, or a part of it, as a view of the file's pages."""
        return self._places[name].read(part)


def _name_of(inside: str, number: int, part: str) -> str:
    """Return the name of the parameter ``part`` of expert ``number``."""
    return f"{inside}{number}.{part}"


@dataclass(frozen=True)
class _Merged:
    """A parameter that transformers makes of several tensors.

    Args:
        converter: What makes it.
        sources: The names of the tensors in the order of experts, by the pattern that they match.
    """

    converter: WeightConverter
    sources: dict[str, list[str]]

    def of_one_expert(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what is made of the ``tensors`` of one expert, by pattern.

        Raises:
            NotBlockwiseError: It isn't one tensor, or the conversion needs more than these tensors.
        """
        made: dict[str, Any] = {pattern: [tensor] for pattern, tensor in tensors.items()}
        patterns = {"source_patterns": [*tensors], "target_patterns": self.converter.target_patterns}
        try:
            for operation in self.converter.operations:
                made = operation.convert(made, **patterns, full_layer_name="", model=None, config=None)
            (found,) = made.values()
            one: Tensor = found[0]
        except Exception as error:  # The operations of transformers may need anything.
            raise NotBlockwiseError(f"a conversion of its weights needs whole tensors: {_first_line(error)}") from error
        return one


def _files(path: str) -> list[str]:
    """Return the safetensors files that transformers would load: it prefers a single file to those of an index."""
    try:
        return [str(cached_file(path, SAFE_WEIGHTS_NAME))]
    except OSError:
        return list(get_checkpoint_shard_files(path, cached_file(path, SAFE_WEIGHTS_INDEX_NAME))[0])


def _names(keys: Iterable[str], model: PreTrainedModel) -> tuple[dict[str, str], dict[str, _Merged]]:
    """Return the model's names for the ``keys`` that transformers loads unchanged, and what it makes of the others."""
    # Not public: if a release lacks these functions, the caller has to load the whole model.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
    known = model.state_dict()
    names: dict[str, str] = {}
    merged: dict[str, _Merged] = {}
    # In the order in which transformers puts tensors together.
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if pattern is None:
            names[key] = name
        else:
            converter = next(one for one in converters if pattern in one.source_patterns)
            sources = merged.setdefault(
                name, _Merged(converter, {pattern: [] for pattern in converter.source_patterns})
            )
            sources.sources[pattern].append(key)
    return names, merged


class NotBlockwiseError(Exception):
    """A base can't be loaded block by block, only as a whole; the message says why."""


class Blocks(Protocol):
    """A model whose decoder blocks can be run one at a time: a ``Skeleton`` or a ``WholeModel``.

    Attributes:
        model: The model.
        device: The device that it computes on.
        blocks: Names of the parameters of each decoder block.
        embeddings: Names of the parameters of the input embeddings.
        head: Names of the parameters of the output embeddings, which may be tied to the input embeddings.
        outer: Names of all other parameters.
    """

    model: PreTrainedModel
    device: torch.device
    blocks: list[list[str]]
    embeddings: list[str]
    head: list[str]
    outer: list[str]

    def loaded(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Load the weights of the parameters ``names`` while the block runs."""

    def streaming(self) -> AbstractContextManager[None]:
        """Load each decoder block's weights when a forward pass reaches it, and stop passes before the head."""


class WholeModel:
    """A model that is completely in memory, with the interface of ``Blocks``.

    Block-wise passes save memory even then: second moments of all blocks take twelve times as much as the weights.

    Args:
        model: A causal language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, model.device
        self.blocks: list[list[str]] = [[] for _ in decoder_blocks(model)[1]]
        self.embeddings: list[str] = []
        self.head: list[str] = []
        self.outer: list[str] = []

    def loaded(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Do nothing: all weights are loaded."""
        return nullcontext()

    def streaming(self) -> AbstractContextManager[None]:
        """Stop forward passes before the head."""
        return forward_until(self.model, body_of(self.model))


class Skeleton:
    """A causal language model on the meta device, with real buffers, and the files of its weights.

    Args:
        model: The model, without weights.
        shards: The files that hold all of its parameters.
        device: The device that weights are loaded to.

    Attributes:
        blocks: Names of the parameters of each decoder block.
        embeddings: Names of the parameters of the input embeddings.
        head: Names of the parameters of the output embeddings, which may be tied to the input embeddings.
        outer: Names of all other parameters.
    """

    def __init__(self, model: PreTrainedModel, shards: Shards, device: torch.device) -> None:
        self.model, self.shards, self.device = model, shards, device
        self._parameters = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        # Tied parameters belong to several modules.
        self._places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in self._parameters}
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                self._places[names[id(parameter)]].append((module, key))

        def names_in(module: nn.Module | None) -> list[str]:
            return [] if module is None else [names[id(parameter)] for parameter in module.parameters()]

        self.blocks = [names_in(block) for block in decoder_blocks(model)[1]]
        self.embeddings = names_in(model.get_input_embeddings())
        self.head = names_in(model.get_output_embeddings())
        elsewhere = {*self.embeddings, *self.head, *chain(*self.blocks)}
        self.outer = [name for name in self._parameters if name not in elsewhere]
        self._names = {name: names[id(one)] for name, one in model.named_parameters(remove_duplicate=False)}
        for module in model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = buffer.to(device)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the value of every parameter in the model's order; each value is read when it is due."""
        bar = tqdm(self._parameters.items(), desc="reading weights", unit="tensor", disable=not is_first())
        for name, parameter in bar:
            yield name, self.shards.read(name).to(parameter.dtype)

    def rows(self, name: str, rows: slice, *, transposed: bool = False) -> Tensor:
        """Return ``rows`` of a parameter, contiguous; other rows are not read.

        Args:
            name: Name of the parameter; any of its names if it is tied.
            rows: The rows to read.
            transposed: Take the rows of the parameter's transpose.
        """
        name = self._names[name]
        part = self.shards.read(name, (slice(None), rows) if transposed else (rows,))
        return (part.mT if transposed else part).to(
            self.device, self._parameters[name].dtype, copy=True, memory_format=torch.contiguous_format
        )

    @contextmanager
    def loaded(self, names: Iterable[str]) -> Iterator[None]:
        """Load the weights of the parameters ``names`` while the block runs."""
        loaded = list(names)
        try:
            for name in loaded:
                # A copy, because pages of the file count as memory while a tensor refers to them.
                weight = self.shards.read(name).to(
                    self.device, self._parameters[name].dtype, copy=True, memory_format=torch.contiguous_format
                )
                self._put(name, nn.Parameter(weight, requires_grad=False))
            yield
        finally:
            for name in loaded:
                self._put(name, self._parameters[name])

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        for module, key in self._places[name]:
            module._parameters[key] = parameter

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Load each decoder block's weights when a forward pass reaches it, and stop passes before the head."""
        blocks = decoder_blocks(self.model)[1]
        with self.loaded([*self.embeddings, *self.outer]), ExitStack() as hooks, ExitStack() as current:
            bar = hooks.enter_context(
                tqdm(total=len(blocks), desc="trying blocks", unit="block", disable=not is_first())
            )

            def load(names: Sequence[str]) -> None:
                current.enter_context(self.loaded(names))
                bar.update()

            for block, names in zip(blocks, self.blocks, strict=True):
                hooks.callback(block.register_forward_pre_hook(lambda *_, names=names: load(names)).remove)
                hooks.callback(block.register_forward_hook(lambda *_: current.close()).remove)
            with forward_until(self.model, body_of(self.model)):
                yield

    def find_targets(self, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Targets:
        """Return the targets that ``lowrank_pl.models.targets.find_targets`` finds in the loaded model.

        Raises:
            ValueError: The model is quantised, a pattern matches nothing, or no layer is left.
            NotBlockwiseError: The decoder blocks can't be run one at a time.
        """
        with explain_not_blockwise(), self.streaming():
            return find_targets(self.model, include=include, exclude=exclude)


@contextmanager
def explain_not_blockwise() -> Iterator[None]:
    """Take an error inside the block as a sign that decoder blocks can't be run with only one of them loaded.

    Raises:
        NotBlockwiseError: Any exception but a ``ValueError`` was raised.
    """
    try:
        yield
    except (NotBlockwiseError, ValueError):
        raise
    except Exception as error:  # The code of the model may raise anything.
        raise NotBlockwiseError(f"its blocks can't be run one at a time: {_first_line(error)}") from error


def open_skeleton(
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Skeleton:
    """Return the base model without its weights, parts of which can be loaded later.

    Args:
        base: See ``lowrank_pl.models.base.resolve_base``.
        dtype: Type in which weights are loaded.
        device: Device to which weights are loaded.
        trust_remote_code: Whether to run Python code that comes with the model.

    Raises:
        ValueError: The base can't be found or read, is quantised, or is not a causal language model.
        NotBlockwiseError: The base can only be loaded as a whole.
    """
    spec = resolve_base(base)
    if spec.family is not None or spec.shapes is not None:
        raise NotBlockwiseError("its random weights are made all at once")
    if spec.gguf_file is not None:
        raise NotBlockwiseError("its weights lie in a .gguf file, not in safetensors files")
    config = read_config(spec, trust_remote_code=trust_remote_code)
    check_files(Path(spec.path))
    try:
        shapes = pop_shapes(config)
        model = _on_meta(config, dtype, trust_remote_code)
        shards = Shards(spec.path, model)
        split_known_experts(model)
        shards.split_experts(model)
        reshape(model, shapes)
    except NotBlockwiseError:
        raise
    except Exception as error:  # The hub, safetensors and the code of the model raise exceptions of their own.
        raise NotBlockwiseError(_first_line(error)) from error
    _check_weights_are_stored(model, shards, dtype)
    _load_buffers(model, shards, dtype)
    return Skeleton(model, shards, torch.device(device))


def _on_meta(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    # Tied parameters were put on the meta device separately.
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _check_weights_are_stored(model: PreTrainedModel, shards: Shards, dtype: torch.dtype) -> None:
    """Refuse a model whose weights are more than the tensors in its files, cast to ``dtype``."""
    for name, parameter in model.named_parameters():
        if shards.shapes.get(name) != tuple(parameter.shape):
            raise NotBlockwiseError(f"its files hold no {name} of shape {tuple(parameter.shape)}")
    wide = _kept_wide(model, dtype)
    stay = sorted({part for name, _ in model.named_parameters() for part in wide if part in name})
    if stay:
        raise NotBlockwiseError(f"its modules {', '.join(stay)} stay in float32")


def _load_buffers(model: PreTrainedModel, shards: Shards, dtype: torch.dtype) -> None:
    """Load the buffers that come from the files; they are small.

    Raises:
        NotBlockwiseError: The files hold no such buffer.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wide = _kept_wide(model, dtype)
    for name, buffer in model.state_dict().items():
        if name in parameters:
            continue
        if shards.shapes.get(name) != tuple(buffer.shape):
            raise NotBlockwiseError(f"its files hold no {name} of shape {tuple(buffer.shape)}")
        kind = torch.float32 if any(part in name for part in wide) else buffer.dtype
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = shards.read(name).to(kind, copy=True)


def _kept_wide(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Return parts of the names of tensors that transformers keeps in float32 in a model of type ``dtype``."""
    names = {
        torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
        torch.bfloat16: ("_keep_in_fp32_modules_strict",),
    }
    return list(chain(*(getattr(model, name, None) or () for name in names.get(dtype, ()))))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
