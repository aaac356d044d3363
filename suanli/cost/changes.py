"""What a change of plan does to operators whose time is known: expected over present time.

A step that was measured says more than any model of it, so the model is only asked for ratios: how
much longer or shorter an operator takes in another precision, layout or when it is fused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from suanli.base.gpu_sheet import GpuSheet
from suanli.base.hardware import Ceilings
from suanli.base.prediction import KernelKind
from suanli.base.work import Operator, Work
from suanli.cost.predictor import predict_operators
from suanli.cost.rates import achieved, narrowed, traffic_s
from suanli.cost.work_kernels import kind_of

Fused = Literal["none", "compiled", "engine"]

# Part of the best library rate that operators reach on a CPU, by precision: the faster the units,
# the smaller the part, because data has to be brought to them. Bytes moved over bytes counted: a
# store of new data also reads it, norms read twice. From races over built-in workloads on a Xeon
# with AMX (`benchmarks/profiling.py`), 2026-11-21.
_SHARE: dict[str, dict[KernelKind, float]] = {
    "fp32": {"product": 0.8, "convolution": 0.7, "attention": 0.5, "recurrent": 0.4},
    "bf16": {"product": 0.35, "convolution": 0.4, "attention": 0.2, "recurrent": 0.1},
    "int8": {"product": 0.3, "convolution": 0.3, "attention": 0.2, "recurrent": 0.1},
}
_TRAFFIC: dict[KernelKind, float] = {
    "pointwise": 1.5,
    "rows": 2.0,
    "update": 1.5,
    "product": 1.2,
    "convolution": 1.2,
    "attention": 1.2,
    "recurrent": 1.2,
}
_CALL_S, _BACKWARD_CALL_S = 4e-6, 8e-6
# What oneDNN's products cost beside MKL's of fp32: looking the kernel up, and the weights' copy
# into the units' layout at each call. An engine does that once.
_LIBRARY_CALL_S = 1.5e-5
# Images that lie channels first are copied into the units' layout and back; passes over them at the
# rate of reading. In bf16 the library does it element by element.
_IMAGE_COPIES = {"fp32": 0.5, "bf16": 10.0}
# Part of the bytes between operators, and of their calls, that is left after fusion.
_FUSED_TRAFFIC: dict[Fused, float] = {"none": 1.0, "compiled": 0.5, "engine": 0.1}
_FUSED_CALLS: dict[Fused, float] = {"none": 1.0, "compiled": 0.1, "engine": 0.05}
# glibc takes blocks from here on from the system and gives them back at once (its
# DEFAULT_MMAP_THRESHOLD_MAX on 64-bit systems), so that each use faults its pages in anew.
_FRESH_BYTES = 32 * 2**20
PAGE_FAULT_S = 9e-7  # one page of 4 KiB on a virtual machine: the fault and its clearing


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a step's operators are run.

    Attributes:
        precision: What products run in, and how wide data between operators is.
        channels_last: Whether images lie channels last.
        fused: By whom operators are fused.
        autocast: Whether weights stay in fp32 and are narrowed in every step.
        keeps_memory: Whether freed memory stays in the process.
    """

    precision: str = "fp32"
    channels_last: bool = False
    fused: Fused = "none"
    autocast: bool = False
    keeps_memory: bool = False


def cpu_ratios(
    operators: Sequence[Operator], old: Manner, new: Manner, ceilings: Ceilings
) -> list[float]:
    """Expected over present time of each operator on a CPU.

    Args:
        operators: As they run now.
        old: How they run now.
        new: How they would.
        ceilings: Of the processor.

    Raises:
        BadInputError: There are no products in a precision.
    """
    found = []
    for op in operators:
        before = _cpu_s(op, old, ceilings)
        found.append(_cpu_s(op, new, ceilings) / before if before > 0 else 1.0)
    return found


def gpu_ratios(
    operators: Sequence[Operator], old: Manner, new: Manner, sheet: GpuSheet
) -> list[float]:
    """The same on a card, from the operator model that `suanli predict` uses.

    Raises:
        BadInputError: The card has no units for a precision.
    """
    before, after = (_gpu_ms(operators, manner, sheet) for manner in (old, new))
    return [n / o if o > 0 else 1.0 for o, n in zip(before, after, strict=True)]


def _gpu_ms(operators: Sequence[Operator], manner: Manner, sheet: GpuSheet) -> list[float]:
    work = Work(
        operators=tuple(operators),
        batch=1,
        parameters=0,
        parameter_bytes=0,
        input_bytes=0,
        output_bytes=0,
    )
    step = predict_operators(
        work,
        sheet,
        dtype=manner.precision,
        plan_kind="eager" if manner.fused == "none" else "compiled",
        autocast=manner.autocast,
        channels_last=manner.channels_last,
    )
    return [op.ms for op in step.operators]


def scaled(op: Operator, times: float) -> Operator:
    """The same operator on so many times the samples: its parameters stay."""
    return replace(
        op,
        flops=int(op.flops * times),
        needed_flops=None if op.needed_flops is None else int(op.needed_flops * times),
        bytes_read=int(op.parameter_bytes + (op.bytes_read - op.parameter_bytes) * times),
        bytes_written=int(op.bytes_written * times),
    )


def batch_ratios(
    operators: Sequence[Operator], manner: Manner, ceilings: Ceilings, times: float
) -> list[float]:
    """Expected time on so many times the samples over the present time, operator by operator.

    Raises:
        BadInputError: There are no products in the precision.
    """
    found = []
    for op in operators:
        before = _cpu_s(op, manner, ceilings)
        found.append(_cpu_s(scaled(op, times), manner, ceilings) / before if before > 0 else times)
    return found


def _cpu_s(op: Operator, manner: Manner, ceilings: Ceilings) -> float:
    kind = kind_of(op)
    if kind == "free":
        return 0.0
    precision = "fp32" if op.phase == "optimizer" else manner.precision
    fused = manner.fused if kind in ("pointwise", "rows") else "none"
    read = narrowed(op.bytes_read, op.dtype, precision)
    written = narrowed(op.bytes_written, op.dtype, precision)
    memory_s, _ = traffic_s(ceilings, read=read, written=written, working_set=read + written)
    compute_s = aside_s = 0.0
    if op.matmul:
        rate = achieved(ceilings, precision) or achieved(ceilings, "fp32")
        share = _SHARE.get(precision, _SHARE["fp32"]).get(kind, 0.5)
        compute_s = op.flops / (rate * share) if rate else 0.0
        aside_s = _beside(op, manner, ceilings, image=kind == "convolution" and _is_image(op))
    if op.phase == "forward" and written >= _FRESH_BYTES and fused == "none":
        aside_s += 0.0 if manner.keeps_memory else written / 4096 * PAGE_FAULT_S
    call_s = _BACKWARD_CALL_S if op.phase == "backward" else _CALL_S
    moved_s = memory_s * _TRAFFIC.get(kind, 1.0) * _FUSED_TRAFFIC[fused]
    return max(compute_s, moved_s) + aside_s + call_s * _FUSED_CALLS[fused]


def _beside(op: Operator, manner: Manner, ceilings: Ceilings, *, image: bool) -> float:
    """Seconds of what a product's library does beside the product."""
    if manner.fused == "engine":
        return 0.0
    precision, weights = manner.precision, float(op.parameter_bytes)
    seconds = 0.0
    if precision != "fp32" or image:
        narrow = narrowed(weights, op.dtype, precision)
        copy_s, _ = traffic_s(ceilings, read=narrow, written=narrow, working_set=2 * narrow)
        seconds += copy_s + _LIBRARY_CALL_S
    if image and not manner.channels_last:
        read = narrowed(op.bytes_read - weights, op.dtype, precision)
        written = narrowed(op.bytes_written, op.dtype, precision)
        copy_s, _ = traffic_s(ceilings, read=read, written=written, working_set=read + written)
        seconds += copy_s * _IMAGE_COPIES.get(precision, 1.0)
    if manner.autocast and op.phase == "forward":
        cast_s, _ = traffic_s(
            ceilings, read=weights, written=weights / 2, working_set=1.5 * weights
        )
        seconds += cast_s
    return seconds


def _is_image(op: Operator) -> bool:
    return any(len(shape) == 4 for shape in op.input_shapes)
