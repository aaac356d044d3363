"""How wide data is between operators under autocast, and what is cast on the way.

Mixed precision is no narrow model: PyTorch's autocast runs products in the narrow type and norms,
softmax and some others in fp32, and between them the wider operand decides (torch.amp, "Autocast op
reference"). A network of convolutions and batch norms stays narrow; one of layer norms keeps its
residual sums in fp32 and casts at every product and every norm.

Works hold shapes and no tensors, so types are followed by number of elements, which views keep: the
last results of a size are taken for the next operands of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

from suanli.base.work import Operator

_FP32 = 4.0
# Run in fp32 both ways; their operands are cast.
_NORMS = ("layer_norm", "group_norm")
# The same forward; the backward pass runs in what it is given.
_WIDE = ("pow", "exp", "log", "rsqrt", "mse_loss", "l1_loss", "smooth_l1_loss", "nll_loss", "norm")
# Read what they are given and write fp32.
_WIDENING = ("_softmax", "_log_softmax", "_safe_softmax", "sum", "cumsum", "prod")
# Follow their operand and not their parameters.
_FOLLOWING = ("native_batch_norm", "cudnn_batch_norm", "native_batch_norm_backward")


@dataclass(frozen=True, kw_only=True)
class Passed:
    """Bytes of one operator under autocast.

    Attributes:
        moved: What it reads and writes; None for products, which run in the narrow type.
        cast: What casts of its operands read and write before it.
    """

    moved: float | None
    cast: float = 0.0


@dataclass
class _Flow:
    """Widths of the last results by number of elements.

    Attributes:
        narrow: Bytes of the narrow type.
        last: The two last widths of a size.
        stream: Width of the last sum, norm or table look-up of a size: what residual sums add to.
    """

    narrow: float
    last: dict[int, list[float]] = field(default_factory=dict)
    stream: dict[int, float] = field(default_factory=dict)

    def width(self, count: int) -> float:
        """Of the last result of a size; inputs and parameters are fp32."""
        return self.last.get(count, [_FP32])[-1]

    def put(self, op: Operator, width: float) -> None:
        for shape in op.output_shapes:
            self.record(prod(shape), width)

    def record(self, count: int, width: float) -> None:
        self.last[count] = [*self.last.get(count, []), width][-2:]


def passed(operators: Sequence[Operator], narrow: float) -> Iterator[Passed | None]:
    """Bytes of each operator in turn; None where autocast changes nothing (updates, integers).

    Args:
        operators: In the order in which they run, as captured in fp32.
        narrow: Bytes of an element of the narrow type.
    """
    flow = _Flow(narrow=narrow)
    for op in operators:
        if op.phase == "optimizer" or op.dtype != "fp32" or not op.input_shapes:
            yield None
        elif op.matmul:
            yield _product(op, flow)
        elif not op.bytes_read + op.bytes_written + op.flops:
            _view(op, flow)
            yield None
        else:
            yield _between(op, flow)


def _view(op: Operator, flow: _Flow) -> None:
    """The same data in another shape; views of parameters are no results."""
    count = prod(op.input_shapes[0])
    if count in flow.last:
        flow.put(op, flow.width(count))


def _product(op: Operator, flow: _Flow) -> Passed:
    """Wide operands are cast; what was saved for the backward pass is narrow already."""
    sizes = [prod(shape) for shape in op.input_shapes]
    if op.name == "addmm" and len(sizes) > 1:
        own = sizes[1:2]
    elif op.name.startswith("convolution") or op.phase == "backward":
        own = sizes[:1]
    else:
        own = [count for count in sizes if count in flow.last] or sizes[:1]
    cast = 0.0
    for count in dict.fromkeys(own):
        if flow.width(count) == _FP32:
            cast += count * (_FP32 + flow.narrow)
            flow.record(count, flow.narrow)
    flow.put(op, flow.narrow)
    return Passed(moved=None, cast=cast)


def _between(op: Operator, flow: _Flow) -> Passed:
    name, count = op.name, prod(op.input_shapes[0])
    size = float(op.bytes_read + op.bytes_written)
    forward = op.phase == "forward"
    if name.startswith("embedding"):
        flow.put(op, _FP32)
        flow.stream[prod(op.output_shapes[0]) if op.output_shapes else 0] = _FP32
        return Passed(moved=size)
    if any(word in name for word in _NORMS) or (forward and name in _WIDE):
        narrow = flow.width(count) < _FP32
        flow.put(op, _FP32)
        flow.stream[count] = _FP32
        return Passed(moved=size, cast=count * (_FP32 + flow.narrow) if narrow else 0.0)
    if name.endswith("softmax_backward_data"):
        narrow = flow.width(count) < _FP32
        flow.put(op, flow.narrow)
        moved = op.bytes_read + op.bytes_written * flow.narrow / _FP32
        return Passed(moved=moved, cast=count * (_FP32 + flow.narrow) if narrow else 0.0)
    read, out = _promoted(op, flow)
    if forward and name in _WIDENING:
        out = _FP32
    flow.put(op, out)
    if name in ("add", "add_"):
        flow.stream[count] = out
    return Passed(moved=op.bytes_read * read / _FP32 + op.bytes_written * out / _FP32)


def _promoted(op: Operator, flow: _Flow) -> tuple[float, float]:
    """(mean width of what is read, width of the result): the widest operand decides."""
    sizes = [prod(shape) for shape in op.input_shapes if prod(shape) > 1]
    if not sizes:
        return _FP32, _FP32
    if op.name in _FOLLOWING:
        width = flow.width(sizes[0])
        return width, width
    twice = len(sizes) > len(set(sizes))
    widths = []
    for count in sizes:
        width = max(flow.last.get(count, [_FP32])) if twice else flow.width(count)
        if twice and op.name in ("add", "add_") and op.phase == "forward":
            width = max(width, flow.stream.get(count, 0.0))
        widths.append(width)
    total = sum(sizes)
    mean = sum(count * width for count, width in zip(sizes, widths, strict=True)) / total
    if twice:  # of two operands of a size one may be narrow
        mean = min(mean, (max(widths) + min(flow.width(c) for c in sizes)) / 2.0)
    return mean, max(widths)
