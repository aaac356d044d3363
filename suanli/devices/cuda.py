"""An NVIDIA GPU as a device, through torch for its work and NVML for its power."""

from typing import Any

from suanli.base.hardware import DeviceInfo, GpuInfo
from suanli.devices.device import Event, Kind, MemoryUse, fingerprint
from suanli.devices.gpu_facts import ask, nvml_session


class CudaEvent:
    """A timing event in the device's current stream."""

    def __init__(self, torch: Any, index: int) -> None:
        self._torch = torch
        self._index = index
        self._event = torch.cuda.Event(enable_timing=True)

    def record(self) -> None:
        """Put the event behind the work queued so far."""
        with self._torch.cuda.device(self._index):
            self._event.record()

    def seconds_since(self, earlier: Event) -> float:
        """Seconds of device time between two recorded events; waits for this one.

        Raises:
            ValueError: The earlier event is another kind of device's.
        """
        if not isinstance(earlier, CudaEvent):
            raise ValueError("both events must be recorded on the GPU before they are compared")
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000


class CudaDevice:
    """One GPU.

    Args:
        gpu: Its facts, with torch's index.
        torch: The `torch` module, or a stand-in; imported where None.
        nvml: The `pynvml` module, or a stand-in; imported on use where None.
    """

    kind: Kind = "cuda"

    def __init__(self, gpu: GpuInfo, *, torch: Any = None, nvml: Any = None) -> None:
        if torch is None:
            import torch as real

            torch = real
        self.gpu = gpu
        self.name = f"cuda:{gpu.index}"
        self.torch_device = self.name
        self._torch = torch
        self._nvml = nvml

    @property
    def info(self) -> DeviceInfo:
        """Identity; the fingerprint covers name, capability, memory, driver and power limit."""
        gpu = self.gpu
        return DeviceInfo(
            name=self.name,
            title=gpu.name,
            fingerprint=fingerprint(
                gpu.name,
                gpu.compute_capability,
                gpu.multiprocessors,
                gpu.memory_bytes,
                gpu.driver,
                gpu.power_limit_w,
            ),
            memory_bytes=gpu.memory_bytes,
        )

    def synchronize(self) -> None:
        """Wait until the GPU has done all queued work of this process."""
        self._torch.cuda.synchronize(self.gpu.index)

    def event(self) -> CudaEvent:
        """A fresh timing event."""
        return CudaEvent(self._torch, self.gpu.index)

    def memory(self) -> MemoryUse:
        """Bytes used by everyone now; this process's peak in torch's allocator; all bytes."""
        free, total = self._torch.cuda.mem_get_info(self.gpu.index)
        peak = int(self._torch.cuda.max_memory_allocated(self.gpu.index))
        return MemoryUse(used=int(total - free), peak=peak, total=int(total))

    def reset_peak_memory(self) -> None:
        """Start a new peak in torch's allocator."""
        self._torch.cuda.reset_peak_memory_stats(self.gpu.index)

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded (Volta and newer), else None."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def power_w(self) -> float | None:
        """Watts as the driver averages them, else None."""
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1000

    def set_threads(self, threads: int) -> None:
        """Host threads of torch: what stays on the CPU beside a GPU."""
        self._torch.set_num_threads(threads)

    def _ask(self, question: str) -> float | None:
        """One NVML figure of this card, found by UUID because indices differ from torch's."""
        with nvml_session(self._nvml) as nvml:
            if nvml is None or self.gpu.uuid is None:
                return None
            handle = ask(nvml.nvmlDeviceGetHandleByUUID, self.gpu.uuid)
            if handle is None:
                return None
            answer: float | None = ask(getattr(nvml, question), handle)
            return answer
