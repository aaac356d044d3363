"""Time of a step on the CPU at hand, from the ceilings that `suanli doctor` measured."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from suanli.base.hardware import Ceilings
from suanli.base.prediction import Interval, KernelKind, PlanKind
from suanli.base.work import Operator, Work
from suanli.cost.intervals import interval
from suanli.cost.parameters import CpuParameters, parameters
from suanli.cost.rates import achieved, narrowed, read_rate
from suanli.cost.work_kernels import kind_of

# Operators whose data pass through the caches between two uses of a storage: set by hand.
_STORAGES_BETWEEN = 4.0
# Operators whose kernels take one element of a window after the other, and what a window costs
# beside its elements, as many of them: races of pools of 2 x 2 and 3 x 3 in one process.
_BY_ELEMENT = ("max_pool",)
_WINDOW_ELEMENTS = 10
# What a window costs in the backward pass, where only its largest element is touched.
_WINDOW_BACKWARD = 3
# A batch norm that trains reads its input for the means, for the variances and to normalise
# (`batch_norm_cpu` in torch's Normalization.cpp).
_STATISTICS_LOOKS = 3


def predict_cpu_ms(
    work: Work,
    ceilings: Ceilings,
    *,
    precision: str,
    plan_kind: PlanKind = "eager",
    fresh_bytes: float = 0.0,
    constants: CpuParameters | None = None,
) -> Interval:
    """Milliseconds of one step: the sum of its operators, each by the longer of two times.

    Arithmetic at the rate that the best library reached on a large product, times the share that
    this kind of operator gets of it; bytes at the read rate of a set of some operators' size. Each
    operator costs its call; small operators cost little else. Memory that the system hands out
    anew in every step is cleared page by page.

    Args:
        work: Of one step.
        ceilings: Measured here.
        precision: What products run in, and how wide data between operators is.
        plan_kind: Operator by operator, or compiled and fused.
        fresh_bytes: Of memory handed out anew in a step of inference: `suanli.cost.heap`.
        constants: Other parameters than those that ship.

    Raises:
        BadInputError: There are no products in this precision.
    """
    p = constants or parameters().cpu
    rate = achieved(ceilings, precision) or achieved(ceilings, "fp32") or float("inf")
    step = setting(work.operators)
    demands = [demand(op, ceilings, precision, step) for op in work.operators]
    total_s = sum(seconds_of(need, rate, plan_kind, p) for need in demands)
    total_s += p.fresh_s_per_byte * bytes_anew(work.operators, fresh_bytes)
    return interval(1e3 * max(total_s, ceilings.overhead_s()), p.spread)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What operators have to know of the step that they are in.

    Attributes:
        training: Whether it has a backward pass.
        weights_bytes: Of all weights that its forward pass reads.
    """

    training: bool = False
    weights_bytes: int = 0


def setting(operators: Iterable[Operator]) -> Setting:
    """The setting of a step's operators."""
    forward, training = 0, False
    for op in operators:
        forward += op.parameter_bytes if op.phase == "forward" else 0
        training = training or op.phase == "backward"
    return Setting(training=training, weights_bytes=forward)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What an operator asks of this CPU, whatever the constants.

    Attributes:
        kind: The family of kernels; "grouped" for convolutions of one channel per group.
        flops: Of its products.
        steps: Elements that one of the threads takes one after the other.
        memory_s: Seconds to move its data once.
        layout_s: The same, where images are brought to the library's layout and back.
        weights_s: Seconds to bring its weights from where all of them lie into the order in which
            the library multiplies by them.
        backward: Whether it is called in the backward pass.
    """

    kind: KernelKind | Literal["grouped"]
    flops: float = 0.0
    steps: float = 0.0
    memory_s: float = 0.0
    layout_s: float = 0.0
    weights_s: float = 0.0
    backward: bool = False


def demand(op: Operator, ceilings: Ceilings, precision: str, step: Setting) -> Demand:
    """What an operator asks for.

    Args:
        op: The operator.
        ceilings: Measured here.
        precision: What products run in, and how wide data between operators is.
        step: The step that it is in.
    """
    kind = kind_of(op)
    if kind == "free":
        return Demand(kind=kind)
    stored = "fp32" if op.phase == "optimizer" else precision
    looks = _STATISTICS_LOOKS if step.training and _takes_statistics(op) else 1
    read = narrowed(looks * op.bytes_read, op.dtype, stored)
    written = narrowed(op.bytes_written, op.dtype, stored)
    memory_s = _memory_s(ceilings, read, written)
    return Demand(
        kind="grouped" if kind == "convolution" and _single_channels(op) else kind,
        flops=op.flops if op.matmul else 0.0,
        steps=_steps(op) / max(1, ceilings.threads),
        memory_s=memory_s,
        layout_s=memory_s if kind == "convolution" else 0.0,
        weights_s=_weights_s(op, kind, ceilings, step) if op.matmul else 0.0,
        backward=op.phase == "backward",
    )


def seconds_of(need: Demand, rate: float, plan_kind: PlanKind, p: CpuParameters) -> float:
    """Seconds of an operator.

    Args:
        need: What it asks for.
        rate: Operations per second of a large product.
        plan_kind: As in `predict_cpu_ms`.
        p: The constants.
    """
    if need.kind == "free":
        return 0.0
    fused = plan_kind == "compiled" and need.kind in ("pointwise", "rows")
    call_s = p.backward_call_s if need.backward else p.call_s
    convolution = "convolution" if need.kind == "grouped" else need.kind
    moved_share = p.fused_traffic if fused else p.traffic.get(convolution, 1.0)
    share = p.grouped_share if need.kind == "grouped" else p.share.get(need.kind, 0.5)
    if need.backward and convolution == "convolution":
        share *= p.gradient_share
    compute_s = need.flops / (rate * share) + need.steps * p.element_s
    apart_s = p.layout_traffic * need.layout_s + p.weights_traffic * need.weights_s
    busy_s = max(compute_s, need.memory_s * moved_share) + apart_s
    return busy_s + call_s * (0.3 if fused else 1.0)


def _steps(op: Operator) -> float:
    """Elements that are taken one after the other, windows counted as some."""
    if not any(word in op.name for word in _BY_ELEMENT):
        return 0.0
    if op.phase == "backward":
        return float(_WINDOW_BACKWARD * prod(op.input_shapes[0]))
    return op.flops + float(_WINDOW_ELEMENTS * prod(op.output_shapes[0]))


def _takes_statistics(op: Operator) -> bool:
    return op.phase == "forward" and "batch_norm" in op.name


def bytes_anew(operators: Iterable[Operator], replayed: float) -> float:
    """Bytes of a step that lie in memory handed out anew: each page is cleared first.

    In inference those of the replay. In training the results of the forward pass, which are kept
    until the backward pass, and the gradients, which are kept until the update: a rule
    that fits. Counts are about half of that in the median, but with them training is predicted too
    fast; pages that the host of a virtual machine has taken back cost several times as much.

    Args:
        operators: Of the step.
        replayed: As `suanli.cost.heap` found.
    """
    kept, training = 0, False
    for op in operators:
        training = training or op.phase == "backward"
        if op.phase == "optimizer":
            kept += op.parameter_bytes
        elif op.phase == "forward" and kind_of(op) != "free":
            kept += op.bytes_written
    return float(kept) if training else replayed


def _memory_s(ceilings: Ceilings, read: float, written: float) -> float:
    """Seconds to move an operator's data; 0 where no rate was measured.

    Results are new storages, so that a store first fetches the line it goes to, and the data of
    some operators pass through the caches before a storage is used again.
    """
    rate = read_rate(ceilings, _STORAGES_BETWEEN * (read + written))
    return (read + 2.0 * written) / rate.value if rate else 0.0


def _weights_s(op: Operator, kind: KernelKind, ceilings: Ceilings, step: Setting) -> float:
    """Seconds to bring a product's weights into the library's order; 0 where no rate was measured.

    They were last used in another step, so that they come from wherever all weights together lie.
    Products pack them piece by piece into a cache; convolutions make a copy, and one of their
    gradient.
    """
    rate = read_rate(ceilings, float(step.weights_bytes))
    copied = kind == "convolution"
    passes = (3 if copied else 1) * (2 if copied and op.phase == "backward" else 1)
    return passes * op.parameter_bytes / rate.value if rate else 0.0


def _single_channels(op: Operator) -> bool:
    """Whether a convolution has one channel in each of several groups."""
    backward = op.name.endswith("_backward")
    index = 2 if backward else 1
    if len(op.input_shapes) <= index:
        return False
    weight, data = op.input_shapes[index], op.input_shapes[index - 1]
    return len(weight) > 2 and weight[1] == 1 < data[1 - len(weight)]
