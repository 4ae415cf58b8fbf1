"""The quantisation method ``lowrank`` of vLLM: linear layers and experts stored as factors, or pivots and coefficients.

vLLM asks the registered configuration for a method for each linear layer of its own model, and for the experts of each
block. The method makes parameters that only receive the tensors of the checkpoint. After loading, it builds a
:class:`~lowrank_pl.serving.fused_linear.FusedLinear`, or the
:class:`~lowrank_pl.serving.grouped_experts.ExpertMatrices` of a block. This is the only module of the package that
imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
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

from lowrank_pl.models.hf_experts import taken_over
from lowrank_pl.models.hf_format import METHOD, LowRankConfig
from lowrank_pl.models.hf_layers import LowRankLinear
from lowrank_pl.models.hf_quantized import grid_of_entry
from lowrank_pl.models.identity import ORIGIN_KEY
from lowrank_pl.serving.fused_linear import FusedLinear, Member
from lowrank_pl.serving.grouped_experts import ExpertMatrices, Way

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["LowRankExpertsMethod", "LowRankLinearMethod", "LowRankQuantizationConfig"]

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
            ValueError: Heads were pruned: vLLM takes the number of heads of every block from the config.
        """
        if (getattr(hf_config, ORIGIN_KEY, None) or {}).get("heads_left"):
            raise ValueError(
                f"some blocks of {model_name} have fewer key/value heads than config.json says, and vLLM takes the "
                "number of every block from there: run it in transformers, or prune without heads "
                "(lowrank prune --llm_pruner.attention false)"
            )
        self.transposed = getattr(hf_config, "model_type", None) == "gpt2"

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename the modules to their names in vLLM's model."""
        self.modules = _renamed(hf_to_vllm_mapper, self.modules)
        self.shapes = _renamed(hf_to_vllm_mapper, self.shapes)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | FusedMoEMethodBase | None:
        """Return the method for ``layer``; None for what stays as it is.

        Raises:
            ValueError: Its experts can't be computed here.
        """
        if isinstance(layer, RoutedExperts):
            return LowRankExpertsMethod(self, layer) if self.experts else None
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

    def entry(self, name: str) -> int | dict[str, Any] | None:
        """Return how the module ``name`` of vLLM's model is stored; None if it is dense, or there is no such module."""
        return self.modules.get(name, self.modules.get(self.stored_name(name)))

    @staticmethod
    def stored_name(name: str) -> str:
        """Return what the module ``name`` of vLLM's model is called in ``quantization_config``."""
        return name.replace(".block_sparse_moe.", ".mlp.")

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


class LowRankExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Parameters and computation of the experts of one block of vLLM.

    The matrices that the checkpoint holds of each expert keep their own ranks. Processes share the experts (expert
    parallelism) or every expert's inner features (tensor parallelism), as vLLM says.

    Args:
        config: The model's configuration.
        layer: The experts.

    Raises:
        ValueError: The experts have biases, or vLLM would move them between processes.
    """

    def __init__(self, config: LowRankQuantizationConfig, layer: RoutedExperts) -> None:
        super().__init__(layer.moe_config)
        moe = layer.moe_config
        known = moe.activation.without_mul() in _ACTIVATIONS and moe.swiglu_limit is None
        refused = {
            "have biases": moe.has_bias,
            f"are activated by {moe.activation.value}": not known,
            "would be moved between processes (enable_eplb)": moe.moe_parallel_config.enable_eplb,
        }
        if any(refused.values()):
            what = " and ".join(reason for reason, holds in refused.items() if holds)
            raise ValueError(
                f"{layer.layer_name}: compressed experts that {what} are not served: run the model in transformers, or "
                "merge its factors into dense weights (lowrank export PLAN --merge), which vLLM serves"
            )
        self.config = config
        gate, down, up = layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name
        # Where there is no gate, vLLM calls the first matrix so.
        self.names = {"w1": gate, "w2": down} if up is None else {"w1": gate, "w3": up, "w2": down}
        self.members: dict[tuple[int, str], Member] = {}

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give ``layer`` an empty parameter for each kind of tensor, which hands what is loaded to the right expert."""
        parallel = layer.moe_config.moe_parallel_config
        hidden, inner = (0, hidden_size), intermediate_size_per_partition
        span, whole = (parallel.tp_rank * inner, inner), parallel.tp_size * inner
        for number in range(layer.global_num_experts):
            for shard, called in self.names.items():
                name = f"{layer.layer_name}.{number}.{called}"
                entry = self.config.entry(name)
                self.members[number, shard] = (
                    Member(name, hidden_size, whole, entry, [hidden], span)
                    if shard == "w2"
                    else Member(name, whole, hidden_size, entry, [span], hidden)
                )
        self.kept = [
            self.config.entry(f"{layer.layer_name}.{number}") is None for number in range(layer.global_num_experts)
        ]
        # vLLM hands every process the tensors of all experts, which may be stored in other ways than its own.
        for group, shards in (("w13", ("w1", "w3")), ("w2", ("w2",))):
            of_group = [member for (_, shard), member in self.members.items() if shard in shards]
            for part in sorted({part for member in of_group for part in member.shapes}):
                parameter = nn.Parameter(torch.empty(0, dtype=_type_of(part, params_dtype)), requires_grad=False)
                parameter.weight_loader = partial(self._load, part, params_dtype)  # type: ignore[attr-defined]
                layer.register_parameter(f"{group}_{part}", parameter)
        # Another process's expert may hold the right factor of one of this process.
        owners = {member.owner for (number, _), member in self.members.items() if self._is_here(layer, number)}
        self.members = {
            (number, shard): member
            for (number, shard), member in self.members.items()
            if self.kept[number] and (self._is_here(layer, number) or self.config.stored_name(member.name) in owners)
        }
        self.config.members += self.members.values()

    @staticmethod
    def _is_here(layer: RoutedExperts, number: int) -> bool:
        """Tell whether this process computes an expert."""
        place: int = layer._map_global_expert_id_to_local_expert_id(number)
        return place >= 0

    def _load(
        self,
        part: str,
        dtype: torch.dtype,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Hand ``loaded_weight`` to the expert's matrix that vLLM calls ``shard_id``."""
        member = self.members.get((expert_id, shard_id))
        if member is not None:
            member.load(part, loaded_weight, dtype)
        return member is not None if return_success else None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Build what ``apply`` computes.

        Raises:
            ValueError: Tensors are missing or damaged.
        """
        parallel = layer.moe_config.moe_parallel_config
        self.config.report_unpivoted(parallel.tp_size, layer.params_dtype)
        kinds = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
        if "w3" not in self.names:
            kinds = {"w1": "up_proj", "w2": "down_proj"}
        here = [number for number, kept in enumerate(self.kept) if kept and self._is_here(layer, number)]
        device = next(layer.parameters()).device
        made: dict[str, nn.Linear] = {}
        # Those first whose right factors others read.
        for member in sorted(self.members.values(), key=lambda member: member.owner is not None):
            owner = made.get(member.owner or "")
            assert owner is None or isinstance(owner, LowRankLinear)
            made[self.config.stored_name(member.name)] = member.layer(device, owner)
        layers = {
            kind: [made[self.config.stored_name(self.members[number, shard].name)] for number in here]
            for shard, kind in kinds.items()
        }
        # All experts of a process may be dropped.
        activation = partial(_activated, _ACTIVATIONS[layer.activation.without_mul()])
        present = [number in here for number in range(layer.global_num_experts)]
        self.matrices = ExpertMatrices(layers, activation, present) if here else None
        self.mask = None if all(self.kept) else torch.tensor([*self.kept, False], device=device)
        for member in self.members.values():
            member.release()
        self.members.clear()
        for name, _ in list(layer.named_parameters(recurse=False)):
            delattr(layer, name)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        """Return None: no kernel of vLLM's computes these experts."""
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of the chosen experts' outputs, each times its weight; shared experts are computed elsewhere.

        Args:
            layer: The experts.
            x: ``[tokens, hidden]`` inputs.
            topk_weights: ``[tokens, chosen]`` weights of the chosen experts.
            topk_ids: ``[tokens, chosen]`` their numbers.
            shared_experts: Unused.
            shared_experts_input: Unused.
        """
        if self.matrices is None:
            return torch.zeros_like(x)
        chosen = topk_ids.long()
        if self.mask is not None:
            chosen, topk_weights = taken_over(chosen, topk_weights, self.mask)
        sources = torch.arange(chosen.numel(), device=x.device) // chosen.shape[-1]
        weights = topk_weights.to(x.dtype).reshape(-1, 1)
        if layer.apply_router_weight_on_input:
            x, sources = x[sources] * weights, torch.arange(chosen.numel(), device=x.device)
            weights = torch.ones_like(weights)
        way: Way = "grouped" if "grouped" in self.matrices.offers else "gathered"
        outputs = self.matrices.compute(way, x, chosen.flatten(), sources) * weights
        return outputs.view(*chosen.shape, -1).sum(dim=-2)


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


def _renamed(mapper: WeightsMapper, named: dict[str, Any]) -> dict[str, Any]:
    """Return ``named`` with the names that modules have in vLLM's model."""
    # Some rules are for the beginning of a parameter's name, which goes on with a dot.
    renamed = {
        name.removesuffix("."): value
        for name, value in mapper.apply_dict({f"{name}.": value for name, value in named.items()}).items()
    }
    for name, value in renamed.items():
        if isinstance(value, dict) and "right" in value:
            (owner,) = mapper.apply_dict({f"{value['right']}.": None})
            renamed[name] = {**value, "right": owner.removesuffix(".")}
    return renamed


_ACTIVATIONS: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU_NO_MUL: F.silu,
    MoEActivation.GELU_NO_MUL: F.gelu,
    MoEActivation.GELU_TANH_NO_MUL: partial(F.gelu, approximate="tanh"),
}
"""The activations of experts, without the product with the up projection."""


def _activated(activation: Callable[[Tensor], Tensor], gate: Tensor | None, up: Tensor) -> Tensor:
    return activation(up) if gate is None else activation(gate) * up


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
