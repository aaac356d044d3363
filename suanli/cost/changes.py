"""What a change of plan does to operators whose time is known: expected over present time.

A step that was measured says more than any model of it, so the model is only asked for ratios: how
much longer or shorter an operator takes in another precision, layout or when it is fused.
"""

from collections.abc import Sequence
from dataclasses import replace

from suanli.base.gpu_sheet import GpuSheet
from suanli.base.hardware import Ceilings
from suanli.base.work import Operator, Work
from suanli.cost.cpu_manner import Manner, cpu_seconds
from suanli.cost.predictor import predict_operators


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
        before = cpu_seconds(op, old, ceilings)
        found.append(cpu_seconds(op, new, ceilings) / before if before > 0 else 1.0)
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
        before = cpu_seconds(op, manner, ceilings)
        found.append(
            cpu_seconds(scaled(op, times), manner, ceilings) / before if before > 0 else times
        )
    return found
