"""The format of a compressed model on disk, as transformers reads and writes it.

This file, hf_layers.py and digests.py need only torch and transformers. Every exported folder holds copies of them,
which ``trust_remote_code=True`` runs on machines without lowrank_pl. Importing the file, or a copy of it, registers the
quantization method ``"lowrank"`` with transformers. Plain ``from_pretrained`` then builds the model with
:class:`LowRankLinear` or :class:`PivotedLinear` where ``config.json`` says so.

A loader that does not know the method must fail: transformers only warns about an unknown quantization method, and
would continue with random weights. Therefore one parameter of each layer is called ``weight`` but never has the dense
shape, so that transformers stops at the size mismatch.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

# Relative, so that transformers copies both files along with this one.
from .digests import check_files
from .hf_layers import LowRankLinear, PivotedLinear

if TYPE_CHECKING:
    # transformers' own models import the tables above: importing this name here would be circular.
    from transformers import PreTrainedModel

__all__ = ["METHOD", "SCHEMA", "LowRankAutoConfig", "LowRankConfig", "LowRankQuantizer", "align", "reshape"]

METHOD = "lowrank"
SCHEMA = 3


class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The entry ``quantization_config`` of ``config.json``.

    Args:
        modules: How each compressed module is stored, by its name in the saved model: the rank of two factors, or
            ``{"rank": 3, "storage": "pivoted", "side": "out"}``.
        shapes: ``[out, in]`` of the linear layers, compressed or not, whose shape differs from what the rest of the
            config says, for example after MLPs were pruned to several widths.
        schema: Version of the format that the folder was written in.
        quant_method: Always ``"lowrank"``.
        **unknown: Other keys, which are refused. A newer schema may have them: its error comes first.

    Raises:
        ValueError: The folder has a newer schema than this file knows, or a rank or a shape is invalid.

    Attributes:
        newest: The highest schema that this copy of the file reads.
        schema: The lowest schema that can express the entries, so that older versions read the folder if they can: 2
            with pivots, 3 with shapes.
    """

    newest = SCHEMA

    def __init__(
        self,
        modules: dict[str, int | dict[str, Any]] | None = None,
        shapes: dict[str, list[int]] | None = None,
        schema: int = SCHEMA,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if schema > SCHEMA:
            raise ValueError(
                f"the model is stored in lowrank schema {schema}, this code reads schemas up to {SCHEMA}: "
                "upgrade lowrank_pl, or pass trust_remote_code=True to use the code in the model's folder"
            )
        if unknown:
            raise ValueError(
                f"quantization_config has the unknown keys {sorted(unknown)}: expected modules, shapes, schema"
            )
        self.modules = dict(modules or {})
        for name, entry in self.modules.items():
            rank: Any = entry
            if isinstance(entry, dict):
                if set(entry) != {"rank", "storage", "side"} or entry["storage"] != "pivoted":
                    raise ValueError(
                        f"quantization_config gives {name!r} the entry {entry}: expected a rank, or rank, storage "
                        '"pivoted" and side'
                    )
                rank = entry["rank"]
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"quantization_config gives {name!r} the rank {rank!r}: expected a positive integer")
        self.schema = 2 if any(isinstance(entry, dict) for entry in self.modules.values()) else 1
        if shapes:
            for name, shape in shapes.items():
                if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
                    raise ValueError(f"quantization_config gives {name!r} the shape {shape}: expected [out, in]")
            # Only if there are any: older versions refuse unknown keys.
            self.shapes = {name: list(shape) for name, shape in shapes.items()}
            self.schema = 3
        self.quant_method = quant_method


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
        """Return True: ``save_pretrained`` writes the parameters unchanged."""
        return True

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
        """True: the layers are two matrix products and at most two gathers."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        """Check the files, and replace the named modules; the model is still on the meta device."""
        if checkpoint_files:
            check_files(Path(checkpoint_files[0]).parent)
        known = dict(model.named_modules())
        reshape(model, getattr(self.quantization_config, "shapes", {}))
        for name, entry in self.quantization_config.modules.items():
            _swap(model, _name_here(model, name, known), entry)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Refuse a model with missing weights, and let ``save_pretrained`` copy this file beside it."""
        name = type(model).__name__
        missing = _missing(model, own_head=_auto_class(name) is None)
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


def _missing(model: PreTrainedModel, *, own_head: bool) -> list[str]:
    """Return the parameters and pivots that no file had, except for those of a new head, as for classification."""
    body = {id(parameter) for parameter in model.base_model.parameters()}
    parameters = [
        name
        for name, parameter in model.named_parameters()
        # Parameters that a device_map keeps on disk are on the meta device: they are read when used.
        if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False))
        and not (own_head and id(parameter) not in body)
    ]
    return parameters + [
        f"{name}.pivots"
        for name, layer in _pivoted(model)
        # If a hook of accelerate has moved the pivots, the mark is lost; their values are checked all the same.
        if not (getattr(layer.pivots, "_is_hf_initialized", False) or hasattr(layer, "_hf_hook"))
    ]


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
        _put(model, here, new)


def _linear(model: nn.Module, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the linear layer ``name``, and the arguments with which a layer in its place is made."""
    old = model.get_submodule(name)
    if not isinstance(old, (nn.Linear, Conv1D)):
        raise ValueError(f"{name!r} is a {type(old).__name__}: only nn.Linear and Conv1D can be stored as factors")
    return old, {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}


def _put(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _swap(model: nn.Module, name: str, entry: int | dict[str, Any]) -> None:
    """Replace the linear layer ``name`` by an empty low-rank layer, as ``entry`` of the configuration says."""
    old, like = _linear(model, name)
    weight: Any = old.weight
    outputs, inputs = weight.shape[::-1] if isinstance(old, Conv1D) else weight.shape
    new: nn.Module
    if isinstance(entry, int):
        new = LowRankLinear(inputs, outputs, entry, **like)
    else:
        try:
            new = PivotedLinear(inputs, outputs, entry["rank"], side=entry["side"], **like)
        except ValueError as error:
            raise ValueError(f"quantization_config, {name}: {error}") from None
    _put(model, name, new)


def _portable_class(name: str) -> type[PreTrainedModel]:
    """Return a subclass of transformers' class ``name``, made here so that ``save_pretrained`` copies this file."""
    made: Any = globals().get(name)
    if made is None:
        base = getattr(transformers, name, None)
        if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel) and _auto_class(name)):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor has transformers such a model")
        # If is_custom_code returned True, transformers would not rename old checkpoint keys (GPT-NeoX's embed_out), and
        # the head would stay random.
        body = {"__module__": __name__, "__doc__": base.__doc__, "is_custom_code": classmethod(lambda _: False)}
        made = globals()[name] = type(name, (base,), body)
        made.register_for_auto_class(_auto_class(name))
    portable: type[PreTrainedModel] = made
    return portable


def _auto_class(name: str) -> str | None:
    """Return the auto class for the model class ``name`` in ``auto_map``; None for heads that are not supported."""
    if name.endswith(("ForCausalLM", "LMHeadModel")):
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
