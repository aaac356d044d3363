"""Matrix products of each dtype as torch offers them on a GPU."""

from collections.abc import Callable

import torch

# dtype -> the compute capability from which the card has a unit for it (CUDA programming guide).
DTYPES: dict[str, tuple[int, int]] = {
    "fp32": (0, 0),
    "tf32": (8, 0),
    "bf16": (8, 0),
    "fp16": (5, 3),
    "int8": (7, 5),
    "fp8": (8, 9),
}
_TORCH = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def product(
    dtype: str, side: int, torch_device: str, capability: tuple[int, int]
) -> Callable[[], object] | None:
    """A square product of random values, ready to be called; None where the card has no unit.

    Random values, because zeros draw less power and let the card clock higher than any model does.

    Args:
        dtype: A key of `DTYPES`.
        side: Rows, columns and inner size.
        torch_device: Where the matrices live.
        capability: The card's compute capability.

    Raises:
        RuntimeError: Out of memory, or torch has no such product.
    """
    if capability < DTYPES[dtype]:
        return None
    if dtype == "int8":
        left = torch.randint(-127, 127, (side, side), dtype=torch.int8, device=torch_device)
        right = torch.randint(-127, 127, (side, side), dtype=torch.int8, device=torch_device)
        # The right side column by column: the only order that the int8 units take everywhere.
        columns = right.t()
        return lambda: torch._int_mm(left, columns)
    if dtype == "fp8":
        return _fp8(side, torch_device)
    a = torch.rand(side, side, device=torch_device).sub_(0.5).to(_TORCH[dtype])
    b = torch.rand(side, side, device=torch_device).sub_(0.5).to(_TORCH[dtype])
    out = torch.empty_like(a)
    if dtype in ("fp32", "tf32"):
        return lambda: _with_tf32(dtype == "tf32", a, b, out)
    return lambda: torch.mm(a, b, out=out)


def _fp8(side: int, torch_device: str) -> Callable[[], object]:
    a = torch.rand(side, side, device=torch_device).sub_(0.5).to(torch.float8_e4m3fn)
    b = torch.rand(side, side, device=torch_device).sub_(0.5).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=torch_device)
    return lambda: torch._scaled_mm(
        a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _with_tf32(allowed: bool, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """One product with tf32 as asked; the setting of the process is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        torch.mm(a, b, out=out)
    finally:
        torch.set_float32_matmul_precision(before)
