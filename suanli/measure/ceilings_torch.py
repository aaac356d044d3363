"""What torch reaches on the CPU at its best shapes: the `achieved` side of each ceiling."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from suanli.base.hardware import Ceiling

# Short blocks: on a busy machine the best of many short ones meets a quiet moment.
_BLOCK_S = 1e-3
# (rows, columns, inner): square products of growing size, and a tall one.
_SHAPES = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024))
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Achieved:
    """A rate that a library reached.

    Attributes:
        rate: Units per second in the best block.
        spread: (third quartile - first quartile) / median over the blocks.
        how: What was called.
    """

    rate: float
    spread: float
    how: str


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with that many threads for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul(dtype: str, seconds: float) -> Achieved | None:
    """Best FLOP/s of a product over a few shapes; None where torch has no such product here."""
    best: Achieved | None = None
    end = time.perf_counter() + seconds
    for index, (m, n, k) in enumerate(_SHAPES):
        operations = 2.0 * m * n * k
        left = (end - time.perf_counter()) / (len(_SHAPES) - index)
        if best is not None and 3 * operations / best.rate > left:
            continue  # a slow machine: the smaller shapes have to do
        try:
            durations = blocks(_product(dtype, m, n, k), left)
        except RuntimeError:
            return best  # no such product on this processor
        found = _achieved(durations, operations, f"torch {dtype} {m}x{n}x{k}")
        if best is None or found.rate > best.rate:
            best = found
    return best


def read(n_bytes: int, seconds: float) -> Achieved:
    """Bytes per second of a sum over that much data."""
    data = torch.ones(max(1, n_bytes // 4), dtype=torch.float32)
    return _achieved(blocks(data.sum, seconds), float(data.nbytes), "torch sum")


def copy(n_bytes: int, seconds: float) -> Achieved:
    """Bytes per second, read and written together, of a copy; `n_bytes` is both tensors."""
    source = torch.ones(max(1, n_bytes // 8), dtype=torch.float32)
    target = torch.empty_like(source)
    durations = blocks(lambda: target.copy_(source), seconds)
    return _achieved(durations, 2.0 * source.nbytes, "torch copy_")


def call_overhead(seconds: float) -> Ceiling:
    """Seconds that the smallest call of torch costs."""
    value = torch.ones(1)
    with torch.inference_mode():
        durations = blocks(value.neg_, seconds)
    return Ceiling(
        what="call_overhead",
        unit="s",
        achieved=min(durations),
        spread=_spread(durations),
        how="torch neg_ of one element",
    )


def blocks(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds per call, one figure for each block of calls, over about `seconds` in all."""
    call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    calls = max(1, int(min(_BLOCK_S, seconds / 5) / once))
    durations = []
    end = start + seconds
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        now = time.perf_counter()
        durations.append((now - start) / calls)
        if now >= end:
            return durations


def _product(dtype: str, m: int, n: int, k: int) -> Callable[[], object]:
    """A matrix product [m, k] x [k, n] of random values, ready to be called."""
    if dtype == "int8":
        left = torch.randint(-127, 127, (m, k), dtype=torch.int8)
        right = torch.randint(-127, 127, (k, n), dtype=torch.int8)
        return lambda: torch._int_mm(left, right)
    a = torch.rand(m, k).to(_DTYPES[dtype])
    b = torch.rand(k, n).to(_DTYPES[dtype])
    out = torch.empty(m, n, dtype=_DTYPES[dtype])
    return lambda: torch.mm(a, b, out=out)


def _achieved(durations: list[float], units: float, how: str) -> Achieved:
    return Achieved(rate=units / min(durations), spread=_spread(durations), how=how)


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, median, third = statistics.quantiles(values, n=4)
    return (third - first) / median if median else 0.0
