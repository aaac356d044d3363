"""Gated activations act(a) * b (SwiGLU, GEGLU), forward and backward."""

from pathlib import Path

import torch
from torch.nn import functional

from suanli.kernels.declaration import (
    Config,
    Declaration,
    Inputs,
    KernelWork,
    Outputs,
    Sizes,
    Source,
    gradients,
)
from suanli.kernels.launching import ceil_div, empty, launch, power_of_two
from suanli.kernels.shipped import _libraries

KINDS = ("silu", "gelu", "gelu_tanh")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """As [rows, width] with neighbouring columns side by side; parts of wider rows stay views."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _forward(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import gate as code

    a, b = _rows(inputs["a"]), _rows(inputs["b"])
    out = empty(inputs["a"].shape, a.dtype, a.device)
    block = min(config["block"], power_of_two(a.shape[1]))
    launch(
        code.forward,
        (a.shape[0], ceil_div(a.shape[1], block)),
        *(a, b, out, a.shape[1], a.stride(0), b.stride(0)),
        KIND=inputs["kind"],
        BLOCK=block,
        num_warps=config["num_warps"],
        num_stages=1,
    )
    return (out,)


def _reference(inputs: Inputs) -> Outputs:
    a, b, kind = inputs["a"], inputs["b"], inputs["kind"]
    if kind == "silu":
        return (functional.silu(a) * b,)
    return (functional.gelu(a, approximate="tanh" if kind == "gelu_tanh" else "none") * b,)


def _backward(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import gate as code

    a, b, grad = _rows(inputs["a"]), _rows(inputs["b"]), inputs["grad"].contiguous()
    grad_a = empty(inputs["a"].shape, a.dtype, a.device)
    grad_b = empty(inputs["a"].shape, a.dtype, a.device)
    block = min(config["block"], power_of_two(a.shape[1]))
    launch(
        code.backward,
        (a.shape[0], ceil_div(a.shape[1], block)),
        *(a, b, grad, grad_a, grad_b, a.shape[1], a.stride(0), b.stride(0)),
        KIND=inputs["kind"],
        BLOCK=block,
        num_warps=config["num_warps"],
        num_stages=1,
    )
    return grad_a, grad_b


def _backward_reference(inputs: Inputs) -> Outputs:
    return gradients(_reference, inputs, ("a", "b"), (inputs["grad"],))


def _backward_fallback(inputs: Inputs) -> Outputs:
    """The same by PyTorch's own backward functions."""
    a, kind, weighed = inputs["a"], inputs["kind"], inputs["grad"] * inputs["b"]
    if kind == "silu":
        return torch.ops.aten.silu_backward(weighed, a), inputs["grad"] * functional.silu(a)
    how = "tanh" if kind == "gelu_tanh" else "none"
    on_a = torch.ops.aten.gelu_backward(weighed, a, approximate=how)
    return on_a, inputs["grad"] * functional.gelu(a, approximate=how)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    make, (rows, width) = Source(device, seed), (sizes["rows"], sizes["width"])
    packed = make.normal(rows, 2 * width, dtype=dtype, scale=2.0)
    return {"a": packed[:, :width], "b": packed[:, width:], "kind": KINDS[sizes["kind"]]}


def _backward_inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    grad = Source(device, seed + 1).normal(sizes["rows"], sizes["width"], dtype=dtype)
    return {**_inputs(sizes, dtype, device, seed), "grad": grad}


def _sizes(inputs: Inputs) -> Sizes:
    width = inputs["a"].shape[-1]
    rows = inputs["a"].numel() // width if width else 0
    return {"rows": rows, "width": width, "kind": KINDS.index(inputs["kind"])}


def _work(sizes: Sizes, item: int) -> KernelWork:
    n = sizes["rows"] * sizes["width"]
    return KernelWork(flops=6 * n, bytes_read=2 * n * item, bytes_written=n * item)


def _backward_work(sizes: Sizes, item: int) -> KernelWork:
    n = sizes["rows"] * sizes["width"]
    return KernelWork(flops=14 * n, bytes_read=3 * n * item, bytes_written=2 * n * item)


def _legal(config: Config, sizes: Sizes) -> bool:
    threads = 32 * config["num_warps"]
    return threads <= config["block"] <= 32 * threads


def _default(sizes: Sizes) -> Config:
    block = max(128, min(2048, power_of_two(sizes["width"])))
    return {"block": block, "num_warps": max(1, min(8, block // 256))}


_CHECKED: tuple[Sizes, ...] = (
    {"rows": 1, "width": 1, "kind": 0},
    {"rows": 3, "width": 1000, "kind": 0},
    {"rows": 5, "width": 77, "kind": 1},
    {"rows": 2, "width": 2049, "kind": 2},
)
_TIMED: tuple[Sizes, ...] = (
    {"rows": 8192, "width": 14336, "kind": 0},
    {"rows": 8192, "width": 4096, "kind": 2},
)
_TUNABLES = {"block": (256, 512, 1024, 2048, 4096, 8192), "num_warps": (1, 2, 4, 8, 16)}
_FILES = (Path(__file__),)
FORWARD = Declaration(
    name="gate",
    title="gated activation (SwiGLU, GEGLU)",
    inputs=_inputs,
    sizes=_sizes,
    run=_forward,
    reference=_reference,
    libraries={"liger": _libraries.gate},
    work=_work,
    tunables=_TUNABLES,
    default=_default,
    legal=_legal,
    check_sizes=_CHECKED,
    bench_sizes=_TIMED,
    code=("gate",),
    files=_FILES,
)
BACKWARD = Declaration(
    name="gate_backward",
    title="gradients of a gated activation",
    inputs=_backward_inputs,
    sizes=_sizes,
    run=_backward,
    reference=_backward_reference,
    fallback=_backward_fallback,
    work=_backward_work,
    tunables=_TUNABLES,
    default=_default,
    legal=_legal,
    check_sizes=_CHECKED,
    bench_sizes=_TIMED,
    code=("gate",),
    files=_FILES,
)
