"""What a change of plan does to operators whose time is known: expected over present time.

A step that was measured says more than any model of it, so the model is only asked for ratios: how
much longer or shorter an operator takes in another precision, layout or when it is fused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
# the smaller the part, because data has to be laid out for them. Bytes moved over bytes counted: a
# store of new data also reads it, norms read twice. Measured on two cores of a Xeon with AMX,
# 2026-11-21, by `benchmarks/profiling.py` over the built-in workloads.
_SHARE: dict[str, dict[KernelKind, float]] = {
    "fp32": {"product": 0.8, "convolution": 0.7, "attention": 0.5, "recurrent": 0.4},
    "bf16": {"product": 0.5, "convolution": 0.4, "attention": 0.3, "recurrent": 0.2},
    "int8": {"product": 0.4, "convolution": 0.35, "attention": 0.3, "recurrent": 0.2},
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
# Convolutions on images that lie channels first are copied into the units' layout and back.
_REORDERS = 1.0
# Part of the bytes between operators, and of their calls, that is left after fusion.
_FUSED_TRAFFIC: dict[Fused, float] = {"none": 1.0, "compiled": 0.5, "engine": 0.1}
_FUSED_CALLS: dict[Fused, float] = {"none": 1.0, "compiled": 0.1, "engine": 0.05}


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a step's operators are run.

    Attributes:
        precision: What products run in, and how wide data between operators is.
        channels_last: Whether images lie channels last.
        fused: By whom operators are fused.
        autocast: Whether weights stay in fp32 and are narrowed in every step.
    """

    precision: str = "fp32"
    channels_last: bool = False
    fused: Fused = "none"
    autocast: bool = False


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


def _cpu_s(op: Operator, manner: Manner, ceilings: Ceilings) -> float:
    kind = kind_of(op)
    if kind == "free":
        return 0.0
    precision = "fp32" if op.phase == "optimizer" else manner.precision
    fused = manner.fused if kind in ("pointwise", "rows") else "none"
    read = narrowed(op.bytes_read, op.dtype, precision)
    written = narrowed(op.bytes_written, op.dtype, precision)
    memory_s, _ = traffic_s(ceilings, read=read, written=written, working_set=read + written)
    compute_s = 0.0
    if op.matmul:
        rate = achieved(ceilings, precision) or achieved(ceilings, "fp32")
        share = _SHARE.get(precision, _SHARE["fp32"]).get(kind, 0.5)
        compute_s = op.flops / (rate * share) if rate else 0.0
    call_s = _BACKWARD_CALL_S if op.phase == "backward" else _CALL_S
    reorder_s = 0.0
    if kind == "convolution" and not manner.channels_last and _is_image(op):
        reorder_s = _REORDERS * memory_s
    if manner.autocast and op.matmul and op.phase == "forward":
        cast, _ = traffic_s(
            ceilings,
            read=op.parameter_bytes,
            written=op.parameter_bytes / 2,
            working_set=1.5 * op.parameter_bytes,
        )
        memory_s += cast
    moved_s = memory_s * _TRAFFIC.get(kind, 1.0) * _FUSED_TRAFFIC[fused]
    calls_s = call_s * _FUSED_CALLS[fused]
    return max(compute_s, moved_s) + reorder_s + calls_s


def _is_image(op: Operator) -> bool:
    return any(len(shape) == 4 for shape in op.input_shapes)
