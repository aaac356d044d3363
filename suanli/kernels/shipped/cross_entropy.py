"""Softmax cross-entropy over logits that lie in memory, forward and backward."""

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
    wide,
)
from suanli.kernels.launching import ceil_div, empty, launch, power_of_two
from suanli.kernels.shipped import _libraries


def _forward(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import cross_entropy as code

    logits, target = inputs["logits"], inputs["target"].contiguous()
    rows, classes = logits.shape
    loss = empty((rows,), torch.float32, logits.device)
    lse = empty((rows,), torch.float32, logits.device)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    launch(
        code.loss_forward,
        (rows,),
        *(logits, target, loss, lse, classes, logits.stride(0)),
        *(inputs["ignored"], inputs["smoothing"]),
        BLOCK=min(config["block"], power_of_two(classes)),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return loss, lse


def _reference(inputs: Inputs) -> Outputs:
    logits = inputs["logits"].to(wide(inputs["logits"].dtype))
    loss = functional.cross_entropy(
        logits,
        inputs["target"],
        reduction="none",
        ignore_index=inputs["ignored"],
        label_smoothing=inputs["smoothing"],
    )
    return loss, torch.logsumexp(logits, dim=1)


def _eager(inputs: Inputs) -> Outputs:
    return _reference(inputs)[:1]


def _backward(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import cross_entropy as code

    logits, target = inputs["logits"], inputs["target"].contiguous()
    rows, classes = logits.shape
    grad = empty((rows, classes), logits.dtype, logits.device)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    block = min(config["block"], power_of_two(classes))
    launch(
        code.loss_backward,
        (rows, ceil_div(classes, block)),
        *(logits, target, inputs["lse"], inputs["grad_loss"].contiguous(), grad),
        *(classes, logits.stride(0), inputs["ignored"], inputs["smoothing"]),
        BLOCK=block,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return (grad,)


def _backward_reference(inputs: Inputs) -> Outputs:
    upstream = inputs["grad_loss"].to(wide(inputs["logits"].dtype))
    return gradients(_reference, inputs, ("logits",), (upstream,))


def _backward_fallback(inputs: Inputs) -> Outputs:
    """The same by the formula that the kernel follows."""
    logits, target, smoothing = inputs["logits"], inputs["target"], inputs["smoothing"]
    counted = target != inputs["ignored"]
    wanted = torch.full_like(
        inputs["lse"][:, None].expand(logits.shape), smoothing / logits.shape[1]
    )
    wanted.scatter_add_(
        1,
        torch.where(counted, target, 0)[:, None],
        torch.full_like(inputs["lse"][:, None], 1 - smoothing),
    )
    scale = torch.where(counted, inputs["grad_loss"], 0.0)[:, None]
    grad = ((logits.to(wanted.dtype) - inputs["lse"][:, None]).exp() - wanted) * scale
    return (grad.to(logits.dtype),)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    make = Source(device, seed)
    rows, classes = sizes["rows"], sizes["classes"]
    target = make.integers(rows, low=0, high=classes, dtype=torch.int64)
    if rows > 2 and device != "meta":
        target[1] = -100
    return {
        "logits": make.normal(rows, classes, dtype=dtype, scale=3.0),
        "target": target,
        "ignored": -100,
        "smoothing": 0.1 if sizes["smoothed"] else 0.0,
    }


def _backward_inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    given = _inputs(sizes, dtype, device, seed)
    lse = torch.logsumexp(given["logits"].float(), dim=1)
    grad = Source(device, seed + 1).uniform(sizes["rows"], dtype=torch.float32)
    return {**given, "lse": lse, "grad_loss": grad}


def _sizes(inputs: Inputs) -> Sizes:
    rows, classes = inputs["logits"].shape
    return {"rows": rows, "classes": classes, "smoothed": int(inputs["smoothing"] > 0)}


def _work(sizes: Sizes, item: int) -> KernelWork:
    n, rows = sizes["rows"] * sizes["classes"], sizes["rows"]
    return KernelWork(flops=4 * n, bytes_read=n * item + 8 * rows, bytes_written=8 * rows)


def _backward_work(sizes: Sizes, item: int) -> KernelWork:
    n, rows = sizes["rows"] * sizes["classes"], sizes["rows"]
    return KernelWork(flops=4 * n, bytes_read=n * item + 16 * rows, bytes_written=n * item)


def _legal(config: Config, sizes: Sizes) -> bool:
    block, threads = config["block"], 32 * config["num_warps"]
    return threads <= block <= 64 * threads and block <= 2 * power_of_two(sizes["classes"])


def _default(sizes: Sizes) -> Config:
    block = max(128, min(4096, power_of_two(sizes["classes"])))
    return {"block": block, "num_warps": max(1, min(8, block // 512)), "num_stages": 2}


_CHECKED: tuple[Sizes, ...] = (
    {"rows": 1, "classes": 2, "smoothed": 0},
    {"rows": 5, "classes": 131, "smoothed": 0},
    {"rows": 4, "classes": 1000, "smoothed": 1},
    {"rows": 3, "classes": 5003, "smoothed": 0},
)
_TIMED: tuple[Sizes, ...] = (
    {"rows": 8192, "classes": 32000, "smoothed": 0},
    {"rows": 4096, "classes": 128256, "smoothed": 0},
    {"rows": 4096, "classes": 1000, "smoothed": 1},
)
_TUNABLES = {
    "block": (512, 1024, 2048, 4096, 8192),
    "num_warps": (2, 4, 8, 16),
    "num_stages": (1, 2, 3),
}
_FILES = (Path(__file__),)
FORWARD = Declaration(
    name="cross_entropy",
    title="softmax cross-entropy per row",
    inputs=_inputs,
    sizes=_sizes,
    run=_forward,
    reference=_reference,
    eager=_eager,
    libraries={"liger": _libraries.cross_entropy},
    work=_work,
    tunables=_TUNABLES,
    default=_default,
    legal=_legal,
    check_sizes=_CHECKED,
    bench_sizes=_TIMED,
    code=("cross_entropy",),
    files=_FILES,
    depth=lambda sizes: sizes["classes"],
)
BACKWARD = Declaration(
    name="cross_entropy_backward",
    title="gradient of softmax cross-entropy",
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
    code=("cross_entropy",),
    files=_FILES,
    depth=lambda sizes: sizes["classes"],
)
