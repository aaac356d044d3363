"""Profiles of steps on a device, from recordings: no GPU is needed."""

from suanli.profiling import joining, rows
from suanli.profiling import recording as recording_module
from suanli.profiling.recording import KernelRun
from tests.profile_parts import node, product, recording


def test_a_device_takes_no_time_for_calls_that_start_no_kernel() -> None:
    host_only = node("aten::index", 0, 3)
    inside = node("aten::to", 3, 9, node("aten::copy_", 3, 9, device_ms=2.0), device_ms=2.0)
    step = recording(
        node("aten::addmm", 0, 0.1, device_ms=5.0),
        host_only,
        inside,
        ms=10,
        device=[KernelRun(name="gemm", start_ms=1, end_ms=6)],
    )
    found = joining.join(step, [product()])
    assert [(j.node.name, j.ms) for j in found] == [
        ("aten::addmm", 5.0),
        ("aten::index", 0.0),
        ("aten::copy_", 2.0),
    ]
    kept = {row.name for row in rows.grouped([found])}
    assert kept == {"addmm", "copy"}, "what the device does not do takes none of its step"


def test_copies_between_host_and_device_are_no_operators_time() -> None:
    class Event:
        """As torch's profiler gives it."""

        name, cpu_children = "aten::copy_", ()

        class time_range:
            start, end = 0.0, 1000.0

        class Kernel:
            def __init__(self, name: str, duration: float) -> None:
                self.name, self.duration = name, duration

        kernels = (
            Kernel("Memcpy HtoD (Pageable -> Device)", 4000.0),
            Kernel("Memcpy DtoD (Device -> Device)", 500.0),
            Kernel("ncclDevKernel_AllReduce_Sum_f32", 700.0),
        )

    found = recording_module._node(Event(), 0.0, "forward")
    assert found.device_ms == 0.5
    assert found.kernels == ("Memcpy DtoD (Device -> Device)",)
