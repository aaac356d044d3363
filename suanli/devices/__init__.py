"""Layer 1: what computes here. Identity, events, memory and power of each device."""

from suanli.devices.catalogue import catalogue, derived_flops, find_sheet, sheet_for, slug
from suanli.devices.cpu import CpuDevice
from suanli.devices.cpu_facts import cpu_info, request_amx
from suanli.devices.device import Device, Event, GpuDevice, MemoryUse
from suanli.devices.gpu_facts import gpu_infos
from suanli.devices.lookup import device, device_names

__all__ = [
    "CpuDevice",
    "Device",
    "Event",
    "GpuDevice",
    "MemoryUse",
    "catalogue",
    "cpu_info",
    "derived_flops",
    "device",
    "device_names",
    "find_sheet",
    "gpu_infos",
    "request_amx",
    "sheet_for",
    "slug",
]
