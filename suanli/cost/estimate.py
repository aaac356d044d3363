"""A quick guess of a plan's step time, for the order in which plans are tried and nothing else."""

from suanli.base.hardware import Ceilings
from suanli.base.work import Work
from suanli.cost.rates import achieved, narrowed, traffic_s


def estimate_ms(work: Work, ceilings: Ceilings, precision: str, *, fused: bool = True) -> float:
    """Milliseconds that one step would take if each operator met its roofline.

    The sum over operators of the longer of two times: operations at the rate that a library
    reached (Williams et al., "Roofline", 2009), and the operator's own bytes. Operators that move
    or compute cost one call each.

    Args:
        work: Of one step.
        ceilings: Of the device.
        precision: What products run in, and how wide data between operators is.
        fused: Whether the backend folds everything into the products before it, so that other
            operators cost nothing. Eager execution does not.

    Raises:
        BadInputError: The precision is unknown.
    """
    rate = achieved(ceilings, precision) or achieved(ceilings, "fp32")
    call_s = ceilings.overhead_s()
    total = 0.0
    for op in work.operators:
        runs = op.flops + op.bytes_read + op.bytes_written > 0
        if not runs or (fused and not op.matmul and op.phase != "optimizer"):
            continue
        compute_s = op.flops / rate if op.matmul and rate else 0.0
        read = narrowed(op.bytes_read, op.dtype, precision)
        written = narrowed(op.bytes_written, op.dtype, precision)
        memory_s, _ = traffic_s(ceilings, read=read, written=written, working_set=read + written)
        total += max(compute_s, memory_s) + call_s
    return 1e3 * max(total, call_s)
