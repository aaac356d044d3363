"""Time of a step on the CPU at hand, from the ceilings that `suanli doctor` measured."""

from math import prod

from suanli.base.hardware import Ceilings
from suanli.base.prediction import Interval, PlanKind
from suanli.base.work import Operator, Work
from suanli.cost.intervals import interval
from suanli.cost.parameters import CpuParameters, parameters
from suanli.cost.rates import achieved, narrowed, read_rate
from suanli.cost.work_kernels import kind_of

# Operators whose data pass through the caches between two uses of a storage: set by hand.
_STORAGES_BETWEEN = 4.0


def predict_cpu_ms(
    work: Work,
    ceilings: Ceilings,
    *,
    precision: str,
    plan_kind: PlanKind = "eager",
    constants: CpuParameters | None = None,
) -> Interval:
    """Milliseconds of one step: the sum of its operators, each by the longer of two times.

    Arithmetic at the rate that the best library reached on a large product, times the share that
    this kind of operator gets of it; bytes at the read rate of a set of some operators' size. Each
    operator costs its call; small operators cost little else.

    Args:
        work: Of one step.
        ceilings: Measured here.
        precision: What products run in, and how wide data between operators is.
        plan_kind: Operator by operator, or compiled and fused.
        constants: Other parameters than those that ship.

    Raises:
        BadInputError: There are no products in this precision.
    """
    p = constants or parameters().cpu
    rate = achieved(ceilings, precision) or achieved(ceilings, "fp32") or float("inf")
    total_s = sum(operator_s(op, ceilings, rate, precision, plan_kind, p) for op in work.operators)
    return interval(1e3 * max(total_s, ceilings.overhead_s()), p.spread)


def operator_s(
    op: Operator,
    ceilings: Ceilings,
    rate: float,
    precision: str,
    plan_kind: PlanKind,
    p: CpuParameters,
) -> float:
    """Seconds of one operator.

    Args:
        op: The operator.
        ceilings: Measured here.
        rate: Operations per second of a large product.
        precision: As in `predict_cpu_ms`.
        plan_kind: As in `predict_cpu_ms`.
        p: The constants.
    """
    kind = kind_of(op)
    if kind == "free":
        return 0.0
    call_s = p.backward_call_s if op.phase == "backward" else p.call_s
    fused = plan_kind == "compiled" and kind in ("pointwise", "rows")
    moved_share = p.fused_traffic if fused else p.traffic.get(kind, 1.0)
    stored = "fp32" if op.phase == "optimizer" else precision
    read = narrowed(op.bytes_read, op.dtype, stored)
    written = narrowed(op.bytes_written, op.dtype, stored)
    memory_s = _memory_s(ceilings, read, written)
    compute_s = 0.0
    if op.matmul:
        share = p.share.get(kind, 0.5)
        if kind == "convolution" and _single_channels(op):
            share = p.grouped_share
        compute_s = op.flops / (rate * share)
    return max(compute_s, memory_s * moved_share) + call_s * (0.3 if fused else 1.0)


def _memory_s(ceilings: Ceilings, read: float, written: float) -> float:
    """Seconds to move an operator's data; 0 where no rate was measured.

    Results are new storages, so that a store first fetches the line it goes to, and the data of
    some operators pass through the caches before a storage is used again.
    """
    rate = read_rate(ceilings, _STORAGES_BETWEEN * (read + written))
    return (read + 2.0 * written) / rate.value if rate else 0.0


def _single_channels(op: Operator) -> bool:
    """Whether a convolution has one channel per group."""
    backward = op.name.endswith("_backward")
    index = 2 if backward else 1
    if len(op.input_shapes) <= index:
        return False
    weight = op.input_shapes[index]
    return len(weight) > 2 and weight[1] == 1 and prod(weight) > 0
