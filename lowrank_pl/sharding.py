"""Learning over several processes with the base sharded (FSDP2): what is sharded, and who averages the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from lowrank_pl.targets import decoder_blocks

__all__ = ["average_gradients", "shard_frozen"]


def shard_frozen(model: PreTrainedModel, mesh: DeviceMesh, whole: Sequence[nn.Parameter]) -> None:
    """Shard the parameters of ``model`` over the processes of ``mesh``, block by block, in place.

    Args:
        model: With its masked layers in.
        mesh: The processes.
        whole: The parameters that learn; they stay as they are on every process.
    """
    ignored = set(whole)
    for block in decoder_blocks(model)[1]:
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)


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
