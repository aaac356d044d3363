"""Work and memory at any batch from two small captures.

Shapes, bytes and operations of nearly every model grow evenly with the batch: a constant part and a
part per sample. Two captures at different batches give both, so that a step of thousands of samples
needs no inputs of that size.
"""

from collections.abc import Callable
from dataclasses import replace

from suanli.base.errors import BadInputError
from suanli.base.memory import Block, Footprint
from suanli.base.work import Operator, Work

_Line = Callable[[int, int], int]


def work_at(low: Work, high: Work, batch: int) -> Work:
    """The work of a step of `batch` samples.

    Args:
        low: Captured at one batch.
        high: The same model at another.
        batch: Samples wanted.

    Raises:
        BadInputError: The two captures do not hold the same operators.
    """
    if batch == low.batch:
        return low
    line = _line(low.batch, high.batch, batch)
    if [op.name for op in low.operators] != [op.name for op in high.operators]:
        raise _uneven("operators")
    pairs = zip(low.operators, high.operators, strict=True)
    return replace(
        low,
        batch=batch,
        operators=tuple(_operator(a, b, line) for a, b in pairs),
        input_bytes=line(low.input_bytes, high.input_bytes),
        output_bytes=line(low.output_bytes, high.output_bytes),
        read_parameters=_optional(low.read_parameters, high.read_parameters, line),
        read_parameter_bytes=_optional(low.read_parameter_bytes, high.read_parameter_bytes, line),
    )


def footprint_at(low: Footprint, high: Footprint, batch: int) -> Footprint:
    """The allocations of a step of `batch` samples.

    Raises:
        BadInputError: The two captures do not hold the same allocations.
    """
    if batch == low.batch:
        return low
    line = _line(low.batch, high.batch, batch)
    if [b.born for b in low.blocks] != [b.born for b in high.blocks]:
        raise _uneven("allocations")
    pairs = zip(low.blocks, high.blocks, strict=True)
    blocks = tuple(_block(a, b, line) for a, b in pairs)
    return replace(low, batch=batch, blocks=blocks)


def _line(at: int, other: int, wanted: int) -> _Line:
    if at == other:
        raise BadInputError("two captures at the same batch say nothing of another one")
    steps, span = wanted - at, other - at

    def value(low: int, high: int) -> int:
        return low if low == high else max(0, low + (high - low) * steps // span)

    return value


def _operator(low: Operator, high: Operator, line: _Line) -> Operator:
    if low.input_shapes == high.input_shapes and low.output_shapes == high.output_shapes:
        return low
    return replace(
        low,
        flops=line(low.flops, high.flops),
        needed_flops=_optional(low.needed_flops, high.needed_flops, line),
        bytes_read=line(low.bytes_read, high.bytes_read),
        bytes_written=line(low.bytes_written, high.bytes_written),
        parameter_bytes=line(low.parameter_bytes, high.parameter_bytes),
        input_shapes=_shapes(low.input_shapes, high.input_shapes, line),
        output_shapes=_shapes(low.output_shapes, high.output_shapes, line),
    )


def _block(low: Block, high: Block, line: _Line) -> Block:
    if low.size_bytes == high.size_bytes:
        return low
    return replace(low, size_bytes=line(low.size_bytes, high.size_bytes))


def _shapes(
    low: tuple[tuple[int, ...], ...], high: tuple[tuple[int, ...], ...], line: _Line
) -> tuple[tuple[int, ...], ...]:
    if [len(shape) for shape in low] != [len(shape) for shape in high]:
        raise _uneven("shapes")
    return tuple(
        tuple(line(a, b) for a, b in zip(one, other, strict=True))
        for one, other in zip(low, high, strict=True)
    )


def _optional(low: int | None, high: int | None, line: _Line) -> int | None:
    return None if low is None or high is None else line(low, high)


def _uneven(what: str) -> BadInputError:
    return BadInputError(
        f"the model's {what} do not grow evenly with the batch",
        next_step="set dynamic_batch=False in the workload and give its batch",
    )
