"""The format of a compressed model on disk, as transformers reads and writes it.

This file needs torch and transformers only, because a copy of it lies in every exported folder: there it is the
remote code that ``trust_remote_code=True`` runs on a machine without lowrank_pl. Importing either copy teaches
transformers the quantization method ``"lowrank"``; then plain ``from_pretrained`` builds the model with
:class:`LowRankLinear` in the places that ``config.json`` names.

What is special: a loader that was taught nothing must fail, for transformers only warns about an unknown quantization
method and would go on with random weights. Hence the left factor is called ``weight``: its shape ``[out, rank]`` is
not the dense one, and transformers stops at the size mismatch.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["METHOD", "SCHEMA", "LowRankConfig", "LowRankLinear", "LowRankQuantizer", "align"]

METHOD = "lowrank"
SCHEMA = 1


class LowRankLinear(nn.Linear):
    """A linear map stored as two factors: ``y = weight @ (right @ x) + bias``.

    It is an ``nn.Linear`` so that PEFT attaches adapters to it; ``weight`` is its left factor, not the merged matrix.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        rank: Inner size of the factors.
        bias: Whether there is a bias.
        device: Where the parameters are made.
        dtype: Their type.

    Attributes:
        weight: Left factor, ``[out, rank]``.
        right: Right factor, ``[rank, in]``.
        bias: ``[out]`` or None.

    >>> layer = LowRankLinear(8, 6, 2, bias=False)
    >>> layer
    LowRankLinear(in_features=8, out_features=6, rank=2, bias=False)
    >>> layer.dense().shape
    torch.Size([6, 8])
    """

    right: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not nn.Linear.__init__: it would allocate the dense matrix.
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.weight = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, bias: Tensor | None = None) -> LowRankLinear:
        """Return a layer that holds these very tensors, detached and contiguous, not copies.

        Args:
            left: ``[out, rank]``.
            right: ``[rank, in]``.
            bias: ``[out]`` or None.

        Raises:
            ValueError: The shapes, types or devices don't belong together.

        >>> LowRankLinear.from_factors(torch.ones(4, 2), torch.ones(2, 3))(torch.ones(3)).tolist()
        [6.0, 6.0, 6.0, 6.0]
        """
        parts = [left, right] if bias is None else [left, right, bias]
        fits = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
        if not fits or (bias is not None and bias.shape != left.shape[:1]):
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            raise ValueError(f"factors of shapes {shapes}: expected [out, rank], [rank, in] and a bias of [out]")
        if len({(part.dtype, part.device) for part in parts}) > 1:
            kinds = ", ".join(f"{part.dtype} on {part.device}" for part in parts)
            raise ValueError(f"factors of {kinds}: expected one type and one device")
        layer = cls(right.shape[1], *left.shape, bias=bias is not None, device="meta", dtype=left.dtype)
        layer.weight = nn.Parameter(left.detach().contiguous())
        layer.right = nn.Parameter(right.detach().contiguous())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().contiguous())
        return layer

    def reset_parameters(self) -> None:
        """Fill the parameters as a chain of two fresh ``nn.Linear`` would."""
        for factor in (self.weight, self.right):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., out]`` for an input ``[..., in]``."""
        return F.linear(F.linear(input, self.right), self.weight, self.bias)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the merged matrix ``[out, in]`` in the factors' type; the product is taken in a wider one.

        fp32 factors are multiplied in fp64, half-precision ones in fp32, so only the last rounding is lost.
        """
        wide = torch.float64 if self.weight.dtype == torch.float32 else torch.float32
        wide = torch.promote_types(wide, self.weight.dtype)
        return (self.weight.to(wide) @ self.right.to(wide)).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, bias={self.bias is not None}"


class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` says under ``quantization_config``.

    Args:
        modules: Rank of each compressed module, by the module's name in the model that was saved.
        schema: Version of the format.
        quant_method: Always ``"lowrank"``.
        **unknown: Refused; named so that what a newer schema adds ends in the message about the schema.

    Raises:
        ValueError: The folder was written by a newer format than this file knows, or the ranks aren't ranks.

    Attributes:
        newest: The highest schema that this copy of the file reads.
    """

    newest = SCHEMA

    def __init__(
        self,
        modules: dict[str, int] | None = None,
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
            raise ValueError(f"quantization_config has the unknown keys {sorted(unknown)}: expected modules and schema")
        self.modules = dict(modules or {})
        for name, rank in self.modules.items():
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"quantization_config gives {name!r} the rank {rank!r}: expected a positive integer")
        self.schema = schema
        self.quant_method = quant_method


class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts :class:`LowRankLinear` where the configuration says, before transformers reads the weights."""

    # transformers then refuses to "quantize" a dense model while loading it: ranks and factors need calibration.
    requires_calibration = True

    def is_serializable(self) -> bool:
        """Return True: ``save_pretrained`` writes the factors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the factors are ordinary floating-point parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True, so that the Trainer accepts the model without adapters too."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the layers are two matrix products."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Swap the named modules; the model is still on the meta device."""
        known = dict(model.named_modules())
        for name, rank in self.quantization_config.modules.items():
            _swap(model, _name_here(model, name, known), rank)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Refuse weights that the files lack, and let the model save itself with this file beside it."""
        name = type(model).__name__
        missing = _missing(model, own_head=_auto_class(name) is None)
        if missing:
            raise ValueError(
                f"the weight files hold no {missing[0]}"
                + (f" and {len(missing) - 1} more" if missing[1:] else "")
                + ": transformers would make them up; the folder is damaged, copy or export it again"
            )
        align(model)
        # Its parameters are plain floats: .float() and .half() must not be refused as for packed integers.
        model.is_quantized = False
        if type(model) is getattr(transformers, name, None) and _auto_class(name) is not None:
            model.__class__ = _portable_class(name)
        return model


def _missing(model: PreTrainedModel, *, own_head: bool) -> list[str]:
    """Return the parameters that were not read from the files; a new head, as for classification, may be new."""
    body = {id(parameter) for parameter in model.base_model.parameters()}
    return [
        name
        for name, parameter in model.named_parameters()
        # On meta lie parameters that a device_map keeps on disk: they are read when used.
        if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False))
        and not (own_head and id(parameter) not in body)
    ]


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Move parameters and buffers in main memory to addresses that are multiples of 64; their values stay.

    Tensors that safetensors maps from a file lie wherever its header happens to end, and MKL's fp32 matrix-vector
    product (a decoding step) rounds differently at addresses that are no multiple of 16: without this, the tokens
    generated after a reload may differ from those before it.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _name_here(model: PreTrainedModel, name: str, known: Container[str]) -> str:
    """Return the name in ``model`` of what a model with or without its head called ``name``.

    ``AutoModel`` builds the part below the head, where ``model.layers.0`` is called ``layers.0``.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in known:
            return candidate
    raise ValueError(
        f"quantization_config names the module {name!r}, which {type(model).__name__} does not have: "
        "the folder belongs to another architecture or was edited; export again"
    )


def _swap(model: nn.Module, name: str, rank: int) -> None:
    """Put an empty :class:`LowRankLinear` in the place of the linear map ``name``."""
    old = model.get_submodule(name)
    if isinstance(old, Conv1D):
        inputs, outputs = old.weight.shape
    elif isinstance(old, nn.Linear):
        outputs, inputs = old.weight.shape
    else:
        raise ValueError(f"{name!r} is a {type(old).__name__}: only nn.Linear and Conv1D can be stored as factors")
    new = LowRankLinear(
        inputs, outputs, rank, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
    )
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _portable_class(name: str) -> type[PreTrainedModel]:
    """Return transformers' class ``name``, derived here so that ``save_pretrained`` copies this file along."""
    made: Any = globals().get(name)
    if made is None:
        base = getattr(transformers, name, None)
        if not (isinstance(base, type) and issubclass(base, PreTrainedModel) and _auto_class(name)):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor has transformers such a model")
        # Left at True, transformers would skip its renaming of old checkpoint keys (GPT-NeoX's embed_out): the head
        # stayed random.
        body = {"__module__": __name__, "__doc__": base.__doc__, "is_custom_code": classmethod(lambda _: False)}
        made = globals()[name] = type(name, (base,), body)
        made.register_for_auto_class(_auto_class(name))
    portable: type[PreTrainedModel] = made
    return portable


def _auto_class(name: str) -> str | None:
    """Return the auto class under which ``auto_map`` lists the model class ``name``; None for heads not served."""
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "AutoModelForCausalLM"
    return "AutoModel" if name.endswith("Model") else None


def __getattr__(name: str) -> Any:
    """Return transformers' model class of that name: ``auto_map`` points at ``hf_format.<class>``."""
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
