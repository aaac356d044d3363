"""The ceilings of the processor: register-only loops, reads by size, and what torch reaches."""

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import psutil

from suanli.base.hardware import Ceiling, CpuInfo
from suanli.base.units import size
from suanli.devices import request_amx
from suanli.devices.cpu_facts import spread_cpus
from suanli.measure import ceilings_torch
from suanli.measure.native import (
    Loop,
    NativeLoops,
    Rates,
    clock_hz,
    common_rates,
    native_loops,
    possible_loops,
    run_pinned,
    summed_rates,
)

Progress = Callable[[str], None]

_STRETCH_S = 2e-3
_BLOCK_S = 2e-4
_KIB, _MIB = 2**10, 2**20
_CHUNK = 4 * _MIB
# Data that lives in L1, in L2, in the last level, and in memory, on machines small and large.
_READ_SIZES = tuple(n * _MIB for n in (1, 4, 16, 64, 170, 512, 2048))
_LARGEST_ACHIEVED = 512 * _MIB


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """What all measurements of one processor share.

    Attributes:
        cpus: Processors that the threads are kept on.
        native: The built loops, or None.
        why: Why there are none, in one line.
        clock: Hz of a core, or None.
        share: Part of the usual time that may be spent.
        deadline: Reading of the clock after which nothing is begun that can be left out.
    """

    cpu: CpuInfo
    cpus: list[int]
    native: NativeLoops | None
    why: str
    clock: float | None
    share: float
    deadline: float
    progress: Progress

    @property
    def alone(self) -> bool:
        """Whether no two threads sit on one physical core, whose units and caches they share."""
        return len(self.cpus) <= self.cpu.physical_cores

    @property
    def cores(self) -> str:
        return f"{len(self.cpus)} cores"


def measure_cpu(cpu: CpuInfo, seconds: float, progress: Progress) -> list[Ceiling]:
    """All ceilings of the processor.

    Args:
        cpu: Its facts; `usable_cores` threads are used, one a core.
        seconds: The most it should take; on a quiet machine about half of it is used.
        progress: Told what is being measured.

    Returns:
        "matmul" per dtype, "read" by size, "copy" and "call_overhead".
    """
    started = time.perf_counter()
    progress("building the loops")
    loops = possible_loops(cpu.features, amx_allowed=request_amx())
    native, why = native_loops(loop.name for loop in loops)
    bench = _Bench(
        cpu=cpu,
        cpus=spread_cpus(cpu.usable_cores),
        native=native,
        why=why,
        clock=_clock(),
        share=seconds / 25,
        deadline=started + 0.9 * seconds,
        progress=progress,
    )
    items = _arithmetic(bench, loops) + _traffic(bench)
    # Torch last: its threads spin for a while after each call and would disturb the loops.
    return _with_achieved(bench, items)


def _clock() -> float | None:
    """Hz of a core, measured, else the highest that the system says it can have."""
    measured = clock_hz()
    if measured is not None:
        return measured
    try:
        said = psutil.cpu_freq()
    except (OSError, NotImplementedError, AttributeError):
        return None
    return max(said.max, said.current) * 1e6 if said else None


def _arithmetic(bench: _Bench, loops: Sequence[Loop]) -> list[Ceiling]:
    items: list[Ceiling] = []
    for loop in loops:
        bench.progress(f"{loop.dtype}: {loop.what} from registers")
        if bench.native is not None and loop.name in bench.native.runnable:
            items.append(_measured_loop(bench, bench.native, loop))
        elif bench.clock is not None:
            items.append(_derived_loop(bench, bench.clock, loop))
    known = {item.dtype: item for item in items}
    if "fp32" in known:
        # A processor without the instruction converts and computes in fp32.
        items += [
            replace(known["fp32"], dtype=dtype, how=f"no {dtype} unit: " + known["fp32"].how)
            for dtype in ("bf16", "fp16")
            if dtype not in known
        ]
    return items


def _measured_loop(bench: _Bench, native: NativeLoops, loop: Loop) -> Ceiling:
    """Operations per second of a register-only loop on all cores."""
    trial = native.arithmetic(loop.name, 1000, 0.01)
    one = min(after - before for before, after in pairwise(trial)) / 1000
    iterations = max(1000, int(_BLOCK_S / one))
    seconds = 0.6 * bench.share
    stamps = run_pinned(lambda _: native.arithmetic(loop.name, iterations, seconds), bench.cpus)
    rates = _rates(stamps, native.operations(loop.name) * iterations, alone=bench.alone)
    return Ceiling(
        what="matmul",
        unit="FLOP/s",
        dtype=loop.dtype,
        hardware=rates.best,
        spread=rates.spread,
        mark="measured",
        how=f"{loop.what} from registers, {bench.cores}",
    )


def _derived_loop(bench: _Bench, clock: float, loop: Loop) -> Ceiling:
    """The same without running it: operations per clock x clock x cores."""
    reason = bench.why or "this loop does not build or run here"
    return Ceiling(
        what="matmul",
        unit="FLOP/s",
        dtype=loop.dtype,
        hardware=clock * loop.operations_per_clock * len(bench.cpus),
        mark="derived",
        how=f"{loop.what}: {loop.operations_per_clock} a clock x {clock / 1e9:.2f} GHz "
        f"x {bench.cores} ({reason})",
    )


def _rates(stamps: list[list[float]], units: float, *, alone: bool) -> Rates:
    return (summed_rates if alone else common_rates)(stamps, units, _STRETCH_S)


def _traffic(bench: _Bench) -> list[Ceiling]:
    """Reads by size, then copies of the second smallest and of the largest size read."""
    threads = len(bench.cpus)
    sizes = read_sizes(threads, bench.cpu.memory_available_bytes)
    if bench.native is None:
        return [_derived_read(bench, n_bytes) for n_bytes in sizes]
    buffers = Buffers(bench.cpus, max(sizes) // threads)
    items: list[Ceiling] = []
    deadline = time.perf_counter() + 0.8 * bench.share * len(sizes)
    for n_bytes in sizes:
        if time.perf_counter() > deadline:
            break  # a machine that is slow to hand out memory: larger sizes count as the last
        bench.progress(f"reading {size(n_bytes)}")
        buffers.fill(n_bytes // threads)
        private = n_bytes // threads <= bench.cpu.cache_bytes.get("L2", 0)
        rates = _traffic_rates(bench, "read", buffers, n_bytes, alone=private and bench.alone)
        how = f"loads of the widest register, {bench.cores}, each its own part"
        items.append(_traffic_item("read", rates, n_bytes, how))
    done = sizes[: len(items)]
    for n_bytes in (done[len(done) > 1], done[-1]):
        bench.progress(f"copying {size(n_bytes)}")
        rates = _traffic_rates(bench, "copy", buffers, n_bytes, alone=False)
        how = f"memcpy, {bench.cores}; bytes read and bytes written both count"
        items.append(_traffic_item("copy", rates, n_bytes, how))
    return items


def _traffic_item(what: Literal["read", "copy"], rates: Rates, n_bytes: int, how: str) -> Ceiling:
    return Ceiling(
        what=what,
        unit="B/s",
        hardware=rates.best,
        spread=rates.spread,
        working_set_bytes=n_bytes,
        how=how,
    )


def read_sizes(threads: int, available_bytes: int) -> list[int]:
    """Working sets to read, in bytes: 16 KiB a thread first (L1), at most a quarter of memory."""
    smallest = 16 * _KIB * threads
    most = max(available_bytes // 4, smallest)
    grain = _KIB * threads  # each thread's part is a multiple of 1 KiB
    fitting = [n // grain * grain for n in _READ_SIZES if smallest < n <= most]
    return [smallest, *fitting]


class Buffers:
    """One buffer per core, each touched first by the processor that will read it.

    Args:
        cpus: The processors.
        n_bytes: Room for each; memory is taken only as it is filled.
    """

    def __init__(self, cpus: Sequence[int], n_bytes: int) -> None:
        self.cpus = cpus
        self._filled = 0
        self._maps = [mmap.mmap(-1, max(n_bytes, mmap.PAGESIZE)) for _ in cpus]
        if hasattr(mmap, "MADV_HUGEPAGE"):
            for part in self._maps:
                # With small pages the look-up of pages, not memory, would be the limit.
                part.madvise(mmap.MADV_HUGEPAGE)
        self.addresses = [ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in self._maps]

    def fill(self, n_bytes: int) -> None:
        """Write the first `n_bytes` of each: pages never written are one page, kept in cache."""
        start, self._filled = self._filled, max(self._filled, n_bytes)

        def write(i: int) -> list[float]:
            ctypes.memset(self.addresses[i] + start, 1, self._filled - start)
            return []

        run_pinned(write, self.cpus)


def _traffic_rates(
    bench: _Bench, kind: str, buffers: Buffers, n_bytes: int, *, alone: bool
) -> Rates:
    """Bytes per second of all cores; a copy moves one half of the working set to the other.

    Args:
        bench: With the loops.
        kind: "read" or "copy".
        buffers: Filled up to the working set.
        n_bytes: The working set of all cores together.
        alone: Whether each core's part stays in caches of its own.
    """
    native = bench.native
    assert native is not None
    part = n_bytes // len(bench.cpus)
    moved = part // (2 * _KIB) * _KIB if kind == "copy" else part
    chunk, seconds = _chunk(moved), 0.4 * bench.share
    stamps = run_pinned(
        lambda i: native.traffic(kind, buffers.addresses[i], moved, chunk, seconds), bench.cpus
    )
    return _rates(stamps, 2 * chunk if kind == "copy" else chunk, alone=alone)


def _chunk(part: int) -> int:
    """Bytes of a block near 4 MiB: whole passes over a small part, or an even share of a large."""
    if part <= _CHUNK:
        return part * (_CHUNK // part)
    return part // -(-part // _CHUNK) // _KIB * _KIB


def _derived_read(bench: _Bench, n_bytes: int) -> Ceiling:
    """Without a compiler: two loads of the widest register a clock where caches can hold it."""
    cpu, clock, threads = bench.cpu, bench.clock, len(bench.cpus)
    width = 64 if "avx512f" in cpu.features else 32 if "avx2" in cpu.features else 16
    known = clock is not None and n_bytes <= cpu.cache_bytes.get("L2", 0) * threads
    return Ceiling(
        what="read",
        unit="B/s",
        hardware=2 * width * (clock or 0.0) * threads if known else None,
        mark="derived",
        working_set_bytes=n_bytes,
        how=f"two loads of {width} bytes a clock ({bench.why})" if known else bench.why,
    )


def _with_achieved(bench: _Bench, items: list[Ceiling]) -> list[Ceiling]:
    """The same ceilings with what torch reaches beside them, and the overhead of a call."""
    filled: list[Ceiling] = []
    with ceilings_torch.threads(len(bench.cpus)):
        for item in items:
            n_bytes = item.working_set_bytes or 0
            found = None
            if time.perf_counter() > bench.deadline and item.hardware is not None:
                pass  # a busy machine: the hardware's figure has to do
            elif item.what == "matmul" and item.dtype is not None:
                bench.progress(f"{item.dtype}: torch's matrix product")
                found = ceilings_torch.matmul(item.dtype, 0.9 * bench.share)
            elif item.what == "read" and n_bytes <= _LARGEST_ACHIEVED:
                found = ceilings_torch.read(n_bytes, 0.1 * bench.share)
            elif item.what == "copy" and n_bytes <= _LARGEST_ACHIEVED:
                found = ceilings_torch.copy(n_bytes, 0.1 * bench.share)
            filled.append(_joined(item, found))
        bench.progress("the overhead of a call")
        filled.append(ceilings_torch.call_overhead(0.3 * bench.share))
    return [item for item in filled if item.best is not None]


def _joined(item: Ceiling, found: ceilings_torch.Achieved | None) -> Ceiling:
    if found is None:
        return item
    spread = item.spread if item.hardware is not None else found.spread
    how = f"{item.how}; achieved: {found.how}" if item.how else found.how
    hardware = item.hardware
    if hardware is not None and item.mark == "measured" and found.rate > hardware:
        # what a library reached the hardware can do, so the loop's figure was no upper limit
        hardware, spread = found.rate, found.spread
        how += "; the library's figure is the higher one and stands for both"
    return replace(item, hardware=hardware, achieved=found.rate, spread=spread, how=how)
