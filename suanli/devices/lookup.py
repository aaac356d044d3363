"""From a name to a device."""

import re

from suanli.base.errors import BadInputError
from suanli.devices.cpu import CpuDevice
from suanli.devices.cuda import CudaDevice
from suanli.devices.device import Device
from suanli.devices.gpu_facts import gpu_infos


def device(name: str) -> Device:
    """The device of that name: "cpu", "cuda" (the first GPU) or "cuda:<index>".

    Raises:
        BadInputError: There is no such device; the message says which there are.
    """
    if name == "cpu":
        return CpuDevice()
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise BadInputError(
            f"unknown device {name!r}", next_step=f"devices here: {', '.join(device_names())}"
        )
    index = int(match.group(1) or 0)
    for gpu in gpu_infos():
        if gpu.index == index and _torch_has_cuda():
            return CudaDevice(gpu)
    raise BadInputError(
        f"no device {name!r} that torch can use",
        next_step=f"devices here: {', '.join(device_names())}; `suanli doctor` says what is wrong",
    )


def device_names() -> list[str]:
    """Names of the devices that can compute here, the CPU first."""
    gpus = gpu_infos() if _torch_has_cuda() else []
    return ["cpu", *(f"cuda:{gpu.index}" for gpu in gpus)]


def _torch_has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())
