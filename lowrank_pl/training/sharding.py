"""Learning with base and factors sharded over processes (FSDP2), and with gradients averaged by our own code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.masks.masked_linear import MaskedLinear, component_rows
from lowrank_pl.models.hf_experts import split_modules
from lowrank_pl.models.lazy import Skeleton
from lowrank_pl.models.targets import decoder_blocks

__all__ = ["average_gradients", "own_rows", "shard_frozen"]


def shard_frozen(
    model: PreTrainedModel,
    store: FactorStore,
    whole: Sequence[nn.Parameter],
    device: torch.device,
    skeleton: Skeleton | None = None,
) -> None:
    """Shard the parameters of ``model`` over all processes, layer by layer, in place.

    Each process reads only its own components of the factors from disk, and with a skeleton only its own rows of the
    weights. No process holds all of them in memory.

    Args:
        model: Model with masked layers whose factors are on the meta device (``insert_masks`` with ``empty``).
        store: The factors.
        whole: The trained parameters; every process keeps all of them.
        device: Device of this process.
        skeleton: Reads the weights if all of them are on the meta device.
    """
    # Lightning's mesh has a data and a tensor dimension, and FSDP2 would shard over one of them only.
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    ignored = set(whole)
    reader = _RowReader(model, store, device, skeleton)
    for block in tqdm(decoder_blocks(model)[1], desc="shard", unit="block", disable=mesh.get_rank() > 0):
        # Layers are sharded separately, so a pass gathers one layer and prefetches one, and not whole blocks.
        for part in _parts(block):
            fully_shard(part, mesh=mesh, ignored_params=ignored)
            reader.read(part)
        fully_shard(block, mesh=mesh, ignored_params=ignored)
        reader.read(block)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    reader.read(model)


def _parts(block: nn.Module) -> list[nn.Module]:
    """Return the parts of a block that are gathered one at a time: masked layers, and the experts of a mixture at once.

    All processes have to gather in the same order, but each calls only the experts that its tokens are routed to.
    """
    experts: list[nn.Module] = [module for _, module in split_modules(block)]
    inside = {layer for module in experts for layer in module.modules()}
    return [*experts, *(one for one in block.modules() if isinstance(one, MaskedLinear) and one not in inside)]


class _RowReader:
    """Reads this process's rows of parameters that were sharded on the meta device; arguments of ``shard_frozen``."""

    def __init__(self, model: nn.Module, store: FactorStore, device: torch.device, skeleton: Skeleton | None) -> None:
        self.store, self.device, self.skeleton = store, device, skeleton
        self._names = {module: name for name, module in model.named_modules()}
        # By the parameter on the meta device, because a tied parameter belongs to several modules.
        self._read: dict[nn.Parameter, nn.Parameter] = {}

    def read(self, root: nn.Module) -> None:
        """Load this process's rows of the parameters of ``root`` that are sharded on the meta device."""
        for module in root.modules():
            parameters = module.named_parameters(recurse=False)
            empty = {key: one for key, one in parameters if isinstance(one, DTensor) and one.is_meta}
            if empty:
                self._read |= self._rows(module, {key: one for key, one in empty.items() if one not in self._read})
                # FSDP2 hooks into load_state_dict and pads the rows.
                module.load_state_dict(
                    {key: self._read[one] for key, one in empty.items()}, strict=False, assign=True
                )  # fmt: skip

    def _rows(self, module: nn.Module, empty: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
        """Return, for each parameter of ``module`` in ``empty``, a parameter with the rows of this process."""
        found = self._factors(module) if "right" in empty and isinstance(module, MaskedLinear) else {}
        found |= self._weights(module, empty.keys() - found.keys())
        filled: dict[nn.Parameter, nn.Parameter] = {}
        for key, one in empty.items():
            like = cast(DTensor, one)
            share = DTensor.from_local(
                found[key], like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )  # fmt: skip
            filled[one] = nn.Parameter(share, requires_grad=False)
        return filled

    def _factors(self, layer: MaskedLinear) -> dict[str, Tensor]:
        """Return this process's components of ``layer``: rows of both of its factors."""
        factors = self.store.factors(self._names[layer], _rows_here(layer.right))
        rows = component_rows(factors, torch.empty(0, dtype=layer.right.dtype, device=self.device))
        return dict(zip(("left_rows", "right"), rows, strict=True))

    def _weights(self, module: nn.Module, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return this process's rows of the parameters ``keys`` of ``module``."""
        found = {}
        for key in keys:
            assert self.skeleton is not None, "a parameter on the meta device needs a skeleton to be read from"
            transposed = key == "weight" and isinstance(module, MaskedLinear) and module.was_conv1d
            rows = _rows_here(module.get_parameter(key))
            found[key] = self.skeleton.rows(f"{self._names[module]}.{key}", rows, transposed=transposed)
        return found


def _rows_here(parameter: Tensor) -> slice:
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    return own_rows(len(parameter), mesh.get_local_rank(), mesh.size())


def own_rows(count: int, rank: int, world: int) -> slice:
    """Return the rows of ``count`` that process ``rank`` of ``world`` holds, as FSDP2 shards them (``torch.chunk``).

    >>> [own_rows(5, rank, 4) for rank in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    size = -(-count // world)
    return slice(min(count, rank * size), min(count, (rank + 1) * size))


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients of ``parameters`` by their mean over all processes.

    A missing gradient counts as 0, so that all processes send tensors of the same size.

    Each gradient is added up in the order of the processes. ``all_reduce`` adds in an order that depends on where a
    gradient lies in the message, and DDP divides before it adds. From three processes on, DDP and FSDP2 would then
    learn masks that differ in their last bits.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # One message for all masks saves latency.
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    of_all = [torch.empty_like(flat) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(of_all, flat)
    mean = sum(part.double() for part in of_all) / len(of_all)
    assert isinstance(mean, Tensor)
    for gradient, part in zip(gradients, torch.split(mean, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
