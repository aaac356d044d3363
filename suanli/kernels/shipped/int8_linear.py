"""Weights as int8 with one scale a row: quantising them, and linear layers that read them so.

For inference: half the bytes of fp16 weights, which is what a small batch is bound by. The product
itself is done in the activations' dtype.
"""

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
    wide,
)
from suanli.kernels.launching import ceil_div, empty, launch, power_of_two, precision


def _quantize(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import int8_linear as code

    weight = inputs["weight"].contiguous()
    rows, width = weight.shape
    out = empty((rows, width), torch.int8, weight.device)
    scale = empty((rows,), torch.float32, weight.device)
    launch(
        code.quantize,
        (rows,),
        *(weight, out, scale, width),
        BLOCK=min(config["block"], power_of_two(width)),
        num_warps=config["num_warps"],
        num_stages=1,
    )
    return out, scale


def _quantize_reference(inputs: Inputs) -> Outputs:
    """Halves are rounded up, as the kernel does."""
    weight = inputs["weight"].to(wide(inputs["weight"].dtype))
    scale = weight.abs().amax(1) / 127
    per_scale = torch.where(scale > 0, 1 / scale, 0.0)
    q = (weight * per_scale[:, None] + 0.5).floor().clamp(-127, 127)
    return q.to(torch.int8), scale


def _linear(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import int8_linear as code

    x, weight, bias = inputs["x"].contiguous(), inputs["weight"].contiguous(), inputs["bias"]
    (rows, inner), columns = x.shape, weight.shape[0]
    out = empty((rows, columns), x.dtype, x.device)
    blocks = ceil_div(rows, config["block_m"]) * ceil_div(columns, config["block_n"])
    launch(
        code.linear,
        (blocks,),
        *(x, weight, inputs["scale"], inputs["scale"] if bias is None else bias, out),
        *(rows, inner, columns),
        BIAS=bias is not None,
        BLOCK_M=config["block_m"],
        BLOCK_N=config["block_n"],
        BLOCK_K=config["block_k"],
        GROUP=8,
        PRECISION=precision(),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return (out,)


def _linear_reference(inputs: Inputs) -> Outputs:
    x, bias = inputs["x"], inputs["bias"]
    weight = inputs["weight"].to(wide(x.dtype)) * inputs["scale"][:, None]
    bias = None if bias is None else bias.to(x.dtype)
    return (functional.linear(x, weight.to(x.dtype), bias),)


def _quantize_inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    weight = Source(device, seed).normal(sizes["columns"], sizes["inner"], dtype=dtype)
    if device != "meta" and sizes["columns"] > 1:
        weight[0] = 0  # a row without values has no scale to divide by
    return {"weight": weight}


def _linear_inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    make, (inner, columns) = Source(device, seed), (sizes["inner"], sizes["columns"])
    return {
        "x": make.normal(sizes["rows"], inner, dtype=dtype),
        "weight": make.integers(columns, inner, low=-127, high=128, dtype=torch.int8),
        "scale": make.uniform(columns, dtype=torch.float32) * 0.01,
        "bias": make.normal(columns, dtype=dtype) if sizes["bias"] else None,
    }


def _linear_sizes(inputs: Inputs) -> Sizes:
    (rows, inner), columns = inputs["x"].shape, inputs["weight"].shape[0]
    return {
        **{"rows": rows, "inner": inner, "columns": columns},
        "bias": int(inputs["bias"] is not None),
    }


def _quantize_sizes(inputs: Inputs) -> Sizes:
    columns, inner = inputs["weight"].shape
    return {"columns": columns, "inner": inner}


def _quantize_work(sizes: Sizes, item: int) -> KernelWork:
    n = sizes["columns"] * sizes["inner"]
    written = n + 4 * sizes["columns"]
    return KernelWork(flops=4 * n, bytes_read=n * item, bytes_written=written)


def _linear_work(sizes: Sizes, item: int) -> KernelWork:
    rows, inner, columns = sizes["rows"], sizes["inner"], sizes["columns"]
    return KernelWork(
        flops=2 * rows * inner * columns,
        bytes_read=rows * inner * item + columns * inner + columns * (4 + item * sizes["bias"]),
        bytes_written=rows * columns * item,
        matmul=True,
    )


def _linear_traffic(config: Config, sizes: Sizes, item: int) -> int:
    """Every tile of the output reads its rows of x and its int8 rows of the weight."""
    products = sizes["rows"] * sizes["inner"] * sizes["columns"]
    # a block that reaches over the last row still reads the weight for it
    height = min(config["block_m"], sizes["rows"])
    return int(products * (item / config["block_n"] + 1 / height))


def _magnitude(inputs: Inputs) -> Outputs:
    weight = inputs["weight"].double().abs() * inputs["scale"][:, None].double()
    return (inputs["x"].double().abs() @ weight.t(),)


def _linear_legal(config: Config, sizes: Sizes) -> bool:
    return config["block_m"] * config["block_n"] <= 128 * 32 * config["num_warps"]


def _quantize_legal(config: Config, sizes: Sizes) -> bool:
    threads = 32 * config["num_warps"]
    return threads <= config["block"] <= 32 * threads


def _linear_default(sizes: Sizes) -> Config:
    rows = max(16, min(128, power_of_two(sizes["rows"])))
    return {
        **{"block_m": rows, "block_n": 64 if rows < 64 else 128, "block_k": 64},
        **{"num_warps": 4 if rows < 128 else 8, "num_stages": 3},
    }


def _linear_default_fp32(sizes: Sizes) -> Config:
    made = _linear_default(sizes)
    return {**made, "block_n": 64, "block_k": 32 if made["block_m"] < 64 else 16}


_FILES = (Path(__file__),)
QUANTIZE = Declaration(
    name="int8_quantize",
    title="weights to int8, one scale a row",
    inputs=_quantize_inputs,
    sizes=_quantize_sizes,
    run=_quantize,
    reference=_quantize_reference,
    work=_quantize_work,
    tunables={"block": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)},
    default=lambda sizes: {"block": 1024, "num_warps": 4},
    legal=_quantize_legal,
    check_sizes=({"columns": 1, "inner": 1}, {"columns": 7, "inner": 1500}),
    bench_sizes=({"columns": 14336, "inner": 4096},),
    code=("int8_linear",),
    files=_FILES,
)
LINEAR = Declaration(
    name="int8_linear",
    title="linear layer with int8 weights",
    inputs=_linear_inputs,
    sizes=_linear_sizes,
    run=_linear,
    reference=_linear_reference,
    work=_linear_work,
    tunables={
        "block_m": (16, 32, 64, 128),
        "block_n": (32, 64, 128, 256),
        "block_k": (16, 32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
    },
    default=_linear_default,
    default_fp32=_linear_default_fp32,
    legal=_linear_legal,
    check_sizes=(
        {"rows": 1, "inner": 64, "columns": 40, "bias": 1},
        {"rows": 19, "inner": 133, "columns": 77, "bias": 0},
    ),
    bench_sizes=(
        {"rows": 1, "inner": 4096, "columns": 14336, "bias": 0},
        {"rows": 16, "inner": 4096, "columns": 14336, "bias": 0},
    ),
    code=("int8_linear",),
    files=_FILES,
    depth=lambda sizes: sizes["inner"],
    magnitude=_magnitude,
    traffic=_linear_traffic,
)
