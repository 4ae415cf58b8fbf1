"""The quantisation method ``lowrank`` of vLLM: linear layers stored as factors or as pivots and coefficients.

vLLM asks the registered configuration for a method for each linear layer of its own model. The method makes parameters
that only receive the tensors of the checkpoint, and builds a :class:`~lowrank_pl.serving.fused_linear.FusedLinear`
after loading. This is the only module of the package that imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from lowrank_pl.models.hf_format import METHOD, LowRankConfig
from lowrank_pl.models.hf_quantized import grid_of_entry
from lowrank_pl.models.identity import ORIGIN_KEY
from lowrank_pl.serving.fused_linear import FusedLinear, Member

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["LowRankLinearMethod", "LowRankQuantizationConfig"]

# A child of vLLM's logger, so that its settings hold.
logger = init_logger("vllm.lowrank_pl")

QKV = {"q": 0, "k": 1, "v": 2}


@register_quantization_config(METHOD)
class LowRankQuantizationConfig(QuantizationConfig):  # type: ignore[misc]
    """The entry ``quantization_config`` of ``config.json``, for vLLM.

    Args:
        stored: The entry as transformers reads it.

    Attributes:
        modules: How each compressed module is stored, by its name in vLLM's model.
        experts: Whether experts of a mixture are stored one by one.
        shapes: ``[out, in]`` of modules whose shape differs from what the rest of the config says.
        transposed: Whether vLLM transposes every ``weight`` of the checkpoint, as it does for GPT-2.
        members: All members of layers that were made so far.
    """

    def __init__(self, stored: LowRankConfig) -> None:
        super().__init__()
        rounded = [name for name, entry in stored.modules.items() if grid_of_entry(entry) is not None]
        if rounded:
            logger.warning(
                "%d modules are rounded to a few bits, e.g. %s: they are dequantised, and take as much memory here as "
                "without bits",
                len(rounded),
                rounded[0],
            )
        factored = [name for name, entry in stored.modules.items() if _is_embedding(entry)]
        if factored:
            logger.warning(
                "%s is of low rank: it is multiplied out, and takes as much memory here as dense embeddings",
                factored[0],
            )
        self.modules = stored.modules
        self.shapes: dict[str, list[int]] = getattr(stored, "shapes", {})
        self.experts = bool(getattr(stored, "experts", False))
        self.transposed = False
        self.members: list[Member] = []

    @classmethod
    def get_name(cls) -> str:
        """Return the method's name in ``config.json``."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the types that models may be served in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: plain matrix products run on every GPU."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: everything is in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowRankQuantizationConfig:
        """Return the configuration that ``config.json`` holds.

        Raises:
            ValueError: The folder has a newer schema than this version knows, or an entry is invalid.
        """
        return cls(LowRankConfig(**config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Note from the model's config how vLLM reads its weights.

        Raises:
            ValueError: Heads were pruned: vLLM takes the number of heads of every block from the config. Or the model
                has compressed experts, which vLLM computes fused.
        """
        if self.experts:
            raise ValueError(
                f"{model_name} has compressed experts, which vLLM computes in fused parameters: run it in "
                "transformers, or merge its factors into dense weights (lowrank export PLAN --merge), which vLLM serves"
            )
        if (getattr(hf_config, ORIGIN_KEY, None) or {}).get("heads_left"):
            raise ValueError(
                f"some blocks of {model_name} have fewer key/value heads than config.json says, and vLLM takes the "
                "number of every block from there: run it in transformers, or prune without heads "
                "(lowrank prune --llm_pruner.attention false)"
            )
        self.transposed = getattr(hf_config, "model_type", None) == "gpt2"

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename the modules to their names in vLLM's model."""
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)
        self.shapes = hf_to_vllm_mapper.apply_dict(self.shapes)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return the method for ``layer``; None for what is neither linear nor an embedding, and stays as it is."""
        if isinstance(layer, VocabParallelEmbedding):
            name = prefix or self._nameless_embedding()
            entry = self.modules.get(name)
            return None if entry is None else CompressedEmbeddingMethod(name, entry)
        if not isinstance(layer, LinearBase):
            return None
        parent, dot, last = prefix.rpartition(".")
        names = [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(last, [last])]
        if any(name in self.modules or name in self.shapes for name in names):
            return LowRankLinearMethod(self, names)
        return UnquantizedLinearMethod()

    def _nameless_embedding(self) -> str:
        """Return the name of the compressed embedding: some models of vLLM, such as Llama, do not tell it."""
        outside_blocks = [name for name in self.modules if not any(part.isdecimal() for part in name.split("."))]
        return next((name for name in outside_blocks if not name.endswith("lm_head")), "")

    def report_unpivoted(self, processes: int, dtype: torch.dtype) -> None:
        """Log once how many pivoted layers tensor parallelism turns into factors, and the memory that this takes."""
        ranks = [member.shapes["right"][0] for member in self.members if member.unpivoted]
        self.members = []
        if ranks:
            more = sum(rank * rank for rank in ranks) / processes * dtype.itemsize
            logger.warning(
                "%d pivoted layers are split along their pivots by tensor parallelism and become two factors, which "
                "take %.1f MB more in each process",
                len(ranks),
                more / 1e6,
            )


class LowRankLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Parameters and computation of one linear layer of vLLM.

    Args:
        config: The model's configuration.
        names: The modules of the checkpoint that the layer consists of.
    """

    def __init__(self, config: LowRankQuantizationConfig, names: Sequence[str]) -> None:
        self.config = config
        self.names = names
        self.members: list[Member] = []
        # It chooses the matrix product for the device, for example with packed weights on a CPU.
        self.dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give ``layer`` an empty parameter for each kind of tensor, which hands what is loaded to the right member.

        Raises:
            ValueError: The shapes in the config don't fit the layer, or can't be split over so many processes.
        """
        splits_outputs, splits_inputs = (isinstance(layer, kind) for kind in (ColumnParallelLinear, RowParallelLinear))
        count, rank = layer.tp_size, layer.tp_rank
        if any(name in self.config.shapes for name in self.names):
            self._reshape(layer, count if splits_outputs else 1, count if splits_inputs else 1)
            output_partition_sizes, input_size = layer.output_partition_sizes, layer.input_size
        wholes, spans = [], []
        for place, size in enumerate(output_partition_sizes):
            # If there are fewer heads of keys and values than processes, several processes have the same head.
            copies = getattr(layer, "num_kv_head_replicas", 1) if place else 1
            wholes.append(size * count // copies if splits_outputs else size)
            spans.append((rank // copies * size if splits_outputs else 0, size))
        if len(self.names) == 1 and len(spans) > 1:
            # Fused in the checkpoint too: this process's parts lie apart.
            begins = accumulate(wholes[:-1], initial=0)
            parts = [(begin + start, size) for begin, (start, size) in zip(begins, spans, strict=True)]
            wholes, rows = [sum(wholes)], [tuple(parts)]
        else:
            rows = [(span,) for span in spans]
        width = input_size // count if splits_inputs else input_size
        columns = (rank * width if splits_inputs else 0, width)
        self.members = [
            Member(name, whole, input_size, self.config.modules.get(name), part, columns)
            for name, whole, part in zip(self.names, wholes, rows, strict=True)
        ]
        self.config.members += self.members
        for part in sorted({part for member in self.members for part in member.shapes}):
            dtype = _type_of(part, params_dtype)
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(self._load, part, params_dtype)  # type: ignore[attr-defined]
            layer.register_parameter(part, parameter)

    def _reshape(self, layer: LinearBase, outputs_split: int, inputs_split: int) -> None:
        """Give ``layer`` the shape that ``quantization_config`` says, from which vLLM also makes the bias."""
        shapes = [self.config.shapes[name] for name in self.names]
        (inputs,) = {shape[1] for shape in shapes}
        parts = len(layer.output_partition_sizes)
        outputs = [shape[0] for shape in shapes] if len(shapes) == parts else [shapes[0][0] // parts] * parts
        for size, split in (*((size, outputs_split) for size in outputs), (inputs, inputs_split)):
            if size % split:
                raise ValueError(
                    f"{self.names[0]} has width {size}, which {split} processes can't share: prune to multiples of "
                    f"{split}, or give another --tensor-parallel-size"
                )
        layer.input_size, layer.input_size_per_partition = inputs, inputs // inputs_split
        layer.output_partition_sizes = [size // outputs_split for size in outputs]
        layer.output_size, layer.output_size_per_partition = sum(outputs), sum(outputs) // outputs_split
        if hasattr(layer, "output_sizes"):
            layer.output_sizes = outputs

    def _load(
        self, part: str, dtype: torch.dtype, _: nn.Parameter, tensor: Tensor, shard: str | int | None = None
    ) -> None:
        """Hand ``tensor`` to the member that vLLM calls ``shard``."""
        place = QKV.get(shard, shard) if isinstance(shard, str) else shard or 0
        if not isinstance(place, int) or place >= len(self.members):
            raise ValueError(
                f"{self.names}: vLLM loads the part {shard!r}, expected one of {len(self.members)} members"
            )
        member = self.members[place]
        if part == "weight" and self.config.transposed and member.entry is not None:
            tensor = tensor.t()
        member.load(part, tensor, dtype)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Build what ``apply`` computes.

        Raises:
            ValueError: Tensors are missing or damaged.
        """
        self.config.report_unpivoted(layer.tp_size, layer.params_dtype)
        make: Callable[[Tensor], nn.Module] = partial(_Product, self.dense)
        layer.lowrank = FusedLinear(self.members, device=layer.weight.device, make_product=make)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's output."""
        output: Tensor = layer.lowrank(x)
        return output if bias is None else output + bias


class CompressedEmbeddingMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """Embeddings, or an untied head, that are rounded or of low rank in the checkpoint and dense here.

    Args:
        name: The module of the checkpoint.
        entry: How it is stored.
    """

    def __init__(self, name: str, entry: Any) -> None:
        super().__init__()
        self.name, self.entry = name, entry
        self.member: Member | None = None

    def create_weights(
        self,
        layer: VocabParallelEmbedding,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **options: Any,
    ) -> None:
        """Give ``layer`` its dense weight, and parameters that receive what the checkpoint holds."""
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **options
        )
        rows, columns = layer.org_vocab_size, layer.embedding_dim
        self.member = Member(self.name, rows, columns, self.entry, [(0, rows)], (0, columns))
        self._put = layer.weight.weight_loader
        for part in self.member.shapes:
            if part == "weight":
                parameter = layer.weight
            else:
                parameter = nn.Parameter(torch.empty(0, dtype=_type_of(part, params_dtype)), requires_grad=False)
                layer.register_parameter(part, parameter)
            parameter.weight_loader = partial(self._load, part, params_dtype)

    def _load(self, part: str, dtype: torch.dtype, _: nn.Parameter, tensor: Tensor, *__: Any) -> None:
        assert self.member is not None
        self.member.load(part, tensor, dtype)

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        """Fill the dense weight, or this process's part of it.

        Raises:
            ValueError: Tensors are missing.
        """
        # A tied head has the embeddings' method, which may be asked twice.
        if self.member is not None:
            self.member.check()
            weight, right = self.member.loaded["weight"], self.member.loaded.get("right")
            if right is not None:
                if not _is_embedding(self.member.entry):
                    logger.warning("the head %s is of low rank: it is multiplied out to a dense one", self.name)
                weight = (weight.float() @ right.float()).to(weight.dtype)
            self._put(layer.weight, weight.to(layer.weight.device))
            self.member = None
            for name in [name for name, _ in layer.named_parameters(recurse=False) if name != "weight"]:
                delattr(layer, name)
        super().process_weights_after_loading(layer)


def _type_of(part: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type of a tensor of the checkpoint, where weights and scales have ``dtype``."""
    if part.endswith(("_packed", "_zeros")):
        return torch.uint8
    return torch.int32 if part == "pivots" else dtype


class _Product(nn.Module):
    """A product with a matrix, as vLLM computes it on this device."""

    def __init__(self, method: UnquantizedLinearMethod, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.method = method
        method.process_weights_after_loading(self)

    def forward(self, input: Tensor) -> Tensor:
        return self.method.apply(self, input)  # type: ignore[no-any-return]


def _is_embedding(entry: Any) -> bool:
    """Tell the entry of an embedding of low rank."""
    return isinstance(entry, dict) and entry.get("storage") == "embedding"
