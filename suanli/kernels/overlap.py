"""Copies and kernel on several streams: a timeline simulated from a card's figures.

A GPU has one engine for copies to it, one for copies from it, and its multiprocessors. Work on one
stream is done in order; work on different streams overlaps where the engines are different. The
kernel's chunks are taken to fill the card, so that two of them do not run at once.
"""

from suanli.base.errors import BadInputError
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.kernel_results import CopyOverlap, CopySlot

# One direction of 16 lanes in bytes per second: PCI-SIG's transfer rate with 128b/130b coding;
# what programs reach with pinned memory is 80 to 90 % of it.
_PCIE = {3: 15.75e9, 4: 31.5e9, 5: 63.0e9, 6: 121.0e9}


def pcie_bytes_per_s(gpu: GpuSheet) -> float | None:
    """Bytes per second between host and card in one direction; None where unknown."""
    return _PCIE.get(gpu.pcie_generation or 0)


def simulate(
    gpu: GpuSheet,
    *,
    host_to_device_bytes: int,
    device_to_host_bytes: int,
    kernel_ms: float,
    streams: int,
    chunks: int = 8,
) -> CopyOverlap:
    """Cut the work into chunks and hand them to streams in turn.

    Args:
        gpu: The card.
        host_to_device_bytes: All inputs.
        device_to_host_bytes: All outputs.
        kernel_ms: The kernel's time for all of it.
        streams: How many; chunk c goes to stream c mod `streams`.
        chunks: Into how many the work is cut.

    Raises:
        BadInputError: The card's link is unknown, or a number is not positive.
    """
    rate = pcie_bytes_per_s(gpu)
    if rate is None:
        raise BadInputError(f"the sheet of {gpu.name} names no PCIe generation")
    if streams < 1 or chunks < 1:
        raise BadInputError("streams and chunks must be at least 1")
    steps = (
        ("host_to_device", host_to_device_bytes / rate * 1e3 / chunks),
        ("kernel", kernel_ms / chunks),
        ("device_to_host", device_to_host_bytes / rate * 1e3 / chunks),
    )
    engine_free = {name: 0.0 for name, _ in steps}
    stream_free = [0.0] * streams
    slots = []
    for chunk in range(chunks):
        stream = chunk % streams
        for name, duration in steps:
            begin = max(engine_free[name], stream_free[stream])
            end = begin + duration
            engine_free[name] = stream_free[stream] = end
            slots.append(
                CopySlot(stream=stream, what=name, chunk=chunk, begin_ms=begin, end_ms=end)
            )
    return CopyOverlap(
        gpu=gpu.name,
        streams=streams,
        chunks=chunks,
        host_to_device_bytes=host_to_device_bytes,
        device_to_host_bytes=device_to_host_bytes,
        serial_ms=sum(duration for _, duration in steps) * chunks,
        total_ms=max(slot.end_ms for slot in slots),
        slots=tuple(slots),
        assumptions=(
            f"PCIe {gpu.pcie_generation} x16 at {rate / 1e9:g} GB/s each way (theoretical), pinned "
            "memory, one copy engine each way, the kernel at its static bound"
        ),
    )
