"""How fast a compiled configuration should be, from what the compiler says: a ranking, no timing.

Time = max(operations / rate, bytes / memory rate, traffic / L2 rate) / (tail x hiding x room):

- tail: blocks over the places in all waves, since the last wave leaves multiprocessors idle;
- hiding: resident warps over what keeps enough loads in flight, at most 1. By Little's law 64 KiB
  in flight hide memory's latency on one multiprocessor of an H100-class card; a thread of these
  kernels has 16 to 64 bytes in flight, so 32 warps are taken as enough;
- room: 1 / (1 + spilled bytes per thread / 64), a guess that puts spilling last.

The figures order configurations of one kernel; their absolute values are not to be believed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from suanli.base.gpu_sheet import GpuSheet
from suanli.devices import derived_flops
from suanli.kernels.compiled import CompiledKernel
from suanli.kernels.declaration import KernelWork
from suanli.kernels.occupancy import Occupancy, occupancy

_ENOUGH_WARPS = 32
_SPILL_BYTES = 64
# Bytes that a multiprocessor takes from L2 per clock (NVIDIA's tuning guides, Volta and newer).
_L2_BYTES_PER_CLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the static model says of one configuration.

    Attributes:
        predicted_ms: For ordering only.
        occupancy: Least share of resident warps over the functions launched, 0 to 1.
        limited_by: What limits it there.
        reason: Why it cannot run; "" if it can.
    """

    predicted_ms: float
    occupancy: float
    limited_by: str
    reason: str = ""


def forecast(
    functions: Sequence[CompiledKernel],
    work: KernelWork,
    *,
    gpu: GpuSheet,
    dtype: str,
    traffic: int | None = None,
) -> Forecast:
    """Judge one configuration by its compiled functions.

    Args:
        functions: What one call launches, with `blocks` known.
        work: What one call has to do.
        gpu: The card that it is judged for.
        dtype: Of the main input; decides the rate of matrix products.
        traffic: Bytes between L2 and the multiprocessors; those of `work` where None.
    """
    shares = [_share(function, gpu) for function in functions]
    bad = next((reason for _, _, reason in shares if reason), "")
    worst = min((found for _, found, _ in shares), key=lambda o: o.fraction)
    if bad:
        return Forecast(
            predicted_ms=math.inf, occupancy=0.0, limited_by=worst.limited_by, reason=bad
        )
    # functions of one call share its work; the geometric mean lets none hide
    efficiency = math.prod(share for share, _, _ in shares) ** (1 / len(shares))
    return Forecast(
        predicted_ms=_bound_s(work, gpu, dtype, traffic) / efficiency * 1e3,
        occupancy=worst.fraction,
        limited_by=worst.limited_by,
    )


def _share(function: CompiledKernel, gpu: GpuSheet) -> tuple[float, Occupancy, str]:
    """(efficiency, occupancy, why it cannot run) of one function."""
    found = occupancy(
        function.arch,
        threads=function.threads,
        registers=function.registers,
        static_shared_bytes=function.static_shared_bytes,
        dynamic_shared_bytes=function.dynamic_shared_bytes,
    )
    if found.blocks == 0:
        return 0.0, found, f"{function.name} does not fit on a multiprocessor: {found.limited_by}"
    places = found.blocks * (gpu.multiprocessors or 1)
    blocks = max(1, function.blocks)
    tail = blocks / (math.ceil(blocks / places) * places)
    # where one wave does not fill the card, more blocks per multiprocessor do not help
    resident = min(found.blocks, math.ceil(blocks / (gpu.multiprocessors or 1)))
    warps = resident * math.ceil(function.threads / 32)
    if blocks <= places:
        busy = min(1.0, blocks / (gpu.multiprocessors or 1))
        tail = busy
    hiding = min(1.0, warps / _ENOUGH_WARPS) ** 0.5
    spilled = function.spill_store_bytes + function.spill_load_bytes
    return tail * hiding / (1 + spilled / _SPILL_BYTES), found, ""


def _bound_s(work: KernelWork, gpu: GpuSheet, dtype: str, traffic: int | None) -> float:
    """Seconds that the card needs at least for the work, as far as its sheet tells."""
    rates = ("tf32" if dtype == "fp32" else dtype) if work.matmul else "fp32"
    flops = gpu.flops(rates) or gpu.flops("fp32")
    bounds = [1e-9]
    if flops:
        bounds.append(work.flops / flops)
    if gpu.memory_bytes_per_s:
        bounds.append(work.bytes / gpu.memory_bytes_per_s)
    l2 = _l2_bytes_per_s(gpu)
    if l2:
        bounds.append((work.bytes if traffic is None else traffic) / l2)
    return max(bounds)


def _l2_bytes_per_s(gpu: GpuSheet) -> float | None:
    """Multiprocessors x clock x bytes per clock."""
    clock = clock_hz(gpu)
    if clock is None or gpu.multiprocessors is None:
        return None
    return gpu.multiprocessors * clock * _L2_BYTES_PER_CLOCK


def clock_hz(gpu: GpuSheet) -> float | None:
    """The clock that a card's fp32 rate implies; None where its sheet does not tell."""
    multiprocessors, rate = gpu.multiprocessors, gpu.flops("fp32")
    if not multiprocessors or not rate:
        return None
    at_one_mhz = derived_flops(gpu.compute_capability, multiprocessors, 1.0, "fp32")
    return rate / at_one_mhz * 1e6 if at_one_mhz else None
