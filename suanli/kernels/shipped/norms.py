"""RMSNorm and LayerNorm with an optional residual sum, forward and backward."""

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
from suanli.kernels.launching import ceil_div, empty, empty_like, launch, power_of_two
from suanli.kernels.shipped import _libraries

# A row stands in registers as a whole; above this a program would spill.
WIDEST = 32768
_EPS = 1e-5


def _rows(x: torch.Tensor) -> tuple[int, int]:
    return (x.numel() // x.shape[-1] if x.shape[-1] else 0), x.shape[-1]


def _forward(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import norm as code

    x, weight = inputs["x"].contiguous(), inputs["weight"]
    residual, bias = inputs["residual"], inputs["bias"]
    n_rows, width = _rows(x)
    out, rstd = empty_like(x), empty((n_rows,), torch.float32, x.device)
    total = x if residual is None else empty_like(x)
    mean = empty((n_rows,), torch.float32, x.device) if inputs["centred"] else rstd
    launch(
        code.forward,
        (ceil_div(n_rows, config["rows"]),),
        *(x, x if residual is None else residual.contiguous(), weight),
        *(weight if bias is None else bias, out, total, mean, rstd, n_rows, width, inputs["eps"]),
        CENTRED=inputs["centred"],
        RESIDUAL=residual is not None,
        BIAS=bias is not None,
        ROWS=config["rows"],
        BLOCK=power_of_two(width),
        num_warps=config["num_warps"],
        num_stages=1,
    )
    return out, total, mean, rstd


def _normalised(total: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    weight, bias, width = inputs["weight"].to(total.dtype), inputs["bias"], total.shape[-1:]
    if inputs["centred"]:
        bias = None if bias is None else bias.to(total.dtype)
        return functional.layer_norm(total, width, weight, bias, inputs["eps"])
    return functional.rms_norm(total, width, weight, inputs["eps"])


def _eager(inputs: Inputs) -> Outputs:
    total = inputs["x"] if inputs["residual"] is None else inputs["x"] + inputs["residual"]
    return _normalised(total, inputs), total


def _reference(inputs: Inputs) -> Outputs:
    x, residual, eps = inputs["x"], inputs["residual"], inputs["eps"]
    total = x if residual is None else x + residual
    out = _normalised(total, inputs)
    high = total.to(wide(x.dtype)).reshape(-1, x.shape[-1])
    mean = high.mean(-1) if inputs["centred"] else torch.zeros_like(high[:, 0])
    rstd = ((high - mean[:, None]).square().mean(-1) + eps).rsqrt()
    return out, total, (mean if inputs["centred"] else rstd), rstd


def _backward(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import norm as code

    x, weight, grad_sum = inputs["x"].contiguous(), inputs["weight"], inputs["grad_sum"]
    grad_out = inputs["grad_out"].contiguous()
    n_rows, width = _rows(x)
    programs = max(1, min(config["programs"], n_rows))
    grad_x = empty_like(x)
    parts = empty((programs, width), torch.float32, x.device)
    bias_parts = empty((programs, width), torch.float32, x.device) if inputs["bias"] else parts
    launch(
        code.backward,
        (programs,),
        *(x, weight, inputs["mean"], inputs["rstd"], grad_out),
        *(grad_out if grad_sum is None else grad_sum.contiguous(), grad_x, parts, bias_parts),
        *(n_rows, width, ceil_div(n_rows, programs)),
        CENTRED=inputs["centred"],
        RESIDUAL=grad_sum is not None,
        BIAS=inputs["bias"],
        BLOCK=power_of_two(width),
        num_warps=config["num_warps"],
        num_stages=1,
    )
    grad_weight = parts.sum(0).to(weight.dtype)
    if not inputs["bias"]:
        return grad_x, grad_weight
    return grad_x, grad_weight, bias_parts.sum(0).to(weight.dtype)


def _backward_reference(inputs: Inputs) -> Outputs:
    """By autograd, with the sum `x` as what is normalised."""
    weight = inputs["weight"]
    bias = torch.zeros_like(weight) if inputs["bias"] else None
    given: Inputs = {**inputs, "residual": None, "bias": bias, "eps": inputs["eps"]}
    wanted = ("x", "weight", "bias") if inputs["bias"] else ("x", "weight")
    grads = gradients(_reference, given, wanted, (inputs["grad_out"],))
    if inputs["grad_sum"] is None:
        return grads
    return grads[0] + inputs["grad_sum"], *grads[1:]


def _backward_fallback(inputs: Inputs) -> Outputs:
    """The same by the formula that the kernel follows."""
    x, high = inputs["x"], wide(inputs["x"].dtype)
    rows = x.reshape(-1, x.shape[-1]).to(high)
    rstd = inputs["rstd"][:, None]
    normal = (rows - inputs["mean"][:, None] if inputs["centred"] else rows) * rstd
    grad_out = inputs["grad_out"].reshape(rows.shape).to(high)
    weighed = grad_out * inputs["weight"].to(high)
    grad = weighed - normal * (weighed * normal).mean(1, keepdim=True)
    grad = (grad - weighed.mean(1, keepdim=True) if inputs["centred"] else grad) * rstd
    if inputs["grad_sum"] is not None:
        grad = grad + inputs["grad_sum"].reshape(rows.shape)
    dtype = inputs["weight"].dtype
    on_weight, on_bias = (grad_out * normal).sum(0).to(dtype), grad_out.sum(0).to(dtype)
    grad_x = grad.to(x.dtype).reshape(x.shape)
    return (grad_x, on_weight, on_bias) if inputs["bias"] else (grad_x, on_weight)


def _backward_magnitude(inputs: Inputs) -> Outputs:
    """Sizes of the terms, which cancel where a row is narrow or lies along its gradient."""
    x, rstd = inputs["x"].double(), inputs["rstd"].double()[:, None]
    mean = inputs["mean"].double()[:, None] if inputs["centred"] else 0.0
    normal = ((x - mean) * rstd).abs()
    grad = inputs["grad_out"].double().abs()
    weighed = grad * inputs["weight"].double().abs()
    on_x = rstd * (weighed + normal * (weighed * normal).mean(1, keepdim=True))
    if inputs["centred"]:
        on_x = on_x + rstd * weighed.mean(1, keepdim=True)
    if inputs["grad_sum"] is not None:
        on_x = on_x + inputs["grad_sum"].double().abs()
    on_weight, on_bias = (grad * normal).sum(0), grad.sum(0)
    return (on_x, on_weight, on_bias) if inputs["bias"] else (on_x, on_weight)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    make, width = Source(device, seed), sizes["width"]
    return {
        "x": make.normal(sizes["rows"], width, dtype=dtype),
        "residual": make.normal(sizes["rows"], width, dtype=dtype) if sizes["residual"] else None,
        "weight": 1 + make.normal(width, dtype=dtype, scale=0.1),
        "bias": make.normal(width, dtype=dtype, scale=0.1) if sizes["centred"] else None,
        "eps": _EPS,
        "centred": bool(sizes["centred"]),
    }


def _backward_inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    given = _inputs({**sizes, "residual": 0}, dtype, device, seed)
    make = Source(device, seed + 1)
    shape = given["x"].shape
    high = given["x"].double()
    mean = high.mean(-1) if sizes["centred"] else torch.zeros_like(high[:, 0])
    rstd = ((high - mean[:, None]).square().mean(-1) + _EPS).rsqrt()
    return {
        "x": given["x"],
        "weight": given["weight"],
        "mean": mean.float(),
        "rstd": rstd.float(),
        "grad_out": make.normal(*shape, dtype=dtype),
        "grad_sum": make.normal(*shape, dtype=dtype) if sizes["residual"] else None,
        "bias": bool(sizes["centred"]),
        "eps": _EPS,
        "centred": bool(sizes["centred"]),
    }


def _sizes(inputs: Inputs) -> Sizes:
    n_rows, width = _rows(inputs["x"])
    added = inputs["residual"] if "residual" in inputs else inputs["grad_sum"]
    return {
        "rows": n_rows,
        "width": width,
        "residual": int(added is not None),
        "centred": int(inputs["centred"]),
    }


def _work(sizes: Sizes, item: int) -> KernelWork:
    n = sizes["rows"] * sizes["width"] * item
    moved = 2 if sizes["residual"] else 1
    flops = (6 if sizes["centred"] else 4) * sizes["rows"] * sizes["width"]
    return KernelWork(flops=flops, bytes_read=n * moved, bytes_written=n * moved)


def _backward_work(sizes: Sizes, item: int) -> KernelWork:
    n = sizes["rows"] * sizes["width"] * item
    flops = (14 if sizes["centred"] else 11) * sizes["rows"] * sizes["width"]
    return KernelWork(flops=flops, bytes_read=n * (3 if sizes["residual"] else 2), bytes_written=n)


def _warps(width: int) -> int:
    return max(1, min(16, power_of_two(width) // 512))


def _fits(config: Config, sizes: Sizes) -> bool:
    # at most 64 values of a row per thread, and a warp has at least one value a lane
    held = config.get("rows", 1) * power_of_two(sizes["width"])
    threads = 32 * config["num_warps"]
    return held <= 64 * threads and (held >= threads or config["num_warps"] == 1)


def _shapes(*rows_widths: tuple[int, int]) -> tuple[Sizes, ...]:
    return tuple(
        {"rows": rows, "width": width, "residual": i % 2, "centred": (i // 2) % 2}
        for i, (rows, width) in enumerate(rows_widths)
    )


_FILES = (Path(__file__),)
_CHECKED = _shapes((1, 1), (5, 64), (3, 127), (7, 300), (9, 33), (4, 1000))
_TIMED = _shapes((8192, 4096), (8192, 4096), (8192, 768), (16384, 768))
FORWARD = Declaration(
    name="norm",
    title="RMSNorm or LayerNorm, with residual sum",
    inputs=_inputs,
    sizes=_sizes,
    run=_forward,
    reference=_reference,
    libraries={"liger": _libraries.norm},
    work=_work,
    tunables={"rows": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8, 16)},
    default=lambda sizes: {"rows": 1, "num_warps": _warps(sizes["width"])},
    legal=_fits,
    check_sizes=_CHECKED,
    bench_sizes=_TIMED,
    code=("norm",),
    files=_FILES,
    depth=lambda sizes: sizes["width"],
    roundings=1,
    eager=_eager,
)
BACKWARD = Declaration(
    name="norm_backward",
    title="gradients of RMSNorm or LayerNorm",
    inputs=_backward_inputs,
    sizes=_sizes,
    run=_backward,
    reference=_backward_reference,
    work=_backward_work,
    tunables={"programs": (66, 132, 264, 528, 1056), "num_warps": (1, 2, 4, 8, 16)},
    default=lambda sizes: {"programs": 264, "num_warps": _warps(sizes["width"])},
    legal=_fits,
    check_sizes=_CHECKED,
    bench_sizes=_TIMED,
    code=("norm",),
    files=_FILES,
    depth=lambda sizes: max(sizes["width"], sizes["rows"]),
    magnitude=_backward_magnitude,
    fallback=_backward_fallback,
)
