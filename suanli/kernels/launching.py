"""How host code starts Triton functions and takes memory, so that both can be watched.

Host code calls `launch` and `empty` and nothing else. On a GPU they do just that. Under `recording`
launches are noted instead of made, which tells what has to be compiled without a GPU; under
`allocating` memory comes from a checker that poisons it and guards its borders.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device], torch.Tensor]

INSTALL = "pip install triton  # Linux x86-64; torch for CUDA brings it"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch as it was asked for.

    Attributes:
        function: The Triton function.
        grid: Programs along each axis.
        arguments: Run-time arguments in the function's order: tensors, numbers or None.
        constants: Compile-time values by name.
        num_warps: Warps per program.
        num_stages: Stages of the software pipeline.
    """

    function: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int


_recorded: ContextVar[list[Launch] | None] = ContextVar("suanli_launches", default=None)
_allocator: ContextVar[Allocate | None] = ContextVar("suanli_allocator", default=None)


def launch(
    function: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Start a Triton function on the device of its tensors, or note it under `recording`.

    Args:
        function: What `triton.jit` made.
        grid: Programs along each axis; nothing is started where one is 0.
        *arguments: Run-time arguments in the function's order.
        num_warps: Warps per program.
        num_stages: Stages of the software pipeline.
        **constants: Compile-time values.
    """
    if math.prod(grid) == 0:
        return
    noted = _recorded.get()
    if noted is not None:
        noted.append(
            Launch(
                function=function,
                grid=grid,
                arguments=arguments,
                constants=constants,
                num_warps=num_warps,
                num_stages=num_stages,
            )
        )
        return
    # Triton starts work on the current GPU, which need not be the one that holds the tensors.
    with _current(arguments):
        function[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)


def _current(arguments: tuple[Any, ...]) -> AbstractContextManager[object]:
    device = next(value.device for value in arguments if isinstance(value, torch.Tensor))
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | int
) -> torch.Tensor:
    """Memory that a kernel is going to write: contiguous, not initialised."""
    allocate = _allocator.get()
    if allocate is not None:
        return allocate(tuple(shape), dtype, torch.device(device))
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def empty_like(tensor: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The same for the shape of another tensor; always contiguous."""
    return empty(tensor.shape, dtype or tensor.dtype, tensor.device)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note launches instead of making them."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


@contextmanager
def allocating(allocate: Allocate) -> Iterator[None]:
    """Take the memory that kernels write from `allocate`."""
    token = _allocator.set(allocate)
    try:
        yield
    finally:
        _allocator.reset(token)


def ceil_div(a: int, b: int) -> int:
    """How many blocks of `b` cover `a`."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least `n` (1 for 0)."""
    return 1 << max(0, n - 1).bit_length()


def precision() -> str:
    """How Triton is to multiply fp32 matrices: as torch is told to."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
