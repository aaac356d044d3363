"""AdamW and Muon steps over many tensors at once.

AdamW follows Loshchilov and Hutter (decoupled weight decay), as `torch.optim.AdamW` does. Muon
(Jordan, 2024) replaces the momentum of a matrix by its nearest semi-orthogonal one, by five
Newton-Schulz steps of a quintic with the coefficients published with it.
"""

from pathlib import Path
from typing import Any

import torch

from suanli.kernels.declaration import (
    DTYPES,
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
from suanli.kernels.shipped._tables import addresses, chunks

# Of p(x) = a x + b x**3 + c x**5, chosen for a steep slope at 0 (Jordan, 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_NORM_EPS = 1e-7


def _kind(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]


def _adamw(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import optimizers as code

    params, grads = inputs["params"], inputs["grads"]
    averages, squares = inputs["averages"], inputs["squares"]
    cut = chunks(params, config["block"])
    beta1, beta2, step = inputs["beta1"], inputs["beta2"], inputs["step"]
    launch(
        code.adamw,
        (cut.count,),
        *(addresses(params), addresses(grads), addresses(averages), addresses(squares)),
        *(cut.tensor, cut.start, cut.sizes),
        *(inputs["lr"], beta1, beta2, inputs["eps"], inputs["decay"]),
        *(1 - beta1**step, (1 - beta2**step) ** 0.5),
        PARAM=_kind(params[0].dtype),
        GRAD=_kind(grads[0].dtype),
        STATE=_kind(averages[0].dtype),
        BLOCK=config["block"],
        num_warps=config["num_warps"],
        num_stages=1,
    )
    return (*params, *averages, *squares)


def _adamw_reference(inputs: Inputs) -> Outputs:
    """In place, in fp32 (fp64 for fp64), rounded once to the tensors' dtypes."""
    lr, step = inputs["lr"], inputs["step"]
    beta1, beta2 = inputs["beta1"], inputs["beta2"]
    groups = zip(
        inputs["params"], inputs["grads"], inputs["averages"], inputs["squares"], strict=True
    )
    for param, grad, average, square in groups:
        high = wide(param.dtype)
        g, p = grad.to(high), param.to(high)
        m = average.to(high) * beta1 + (1 - beta1) * g
        v = square.to(high) * beta2 + (1 - beta2) * g * g
        p = p * (1 - lr * inputs["decay"])
        below = v.sqrt() / (1 - beta2**step) ** 0.5 + inputs["eps"]
        param.copy_(p - lr / (1 - beta1**step) * m / below)
        average.copy_(m)
        square.copy_(v)
    return (*inputs["params"], *inputs["averages"], *inputs["squares"])


def _adamw_eager(inputs: Inputs) -> Outputs:
    """PyTorch's own fused step."""
    params = inputs["params"]
    steps = [torch.tensor(float(inputs["step"] - 1), device=p.device) for p in params]
    torch._fused_adamw_(
        params,
        inputs["grads"],
        inputs["averages"],
        inputs["squares"],
        [],
        steps,
        lr=inputs["lr"],
        beta1=inputs["beta1"],
        beta2=inputs["beta2"],
        weight_decay=inputs["decay"],
        eps=inputs["eps"],
        amsgrad=False,
        maximize=False,
    )
    return (*params,)


def _adamw_inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    make, each = Source(device, seed), sizes["elements"]
    # unequal tensors, the first with one element
    counts = [1, *(each - 7 * i for i in range(1, sizes["tensors"]))]
    return {
        "params": [make.normal(n, dtype=dtype) for n in counts],
        "grads": [make.normal(n, dtype=dtype, scale=0.1) for n in counts],
        "averages": [make.normal(n, dtype=torch.float32, scale=0.1) for n in counts],
        "squares": [make.uniform(n, dtype=torch.float32) * 0.01 for n in counts],
        **{"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1, "step": 3},
    }


def _adamw_sizes(inputs: Inputs) -> Sizes:
    """Both rounded up to powers of two, so that models of like sizes share what was tuned."""
    counts = sorted(t.numel() for t in inputs["params"])
    middle = power_of_two(counts[len(counts) // 2])
    return {"tensors": power_of_two(len(counts)), "elements": middle}


def _adamw_work(sizes: Sizes, item: int) -> KernelWork:
    n = sizes["tensors"] * sizes["elements"]
    return KernelWork(flops=15 * n, bytes_read=n * (2 * item + 8), bytes_written=n * (item + 8))


def _muon(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import optimizers as code

    params, averages = inputs["params"], inputs["averages"]
    rows, columns = params[0].shape
    work = DTYPES["bf16"] if inputs["low"] else torch.float32
    cut = chunks(params, config["block"])
    ahead = empty((len(params), rows, columns), work, params[0].device)
    warps = {"num_warps": config["num_warps"], "num_stages": 1}
    launch(
        code.momentum,
        (cut.count,),
        *(addresses(inputs["grads"]), addresses(averages), addresses(list(ahead))),
        *(cut.tensor, cut.start, cut.sizes, inputs["beta"]),
        GRAD=_kind(inputs["grads"][0].dtype),
        STATE=_kind(averages[0].dtype),
        OUT=_kind(work),
        BLOCK=config["block"],
        **warps,
    )
    update = _orthogonal(ahead, config)
    launch(
        code.descend,
        (cut.count,),
        *(addresses(params), addresses(list(update)), cut.tensor, cut.start, cut.sizes),
        *(1 - inputs["lr"] * inputs["decay"], _rate(inputs)),
        PARAM=_kind(params[0].dtype),
        UPDATE=_kind(work),
        BLOCK=config["block"],
        **warps,
    )
    return (*params, *averages)


def _rate(inputs: Inputs) -> float:
    rows, columns = inputs["params"][0].shape
    stretch: float = max(1.0, rows / columns) ** 0.5
    return float(inputs["lr"]) * stretch


def _orthogonal(x: torch.Tensor, config: Config) -> torch.Tensor:
    """Newton-Schulz on a batch of matrices [n, rows, columns], on the side that is shorter."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT.contiguous() if tall else x
    norm = x.float().flatten(1).norm(dim=1)[:, None, None]
    x = (x / (norm + _NORM_EPS)).to(x.dtype)
    a, b, c = NEWTON_SCHULZ
    for _ in range(_STEPS):
        square = _product(x, x, x, (1.0, 0.0), True, config)
        polynomial = _product(square, square, square, (c, b), False, config)
        x = _product(polynomial, x, x, (1.0, a), False, config)
    return x.mT.contiguous() if tall else x


def _product(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    factors: tuple[float, float],
    transposed: bool,
    config: Config,
) -> torch.Tensor:
    """factors[0] * a @ b + factors[1] * c for a batch; b.mT where transposed."""
    from suanli.kernels.triton_code import optimizers as code

    batch, rows, inner = a.shape
    columns = b.shape[1] if transposed else b.shape[2]
    out = empty((batch, rows, columns), a.dtype, a.device)
    tile = config["tile"]
    launch(
        code.product_sum,
        (ceil_div(rows, tile), ceil_div(columns, tile), batch),
        *(a, b, c, out, rows, inner, columns, *factors),
        TRANSPOSED=transposed,
        BLOCK_M=tile,
        BLOCK_N=tile,
        BLOCK_K=config["inner"],
        PRECISION=precision(),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return out


def _muon_reference(inputs: Inputs) -> Outputs:
    """In place; Newton-Schulz in fp32 (fp64 for fp64), or bf16 where `low`."""
    beta, (a, b, c) = inputs["beta"], NEWTON_SCHULZ
    for param, grad, average in zip(
        inputs["params"], inputs["grads"], inputs["averages"], strict=True
    ):
        high = wide(param.dtype)
        g, m = grad.to(high), average.to(high)
        m = m * beta + (1 - beta) * g
        average.copy_(m)
        ahead = g + beta * (m - g)
        low = inputs["low"] and high != torch.float64
        x = ahead.bfloat16() if low else ahead
        x = x.mT if x.shape[0] > x.shape[1] else x
        x = (x / (x.float().norm() + _NORM_EPS)).to(x.dtype)
        for _ in range(_STEPS):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        x = x.mT if param.shape[0] > param.shape[1] else x
        shrunk = param.to(high) * (1 - inputs["lr"] * inputs["decay"])
        param.copy_(shrunk - _rate(inputs) * x.to(high))
    return (*inputs["params"], *inputs["averages"])


def _muon_inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    make, shape = Source(device, seed), (sizes["rows"], sizes["columns"])
    count = range(sizes["tensors"])
    return {
        "params": [make.normal(*shape, dtype=dtype) for _ in count],
        "grads": [make.normal(*shape, dtype=dtype, scale=0.1) for _ in count],
        "averages": [make.normal(*shape, dtype=torch.float32, scale=0.1) for _ in count],
        "low": bool(sizes["low"]),
        **{"lr": 0.02, "beta": 0.95, "decay": 0.1},
    }


def _muon_sizes(inputs: Inputs) -> Sizes:
    rows, columns = inputs["params"][0].shape
    return {
        **{"tensors": len(inputs["params"]), "rows": rows, "columns": columns},
        "low": int(inputs["low"]),
    }


def _muon_work(sizes: Sizes, item: int) -> KernelWork:
    """Per step x x.T, a square of that, and one product with x, on the shorter side s."""
    short, long = sorted((sizes["rows"], sizes["columns"]))
    n = sizes["tensors"] * short * long
    flops = _STEPS * sizes["tensors"] * (4 * short * short * long + 2 * short**3)
    read, written = n * (2 * item + 4), n * (item + 4)
    return KernelWork(flops=flops, bytes_read=read, bytes_written=written, matmul=True)


def _muon_traffic(config: Config, sizes: Sizes, item: int) -> int:
    work = _muon_work(sizes, item)
    # two operands of 2 bytes (4 in fp32) per multiply-add, each used `tile` times
    return work.bytes + work.flops // config["tile"] * (2 if sizes["low"] else 4)


def _block_legal(config: Config, sizes: Sizes) -> bool:
    threads = 32 * config["num_warps"]
    return threads <= config["block"] <= 32 * threads


def _muon_legal(config: Config, sizes: Sizes) -> bool:
    fits = config["tile"] ** 2 <= 128 * 32 * config["num_warps"]
    return fits and _block_legal(config, sizes)


def _muon_depth(sizes: Sizes) -> int:
    # the polynomial's slope of up to 3.44 a step carries an early error on
    return _STEPS * max(sizes["rows"], sizes["columns"]) * 100


_FILES = (Path(__file__), Path(__file__).with_name("_tables.py"))
ADAMW = Declaration(
    name="adamw",
    title="AdamW step over many tensors",
    inputs=_adamw_inputs,
    sizes=_adamw_sizes,
    run=_adamw,
    reference=_adamw_reference,
    eager=_adamw_eager,
    work=_adamw_work,
    tunables={"block": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)},
    default=lambda sizes: {"block": 1024, "num_warps": 4},
    legal=_block_legal,
    check_sizes=({"tensors": 1, "elements": 1}, {"tensors": 4, "elements": 1021}),
    bench_sizes=({"tensors": 64, "elements": 2**24}, {"tensors": 256, "elements": 2**16}),
    code=("optimizers",),
    files=_FILES,
    depth=lambda sizes: 16,
    writes=("params", "averages", "squares"),
)
MUON = Declaration(
    name="muon",
    title="Muon step over many matrices of one shape",
    inputs=_muon_inputs,
    sizes=_muon_sizes,
    run=_muon,
    reference=_muon_reference,
    work=_muon_work,
    tunables={
        "block": (1024, 2048),
        "tile": (64, 128),
        "inner": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    default=lambda sizes: {
        **{"block": 1024, "tile": 128, "inner": 32, "num_warps": 8, "num_stages": 3}
    },
    legal=_muon_legal,
    check_sizes=(
        {"tensors": 2, "rows": 20, "columns": 33, "low": 0},
        {"tensors": 1, "rows": 50, "columns": 17, "low": 0},
    ),
    bench_sizes=(
        {"tensors": 24, "rows": 1024, "columns": 4096, "low": 1},
        {"tensors": 12, "rows": 768, "columns": 768, "low": 1},
    ),
    code=("optimizers",),
    files=_FILES,
    depth=_muon_depth,
    writes=("params", "averages"),
    traffic=_muon_traffic,
)
