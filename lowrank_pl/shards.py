"""The tensors in a checkpoint's safetensors files, read one at a time under the names that a model has for them."""

from __future__ import annotations

from collections.abc import Iterable

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

__all__ = ["Shards"]


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
