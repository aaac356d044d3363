"""The ceilings of a GPU: the maker's sheet or the card's own counts, beside what torch reaches.

Nothing here asks what kind of device it is given beyond `Device`: the null device runs all of it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from suanli.base.gpu_sheet import GpuSheet
from suanli.base.hardware import Ceiling, GpuInfo, Mark, What
from suanli.base.units import size
from suanli.devices import Device, GpuDevice, derived_flops, sheet_for
from suanli.measure.gpu_products import DTYPES, product

Progress = Callable[[str], None]
_MIB = 2**20
_SIDES = (2048, 4096, 8192, 16384)
# L2 sizes of all generations first, then memory.
_READ_SIZES = tuple(n * _MIB for n in (4, 16, 32, 256, 1024, 4096))
# Bytes that a multiprocessor takes from L2 per clock: NVIDIA's tuning guides, Volta and newer.
_L2_BYTES_PER_CLOCK = 64
# Larger than any L2 so far, so that data of this size must come from memory.
_SURELY_MEMORY = 256 * _MIB
_BLOCK_S = 0.02
_LEAST_BLOCKS = 5


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """What all measurements of one GPU share.

    Attributes:
        room: Bytes of device memory that a measurement may take.
        share: Part of the usual time that may be spent.
    """

    device: Device
    gpu: GpuInfo
    sheet: GpuSheet | None
    room: int
    share: float
    progress: Progress


def measure_gpu(
    device: GpuDevice, others: Sequence[str], seconds: float, progress: Progress
) -> list[Ceiling]:
    """All ceilings of a GPU.

    Args:
        device: The GPU, with its facts in `gpu`.
        others: torch's names of the other GPUs, for the links.
        seconds: About twice what it takes.
        progress: Told what is being measured.

    Returns:
        "matmul" per dtype, "read" by size, "copy", "call_overhead", "host_to_device",
        "device_to_host", and "link" where there is another GPU.
    """
    memory = device.memory()
    bench = _Bench(
        device=device,
        gpu=device.gpu,
        sheet=sheet_for(device.gpu.name),
        room=max(0, memory.total - memory.used) // 4,
        share=seconds / 25,
        progress=progress,
    )
    items = [_matmul(bench, dtype) for dtype in DTYPES]
    items += [_read(bench, n_bytes) for n_bytes in _READ_SIZES if n_bytes <= bench.room]
    items += [_copy(bench), _overhead(bench), *_host_copies(bench)]
    items += [_link(bench, other) for other in others]
    return [item for item in items if item is not None and item.best is not None]


def _matmul(bench: _Bench, dtype: str) -> Ceiling | None:
    bench.progress(f"{dtype}: matrix products")
    gpu, on_sheet = bench.gpu, bench.sheet.flops(dtype) if bench.sheet else None
    hardware = on_sheet
    mark: Mark = "datasheet" if on_sheet else "measured"
    if hardware is None and gpu.multiprocessors and gpu.clock_mhz and gpu.compute_capability:
        hardware = derived_flops(gpu.compute_capability, gpu.multiprocessors, gpu.clock_mhz, dtype)
        mark = "derived" if hardware else "measured"
    best, spread, how = _best_product(bench, dtype)
    if hardware is None and best is None:
        return None
    return Ceiling(
        what="matmul",
        unit="FLOP/s",
        dtype=dtype,
        hardware=hardware,
        achieved=best,
        spread=spread,
        mark=mark,
        datasheet=on_sheet,
        how=how,
    )


def _best_product(bench: _Bench, dtype: str) -> tuple[float | None, float, str]:
    """(best FLOP/s, its spread, the shape) over square products that fit."""
    best, spread, how = None, 0.0, f"torch has no {dtype} product on this card"
    capability = _capability(bench.gpu)
    # Three matrices of at most 4 bytes an element; a small card still gets one product.
    sides = [side for side in _SIDES if 12 * side * side <= bench.room] or [128]
    for side in sides:
        try:
            call = product(dtype, side, bench.device.torch_device, capability)
            if call is None:
                break
            durations = timed(bench.device, call, 0.25 * bench.share)
        except RuntimeError as error:  # out of memory, or a product that this card lacks
            how = f"{how}: {str(error).splitlines()[0]}" if best is None else how
            break
        rate = 2.0 * side**3 / min(durations)
        if best is None or rate > best:
            best, spread, how = rate, _spread(durations), f"torch {dtype} {side}x{side}x{side}"
    return best, spread, how


def _read(bench: _Bench, n_bytes: int) -> Ceiling:
    """Sum over data of one size, again and again."""
    bench.progress(f"reading {size(n_bytes)}")
    data = torch.ones(n_bytes // 4, device=bench.device.torch_device)
    durations = timed(bench.device, data.sum, 0.3 * bench.share)
    hardware, mark, note = _read_hardware(bench, n_bytes)
    return Ceiling(
        what="read",
        unit="B/s",
        hardware=hardware,
        achieved=data.nbytes / min(durations),
        spread=_spread(durations),
        mark=mark,
        working_set_bytes=n_bytes,
        datasheet=hardware if mark == "datasheet" else None,
        how=f"torch sum; {note}",
    )


def _read_hardware(bench: _Bench, n_bytes: int) -> tuple[float | None, Mark, str]:
    """(B/s or None, where from, in words) for data of one size: memory's figure, or L2's."""
    sheet, gpu = bench.sheet, bench.gpu
    l2 = sheet.l2_mb * _MIB if sheet and sheet.l2_mb else None
    # Up to twice the L2's size a part of the data is still served by it.
    if n_bytes >= (2 * l2 if l2 is not None else _SURELY_MEMORY):
        if sheet is None or sheet.memory_bytes_per_s is None:
            return None, "measured", "the memory's own figure is unknown"
        return sheet.memory_bytes_per_s, "datasheet", "hardware: the memory's datasheet figure"
    if not (gpu.multiprocessors and gpu.clock_mhz):
        return None, "measured", "the cache's own figure is unknown"
    rate = gpu.multiprocessors * gpu.clock_mhz * 1e6 * _L2_BYTES_PER_CLOCK
    words = f"{_L2_BYTES_PER_CLOCK} bytes a clock from L2 x {gpu.multiprocessors} multiprocessors"
    return rate, "derived", f"hardware: {words}"


def _copy(bench: _Bench) -> Ceiling:
    """Bytes read and written per second by a copy inside the card's memory."""
    bench.progress("copying inside the card")
    n_bytes = max(_MIB, min(1024 * _MIB, bench.room // 2))
    source = torch.ones(n_bytes // 4, device=bench.device.torch_device)
    target = torch.empty_like(source)
    durations = timed(bench.device, lambda: target.copy_(source), 0.3 * bench.share)
    return _transfer("copy", 2 * source.nbytes, durations, "torch copy_, read and written bytes")


def _overhead(bench: _Bench) -> Ceiling:
    """Seconds per call of the smallest kernel, launched one after another."""
    bench.progress("the overhead of a launch")
    value = torch.ones(1, device=bench.device.torch_device)
    with torch.inference_mode():
        durations = timed(bench.device, value.neg_, 0.3 * bench.share)
    return Ceiling(
        what="call_overhead",
        unit="s",
        achieved=min(durations),
        spread=_spread(durations),
        how="torch neg_ of one element, launches queued back to back",
    )


def _host_copies(bench: _Bench) -> list[Ceiling]:
    """Both directions between pinned host memory and the card."""
    bench.progress("copies between host and card")
    n_bytes = max(_MIB, min(256 * _MIB, bench.room))
    pinned = bench.device.torch_device != "cpu"
    host = torch.ones(n_bytes, dtype=torch.uint8, pin_memory=pinned)
    card = torch.empty(n_bytes, dtype=torch.uint8, device=bench.device.torch_device)
    down = timed(bench.device, lambda: card.copy_(host, non_blocking=True), 0.3 * bench.share)
    up = timed(bench.device, lambda: host.copy_(card, non_blocking=True), 0.3 * bench.share)
    return [
        _transfer("host_to_device", n_bytes, down, "from pinned memory"),
        _transfer("device_to_host", n_bytes, up, "to pinned memory"),
    ]


def _link(bench: _Bench, other: str) -> Ceiling:
    """One direction from this card to another."""
    bench.progress(f"the link to {other}")
    n_bytes = max(_MIB, min(256 * _MIB, bench.room))
    here = torch.ones(n_bytes, dtype=torch.uint8, device=bench.device.torch_device)
    there = torch.empty(n_bytes, dtype=torch.uint8, device=other)
    durations = timed(bench.device, lambda: there.copy_(here, non_blocking=True), 0.3 * bench.share)
    both_ways = bench.sheet.nvlink_gb_per_s_both_ways if bench.sheet else None
    sheet = both_ways / 2 * 1e9 if both_ways and bench.gpu.links else None
    return _transfer("link", n_bytes, durations, f"copy to {other}", sheet)


def _transfer(
    what: What, n_bytes: int, durations: list[float], how: str, sheet: float | None = None
) -> Ceiling:
    return Ceiling(
        what=what,
        unit="B/s",
        achieved=n_bytes / min(durations),
        spread=_spread(durations),
        working_set_bytes=n_bytes if what == "copy" else None,
        datasheet=sheet,
        how=how,
    )


def timed(device: Device, call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of device time per call, one figure for each block of calls between two events.

    Args:
        device: Whose events are used.
        call: Queues one piece of work.
        seconds: Wall time to spend, after warming up; at least five blocks are run.
    """
    for _ in range(2):
        call()
    device.synchronize()
    once = max(_block(device, call, 1), 1e-7)
    calls = max(1, min(1000, int(min(_BLOCK_S, seconds / _LEAST_BLOCKS) / once)))
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while len(durations) < _LEAST_BLOCKS or time.perf_counter() < end:
        durations.append(_block(device, call, calls))
    return durations


def _block(device: Device, call: Callable[[], object], calls: int) -> float:
    start, stop = device.event(), device.event()
    start.record()
    for _ in range(calls):
        call()
    stop.record()
    return stop.seconds_since(start) / calls


def _capability(gpu: GpuInfo) -> tuple[int, int]:
    major, _, minor = (gpu.compute_capability or "0.0").partition(".")
    return int(major), int(minor or 0)


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, median, third = statistics.quantiles(values, n=4)
    return (third - first) / median if median else 0.0
