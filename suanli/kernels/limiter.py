"""What bounds a CUDA kernel on a card: a static model of the units that its blocks use.

Time of each unit, the blocks that were executed standing for all of the grid:

- memory: declared bytes over the card's bandwidth;
- arithmetic: declared operations over the card's rate, of tensor cores where the code uses them;
- cache: each warp's request to global memory takes one clock for every 128-byte line that it
  touches, and a store one clock for every two 32-byte sectors (128 bytes a clock from L1 and 64 to
  L2 per multiprocessor: NVIDIA's tuning guides, Volta and newer);
- shared: one clock for every wavefront;
- atomics: lanes that meet on one address take one clock each; those in global memory are done by
  L2, for which 32 slices are assumed.

The largest is the limiter. The figures order units; they are bounds, not times to be expected.
"""

from collections.abc import Callable, Iterable, Sequence

from suanli.base.gpu_sheet import GpuSheet
from suanli.base.kernel_results import KernelAccess, KernelLimiter
from suanli.kernels.cuda.findings import describe
from suanli.kernels.cuda.host_run import Place
from suanli.kernels.declaration import KernelWork
from suanli.kernels.static_model import clock_hz

_L2_SLICES = 32
# Share of needed traffic over all places from which on the pattern is to blame, not the amount.
_WASTE = 1.5


def limiter(
    gpu: GpuSheet,
    *,
    work: KernelWork,
    rate_dtype: str,
    places: Sequence[Place],
    accesses: Sequence[KernelAccess],
    scale: float,
) -> KernelLimiter | None:
    """Name what bounds a kernel.

    Args:
        gpu: The card.
        work: What one launch has to do.
        rate_dtype: Whose rate the arithmetic runs at, such as "fp32".
        places: What the executed blocks asked of memory.
        accesses: The same in lines of the file.
        scale: Blocks of the launch over blocks that were executed.

    Returns:
        None where the card's sheet lacks a figure.
    """
    clock, flops = clock_hz(gpu), gpu.flops(rate_dtype) or gpu.flops("fp32")
    if not clock or not flops or not gpu.multiprocessors or not gpu.memory_bytes_per_s:
        return None
    per_ms = gpu.multiprocessors * clock / 1e3  # clocks of all multiprocessors in a millisecond
    plain = [p for p in places if not p.atomic]
    units = {
        "memory": work.bytes / gpu.memory_bytes_per_s * 1e3,
        "arithmetic": work.flops / flops * 1e3,
        "cache": scale * sum(_clocks(p) for p in plain if p.space == "global") / per_ms,
        "shared": scale * sum(p.wavefronts for p in plain if p.space == "shared") / per_ms,
        "atomics": scale * _atomics(places, clock, per_ms),
    }
    name, text = _named(max(units, key=lambda unit: units[unit]), plain, accesses)
    return KernelLimiter(name=name, gpu=gpu.name, text=text, unit_ms=units)


def _clocks(place: Place) -> float:
    return max(place.touched_lines, place.sectors / 2) if place.write else place.touched_lines


def _atomics(places: Iterable[Place], clock: float, per_ms: float) -> float:
    shared = sum(p.same_address for p in places if p.atomic and p.space == "shared")
    global_ = sum(p.same_address for p in places if p.atomic and p.space == "global")
    return shared / per_ms + global_ / (_L2_SLICES * clock / 1e3)


def _named(unit: str, places: Sequence[Place], accesses: Sequence[KernelAccess]) -> tuple[str, str]:
    if unit == "memory":
        return "memory bandwidth", "the bytes that have to move decide; only fewer bytes help"
    if unit == "arithmetic":
        return "arithmetic", "the operations decide; tensor cores or fewer operations help"
    if unit == "atomics":
        return "atomic contention", _worst(accesses, lambda a: a.operation == "atomic")
    space = "shared" if unit == "shared" else "global"
    chosen = [p for p in places if p.space == space]
    moved = sum(p.wavefronts if space == "shared" else p.sectors for p in chosen)
    needed = sum(p.ideal_wavefronts if space == "shared" else p.ideal_sectors for p in chosen)
    wasteful = moved >= _WASTE * max(1, needed)
    worst = _worst(accesses, lambda a: a.space == space and a.operation != "atomic")
    if space == "shared":
        text = "every operand is read from shared memory; keep more of them in registers"
        return ("bank conflicts", worst) if wasteful else ("shared memory bandwidth", text)
    text = "loads through the cache decide; keep what is used again in shared memory or registers"
    return ("uncoalesced access", worst) if wasteful else ("cache bandwidth", text)


def _worst(accesses: Sequence[KernelAccess], chosen: Callable[[KernelAccess], bool]) -> str:
    mine = [access for access in accesses if chosen(access)]
    worst = max(mine, key=lambda a: a.factor * a.requests, default=None)
    return "" if worst is None else f"{worst.where}: {describe(worst)}"
