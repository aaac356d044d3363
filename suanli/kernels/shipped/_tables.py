"""Tables that let one launch work on many tensors: addresses, sizes and chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from suanli.kernels.launching import ceil_div


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """How tensors are cut into chunks, on the device.

    Attributes:
        tensor: int32, the tensor of each chunk.
        start: int64, the first element of each chunk.
        sizes: int64, elements of each tensor.
        count: Number of chunks.
    """

    tensor: torch.Tensor
    start: torch.Tensor
    sizes: torch.Tensor
    count: int


def chunks(tensors: Sequence[torch.Tensor], block: int) -> Chunks:
    """Cut tensors into chunks of `block` elements; kept for tensors of the same sizes."""
    return _chunks(tuple(t.numel() for t in tensors), block, str(tensors[0].device))


@lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], block: int, device: str) -> Chunks:
    tensor: list[int] = []
    start: list[int] = []
    for index, size in enumerate(sizes):
        tensor += [index] * ceil_div(size, block)
        start += range(0, size, block)
    return Chunks(
        tensor=torch.tensor(tensor, dtype=torch.int32, device=device),
        start=torch.tensor(start, dtype=torch.int64, device=device),
        sizes=torch.tensor(sizes, dtype=torch.int64, device=device),
        count=len(tensor),
    )


def addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where tensors start, as int64 on their device.

    A kept table would outlive its tensors, and gradients often move: it is written for each call,
    from pinned memory where there is a GPU, so that nothing waits.
    """
    device = tensors[0].device
    if device.type == "meta":
        return torch.empty(len(tensors), dtype=torch.int64, device=device)
    table = torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table
