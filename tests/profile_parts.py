"""Planted ceilings, recordings and operators for the tests of profiles."""

from collections.abc import Sequence

from suanli.base.hardware import Ceiling, Ceilings, DeviceInfo
from suanli.base.work import Operator
from suanli.profiling.recording import KernelRun, Node, Recording
from suanli.profiling.stopwatch import Part

DEVICE = DeviceInfo(name="cpu", title="Planted Processor", fingerprint="0" * 16, memory_bytes=2**34)


def ceilings(*, bf16: float = 1.0, fp32: float = 100e9) -> Ceilings:
    """A processor of `fp32` operations per second, and `bf16` times that in bf16."""
    items = [
        Ceiling(what="matmul", unit="FLOP/s", dtype="fp32", hardware=fp32, achieved=0.8 * fp32),
        Ceiling(
            what="matmul",
            unit="FLOP/s",
            dtype="bf16",
            hardware=bf16 * fp32,
            achieved=0.8 * bf16 * fp32,
        ),
        Ceiling(what="read", unit="B/s", hardware=100e9, working_set_bytes=2**20),
        Ceiling(what="read", unit="B/s", hardware=25e9, working_set_bytes=2**24),
        Ceiling(what="read", unit="B/s", hardware=20e9, working_set_bytes=2**31),
        Ceiling(what="call_overhead", unit="s", hardware=1e-6),
    ]
    return Ceilings(device=DEVICE, items=tuple(items), threads=2, measured_at="")


def node(
    name: str,
    start: float,
    end: float,
    *children: Node,
    part: Part = "forward",
    device_ms: float = 0.0,
) -> Node:
    return Node(
        name=name,
        start_ms=start,
        end_ms=end,
        part=part,
        children=children,
        device_ms=device_ms,
        calls=1 + sum(c.calls for c in children),
    )


def recording(*roots: Node, ms: float = 0.0, device: Sequence[KernelRun] = ()) -> Recording:
    """A step whose parts begin where its calls say so."""
    end = ms or max(r.end_ms for r in roots)
    parts: list[tuple[Part, float, float]] = []
    for root in roots:
        if not parts or parts[-1][0] != root.part:
            if parts:
                parts[-1] = (parts[-1][0], parts[-1][1], root.start_ms)
            parts.append((root.part, root.start_ms, end))
    return Recording(ms=end, parts=tuple(parts), roots=roots, device=tuple(device))


def product(module: str = "", *, flops: int = 10**9, dtype: str = "fp32", **fields) -> Operator:
    settings = {"name": "addmm", "bytes_read": 10**6, "bytes_written": 10**5} | fields
    return Operator(module=module, flops=flops, dtype=dtype, matmul=True, **settings)


def pointwise(name: str = "relu", module: str = "", size: int = 10**6, **fields) -> Operator:
    return Operator(
        name=name, module=module, flops=size // 4, bytes_read=size, bytes_written=size, **fields
    )
