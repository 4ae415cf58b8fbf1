"""Lazily loaded models: parts of a model get their weights from the checkpoint's files only while they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from lowrank_pl.models.base import pop_shapes, read_config, resolve_base
from lowrank_pl.models.digests import check_files
from lowrank_pl.models.forward import forward_until
from lowrank_pl.models.hf_format import reshape
from lowrank_pl.models.targets import Targets, decoder_blocks, find_targets
from lowrank_pl.utils.distributed import is_first

__all__ = ["Blocks", "NotBlockwiseError", "Shards", "Skeleton", "WholeModel", "explain_not_blockwise", "open_skeleton"]


class Shards:
    """The tensors in a checkpoint's safetensors files that a model loads unchanged, possibly under another name.

    Args:
        path: Folder or hub id of the checkpoint.
        model: The model that loads them; it needs no weights itself.

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
        names = _names(files, model)
        self.shapes = {name: shapes[key] for key, name in names.items()}
        self._places = {name: (files[key], key) for key, name in names.items()}

    def read(self, name: str, part: tuple[slice, ...] = ()) -> Tensor:
        """Return the tensor of the model's name ``name``, or a part of it, as a view of the file's pages."""
        file, key = self._places[name]
        # Opened for each read: pages that were read count as memory while their file is open.
        with safe_open(file, framework="pt") as shard:
            tensor: Tensor = shard.get_slice(key)[part] if part else shard.get_tensor(key)
        return tensor


def _files(path: str) -> list[str]:
    """Return the safetensors files that transformers would load: it prefers a single file to those of an index."""
    try:
        return [str(cached_file(path, SAFE_WEIGHTS_NAME))]
    except OSError:
        return list(get_checkpoint_shard_files(path, cached_file(path, SAFE_WEIGHTS_INDEX_NAME))[0])


def _names(keys: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Return the model's names for the ``keys`` whose values transformers loads unchanged."""
    # Not public: if a release lacks these functions, the caller has to load the whole model.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
    known = model.state_dict()
    names: dict[str, str] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if pattern is None:
            names[key] = name
    return names


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
        return forward_until(self.model, self.model.base_model)


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
                weight = self.shards.read(name).to(self.device, self._parameters[name].dtype, copy=True)
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
            with forward_until(self.model, self.model.base_model):
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
        model = _on_meta(config, shapes, dtype, trust_remote_code)
        shards = Shards(spec.path, model)
    except Exception as error:  # The hub, safetensors and the code of the model raise exceptions of their own.
        raise NotBlockwiseError(_first_line(error)) from error
    _check_weights_are_stored(model, shards, dtype)
    return Skeleton(model, shards, torch.device(device))


def _on_meta(
    config: PretrainedConfig, shapes: dict[str, list[int]], dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
        reshape(model, shapes)
    # Tied parameters were put on the meta device separately.
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _check_weights_are_stored(model: PreTrainedModel, shards: Shards, dtype: torch.dtype) -> None:
    """Refuse a model whose weights are more than the tensors in its files, cast to ``dtype``."""
    for name, parameter in model.named_parameters():
        if shards.shapes.get(name) != tuple(parameter.shape):
            raise NotBlockwiseError(f"its files hold no {name} of shape {tuple(parameter.shape)}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = [name for name in model.state_dict() if name not in parameters]
    if buffers:
        raise NotBlockwiseError(f"{buffers[0]} comes from its files, but is not a parameter")
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    wide = list(chain(*(getattr(model, name, None) or () for name in names)))
    if wide and dtype != torch.float32:
        raise NotBlockwiseError(f"its modules {', '.join(sorted(wide))} stay in float32")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
