"""Kernels with planted faults, as a person's own file holds them: `check` has to see each one."""

import torch
import triton
import triton.language as tl

from suanli.kernels.declaration import (
    Config,
    Declaration,
    Inputs,
    KernelWork,
    Outputs,
    Sizes,
    Source,
)
from suanli.kernels.launching import ceil_div, empty_like, launch


@triton.jit
def _scale(x_ptr, y_ptr, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    y = x * x + 0.5
    if FAULT == "no mask":
        tl.store(y_ptr + at, y)
    elif FAULT == "tail":
        tl.store(y_ptr + at, y, mask=at < n - 1)
    elif FAULT == "shifted":
        tl.store(y_ptr + at, tl.load(x_ptr + at + 1, mask=at < n).to(tl.float32), mask=at < n)
    elif FAULT == "changes input":
        tl.store(y_ptr + at, y, mask=at < n)
        tl.store(x_ptr + at, y, mask=at < n)
    elif FAULT == "slightly wrong":
        tl.store(y_ptr + at, y * 1.001, mask=at < n)
    elif FAULT == "overflow":
        tl.store(
            y_ptr + at, (x.to(tl.float16) * 60000.0 * 2.0).to(tl.float32) / 120000.0, mask=at < n
        )
    elif FAULT == "syntax":
        tl.store(y_ptr + at, tl.no_such_function(y), mask=at < n)
    else:
        tl.store(y_ptr + at, y, mask=at < n)


def _kernel(fault: str) -> Declaration:
    def run(inputs: Inputs, config: Config) -> Outputs:
        x = inputs["x"]
        y = empty_like(x)
        grid = (ceil_div(x.numel(), config["block"]),)
        launch(_scale, grid, x, y, x.numel(), FAULT=fault, BLOCK=config["block"])
        return (y,)

    def inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        return {"x": Source(device, seed).normal(sizes["n"], dtype=dtype)}

    return Declaration(
        name=f"fault: {fault}",
        title="x * x + 0.5",
        inputs=inputs,
        sizes=lambda given: {"n": given["x"].numel()},
        run=run,
        reference=lambda given: (given["x"] * given["x"] + 0.5,),
        work=lambda sizes, item: KernelWork(
            flops=2 * sizes["n"], bytes_read=sizes["n"] * item, bytes_written=sizes["n"] * item
        ),
        tunables={"block": (32, 64)},
        default=lambda sizes: {"block": 64},
        check_sizes=({"n": 100},),
        bench_sizes=({"n": 4096},),
        code=(),
    )


right = _kernel("none")
no_mask = _kernel("no mask")
tail = _kernel("tail")
shifted = _kernel("shifted")
changes_input = _kernel("changes input")
slightly_wrong = _kernel("slightly wrong")
overflow = _kernel("overflow")
syntax = _kernel("syntax")
