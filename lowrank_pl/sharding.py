"""Learning with base and factors sharded over processes (FSDP2): who holds what, and who averages the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.factor_store import FactorStore
from lowrank_pl.layers import MaskedLinear, component_rows, masked_layers
from lowrank_pl.targets import decoder_blocks

__all__ = ["average_gradients", "own_rows", "shard_frozen"]


def shard_frozen(
    model: PreTrainedModel, store: FactorStore, whole: Sequence[nn.Parameter], device: torch.device
) -> None:
    """Shard the parameters of ``model`` over all processes, layer by layer, in place.

    Of the factors each process reads its own components from disk; nowhere are they whole in memory.

    Args:
        model: With masked layers in whose factors are on the meta device (``insert_masks`` with ``empty``).
        store: The factors.
        whole: The parameters that learn; they stay as they are on every process.
        device: Where this process computes.
    """
    # Lightning's own mesh would split them into data and tensor parallelism, and this model over a part of them only.
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    ignored = set(whole)
    names = {layer: name for name, layer in masked_layers(model).items()}
    for block in tqdm(decoder_blocks(model)[1], desc="shard", unit="block", disable=mesh.get_rank() > 0):
        # Each layer by itself: what a step gathers at a time, and once more ahead, then is a layer and not a block.
        for layer in [layer for layer in block.modules() if isinstance(layer, MaskedLinear)]:
            fully_shard(layer, mesh=mesh, ignored_params=ignored)
            _read_share(layer, store, names[layer], device)
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)


def _read_share(layer: MaskedLinear, store: FactorStore, name: str, device: torch.device) -> None:
    """Give ``layer`` those components of module ``name`` that this process holds, rows of both of its factors."""
    empty = {key: cast(DTensor, layer.get_parameter(key)) for key in ("left_rows", "right")}
    mesh = empty["right"].device_mesh
    mine = own_rows(len(layer.right), mesh.get_local_rank(), mesh.size())
    rows = component_rows(store.factors(name, mine), torch.empty(0, dtype=layer.right.dtype, device=device))
    state = {
        key: DTensor.from_local(
            local, mesh, part.placements, run_check=False, shape=part.shape, stride=part.stride()
        )
        for (key, part), local in zip(empty.items(), rows, strict=True)
    }  # fmt: skip
    layer.load_state_dict(state, strict=False, assign=True)


def own_rows(count: int, rank: int, world: int) -> slice:
    """Return which of ``count`` rows process ``rank`` of ``world`` holds, as FSDP2 shards them (``torch.chunk``).

    >>> [own_rows(5, rank, 4) for rank in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    size = -(-count // world)
    return slice(min(count, rank * size), min(count, (rank + 1) * size))


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients of ``parameters`` by their mean over all processes.

    Without a gradient on this process, a parameter counts as 0, so that all processes send the same amount.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    # gloo has no average: sum and divide, in one message for all masks.
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
