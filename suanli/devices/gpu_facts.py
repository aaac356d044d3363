"""GPUs as the driver (NVML) and torch see them. Nothing here raises: no GPU is a normal machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

from suanli.base.hardware import GpuInfo
from suanli.base.lazy import present

T = TypeVar("T")
_MAX_LINKS = 18  # NVML_NVLINK_MAX_LINKS


def gpu_infos(*, nvml: Any = None, torch: Any = None, use_torch: bool = True) -> list[GpuInfo]:
    """All GPUs here; empty where there are none.

    NVML is asked first and joined with torch by UUID. Where torch can use GPUs, the list holds
    exactly those and in torch's order, so that `index` is the one in "cuda:<index>".

    Args:
        nvml: The `pynvml` module, or a stand-in; imported where None.
        torch: The `torch` module, or a stand-in; imported where None.
        use_torch: False leaves torch alone (importing it takes a second).
    """
    with nvml_session(nvml) as session:
        from_driver = _driver_gpus(session) if session is not None else []
    from_torch = _torch_gpus(torch) if use_torch else []
    if not from_torch:
        return from_driver
    by_uuid = {gpu.uuid: gpu for gpu in from_driver}
    return [_joined(seen, by_uuid.get(seen.uuid)) for seen in from_torch]


@contextmanager
def nvml_session(nvml: Any = None) -> Iterator[Any]:
    """NVML, initialised for the block, or None where there is no driver or no binding."""
    module = nvml if nvml is not None else _imported("pynvml")
    if module is not None:
        try:
            module.nvmlInit()
        except Exception:  # no driver, no permission, versions that differ: all mean "no NVML"
            module = None
    try:
        yield module
    finally:
        if module is not None:
            ask(module.nvmlShutdown)


def ask(question: Callable[..., T], *arguments: Any) -> T | None:
    """The answer of one NVML call, or None where the card or the driver cannot say."""
    try:
        return question(*arguments)
    except Exception:  # NVML raises for each figure that a card lacks
        return None


def driver_versions(nvml: Any = None) -> tuple[str | None, str | None]:
    """(driver version, newest CUDA version that this driver runs, such as "12.8")."""
    with nvml_session(nvml) as session:
        if session is None:
            return None, None
        driver = _text(ask(session.nvmlSystemGetDriverVersion))
        cuda = ask(session.nvmlSystemGetCudaDriverVersion_v2)
    return driver, None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}"


def _driver_gpus(nvml: Any) -> list[GpuInfo]:
    driver = _text(ask(nvml.nvmlSystemGetDriverVersion))
    found = []
    for index in range(ask(nvml.nvmlDeviceGetCount) or 0):
        handle = ask(nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            continue
        memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        capability = ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
        limit_mw = ask(nvml.nvmlDeviceGetPowerManagementLimit, handle)
        found.append(
            GpuInfo(
                name=_text(ask(nvml.nvmlDeviceGetName, handle)) or "unknown GPU",
                index=index,
                memory_bytes=int(memory.total) if memory is not None else 0,
                compute_capability=None if capability is None else "{}.{}".format(*capability),
                multiprocessors=_multiprocessors(nvml, handle, capability),
                driver=driver,
                power_limit_w=None if limit_mw is None else limit_mw / 1000,
                clock_mhz=ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
                links=_active_links(nvml, handle),
                uuid=_text(ask(nvml.nvmlDeviceGetUUID, handle)),
            )
        )
    return found


def _multiprocessors(nvml: Any, handle: Any, capability: Any) -> int | None:
    """NVML counts fp32 lanes; a multiprocessor has 64 of them up to 8.0 and 128 since (6.1 too)."""
    lanes = ask(partial(nvml.nvmlDeviceGetNumGpuCores, handle))
    if lanes is None or capability is None:
        return None
    per_multiprocessor = 64 if tuple(capability) in {(6, 0), (7, 0), (7, 5), (8, 0)} else 128
    return int(lanes) // per_multiprocessor


def _active_links(nvml: Any, handle: Any) -> int | None:
    states = [ask(nvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(_MAX_LINKS)]
    return None if all(state is None for state in states) else sum(state == 1 for state in states)


def _torch_gpus(torch: Any) -> list[GpuInfo]:
    module = torch if torch is not None else _imported("torch")
    if module is None or not ask(module.cuda.is_available):
        return []
    found = []
    for index in range(ask(module.cuda.device_count) or 0):
        facts = ask(module.cuda.get_device_properties, index)
        if facts is None:
            continue
        uuid = getattr(facts, "uuid", None)
        found.append(
            GpuInfo(
                name=str(facts.name),
                index=index,
                memory_bytes=int(facts.total_memory),
                compute_capability=f"{facts.major}.{facts.minor}",
                multiprocessors=int(facts.multi_processor_count),
                uuid=None if uuid is None else "GPU-" + str(uuid).removeprefix("GPU-"),
            )
        )
    return found


def _joined(seen: GpuInfo, driver: GpuInfo | None) -> GpuInfo:
    """Torch's own index and multiprocessors, the rest from the driver."""
    if driver is None:
        return seen
    return GpuInfo(
        name=driver.name,
        index=seen.index,
        memory_bytes=driver.memory_bytes or seen.memory_bytes,
        compute_capability=seen.compute_capability,
        multiprocessors=seen.multiprocessors,
        driver=driver.driver,
        power_limit_w=driver.power_limit_w,
        clock_mhz=driver.clock_mhz,
        links=driver.links,
        uuid=driver.uuid,
    )


def _imported(package: str) -> Any:
    if not present(package):
        return None
    try:
        return import_module(package)
    except Exception:  # a broken optional package must not hide the rest of the machine
        return None


def _text(value: Any) -> str | None:
    """NVML's older bindings answer with bytes."""
    if value is None:
        return None
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
