"""Whether a built plan still fits: what this machine is, and what differs from the engine's."""

from collections.abc import Sequence
from dataclasses import dataclass

from suanli.base.errors import SuanliError
from suanli.base.hardware import DeviceInfo, Environment
from suanli.devices import cpu_info, device, gpu_infos
from suanli.devices.device import fingerprint
from suanli.engines.manifest import Manifest, Variant
from suanli.measure.environment import environment


@dataclass(frozen=True, kw_only=True)
class Here:
    """This machine, as far as built plans depend on it.

    Attributes:
        device: None where there is no device of the engine's name.
        hardware: See `hardware_fingerprint`; "" without the device.
    """

    environment: Environment
    device: DeviceInfo | None
    hardware: str


def here(device_name: str) -> Here:
    """This machine, seen from an engine for `device_name`."""
    try:
        info = device(device_name).info
    except SuanliError:
        return Here(environment=environment(), device=None, hardware="")
    hardware = hardware_fingerprint(device_name)
    return Here(environment=environment(), device=info, hardware=hardware)


def hardware_fingerprint(device_name: str) -> str:
    """Changes with what compiled code depends on: the model of the processor and what it can do.

    Cores and memory are left out. With other numbers of those a plan still runs and still answers
    the same; it may only not be the fastest any more.
    """
    cpu = cpu_info()
    facts: list[object] = [cpu.architecture, cpu.model, sorted(cpu.features)]
    kind, _, index = device_name.partition(":")
    if kind != "cpu":
        facts += [
            (gpu.name, gpu.compute_capability)
            for gpu in gpu_infos()
            if gpu.index == int(index or 0)
        ]
    return fingerprint(*facts)


def differences(manifest: Manifest, now: Here) -> list[str]:
    """One line per thing that is not as it was when the engine was measured."""
    lines = manifest.environment.differences(now.environment)
    if now.device is None:
        return [f"device: {manifest.device.name} -> absent", *lines]
    if now.device.fingerprint != manifest.device.fingerprint:
        old, new = manifest.device.title, now.device.title
        same_title = f"{old}, another memory, cache or instruction set"
        lines.insert(0, f"device: {old} -> {new}" if old != new else f"device: {same_title}")
    return lines


def misfit(manifest: Manifest, variant: Variant, packages: Sequence[str], now: Here) -> str:
    """Why a variant must not run here as it was built; "" if it may.

    Args:
        manifest: The engine's.
        variant: One of its plans.
        packages: Import names of the libraries that its backend needs.
        now: This machine.
    """
    then = manifest.environment
    if now.device is None:
        return f"there is no {manifest.device.name} here"
    if now.hardware != manifest.hardware:
        return f"it was built for {manifest.device.title}"
    if _family(then.os) != _family(now.environment.os):
        return f"it was built on {then.os}"
    for package in packages or ("torch",):
        for library in (package, f"{package}-gpu"):  # two distributions of one import name
            old, new = then.libraries.get(library), now.environment.libraries.get(library)
            if old and _release(old) != _release(new):
                return f"it was built with {library} {old}, here it is {new or 'absent'}"
    if variant.plan.device != "cpu" and _release(then.driver) != _release(now.environment.driver):
        return f"it was built under driver {then.driver}, here it is {now.environment.driver}"
    return ""


def _family(system: str) -> str:
    return system.replace("-", " ").partition(" ")[0]


def _release(version: str | None) -> tuple[str, ...]:
    """The part of a version in which compiled code and numerics may change: major and minor.

    The frameworks used here change both with the second number (torch 2.11 to 2.12, OpenVINO
    2026.1 to 2026.4).
    """
    return tuple((version or "").partition("+")[0].split(".")[:2])
