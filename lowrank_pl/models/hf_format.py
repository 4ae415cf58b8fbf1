"""The format of a compressed model on disk, as transformers reads and writes it.

This file, hf_layers.py, hf_quantized.py, hf_experts.py and digests.py need only torch and transformers. Every exported
folder holds copies of them, which ``trust_remote_code=True`` runs on machines without lowrank_pl. Importing the file,
or a copy of it, registers the quantization method ``"lowrank"`` with transformers. Plain ``from_pretrained`` then
builds the model with :class:`LowRankLinear`, :class:`PivotedLinear` or :class:`LowRankEmbedding` where ``config.json``
says so, with the layers of hf_quantized.py where it names bits, and with the separate experts of hf_experts.py.

A loader that does not know the method must fail: transformers only warns about an unknown quantization method, and
would continue with random weights. Therefore one parameter of each layer is called ``weight`` but never has the dense
shape, so that transformers stops at the size mismatch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

# Relative, so that transformers copies these files along with this one.
from .digests import check_files
from .hf_experts import drop_experts, put_module, split_experts
from .hf_layers import LowRankEmbedding, LowRankLinear, PivotedLinear, SharedLowRankLinear, low_rank_embedding
from .hf_quantized import (
    Grid,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLowRankLinear,
    QuantizedPivotedLinear,
    grid_of_entry,
    is_quantized,
    quantized_embedding,
    quantized_low_rank_embedding,
    stored_state,
    tie_head,
)

if TYPE_CHECKING:
    # transformers' own models import the tables above: importing this name here would be circular.
    from transformers import PreTrainedModel

__all__ = [
    "METHOD",
    "SCHEMA",
    "LowRankAutoConfig",
    "LowRankConfig",
    "LowRankQuantizer",
    "align",
    "reshape",
    "tied_weights",
]

METHOD = "lowrank"
SCHEMA = 6


_DROPPED = {"dropped": True}
"""The entry of an expert that was dropped."""


class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The entry ``quantization_config`` of ``config.json``.

    Args:
        modules: How each compressed module is stored, by its name in the saved model: the rank of two factors, or
            ``{"rank": 3, "storage": "pivoted", "side": "out"}``, or for an embedding ``{"rank": 3, "storage":
            "embedding"}``. A layer that reads the right factor of another one names it: ``{"rank": 3, "storage":
            "shared", "right": "model.layers.0.mlp.experts.0.up_proj"}``. If its numbers are rounded, ``"bits": 4`` is
            added, and ``"group": 32`` if groups are smaller than rows: ``{"rank": 3, "bits": 4, "group": 32}``. A dense
            layer or an embedding that is rounded has no rank: ``{"bits": 8}``. An expert that was dropped, by its name,
            has neither: ``{"dropped": true}``.
        shapes: ``[out, in]`` of the linear layers, compressed or not, whose shape differs from what the rest of the
            config says, for example after MLPs were pruned to several widths.
        experts: Whether the experts of mixtures are stored as separate linear layers.
        schema: Version of the format that the folder was written in.
        quant_method: Always ``"lowrank"``.
        **unknown: Other keys, which are refused. A newer schema may have them: its error comes first.

    Raises:
        ValueError: The folder has a newer schema than this file knows, or a rank, a shape or bits are invalid.

    Attributes:
        newest: The highest schema that this copy of the file reads.
        schema: The lowest schema that can express the entries, so that older versions read the folder if they can: 2
            with pivots, 3 with shapes, 4 with bits, 5 with separate experts or embeddings of low rank, 6 with dropped
            experts or shared right factors.
    """

    newest = SCHEMA

    def __init__(
        self,
        modules: dict[str, int | dict[str, Any]] | None = None,
        shapes: dict[str, list[int]] | None = None,
        experts: bool = False,
        schema: int = SCHEMA,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if type(schema) is not int:
            raise ValueError(f"quantization_config has the schema {schema!r}: expected a whole number up to {SCHEMA}")
        if schema > SCHEMA:
            raise ValueError(
                f"the model is stored in lowrank schema {schema}, this code reads schemas up to {SCHEMA}: "
                "upgrade lowrank_pl, or pass trust_remote_code=True to use the code in the model's folder"
            )
        if unknown:
            raise ValueError(
                f"quantization_config has the unknown keys {sorted(unknown)}: expected modules, shapes, experts, schema"
            )
        for key, value in (("modules", modules), ("shapes", shapes)):
            if not isinstance(value, (dict, type(None))):
                raise ValueError(f"quantization_config has the {key} {value!r}: expected an entry for each module")
        self.modules = dict(modules or {})
        for name, entry in self.modules.items():
            try:
                _check_entry(entry)
            except ValueError as error:
                raise ValueError(f"quantization_config gives {name!r} {error}") from None
        _check_owners(self.modules)
        self.schema = max(map(_schema, self.modules.values()), default=1)
        if shapes:
            for name, shape in shapes.items():
                sizes = list(shape) if isinstance(shape, (list, tuple)) else []
                if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
                    raise ValueError(f"quantization_config gives {name!r} the shape {shape}: expected [out, in]")
            # Only if there are any: older versions refuse unknown keys.
            self.shapes = {name: list(shape) for name, shape in shapes.items()}
            self.schema = max(self.schema, 3)
        if experts:
            self.experts, self.schema = True, max(self.schema, 5)
        elif _DROPPED in self.modules.values():
            raise ValueError("quantization_config names dropped experts, but stores none: expected experts to be true")
        self.quant_method = quant_method


def _check_entry(entry: Any) -> None:
    """Raise ``ValueError`` unless ``entry`` says how a module is stored; the message continues the module's name."""
    if entry == _DROPPED:
        return
    given = {"rank": entry} if not isinstance(entry, dict) else entry
    rounding = {"bits", "group"} & set(given)
    kind = set(given) - rounding
    pivoted = kind == {"rank", "storage", "side"} and given["storage"] == "pivoted"
    embedding = kind == {"rank", "storage"} and given["storage"] == "embedding"
    shared = set(given) == {"rank", "storage", "right"} and given["storage"] == "shared" and type(given["right"]) is str
    alone = isinstance(entry, dict) and not rounding
    plain = kind in ({"rank"}, set()) and not alone
    if not (pivoted or embedding or shared or plain) or rounding == {"group"}:
        raise ValueError(
            f'the entry {entry}: expected a rank, or rank, storage "pivoted" and side, or rank and storage "embedding"'
            '; bits, and group, may be added or stand alone; or rank, storage "shared" and right'
        )
    rank = given.get("rank", 1)
    if type(rank) is not int or rank < 1:
        raise ValueError(f"the rank {rank!r}: expected a positive integer")
    if rounding:
        try:
            grid_of_entry(given)
        except ValueError as error:
            raise ValueError(f"the entry {entry}: {error}") from None


def _check_owners(modules: dict[str, int | dict[str, Any]]) -> None:
    """Raise ``ValueError`` unless layers that share a right factor name one that stores it, of the same rank."""
    for name, entry in modules.items():
        if isinstance(entry, dict) and entry.get("storage") == "shared":
            owner = modules.get(entry["right"])
            if owner != entry["rank"]:
                raise ValueError(
                    f"quantization_config lets {name!r} of rank {entry['rank']} share the right factor of "
                    f"{entry['right']!r}, whose entry is {owner}: expected a layer stored as two factors of this rank"
                )


def _schema(entry: int | dict[str, Any]) -> int:
    """Return the lowest schema that has such entries."""
    if isinstance(entry, int):
        return 1
    if entry == _DROPPED or entry.get("storage") == "shared":
        return 6
    if entry.get("storage") == "embedding":
        return 5
    return 4 if "bits" in entry else 2


class LowRankAutoConfig:
    """The class that ``auto_map`` names for ``config.json``; it reads the configuration as transformers does.

    With ``trust_remote_code=True``, this entry loads this file together with the configuration. Otherwise the file
    would be loaded with the model only, and tools that read the configuration first, such as lm-eval, would not know
    the quantization method.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: configurations that are saved later are transformers' own."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> PretrainedConfig:
        """Return the configuration as transformers reads it."""
        return AutoConfig.from_pretrained(pretrained_model_name_or_path, trust_remote_code=False, **kwargs)


class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds the low-rank layers that the configuration names, before transformers reads the weights."""

    # With this, transformers refuses to "quantize" a dense model while loading it: ranks and factors need calibration.
    requires_calibration = True

    def is_serializable(self) -> bool:
        """Return True: ``save_pretrained`` writes the parameters with the same values."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *_: Any) -> tuple[dict[str, Any] | None, Any]:
        """Return the tensors for ``save_pretrained``, with the scales of rounded layers in half precision.

        Experts that are computed together have transposed parts of larger tensors, which safetensors refuses.
        """
        rounded = any(is_quantized(module) for module in model.modules())
        if not rounded and all(parameter.is_contiguous() for parameter in model.parameters()):
            return None, {}
        return {name: tensor.contiguous() for name, tensor in stored_state(model.state_dict()).items()}, {}

    @property
    def is_trainable(self) -> bool:
        """True: the layers have ordinary floating-point parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True, so that the Trainer also accepts the model without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the layers are at most two matrix products and two gathers."""
        return True

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """Return the conversions without those that would fuse the experts of files that hold them separately.

        Earlier releases of transformers 5 give no ``model``.
        """
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        if not getattr(self.quantization_config, "experts", False):
            return conversions
        # Not at the head: this file is imported in the middle of transformers' own imports, maybe of two threads.
        from transformers.core_model_loading import WeightConverter

        return [
            conversion
            for conversion in conversions
            if not isinstance(conversion, WeightConverter)
            or any(re.search(target, self._names) for target in conversion.target_patterns)
        ]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        """Check the files, and replace the named modules; the model is still on the meta device."""
        self._files = list(checkpoint_files or ())
        if checkpoint_files:
            check_files(Path(checkpoint_files[0]).parent)
        if getattr(self.quantization_config, "experts", False):
            split_experts(model)
        known = dict(model.named_modules())
        reshape(model, getattr(self.quantization_config, "shapes", {}))
        for name, entry in self.quantization_config.modules.items():
            if entry != _DROPPED and not _is_absent_head(model, name, entry, known):
                _swap(model, _name_here(model, name, known), entry)
        dropped = [name for name, entry in self.quantization_config.modules.items() if entry == _DROPPED]
        drop_experts(model, [_name_here(model, name, known) for name in dropped])
        _let_share(model, self.quantization_config.modules, known)
        self._names = "\n".join(model.state_dict())
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Refuse a model with missing weights, and let ``save_pretrained`` copy this file beside it."""
        name = type(model).__name__
        missing = _missing(model, self._files, own_head=_auto_class(name) is None)
        if missing:
            raise ValueError(
                f"the weight files hold no {missing[0]}"
                + (f" and {len(missing) - 1} more" if missing[1:] else "")
                + ": transformers would use random values; the folder is damaged, copy or export it again"
            )
        _check_pivots(model)
        align(model)
        # The parameters are plain floats: .float() and .half() need not be refused as for packed integers.
        model.is_quantized = False
        if type(model) is getattr(transformers, name, None) and _auto_class(name) is not None:
            model.__class__ = _portable_class(name)
        return model


def _missing(model: PreTrainedModel, files: Sequence[str], *, own_head: bool) -> list[str]:
    """Return the parameters, pivots and codes that no file had, except for those of a new head.

    Args:
        model: The model.
        files: Its weight files.
        own_head: Whether the model may have a new head, as for classification.
    """
    body = {id(parameter) for parameter in model.base_model.parameters()}
    parameters = [
        name
        for name, parameter in model.named_parameters()
        # Parameters that a device_map keeps on disk are on the meta device: they are read when used.
        if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False))
        and not (own_head and id(parameter) not in body)
    ]
    buffers = list(_stored_buffers(model))
    return (
        parameters
        + [
            f"{name}.{key}"
            for name, layer, key, tensor in buffers
            # If a hook of accelerate has moved a buffer, the mark is lost.
            if not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False) or hasattr(layer, "_hf_hook"))
        ]
        + _fewer_in(files, [key for _, layer, key, _ in buffers if hasattr(layer, "_hf_hook")])
    )


def _fewer_in(files: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return which of the last parts of names are in weight files less often than ``wanted``.

    Names are only counted, because transformers renames what it reads.
    """
    if not wanted or not all(str(file).endswith(".safetensors") for file in files):
        return []
    held: Counter[str] = Counter()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            held.update(name.rpartition(".")[2] for name in opened.keys())  # noqa: SIM118
    counts = Counter(wanted)
    return [f"{kind} for {count - held[kind]} layers" for kind, count in counts.items() if held[kind] < count]


def _stored_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield the pivots, codes and zero points of all layers: name, layer, name in the layer, tensor."""
    for name, layer in model.named_modules():
        if isinstance(layer, PivotedLinear) or is_quantized(layer):
            for key, tensor in layer.named_buffers(recurse=False):
                if key not in layer._non_persistent_buffers_set:
                    yield name, layer, key, tensor


def _pivoted(model: nn.Module) -> list[tuple[str, PivotedLinear]]:
    """Return the pivoted layers by name, except for those whose pivots a device_map keeps on disk."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PivotedLinear)]
    return [(name, layer) for name, layer in layers if not layer.pivots.is_meta]


def _check_pivots(model: nn.Module) -> None:
    for name, layer in _pivoted(model):
        try:
            layer.check_pivots()
        except ValueError as error:
            raise ValueError(f"{name}: {error}; the folder is damaged, copy or export it again") from None


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Move parameters and buffers to addresses that are multiples of 64, with the same values.

    The address of a tensor that safetensors maps from a file depends on the length of the file's header. At addresses
    that are not multiples of 16, MKL's fp32 matrix-vector product (a decoding step) rounds differently, and cuBLAS uses
    other kernels. Without this function, a reloaded model may generate other tokens.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _name_here(model: PreTrainedModel, name: str, known: Container[str]) -> str:
    """Return the name in ``model`` of the module ``name`` of a model saved with or without its head.

    ``AutoModel`` builds the model without its head, in which ``model.layers.0`` is called ``layers.0``.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in known:
            return candidate
    raise ValueError(
        f"quantization_config names the module {name!r}, which {type(model).__name__} does not have: "
        "the folder is of another architecture or was edited; export it again"
    )


def reshape(model: PreTrainedModel, shapes: dict[str, list[int]]) -> None:
    """Replace linear layers of ``model`` by empty ones of the given ``shapes`` ``[out, in]``, by name."""
    known = dict(model.named_modules())
    for name, (outputs, inputs) in shapes.items():
        here = _name_here(model, name, known)
        old, like = _linear(model, here)
        new: nn.Module
        if isinstance(old, Conv1D):
            with torch.device(like["device"]):
                new = Conv1D(outputs, inputs).to(like["dtype"])
        else:
            new = nn.Linear(inputs, outputs, **like)
        put_module(model, here, new)


def _linear(model: nn.Module, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the linear layer ``name``, and the arguments with which a layer in its place is made."""
    old = model.get_submodule(name)
    if not isinstance(old, (nn.Linear, Conv1D)):
        raise ValueError(
            f"{name!r} is a {type(old).__name__}: only nn.Linear and Conv1D can be stored as factors, and "
            "they and embeddings rounded"
        )
    return old, {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}


def _is_absent_head(model: PreTrainedModel, name: str, entry: int | dict[str, Any], known: Container[str]) -> bool:
    """Tell whether an entry is of a head that ``model`` does not have, such as one that ``AutoModel`` made."""
    outside = not name.startswith(f"{model.base_model_prefix}.")
    # A head is in no block.
    factored = isinstance(entry, int) or "rank" in entry
    of_head = outside and not (factored and any(part.isdecimal() for part in name.split(".")))
    return of_head and name not in known and model.get_output_embeddings() is None


def _swap(model: PreTrainedModel, name: str, entry: int | dict[str, Any]) -> None:
    """Replace the module ``name`` by an empty one that is stored as ``entry`` of the configuration says."""
    given: dict[str, Any] = {"rank": entry} if isinstance(entry, int) else dict(entry)
    grid, rank = grid_of_entry(given), given.get("rank")
    of_embedding = isinstance(model.get_submodule(name), nn.Embedding)
    if of_embedding and (given.get("storage") == "embedding" or rank is None):
        _swap_embedding(model, name, rank, grid)
        return
    if given.pop("storage", None) == "embedding":
        raise ValueError(f"quantization_config stores {name!r} as an embedding, which it is not: export it again")
    if f"{name}.weight" in tied_weights(model):
        raise ValueError(
            f"quantization_config names {name!r}, which is tied to {tied_weights(model)[f'{name}.weight']}: the "
            "folder is of another architecture or was edited; export it again"
        )
    old, like = _linear(model, name)
    weight: Any = old.weight
    outputs, inputs = weight.shape[::-1] if isinstance(old, Conv1D) else weight.shape
    if grid is not None:
        like["grid"] = grid
    if "side" in given:
        like["side"] = given["side"]
    factored: Any = SharedLowRankLinear if "right" in given else LowRankLinear
    kinds: dict[tuple[bool, bool], Any] = {
        (True, False): factored if grid is None else QuantizedLowRankLinear,
        (True, True): PivotedLinear if grid is None else QuantizedPivotedLinear,
        (False, False): QuantizedLinear,
    }
    try:
        new = kinds[rank is not None, "side" in given](inputs, outputs, *([] if rank is None else [rank]), **like)
    except ValueError as error:
        raise ValueError(f"quantization_config, {name}: {error}") from None
    put_module(model, name, new)


def _let_share(model: PreTrainedModel, entries: Mapping[str, int | dict[str, Any]], known: Container[str]) -> None:
    """Let layers read the right factors of those that their entries name; all layers are in their places."""
    for name, entry in entries.items():
        if isinstance(entry, dict) and "right" in entry:
            layer, owner = (model.get_submodule(_name_here(model, one, known)) for one in (name, entry["right"]))
            assert isinstance(layer, SharedLowRankLinear)
            assert isinstance(owner, LowRankLinear)
            try:
                layer.share(owner)
            except ValueError as error:
                raise ValueError(f"quantization_config, {name}: {error}") from None


def _swap_embedding(model: PreTrainedModel, name: str, rank: int | None, grid: Grid | None) -> None:
    """Replace an embedding by an empty compressed one, and heads that are tied to it by those that read its rows."""
    old: Any = model.get_submodule(name)
    new: QuantizedEmbedding | LowRankEmbedding
    if rank is None:
        assert grid is not None
        new = quantized_embedding(old, grid)
    else:
        new = low_rank_embedding(old, rank) if grid is None else quantized_low_rank_embedding(old, rank, grid)
    tied = tied_weights(model)
    put_module(model, name, new)
    for other, source in tied.items():
        if source == f"{name}.weight":
            head = model.get_submodule(other.removesuffix(".weight"))
            if not isinstance(head, nn.Linear):
                raise ValueError(f"{name!r} is tied to {other}, which is no linear layer: it can't be compressed")
            put_module(model, other.removesuffix(".weight"), tie_head(head, new))


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Return for each parameter that is tied to another one its name, and that of the other."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _portable_class(name: str) -> type[PreTrainedModel]:
    """Return a subclass of transformers' class ``name``, made here so that ``save_pretrained`` copies this file."""
    made: Any = globals().get(name)
    if made is None:
        base = getattr(transformers, name, None)
        if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel) and _auto_class(name)):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor has transformers such a model")
        # If is_custom_code returned True, transformers would not rename old checkpoint keys (GPT-NeoX's embed_out), and
        # the head would stay random.
        body = {
            "__module__": __name__,
            "__doc__": base.__doc__,
            "is_custom_code": classmethod(lambda _: False),
            "resize_token_embeddings": _resizer(base),
        }
        made = globals()[name] = type(name, (base,), body)
        made.register_for_auto_class(_auto_class(name))
    portable: type[PreTrainedModel] = made
    return portable


def _resizer(base: type[PreTrainedModel]) -> Any:
    """Return ``resize_token_embeddings`` for a subclass of ``base``; transformers' own knows dense matrices only."""

    def resize_token_embeddings(
        self: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **options: Any
    ) -> nn.Embedding:
        """Resize the embeddings and the head as transformers does.

        Raises:
            ValueError: The embeddings are rounded, or the head is compressed.
        """
        for layer in (self.get_input_embeddings(), self.get_output_embeddings()):
            if is_quantized(layer) or isinstance(layer, (LowRankLinear, PivotedLinear)):
                raise ValueError(
                    f"resize_token_embeddings was called, but the model has a {type(layer).__name__}, which can't be "
                    "resized: resize the base before it is compressed"
                )
        resized: nn.Embedding = base.resize_token_embeddings(self, new_num_tokens, *args, **options)
        return resized

    return resize_token_embeddings


def _auto_class(name: str) -> str | None:
    """Return the auto class for the model class ``name`` in ``auto_map``; None for heads that are not supported."""
    # Imported here, because transformers' own models import the tables above. Models with images, such as Gemma 3's,
    # have other names.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if name.endswith(("ForCausalLM", "LMHeadModel")) or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "AutoModelForCausalLM"
    return "AutoModel" if name.endswith("Model") else None


def __getattr__(name: str) -> Any:
    """Return the model class ``name`` of transformers, because ``auto_map`` refers to ``hf_format.<class>``."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _portable_class(name)


def _register() -> None:
    """Teach transformers the method, unless a copy of this file that reads as much has done so."""
    known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(METHOD)
    if known is None or getattr(known, "newest", 0) < SCHEMA:
        AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LowRankConfig
        AUTO_QUANTIZER_MAPPING[METHOD] = LowRankQuantizer


_register()
