"""The speed of light: the least time that a device's ceilings allow for the work."""

from suanli.base.hardware import Ceilings
from suanli.base.work import BoundBy, Operator, SpeedOfLight, Work
from suanli.cost.rates import element_bytes, narrowed, peak, traffic_s

# F(4x4, 3x3) makes a 4x4 tile of outputs with 36 multiplications instead of 144, F(2x2, 3x3) a
# 2x2 tile with 16 instead of 36 (2.25x). Lavin and Gray, "Fast Algorithms for Convolutional Neural
# Networks", 2016. Libraries use both, so the bound takes the larger saving.
WINOGRAD_SAVING = 4.0
# Below this length the output of a 3x3 convolution does not tell its stride for sure.
_SHORT = 6


def speed_of_light(
    work: Work,
    ceilings: Ceilings,
    *,
    precision: str,
    weight_precision: str | None = None,
    measured_ms: float | None = None,
    winograd: bool = False,
) -> SpeedOfLight:
    """A lower bound on the time of one step, the largest of three terms that may overlap.

    * compute: operations of the matrix products at the rate that the plan's precision may use.
      Products with zero padding and under a causal mask are left out, as are all other operators:
      a fused implementation hides them, and how few it gets by with cannot be said.
    * memory: the bytes that no fusion avoids, at the read rate of a set of that size. Inference:
      each parameter that is read once, the step's inputs and outputs. Training: the same, and the
      optimiser's states read and written, and the parameters written. Gradients and activations
      are left out: an update fused into the backward pass needs no stored gradient, and
      recomputation no stored activation.
    * overhead: one call.

    The bound is for the operators of the model as captured. Rewriting the model into a smaller one
    with equal answers (merged adapters, pruned zeros) is not covered.

    Args:
        work: Of one step.
        ceilings: Of the device that runs it.
        precision: What the plan's products run in.
        weight_precision: What its weights are stored in; by default `precision` for inference, and
            as captured for training, where master weights are kept.
        measured_ms: A measured step, for `fraction`.
        winograd: Whether the plan's library may use Winograd's algorithm, which does four times
            fewer multiplications in 3x3 convolutions of stride one. True for fp32 plans of
            libraries that have it; the fraction then is of a bound that few layers can reach.

    Returns:
        The bound, with the marks of the ceilings that it rests on. A term whose ceiling is unknown
        is 0, which keeps the bound a bound.

    Raises:
        BadInputError: A precision is unknown.
    """
    marks: set[str] = set()
    compute_ms = 0.0
    rate = peak(ceilings, precision)
    if rate is not None:
        flops = sum(_least_flops(op, winograd=winograd) for op in work.operators if op.matmul)
        compute_ms = 1e3 * flops / rate.value
        marks.add(rate.mark)
    memory_ms, mark = _memory_ms(work, ceilings, precision, weight_precision)
    if mark is not None:
        marks.add(mark)
    overhead_ms = 1e3 * ceilings.overhead_s()
    if overhead_ms:
        marks |= {c.mark for c in ceilings.items if c.what == "call_overhead" and c.best}
    terms: dict[BoundBy, float] = {
        "compute": compute_ms,
        "memory": memory_ms,
        "overhead": overhead_ms,
    }
    bound_by = max(terms, key=lambda name: terms[name])
    ms = terms[bound_by]
    return SpeedOfLight(
        ms=ms,
        bound_by=bound_by,
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        overhead_ms=overhead_ms,
        fraction=ms / measured_ms if measured_ms else None,
        marks=tuple(sorted(marks)),
    )


def operator_sol(op: Operator, ceilings: Ceilings, precision: str) -> tuple[float, BoundBy]:
    """Least milliseconds of one operator that runs by itself, and what binds it.

    It reads its inputs and writes its outputs, at the plan's width where that is narrower, at the
    read rate of a set of that size. These do not add up to the bound of the whole model: fused
    operators need not store what passes between them.

    Raises:
        BadInputError: The precision is unknown.
    """
    rate = peak(ceilings, precision)
    compute_s = op.least_flops / rate.value if op.matmul and rate is not None else 0.0
    read = narrowed(op.bytes_read, op.dtype, precision)
    written = narrowed(op.bytes_written, op.dtype, precision)
    memory_s, _ = traffic_s(ceilings, read=read, written=written, working_set=read + written)
    bound_by: BoundBy = "compute" if compute_s > memory_s else "memory"
    return 1e3 * max(compute_s, memory_s), bound_by


def _memory_ms(
    work: Work, ceilings: Ceilings, precision: str, weight_precision: str | None
) -> tuple[float, str | None]:
    updates = [op for op in work.operators if op.phase == "optimizer"]
    if weight_precision is None and not updates:
        weight_precision = precision
    weights = _weight_bytes(work, weight_precision)
    # An update reads parameter, gradient and states; the first two have the parameter's size.
    states = sum(max(0, op.bytes_read - 2 * op.parameter_bytes) for op in updates)
    updated = sum(op.bytes_written for op in updates)
    read = weights + work.input_bytes + states
    written = work.output_bytes + updated
    touched = read + work.output_bytes
    seconds, mark = traffic_s(ceilings, read=read, written=written, working_set=touched)
    return 1e3 * seconds, mark


def _weight_bytes(work: Work, weight_precision: str | None) -> float:
    """Bytes of the parameters that a step reads, each once, at most as stored in the model."""
    stored = work.read_parameter_bytes
    if stored is None:
        stored = work.parameter_bytes
    elements = work.parameters if work.read_parameters is None else work.read_parameters
    if weight_precision is None:
        return stored
    return min(stored, elements * element_bytes(weight_precision))


def _least_flops(op: Operator, *, winograd: bool) -> float:
    if winograd and _winograd_fits(op):
        return op.least_flops / WINOGRAD_SAVING
    return op.least_flops


def _winograd_fits(op: Operator) -> bool:
    """Whether a convolution has 3x3 taps and may have stride one, forward or backward.

    The record holds shapes and no stride: an output of about half the input's length has stride
    two. Where it is too short to tell, it counts as fitting, which keeps the bound a bound.
    """
    if not op.name.startswith("convolution"):
        return False
    backward = op.name.endswith("_backward")
    if len(op.input_shapes) < (3 if backward else 2):
        return False
    weight = op.input_shapes[2 if backward else 1]
    if len(weight) != 4 or weight[2:] != (3, 3):
        return False
    inputs = op.input_shapes[1 if backward else 0]
    outputs = op.input_shapes[0] if backward else op.output_shapes[0]
    return all(
        near <= _SHORT or 2 * far > near + 1
        for near, far in zip(inputs[-2:], outputs[-2:], strict=True)
    )
