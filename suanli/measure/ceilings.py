"""What a device can do at most: measured once, kept by the device's fingerprint.

Figures on a busy machine come out too low, never too high, so that a bound made from them may be
beaten. Where the repeats of one are far apart all are measured again, once at once and once at each
of the next calls, and of every figure the best is kept; `refresh` measures anew.
"""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from suanli import __version__
from suanli.base import codec
from suanli.base.compiler import find_compiler
from suanli.base.errors import ArtefactError
from suanli.base.files import cache_dir, write_atomic
from suanli.base.hardware import Ceiling, Ceilings
from suanli.devices import Device, GpuDevice, cpu_info, device, device_names
from suanli.devices.cpu_facts import usable_cores
from suanli.measure.ceilings_cpu import measure_cpu
from suanli.measure.ceilings_cuda import measure_gpu

Progress = Callable[[str], None]

# Spread from which on something else must have run beside a measurement: on a quiet two-core server
# the arithmetic had 0.02 and the reads of all caches 0.2 at most.
_WIDE = 0.5
_SECONDS = 25  # for all rounds of one call together
_LATE_SECONDS = 3  # by which a round overruns on a busy machine: what is begun is ended
_LEAST_SECONDS = 8  # a shorter round says nothing; the next call has one
_AGAIN = 12  # for the round of a later call
_MOST_ROUNDS = 4  # a machine that is always busy is not measured for ever
_BOUNDING = ("matmul", "read")  # what a bound is made of


def ceilings(
    device_name: str, refresh: bool = False, *, progress: Progress | None = None
) -> Ceilings:
    """The ceilings of a device, from the cache or measured now.

    Args:
        device_name: "cpu" or "cuda:<index>".
        refresh: Measure again.
        progress: Told what is being measured.

    Raises:
        BadInputError: There is no such device.
    """
    target = device(device_name)
    path = cache_path(target)
    kept = None if refresh else _kept(path)
    if kept is not None and not rough(kept):
        return kept
    found = measure_device(target, seconds=_AGAIN if kept else _SECONDS, progress=progress)
    if kept is not None:
        found = better_of(kept, found)
    elif rough(found) and found.seconds_spent <= _SECONDS - _LATE_SECONDS - _LEAST_SECONDS:
        left = _SECONDS - _LATE_SECONDS - found.seconds_spent
        found = better_of(found, measure_device(target, seconds=left, progress=progress))
    try:
        write_atomic(path, codec.dumps(found))
    except OSError:
        return found  # a cache that cannot be written costs time only
    return found


def kept_ceilings(device_name: str) -> Ceilings | None:
    """The ceilings of a device from the cache; None where they were not measured yet.

    Raises:
        BadInputError: There is no such device.
    """
    return _kept(cache_path(device(device_name)))


def measure_ceilings(
    device_name: str, *, seconds: float = 25, progress: Progress | None = None
) -> Ceilings:
    """Measure the ceilings of a device now, whatever the cache holds.

    Args:
        device_name: "cpu" or "cuda:<index>".
        seconds: The most that it should take; usually about half of it is needed.
        progress: Told what is being measured.

    Raises:
        BadInputError: There is no such device.
    """
    return measure_device(device(device_name), seconds=seconds, progress=progress)


def measure_device(
    target: Device, *, seconds: float = 25, progress: Progress | None = None
) -> Ceilings:
    """The same for a device at hand."""
    say = progress or (lambda _: None)
    started = time.monotonic()
    cpu = cpu_info()
    if isinstance(target, GpuDevice):
        others = [name for name in device_names() if name not in ("cpu", target.name)]
        items = measure_gpu(target, others, seconds, say)
    else:
        items = measure_cpu(cpu, seconds, say)
    return Ceilings(
        device=target.info,
        items=tuple(items),
        threads=cpu.usable_cores,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds_spent=round(time.monotonic() - started, 2),
    )


def rough(found: Ceilings) -> bool:
    """Whether they should be measured again: a figure that bounds has a wide spread."""
    wide = any(item.what in _BOUNDING and item.spread > _WIDE for item in found.items)
    return wide and found.rounds < _MOST_ROUNDS


def better_of(earlier: Ceilings, later: Ceilings) -> Ceilings:
    """Of every figure the better one: what else runs can make a measurement worse only.

    Args:
        earlier: What was measured before.
        later: Of the same device; its items decide which there are.
    """
    known = {(c.what, c.dtype, c.working_set_bytes): c for c in earlier.items}
    items = [
        _better(known.get((item.what, item.dtype, item.working_set_bytes)), item)
        for item in later.items
    ]
    return replace(
        later,
        items=tuple(items),
        seconds_spent=round(earlier.seconds_spent + later.seconds_spent, 2),
        rounds=earlier.rounds + later.rounds,
    )


def _better(one: Ceiling | None, other: Ceiling) -> Ceiling:
    """The one with the higher rate, or the shorter time; a measured figure beats a derived one."""
    if one is None or one.best is None or other.best is None:
        return other
    if (one.mark == "measured") != (other.mark == "measured"):
        return one if one.mark == "measured" else other
    first = one.best < other.best if one.unit == "s" else one.best > other.best
    best, rest = (one, other) if first else (other, one)
    # the narrower spread of two that agree: the rate was then reached steadily at least once
    agree = abs(best.best - rest.best) <= 0.05 * best.best if best.best and rest.best else False
    return replace(best, spread=min(best.spread, rest.spread)) if agree else best


def cache_path(target: Device) -> Path:
    """Where a device's ceilings are kept: one file per fingerprint, cores and version."""
    name = re.sub(r"\W", "-", target.name)
    cores = usable_cores()
    file = f"{name}-{target.info.fingerprint}-{cores}-{__version__}.json"
    return cache_dir() / "ceilings" / file


def kept_for_card(title: str) -> Ceilings | None:
    """The newest ceilings in the cache of a GPU of this name, or None.

    Args:
        title: As the driver reports the card.
    """
    folder = cache_dir() / "ceilings"
    found = [_kept(path) for path in sorted(folder.glob("cuda-*.json"))]
    same = [kept for kept in found if kept is not None and kept.device.title == title]
    return max(same, key=lambda kept: kept.measured_at, default=None)


def _kept(path: Path) -> Ceilings | None:
    """What the cache holds, unless it is absent, damaged, or better can be had by now."""
    try:
        kept = codec.read(Ceilings, path)
    except ArtefactError:
        return None
    if not kept.items:
        return None
    poor = kept.device.name == "cpu" and any(map(_derived, kept.items))
    return None if poor and find_compiler() is not None else kept


def _derived(item: Ceiling) -> bool:
    """Whether a compiler would have given a measured figure in its place."""
    return item.mark == "derived" and "no C compiler" in item.how
