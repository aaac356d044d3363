"""Cross-entropy of a linear layer whose logits never reach memory, forward and backward.

Backward computes the logits again, a slice of the classes at a time, and holds the gradient of one
slice only; `slice_bytes` bounds it. That is 8 N V D operations in all instead of 6 N V D, and
instead of 2 to 4 N V elements of memory.
"""

import math
from collections.abc import Callable
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
from suanli.kernels.launching import ceil_div, empty, launch, precision
from suanli.kernels.shipped import _libraries

SLICE_BYTES = 256 * 2**20


def _forward(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import linear_cross_entropy as code

    x, weight = inputs["x"].contiguous(), inputs["weight"].contiguous()
    target = inputs["target"].contiguous()
    (rows, width), classes = x.shape, weight.shape[0]
    tiles = ceil_div(classes, config["block_v"])
    per_split = ceil_div(tiles, min(config["splits"], tiles))
    splits = ceil_div(tiles, per_split)
    lse = empty((splits, rows), torch.float32, x.device)
    hit = empty((splits, rows), torch.float32, x.device)
    launch(
        code.forward,
        (ceil_div(rows, config["block_r"]), splits),
        *(x, weight, target, lse, hit, rows, classes, width, per_split),
        BLOCK_R=config["block_r"],
        BLOCK_V=config["block_v"],
        BLOCK_D=config["block_d"],
        PRECISION=precision(),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    total = torch.logsumexp(lse, dim=0)
    # a target that is no class has no logit, and gives NaN
    known = (target >= 0) & (target < classes)
    loss = torch.where(known, total - hit.sum(0), torch.nan)
    loss = torch.where(target != inputs["ignored"], loss, 0.0)
    return loss, total


def _reference(inputs: Inputs) -> Outputs:
    logits = functional.linear(inputs["x"], inputs["weight"]).to(wide(inputs["x"].dtype))
    loss = functional.cross_entropy(
        logits, inputs["target"], reduction="none", ignore_index=inputs["ignored"]
    )
    return loss, torch.logsumexp(logits, dim=1)


def _eager(inputs: Inputs) -> Outputs:
    return _reference(inputs)[:1]


def _slice(rows: int, classes: int, item: int, block: int) -> int:
    """Classes per slice: as many as `SLICE_BYTES` hold, a multiple of the block."""
    fitting = max(block, SLICE_BYTES // max(1, rows * item) // block * block)
    return min(fitting, ceil_div(classes, block) * block)


def _backward(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import linear_cross_entropy as code

    x, weight = inputs["x"].contiguous(), inputs["weight"].contiguous()
    (rows, width), classes = x.shape, weight.shape[0]
    grad_loss = torch.where(inputs["target"] != inputs["ignored"], inputs["grad_loss"], 0.0).float()
    # Gradients per row are often 1 / rows: brought to 1, so that fp16 does not lose them.
    largest = grad_loss.abs().amax().clamp_min(1e-30)
    scale = grad_loss / largest
    step = _slice(rows, classes, x.element_size(), config["block_v"])
    step = inputs.get("slice", step)
    grad_x = torch.zeros((rows, width), dtype=torch.float32, device=x.device)
    grad_weight = empty((classes, width), weight.dtype, weight.device)
    for first in range(0, classes, step):
        part = weight[first : first + step]
        held = empty((rows, part.shape[0]), x.dtype, x.device)
        launch(
            code.logit_gradient,
            (ceil_div(rows, config["block_r"]), ceil_div(part.shape[0], config["block_v"])),
            *(x, part, inputs["target"].contiguous(), inputs["lse"], scale, held),
            *(rows, first, part.shape[0], width),
            BLOCK_R=config["block_r"],
            BLOCK_V=config["block_v"],
            BLOCK_D=config["block_d"],
            PRECISION=precision(),
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
        grad_x += held @ part
        grad_weight[first : first + step] = (held.t() @ x).float() * largest
    return (grad_x * largest).to(x.dtype), grad_weight


def _backward_reference(inputs: Inputs) -> Outputs:
    upstream = inputs["grad_loss"].to(wide(inputs["x"].dtype))
    return gradients(_reference, inputs, ("x", "weight"), (upstream,))


def _backward_fallback(inputs: Inputs) -> Outputs:
    """The same by the formula that the kernel follows."""
    x, weight, target = inputs["x"], inputs["weight"], inputs["target"]
    counted = target != inputs["ignored"]
    logits = functional.linear(x, weight).to(wide(x.dtype))
    held = (logits - inputs["lse"][:, None]).exp()
    known = torch.where(counted, target, 0)[:, None]
    held.scatter_add_(1, known, -torch.ones_like(held[:, :1]))
    held = held * torch.where(counted, inputs["grad_loss"], 0.0)[:, None]
    grad_x, grad_weight = held @ weight.to(held.dtype), held.t() @ x.to(held.dtype)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    make = Source(device, seed)
    rows, width, classes = sizes["rows"], sizes["width"], sizes["classes"]
    target = make.integers(rows, low=0, high=classes, dtype=torch.int64)
    if rows > 2 and device != "meta":
        target[1] = -100
    return {
        "x": make.normal(rows, width, dtype=dtype),
        "weight": make.normal(classes, width, dtype=dtype, scale=2.0 / width**0.5),
        "target": target,
        "ignored": -100,
    }


def _backward_inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    given = _inputs(sizes, dtype, device, seed)
    grad = Source(device, seed + 1).uniform(sizes["rows"], dtype=torch.float32) / sizes["rows"]
    if sizes["rows"] * sizes["classes"] > 2**24 and device != "meta":
        lse = _forward(given, _default(sizes))[1]
    else:
        lse = torch.logsumexp((given["x"].float() @ given["weight"].float().t()), dim=1)
    made = {**given, "lse": lse, "grad_loss": grad}
    if sizes["classes"] < 2**12:  # several slices in the small checks, too
        made["slice"] = 128
    return made


def _sizes(inputs: Inputs) -> Sizes:
    (rows, width), classes = inputs["x"].shape, inputs["weight"].shape[0]
    return {"rows": rows, "width": width, "classes": classes}


def _work(sizes: Sizes, item: int) -> KernelWork:
    rows, width, classes = sizes["rows"], sizes["width"], sizes["classes"]
    return KernelWork(
        flops=2 * rows * width * classes,
        bytes_read=item * width * (rows + classes) + 8 * rows,
        bytes_written=8 * rows,
        matmul=True,
    )


def _backward_work(sizes: Sizes, item: int) -> KernelWork:
    rows, width, classes = sizes["rows"], sizes["width"], sizes["classes"]
    moved = item * width * (rows + classes)
    return KernelWork(
        flops=6 * rows * width * classes,
        bytes_read=moved + 16 * rows,
        bytes_written=moved,
        matmul=True,
    )


def _legal(config: Config, sizes: Sizes) -> bool:
    # fp32 accumulators: at most 128 registers a thread
    return config["block_r"] * config["block_v"] <= 128 * 32 * config["num_warps"]


def _tile_traffic(products: int) -> Callable[[Config, Sizes, int], int]:
    """Every tile of the logits reads its rows of x and of the weight."""

    def traffic(config: Config, sizes: Sizes, item: int) -> int:
        per_logit = 1 / config["block_r"] + 1 / config["block_v"]
        return int(products * item * math.prod(sizes.values()) * per_logit)

    return traffic


def _backward_magnitude(inputs: Inputs) -> Outputs:
    """|held| |weight| and |held|.T |x|, the sizes of what is summed, with |held| <= 1 * grad."""
    logits = functional.linear(inputs["x"], inputs["weight"])
    counted = (inputs["target"] != inputs["ignored"]).to(logits.dtype)
    probability = torch.softmax(logits, dim=1)
    wanted = torch.zeros_like(probability)
    wanted.scatter_(1, inputs["target"].clamp_min(0)[:, None], 1.0)
    held = (probability + wanted) * (inputs["grad_loss"] * counted).to(logits.dtype)[:, None]
    return held @ inputs["weight"].abs(), held.t() @ inputs["x"].abs()


def _default(sizes: Sizes) -> Config:
    return {
        **{"block_r": 128, "block_v": 128, "block_d": 32, "splits": 8},
        **{"num_warps": 8, "num_stages": 3},
    }


def _default_fp32(sizes: Sizes) -> Config:
    return {**_default(sizes), "block_v": 64, "block_d": 16}


_CHECKED: tuple[Sizes, ...] = (
    {"rows": 3, "width": 20, "classes": 7},
    {"rows": 130, "width": 33, "classes": 300},
    {"rows": 17, "width": 64, "classes": 513},
)
_TIMED: tuple[Sizes, ...] = (
    {"rows": 8192, "width": 4096, "classes": 128256},
    {"rows": 8192, "width": 768, "classes": 50257},
)
_TUNABLES = {
    "block_r": (64, 128, 256),
    "block_v": (64, 128, 256),
    "block_d": (16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
_FILES = (Path(__file__),)
FORWARD = Declaration(
    name="linear_cross_entropy",
    title="linear layer and cross-entropy, no logits in memory",
    inputs=_inputs,
    sizes=_sizes,
    run=_forward,
    reference=_reference,
    eager=_eager,
    libraries={"liger": _libraries.linear_cross_entropy},
    work=_work,
    tunables={**_TUNABLES, "splits": (1, 4, 8, 16)},
    default=_default,
    default_fp32=_default_fp32,
    legal=_legal,
    check_sizes=_CHECKED,
    bench_sizes=_TIMED,
    code=("linear_cross_entropy",),
    files=_FILES,
    depth=lambda sizes: sizes["width"] + sizes["classes"],
    traffic=_tile_traffic(1),
)
BACKWARD = Declaration(
    name="linear_cross_entropy_backward",
    title="gradients of linear layer and cross-entropy",
    inputs=_backward_inputs,
    sizes=_sizes,
    run=_backward,
    reference=_backward_reference,
    fallback=_backward_fallback,
    work=_backward_work,
    tunables=_TUNABLES,
    default=lambda sizes: {k: v for k, v in _default(sizes).items() if k != "splits"},
    legal=_legal,
    check_sizes=_CHECKED,
    bench_sizes=_TIMED,
    code=("linear_cross_entropy",),
    files=_FILES,
    depth=lambda sizes: sizes["width"] + sizes["classes"],
    magnitude=_backward_magnitude,
    roundings=2,
    traffic=_tile_traffic(3),
)
