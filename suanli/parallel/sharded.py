"""Sharded replicas: each process keeps its share of parameters, gradients and optimiser state.

torch's FSDP2 does it (`fully_shard`): a block's parameters are gathered just before they are used,
and its gradients are summed into the shares. Buffers, such as a batch norm's statistics, stay with
each process.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from suanli.base.errors import BadInputError
from suanli.parallel.replicas import Replicas


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of the model's module lists, or of its sequences, that have parameters.

    A block that lies in another one comes after it.
    """
    lists: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        lists = [m for m in model.children() if isinstance(m, nn.Sequential)]
    found = [b for m in lists for b in m.children() if any(True for _ in b.parameters())]
    return list(dict.fromkeys(found))


def shard(model: nn.Module, replicas: Replicas) -> None:
    """Leave each process its share of the model's parameters, in place.

    Args:
        model: On its device, with contiguous parameters, the same in all processes.
        replicas: More than one process.

    Raises:
        BadInputError: A parameter has no dimension along which it could be shared.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise BadInputError(f"{name} is a single number and cannot be shared by processes")
    mesh = init_device_mesh(replicas.device.partition(":")[0], (replicas.world,))
    for block in reversed(blocks_of(model)):  # what is inside of a block before the block
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state of a sharded model on the CPU; all processes call it together."""
    found = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        found[name] = whole.detach().cpu().clone()
    return found
