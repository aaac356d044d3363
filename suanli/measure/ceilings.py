"""What a device can do at most: measured once, kept by the device's fingerprint.

Figures on a busy machine come out too low, never too high, so that a bound made from them may be
beaten; `refresh` measures again.
"""

import re
import time
from collections.abc import Callable
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
    if not refresh:
        kept = _kept(path)
        if kept is not None:
            return kept
    found = measure_device(target, progress=progress)
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


def cache_path(target: Device) -> Path:
    """Where a device's ceilings are kept: one file per fingerprint, cores and version."""
    name = re.sub(r"\W", "-", target.name)
    cores = usable_cores()
    file = f"{name}-{target.info.fingerprint}-{cores}-{__version__}.json"
    return cache_dir() / "ceilings" / file


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
