"""Batch normalisation, activation and max-pool in one, for training, forward and backward.

Works on channels-last memory, which tensor cores want of convolutions anyway; another layout is
converted first.
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
    gradients,
    wide,
)
from suanli.kernels.launching import ceil_div, empty, launch, power_of_two

ACTIVATIONS = ("none", "relu", "silu")
# (size, stride, padding); size 0 is no pool
Pool = tuple[int, int, int]
_EPS = 1e-5


def channels_last(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Memory for [N, C, H, W] that lies as [N, H, W, C]."""
    n, c, h, w = shape
    return empty((n, h, w, c), dtype, like.device).permute(0, 3, 1, 2)


def pooled(x: torch.Tensor, pool: Pool) -> tuple[int, int]:
    """Height and width behind the pool."""
    size, stride, padding = pool
    if size == 0:
        return x.shape[2], x.shape[3]
    return tuple((side + 2 * padding - size) // stride + 1 for side in x.shape[2:])  # type: ignore[return-value]


def _blocks(config: Config, channels: int) -> dict[str, int]:
    return {
        "BLOCK_R": config["block_r"],
        "BLOCK_C": min(config["block_c"], max(16, power_of_two(channels))),
    }


def _warps(config: Config) -> dict[str, int]:
    return {"num_warps": config["num_warps"], "num_stages": 1}


def _rows_per_program(n_rows: int, config: Config) -> int:
    """Whole tiles, so that about `programs` programs share the rows."""
    block = config["block_r"]
    return ceil_div(ceil_div(n_rows, config["programs"]), block) * block


def _moments(x: torch.Tensor, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance per channel of channels-last memory, in fp32."""
    from suanli.kernels.triton_code import batch_norm as code

    channels = x.shape[1]
    n_rows = x.numel() // channels
    blocks = _blocks(config, channels)
    per_program = _rows_per_program(n_rows, config)
    programs = ceil_div(n_rows, per_program)
    means = empty((programs, channels), torch.float32, x.device)
    squares = empty((programs, channels), torch.float32, x.device)
    launch(
        code.statistics,
        (programs, ceil_div(channels, blocks["BLOCK_C"])),
        *(x, means, squares, n_rows, channels, per_program),
        **blocks,
        **_warps(config),
    )
    # all runs of rows are equally long but the last
    counts = torch.full((programs, 1), float(per_program), device=x.device)
    counts[-1] = n_rows - (programs - 1) * per_program
    mean = (means * counts).sum(0) / n_rows
    spread = squares.sum(0) + (counts * (means - mean).square()).sum(0)
    return mean, spread / n_rows


def _forward(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import batch_norm as code

    x = inputs["x"].contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    size, stride, padding = inputs["pool"]
    mean, variance = _moments(x, config)
    rstd = (variance + inputs["eps"]).rsqrt()
    scale = inputs["weight"].float() * rstd
    shift = inputs["bias"].float() - mean * scale
    out_height, out_width = pooled(x, inputs["pool"])
    out = channels_last((n, channels, out_height, out_width), x.dtype, x)
    n_rows = n * out_height * out_width
    blocks = _blocks(config, channels)
    grid = (ceil_div(n_rows, blocks["BLOCK_R"]), ceil_div(channels, blocks["BLOCK_C"]))
    options = {**blocks, **_warps(config), "ACT": inputs["activation"]}
    if size == 0:
        launch(code.apply, grid, x, scale, shift, out, n_rows, channels, **options)
        tap = torch.empty(0, dtype=torch.uint8, device=x.device)
        return out, mean, rstd, variance, tap
    tap = channels_last(tuple(out.shape), torch.uint8, x)
    launch(
        code.apply_pool,
        grid,
        *(x, scale, shift, out, tap, n_rows, height, width, out_height, out_width, channels),
        SIZE=size,
        STRIDE=stride,
        PADDING=padding,
        **options,
    )
    return out, mean, rstd, variance, tap


def _act(z: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "relu":
        return functional.relu(z)
    return functional.silu(z) if kind == "silu" else z


def _eager(inputs: Inputs) -> Outputs:
    high = wide(inputs["x"].dtype)
    weight, bias = inputs["weight"].to(high), inputs["bias"].to(high)
    z = functional.batch_norm(
        inputs["x"], None, None, weight, bias, training=True, eps=inputs["eps"]
    )
    out = _act(z, inputs["activation"])
    size, stride, padding = inputs["pool"]
    return (functional.max_pool2d(out, size, stride, padding) if size else out,)


def _reference(inputs: Inputs) -> Outputs:
    """By PyTorch; the taps of the pool are worked out from the places that it gives."""
    x, (size, stride, padding) = inputs["x"], inputs["pool"]
    high = x.to(wide(x.dtype))
    mean, variance = high.mean((0, 2, 3)), high.var((0, 2, 3), unbiased=False)
    rstd = (variance + inputs["eps"]).rsqrt()
    weight, bias = inputs["weight"].to(high.dtype), inputs["bias"].to(high.dtype)
    z = (high - mean[:, None, None]) * (rstd * weight)[:, None, None] + bias[:, None, None]
    out = _act(z, inputs["activation"])
    tap = torch.empty(0, dtype=torch.uint8, device=x.device)
    if size:
        out, place = functional.max_pool2d(out, size, stride, padding, return_indices=True)
        top = torch.arange(out.shape[2], device=x.device)[:, None] * stride - padding
        left = torch.arange(out.shape[3], device=x.device)[None, :] * stride - padding
        tap = (place // x.shape[3] - top) * size + place % x.shape[3] - left
        tap = tap.to(torch.uint8)
    return out.to(x.dtype), mean, rstd, variance, tap


def _backward(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import batch_norm as code

    x = inputs["x"].contiguous(memory_format=torch.channels_last)
    grad = inputs["grad"].contiguous(memory_format=torch.channels_last)
    tap = inputs["tap"]
    tap = tap.contiguous(memory_format=torch.channels_last) if tap.numel() else grad
    n, channels, height, width = x.shape
    size, stride, padding = inputs["pool"]
    n_rows = n * height * width
    blocks = _blocks(config, channels)
    columns = ceil_div(channels, blocks["BLOCK_C"])
    options = {**blocks, "ACT": inputs["activation"], "SIZE": size}
    options |= {"STRIDE": stride, "PADDING": padding, **_warps(config)}
    per_program = _rows_per_program(n_rows, config)
    programs = ceil_div(n_rows, per_program)
    sums = empty((programs, channels), torch.float32, x.device)
    products = empty((programs, channels), torch.float32, x.device)
    given = (x, grad, tap, inputs["mean"], inputs["rstd"], inputs["weight"], inputs["bias"])
    shape = (height, width, grad.shape[2], grad.shape[3], channels)
    launch(
        code.gradient_sums,
        (programs, columns),
        *(*given, sums, products, n_rows, per_program, *shape),
        **options,
    )
    grad_bias, grad_weight = sums.sum(0), products.sum(0)
    grad_x = channels_last(tuple(x.shape), x.dtype, x)
    launch(
        code.gradient_input,
        (ceil_div(n_rows, blocks["BLOCK_R"]), columns),
        *(*given, grad_bias, grad_weight, grad_x, n_rows, *shape),
        **options,
    )
    dtype = inputs["weight"].dtype
    return grad_x, grad_weight.to(dtype), grad_bias.to(dtype)


def _backward_reference(inputs: Inputs) -> Outputs:
    high = wide(inputs["x"].dtype)
    given = {name: inputs[name].to(high) for name in ("x", "weight", "bias")}
    grads = gradients(
        _eager, {**inputs, **given}, ("x", "weight", "bias"), (inputs["grad"].to(high),)
    )
    dtype = inputs["weight"].dtype
    return grads[0].to(inputs["x"].dtype), grads[1].to(dtype), grads[2].to(dtype)


def _before_pool(inputs: Inputs, grad: torch.Tensor) -> torch.Tensor:
    """The gradient in front of the pool: each goes to the pixel that its tap names."""
    x, (size, stride, padding) = inputs["x"], inputs["pool"]
    if not size:
        return grad
    tap = inputs["tap"].long()
    down = torch.arange(grad.shape[2], device=x.device)[:, None] * stride - padding
    right = torch.arange(grad.shape[3], device=x.device)[None, :] * stride - padding
    place = (down + tap // size) * x.shape[3] + right + tap % size
    spread = torch.zeros(*x.shape[:2], x.shape[2] * x.shape[3], dtype=grad.dtype, device=x.device)
    return spread.scatter_add_(2, place.flatten(2), grad.flatten(2)).reshape(x.shape)


def _backward_fallback(inputs: Inputs) -> Outputs:
    """The same by the formula that the kernel follows."""
    x, high, across = inputs["x"], wide(inputs["x"].dtype), (0, 2, 3)
    mean, rstd = (inputs[name][:, None, None] for name in ("mean", "rstd"))
    weight, bias = (inputs[name].to(high)[:, None, None] for name in ("weight", "bias"))
    normal = (x.to(high) - mean) * rstd
    z, dz = normal * weight + bias, _before_pool(inputs, inputs["grad"].to(high))
    if inputs["activation"] == "relu":
        dz = dz * (z > 0)
    elif inputs["activation"] == "silu":
        dz = torch.ops.aten.silu_backward(dz, z)
    products = dz * normal
    grad = (
        weight
        * rstd
        * (dz - dz.mean(across, keepdim=True) - normal * products.mean(across, keepdim=True))
    )
    dtype = inputs["weight"].dtype
    return grad.to(x.dtype), products.sum(across).to(dtype), dz.sum(across).to(dtype)


def _pool(sizes: Sizes) -> Pool:
    return (sizes["size"], sizes["stride"], sizes["padding"])


def _inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    make, channels = Source(device, seed), sizes["channels"]
    shape = (sizes["batch"], channels, sizes["height"], sizes["width"])
    x = make.normal(*shape, dtype=torch.float32) + 2 * make.normal(
        channels, 1, 1, dtype=torch.float32
    )
    return {
        "x": x.to(dtype).contiguous(memory_format=torch.channels_last),
        "weight": 1 + make.normal(channels, dtype=torch.float32, scale=0.2),
        "bias": make.normal(channels, dtype=torch.float32, scale=0.2),
        "eps": _EPS,
        "activation": ACTIVATIONS[sizes["activation"]],
        "pool": _pool(sizes),
    }


def _backward_inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    given = _inputs(sizes, dtype, device, seed)
    out, mean, rstd, _, tap = _reference({**given, "x": given["x"].float()})
    grad = Source(device, seed + 1).normal(*out.shape, dtype=dtype)
    return {**given, "mean": mean, "rstd": rstd, "tap": tap, "grad": grad}


def _sizes(inputs: Inputs) -> Sizes:
    batch, channels, height, width = inputs["x"].shape
    size, stride, padding = inputs["pool"]
    return {
        **{"batch": batch, "channels": channels, "height": height, "width": width},
        **{"size": size, "stride": stride, "padding": padding},
        "activation": ACTIVATIONS.index(inputs["activation"]),
    }


def _counts(sizes: Sizes) -> tuple[int, int]:
    """Elements before and behind the pool."""
    planes = sizes["batch"] * sizes["channels"]
    before = planes * sizes["height"] * sizes["width"]
    if not sizes["size"]:
        return before, before
    reach = 2 * sizes["padding"] - sizes["size"]
    sides = [(sizes[side] + reach) // sizes["stride"] + 1 for side in ("height", "width")]
    return before, planes * sides[0] * sides[1]


def _work(sizes: Sizes, item: int) -> KernelWork:
    before, behind = _counts(sizes)
    # the statistics need all of x before the first output can be written: x is read twice
    written = behind * (item + bool(sizes["size"]))
    return KernelWork(flops=8 * before, bytes_read=2 * before * item, bytes_written=written)


def _backward_work(sizes: Sizes, item: int) -> KernelWork:
    before, behind = _counts(sizes)
    once = before * item + behind * (item + bool(sizes["size"]))
    return KernelWork(flops=16 * before, bytes_read=2 * once, bytes_written=before * item)


def _legal(config: Config, sizes: Sizes) -> bool:
    tile, threads = config["block_r"] * config["block_c"], 32 * config["num_warps"]
    return threads <= tile <= 64 * threads


def _shape(n: int, c: int, h: int, w: int, act: int, pool: Pool = (0, 1, 0)) -> Sizes:
    return {
        **{"batch": n, "channels": c, "height": h, "width": w, "activation": act},
        **{"size": pool[0], "stride": pool[1], "padding": pool[2]},
    }


_CHECKED = (
    _shape(2, 3, 5, 7, 1),
    _shape(3, 17, 4, 4, 2),
    _shape(2, 5, 9, 8, 1, (3, 2, 1)),
    _shape(1, 33, 6, 6, 0, (2, 2, 0)),
)
_TIMED = (
    _shape(256, 64, 112, 112, 1, (3, 2, 1)),
    _shape(256, 256, 56, 56, 1),
    _shape(256, 64, 32, 32, 1, (2, 2, 0)),
)
_TUNABLES = {
    "block_r": (16, 32, 64, 128),
    "block_c": (16, 32, 64, 128),
    "programs": (132, 264, 528, 1056),
    "num_warps": (2, 4, 8),
}
_FILES = (Path(__file__),)


def _default(sizes: Sizes) -> Config:
    block_c = min(64, max(16, power_of_two(sizes["channels"])))
    return {"block_r": 2048 // block_c, "block_c": block_c, "programs": 264, "num_warps": 4}


def _backward_default(sizes: Sizes) -> Config:
    made = dict(_default(sizes))
    # the taps of a pool need registers of their own
    made["block_r"] //= 2 if sizes["size"] else 1
    return made


def _backward_default_fp32(sizes: Sizes) -> Config:
    return {**_backward_default(sizes), "num_warps": 8}


def _depth(sizes: Sizes) -> int:
    return sizes["batch"] * sizes["height"] * sizes["width"]


FORWARD = Declaration(
    name="batch_norm",
    title="batch norm, activation and max-pool",
    inputs=_inputs,
    sizes=_sizes,
    run=_forward,
    reference=_reference,
    eager=_eager,
    work=_work,
    tunables=_TUNABLES,
    default=_default,
    legal=_legal,
    check_sizes=_CHECKED,
    bench_sizes=_TIMED,
    code=("batch_norm",),
    files=_FILES,
    depth=_depth,
)
BACKWARD = Declaration(
    name="batch_norm_backward",
    title="gradients of batch norm, activation and max-pool",
    inputs=_backward_inputs,
    sizes=_sizes,
    run=_backward,
    reference=_backward_reference,
    fallback=_backward_fallback,
    work=_backward_work,
    tunables=_TUNABLES,
    default=_backward_default,
    default_fp32=_backward_default_fp32,
    legal=_legal,
    check_sizes=_CHECKED,
    bench_sizes=_TIMED,
    code=("batch_norm",),
    files=_FILES,
    depth=_depth,
)
