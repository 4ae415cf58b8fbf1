"""A model that is never whole in memory: parts of it get their weights from the checkpoint's files for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
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
from lowrank_pl.models.forward import forward_until
from lowrank_pl.models.hf_format import reshape
from lowrank_pl.models.targets import Targets, decoder_blocks, find_targets
from lowrank_pl.utils.distributed import is_first

__all__ = ["Blocks", "NotBlockwiseError", "Shards", "Skeleton", "WholeModel", "explain_not_blockwise", "open_skeleton"]


class Shards:
    """The tensors in a checkpoint's safetensors files that a model takes as they are, at most by another name.

    Args:
        path: Folder or hub id.
        model: For which they are; it needs no weights.

    Attributes:
        shapes: Shape of each by the model's name for it.

    Raises:
        OSError: There are no such files.
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
        """Return the tensor that the model calls ``name``, or a part of it, a view of the file's pages."""
        file, key = self._places[name]
        # Opened for each anew: pages that were read count as memory for as long as their file is open.
        with safe_open(file, framework="pt") as shard:
            tensor: Tensor = shard.get_slice(key)[part] if part else shard.get_tensor(key)
        return tensor


def _files(path: str) -> list[str]:
    """Return the safetensors files that transformers would load: a single one before those of an index."""
    try:
        return [str(cached_file(path, SAFE_WEIGHTS_NAME))]
    except OSError:
        return list(get_checkpoint_shard_files(path, cached_file(path, SAFE_WEIGHTS_INDEX_NAME))[0])


def _names(keys: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Return the model's names of those of ``keys`` whose values transformers loads as they are."""
    # Not public: where a release has no such thing, the caller has to load the model whole.
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
    """A base has to be loaded whole; the message says why."""


class Blocks(Protocol):
    """A model through which passes can be made one decoder block at a time: a ``Skeleton``, or a ``WholeModel``.

    Attributes:
        model: The model.
        device: Where it computes.
        blocks: Names of the parameters of each decoder block.
        embeddings: Those of the input embeddings.
        head: Those of the output embeddings, which may be the same.
        outer: Those outside the blocks, but for the embeddings and the head.
    """

    model: PreTrainedModel
    device: torch.device
    blocks: list[list[str]]
    embeddings: list[str]
    head: list[str]
    outer: list[str]

    def loaded(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Let the parameters ``names`` have their weights while the block runs."""

    def streaming(self) -> AbstractContextManager[None]:
        """Let forward passes find each decoder block's weights there when they come to it, and end before the head."""


class WholeModel:
    """A model that is whole in memory, as something through which passes can be made one block at a time.

    What a device has no room for need not be the weights: sums of second moments take twelve times as much.

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
        """Do nothing: all weights are there."""
        return nullcontext()

    def streaming(self) -> AbstractContextManager[None]:
        """Let forward passes end before the head."""
        return forward_until(self.model, self.model.base_model)


class Skeleton:
    """A causal language model on the meta device, whose buffers are real, and the files that its weights lie in.

    Args:
        model: The model, without weights.
        shards: Hold each of its parameters.
        device: Where weights go that are loaded.

    Attributes:
        blocks: Names of the parameters of each decoder block.
        embeddings: Those of the input embeddings.
        head: Those of the output embeddings, which may be the same.
        outer: Those outside the blocks, but for the embeddings and the head.
    """

    def __init__(self, model: PreTrainedModel, shards: Shards, device: torch.device) -> None:
        self.model, self.shards, self.device = model, shards, device
        self._parameters = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        # A tied one stands in several places.
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
        """Yield name and value of every parameter in the model's order, each read when it is asked for."""
        bar = tqdm(self._parameters.items(), desc="reading weights", unit="tensor", disable=not is_first())
        for name, parameter in bar:
            yield name, self.shards.read(name).to(parameter.dtype)

    def rows(self, name: str, rows: slice, *, transposed: bool = False) -> Tensor:
        """Return ``rows`` of a parameter, contiguous; of the rest nothing is read.

        Args:
            name: The parameter; a tied one by any of its names.
            rows: Which.
            transposed: They are to be rows of its transpose.
        """
        name = self._names[name]
        part = self.shards.read(name, (slice(None), rows) if transposed else (rows,))
        return (part.mT if transposed else part).to(
            self.device, self._parameters[name].dtype, copy=True, memory_format=torch.contiguous_format
        )

    @contextmanager
    def loaded(self, names: Iterable[str]) -> Iterator[None]:
        """Let the parameters ``names`` have their weights while the block runs."""
        there = list(names)
        try:
            for name in there:
                # A copy: the file's pages would count as long as they are looked at.
                weight = self.shards.read(name).to(self.device, self._parameters[name].dtype, copy=True)
                self._put(name, nn.Parameter(weight, requires_grad=False))
            yield
        finally:
            for name in there:
                self._put(name, self._parameters[name])

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        for module, key in self._places[name]:
            module._parameters[key] = parameter

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Let forward passes find each decoder block's weights there when they come to it, and end before the head."""
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
        """Return what ``targets.find_targets`` finds in the model with all its weights.

        Raises:
            ValueError: As there.
            NotBlockwiseError: Blocks can't be run with their weights loaded one by one.
        """
        with explain_not_blockwise(), self.streaming():
            return find_targets(self.model, include=include, exclude=exclude)


@contextmanager
def explain_not_blockwise() -> Iterator[None]:
    """Take what fails in the block for a sign that decoder blocks can't be run with only one of them loaded.

    Raises:
        NotBlockwiseError: Anything but a ``ValueError`` was raised.
    """
    try:
        yield
    except (NotBlockwiseError, ValueError):
        raise
    except Exception as error:  # of the model's own code, which may be anyone's
        raise NotBlockwiseError(f"its blocks can't be run one by one: {_line(error)}") from error


def open_skeleton(
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Skeleton:
    """Return the base model without its weights, of which parts can be loaded.

    Args:
        base: As for ``load_base``.
        dtype: Type of the weights that will be loaded.
        device: Where they go.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        ValueError: The base is none, as ``load_base`` says.
        NotBlockwiseError: It can only be loaded whole.
    """
    spec = resolve_base(base)
    if spec.family is not None or spec.shapes is not None:
        raise NotBlockwiseError("its random weights are made all at once")
    if spec.gguf_file is not None:
        raise NotBlockwiseError("its weights lie in a .gguf file, not in safetensors files")
    config = read_config(spec, trust_remote_code=trust_remote_code)
    try:
        shapes = pop_shapes(config)
        model = _on_meta(config, shapes, dtype, trust_remote_code)
        shards = Shards(spec.path, model)
    except Exception as error:  # of the hub, of safetensors or of the model's own code
        raise NotBlockwiseError(_line(error)) from error
    _refuse_unlike(model, shards, dtype)
    return Skeleton(model, shards, torch.device(device))


def _on_meta(
    config: PretrainedConfig, shapes: dict[str, list[int]], dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
        reshape(model, shapes)
    # Each was put on the meta device for itself.
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _refuse_unlike(model: PreTrainedModel, shards: Shards, dtype: torch.dtype) -> None:
    """Refuse a model whose weights are not just what the files hold, cast to ``dtype``."""
    for name, parameter in model.named_parameters():
        if shards.shapes.get(name) != tuple(parameter.shape):
            raise NotBlockwiseError(f"its files hold no {name} of shape {tuple(parameter.shape)} as it is")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = [name for name in model.state_dict() if name not in parameters]
    if buffers:
        raise NotBlockwiseError(f"{buffers[0]} comes from its files, but is no parameter")
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    wide = list(chain(*(getattr(model, name, None) or () for name in names)))
    if wide and dtype != torch.float32:
        raise NotBlockwiseError(f"its modules {', '.join(sorted(wide))} stay in float32")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
