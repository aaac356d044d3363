"""From the operators of a workload to the kernels that run them, as columns of numbers.

The kernels of a step are kept as arrays, so that a model of thousands of operators is priced in one
go, on one card or, in the fit, on many.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import prod

import numpy as np

from suanli.base.prediction import KernelKind, PlanKind
from suanli.base.work import Operator, Phase, Work
from suanli.cost.autocast_types import Passed, passed
from suanli.cost.rates import between, element_bytes, narrowed
from suanli.cost.whole_kernels import Part, parts

KINDS: tuple[KernelKind, ...] = (
    "product",
    "convolution",
    "attention",
    "recurrent",
    "rows",
    "pointwise",
    "update",
    "free",
)
_ROWS = ("norm", "softmax", "cross_entropy", "nll_loss", "var", "std")
# Channels per group under which a convolution runs on the vector units, each channel by itself.
_FEW_CHANNELS = 16
_GATES = {"lstm": 4, "gru": 3}

# What reading rows again adds, and rows in work on one multiprocessor: a softmax passes three times
# over a row and gives it a large block of threads, a norm passes twice with a small one.
ROW_READS = {"softmax": (1.0, 2.0), "norm": (0.5, 8.0)}

# Factors that depend on the fitted parameters are named here and looked up when time is worked
# out, so that the kernels of a work are found once and priced often.
SHARES = (
    "whole",
    "convolution",
    "grouped",
    "depthwise",
    "wide depthwise",
    "attention",
    "winograd",
    "convolution gradient",
    "grouped gradient",
    "depthwise gradient",
    "wide depthwise gradient",
    "winograd gradient",
)
TRAFFIC = (
    "once",
    "layout",
    "fused",
    "update",
    "layout gradient",
)
STARTS = ("each", "fused", "list", "step", "none")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel, or `repeat` of them one after the other.

    Attributes:
        operator: Index of the operator in the work.
        kind: Index in `KINDS`.
        vector: 1 where the products run on the vector units whatever the type asked for.
        share: Which part of a product's rate it reaches at best, an index in `SHARES`.
        traffic: What multiplies `moved`, an index in `TRAFFIC`.
        starts: What its start costs, an index in `STARTS`.
        batch: Products in one kernel; 0 where there is none.
        m: Rows of the result.
        n: Columns of the result.
        k: Length of the sums.
        moved: Bytes read and written.
        row_bytes: Bytes of a row, for passes that need each row twice; else 0.
        at_once: Rows in work on one multiprocessor.
        second_read: Part of `moved` that is read again where rows do not fit the cache.
        repeat: How often it runs.
    """

    operator: int
    kind: int
    moved: float
    vector: float = 0.0
    share: int = 0
    traffic: int = 0
    starts: int = 0
    batch: float = 0.0
    m: float = 1.0
    n: float = 1.0
    k: float = 1.0
    row_bytes: float = 0.0
    at_once: float = 1.0
    second_read: float = 0.0
    repeat: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of a step as columns, named as in `Kernel`, and what the host does for them.

    Attributes:
        columns: Name -> one number per kernel.
        calls: Operators that the host calls forward.
        backward_calls: The same backward.
        updates: Tensors that the optimiser updates.
        compiled: Whether calls are fused.
    """

    columns: dict[str, "np.ndarray[tuple[int], np.dtype[np.float64]]"]
    calls: int = 0
    backward_calls: int = 0
    updates: int = 0
    compiled: bool = False

    def __getitem__(self, name: str) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        return self.columns[name]


@dataclass(frozen=True, kw_only=True)
class How:
    """How the operators are run.

    Attributes:
        dtype: What products run in; `between` says how wide data between operators is.
        plan_kind: Operator by operator, or compiled and fused.
        autocast: Whether weights stay in fp32 and are narrowed in every step.
        channels_last: Whether images lie channels last, which tensor units need.
        training: Whether the work has a backward pass; `kernels_of` sees for itself.
    """

    dtype: str
    plan_kind: PlanKind = "eager"
    autocast: bool = False
    channels_last: bool = False
    training: bool = False


@lru_cache(maxsize=32)
def kernels_of(work: Work, how: How) -> Kernels:
    """Kernels of one step; kept, because a work is priced on many cards and in many layouts.

    Raises:
        BadInputError: The type is unknown.
    """
    found: list[Kernel] = []
    calls: Counter[Phase] = Counter()
    how = replace(how, training=any(op.phase == "backward" for op in work.operators))
    shared = parts(work.operators)
    widths = _widths(work, how)
    for index, (op, width) in enumerate(zip(work.operators, widths, strict=True)):
        part = shared.get(index)
        made = [_part(index, op, part, how, width)] if part else []
        made = made or list(_of_operator(index, op, how, width))
        found += made
        calls[op.phase] += int(bool(made) and (part is None or part.first))
    names = [f.name for f in fields(Kernel)]
    columns = {name: np.array([getattr(k, name) for k in found], dtype=float) for name in names}
    return Kernels(
        columns=columns,
        calls=calls["forward"],
        backward_calls=calls["backward"],
        updates=calls["optimizer"],
        compiled=how.plan_kind == "compiled",
    )


def kind_of(op: Operator) -> KernelKind:
    """The family of kernels that runs an operator."""
    if op.phase == "optimizer":
        return "update"
    if op.flops + op.bytes_read + op.bytes_written == 0:
        return "free"
    for word in ("attention", "lstm", "gru", "rnn"):
        if word in op.name and op.matmul:
            return "attention" if word == "attention" else "recurrent"
    if op.matmul:
        return "convolution" if "conv" in op.name else "product"
    return "rows" if any(word in op.name for word in _ROWS) else "pointwise"


def _widths(work: Work, how: How) -> Iterable[Passed | None]:
    """What autocast does to each operator's bytes; None where it does not run or change them."""
    width = element_bytes(between(how.dtype))
    if not how.autocast or width >= element_bytes("fp32"):
        return [None] * len(work.operators)
    return passed(work.operators, width)


def _of_operator(index: int, op: Operator, how: How, width: Passed | None) -> Iterator[Kernel]:
    kind = kind_of(op)
    if kind == "free" or prod(op.output_shapes[0] if op.output_shapes else (2,)) == 1 == op.flops:
        return
    moved = _moved(op, how, width)
    cast = 0.0 if width is None else width.cast
    if how.autocast and op.parameter_bytes and op.phase == "forward" and op.matmul:
        weights = op.parameter_bytes * (1.0 + element_bytes(how.dtype) / 4.0)
        cast += weights * (2.0 if how.training else 1.0)  # and their gradients back
    if cast:
        yield from _sweep(index, op, cast, how)
    yield from _MAKERS[kind](index, op, moved, how)


def _moved(op: Operator, how: How, width: Passed | None) -> float:
    """Bytes; the optimiser keeps its own type."""
    if width is not None and width.moved is not None:
        return width.moved
    size = float(op.bytes_read + op.bytes_written)
    if op.phase == "optimizer":
        return size
    weights = min(size, float(op.parameter_bytes)) if op.matmul else 0.0
    passed = narrowed(size - weights, op.dtype, between(how.dtype))
    return passed + narrowed(weights, op.dtype, how.dtype)


def _product(index: int, op: Operator, moved: float, how: How) -> Iterator[Kernel]:
    out = op.output_shapes[0] if op.output_shapes else (1, 1)
    n = out[-1] if out else 1
    batch = prod(out[:-2]) if len(out) > 2 and _batched(op) else 1
    m = max(1, prod(out) // max(1, n * batch))
    k = op.flops / max(1.0, 2.0 * batch * m * n)
    yield Kernel(
        operator=index,
        kind=KINDS.index("product"),
        moved=moved,
        batch=batch,
        m=m,
        n=n,
        k=max(1.0, k),
    )


def _batched(op: Operator) -> bool:
    """Whether both operands have a batch: else its rows are rows of one product."""
    return sum(len(shape) > 2 for shape in op.input_shapes) >= 2


def _convolution(index: int, op: Operator, moved: float, how: How) -> Iterator[Kernel]:
    """Convolutions as products over patches ("implicit GEMM", Chetlur et al., cuDNN, 2014).

    Forward: positions x filters, sum over taps. Backward: the gradient of the input has positions
    x channels, that of the weight filters x (channels * taps) with a sum over positions.
    """
    backward = op.name.endswith("_backward")
    if len(op.input_shapes) < (3 if backward else 2):
        yield from _product(index, op, moved, how)
        return
    x, weight = op.input_shapes[1:3] if backward else op.input_shapes[:2]
    out = op.input_shapes[0] if backward else op.output_shapes[0]
    dims = len(weight) - 2
    filters, per_group, taps = weight[0], weight[1], prod(weight[2:])
    groups = max(1, x[-dims - 1] // per_group)
    positions = prod(out) // max(1, out[-dims - 1])
    inputs = prod(x) // max(1, x[-dims - 1])
    few = groups > 1 and per_group < _FEW_CHANNELS
    single = few and per_group == 1
    turned = not how.channels_last and not few and how.dtype != "fp32"
    traffic = ("layout gradient" if backward else "layout") if turned else "once"
    sides = [(positions, filters // groups, per_group * taps)]
    if backward:
        per = 2.0 * groups * positions * (filters // groups) * per_group * taps
        sides = [(filters // groups, per_group * taps, positions)]
        if op.flops > 1.5 * per:
            sides.append((inputs, per_group, (filters // groups) * taps))
    share = "convolution"
    if few:  # each channel by itself: no tiles of channels to fill, the sum is the taps
        sides, groups = [(positions, filters, per_group * taps)] * len(sides), 1
        wide = element_bytes(between(how.dtype)) >= element_bytes("fp32")
        share = ("wide depthwise" if wide else "depthwise") if single else "grouped"
    elif is_winograd(op):
        share = "winograd"
    if _has_bias(op) and (backward or not single):
        yield from _sweep(index, op, _bias_bytes(prod(out), backward, how), how)
    total = sum(m * n * k for m, n, k in sides) * 2.0 * groups
    scale = op.flops / total if total else 1.0
    for m, n, k in sides:
        yield Kernel(
            operator=index,
            kind=KINDS.index("convolution"),
            moved=moved / len(sides),
            vector=float(few),
            share=SHARES.index(share + (" gradient" if backward else "")),
            traffic=TRAFFIC.index(traffic),
            batch=groups,
            m=m,
            n=n,
            k=max(1.0, k * scale),
        )


def _has_bias(op: Operator) -> bool:
    """Whether a convolution adds a bias, or sums up the gradient of one."""
    if op.name.endswith("_backward"):
        return any(len(shape) == 1 for shape in op.output_shapes)
    return len(op.input_shapes) > 2 and len(op.input_shapes[2]) == 1


def _bias_bytes(elements: int, backward: bool, how: How) -> float:
    """Bytes that a convolution's bias moves on a GPU, where it is a kernel of its own.

    Forward the result is read and written once more, backward its gradient is read once more.
    """
    return elements * element_bytes(between(how.dtype)) * (1.0 if backward else 2.0)


def is_winograd(op: Operator) -> bool:
    """Whether libraries do a convolution with fewer multiplications: 3 x 3, stride 1, dense."""
    backward = op.name.endswith("_backward")
    if "convolution" not in op.name or len(op.input_shapes) < (3 if backward else 2):
        return False
    x, weight = op.input_shapes[1:3] if backward else op.input_shapes[:2]
    out = op.input_shapes[0] if backward else op.output_shapes[0]
    dense = len(weight) == 4 and x[-3] == weight[1]
    return dense and weight[2:] == (3, 3) and x[-2:] == out[-2:]


def _attention(index: int, op: Operator, moved: float, how: How) -> Iterator[Kernel]:
    """One kernel that keeps the scores on the chip.

    A tile of queries runs over all keys: rows are queries, columns a head's width, and the sum is
    as long as the keys, once for the scores and once for the values.
    """
    query = op.input_shapes[0]
    batch = prod(query[:-2])
    m, n = query[-2], query[-1]
    yield Kernel(
        operator=index,
        kind=KINDS.index("attention"),
        moved=moved,
        share=SHARES.index("attention"),
        batch=batch,
        m=m,
        n=n,
        k=max(1.0, op.least_flops / max(1.0, 2.0 * batch * m * n)),
    )


def _recurrent(index: int, op: Operator, moved: float, how: How) -> Iterator[Kernel]:
    """The inputs' products of all steps at once, then the steps, one after the other."""
    name = op.name.removesuffix("_backward")
    gates = _GATES.get(name, 1)
    x, state = op.input_shapes[0], op.input_shapes[1]
    layers, rows, hidden = state[0], max(1, state[-2]), state[-1]
    steps = max(1, prod(x[:-1]) // rows)
    one = 2.0 * rows * gates * hidden * hidden
    passes = 2 if op.name.endswith("_backward") else 1
    stepwise = min(one * steps * layers, 0.9 * op.flops / passes)
    k = max(1.0, (op.flops - stepwise) / (2.0 * rows * steps * gates * hidden))
    recurrent = KINDS.index("recurrent")
    yield Kernel(
        operator=index,
        kind=recurrent,
        moved=moved,
        batch=1,
        m=rows * steps,
        n=gates * hidden,
        k=k,
    )
    width = element_bytes(between(how.dtype))
    yield Kernel(
        operator=index,
        kind=recurrent,
        moved=width * gates * hidden * (hidden + rows),
        batch=1,
        m=rows,
        n=gates * hidden,
        k=hidden,
        repeat=steps * layers,
        starts=STARTS.index("step"),
    )


def _rows(index: int, op: Operator, moved: float, how: How) -> Iterator[Kernel]:
    if "batch_norm" in op.name and not how.training:  # known statistics: one pass
        yield from _sweep(index, op, moved, how)
        return
    shape = max(op.input_shapes, key=prod, default=(1,))
    width = element_bytes(between(how.dtype))
    length = shape[-1] if shape else 1
    if "batch_norm" in op.name and len(shape) > 1:
        length = prod(shape) // max(1, shape[1])
    elif "group_norm" in op.name and len(shape) > 1:
        length = prod(shape[1:]) // 32
    second, at_once = ROW_READS["softmax" if "softmax" in op.name else "norm"]
    fused = how.plan_kind == "compiled"
    yield Kernel(
        operator=index,
        kind=KINDS.index("rows"),
        moved=moved,
        traffic=TRAFFIC.index("fused" if fused else "once"),
        starts=STARTS.index("fused" if fused else "each"),
        row_bytes=max(1.0, length * width),
        at_once=at_once,
        second_read=second,
    )


def _sweep(index: int, op: Operator, moved: float, how: How) -> Iterator[Kernel]:
    fused = how.plan_kind == "compiled"
    yield Kernel(
        operator=index,
        kind=KINDS.index("pointwise"),
        moved=moved,
        traffic=TRAFFIC.index("fused" if fused else "once"),
        starts=STARTS.index("fused" if fused else "each"),
    )


def _part(index: int, op: Operator, part: Part, how: How, width: Passed | None) -> Kernel:
    """An operator's share of a kernel that does several."""
    fused = how.plan_kind == "compiled"
    each = "fused" if fused else "each"
    return Kernel(
        operator=index,
        kind=KINDS.index("pointwise"),
        moved=_moved(op, how, width) * part.share,
        traffic=TRAFFIC.index("fused" if fused else "once"),
        starts=STARTS.index(each if part.first else "none"),
    )


def _update(index: int, op: Operator, moved: float, how: How) -> Iterator[Kernel]:
    """An optimiser's update: few kernels update lists of tensors."""
    yield Kernel(
        operator=index,
        kind=KINDS.index("update"),
        moved=moved,
        traffic=TRAFFIC.index("update" if how.plan_kind == "eager" else "once"),
        starts=STARTS.index("list"),
    )


_Maker = Callable[[int, Operator, float, How], Iterator[Kernel]]
_MAKERS: dict[KernelKind, _Maker] = {
    "product": _product,
    "convolution": _convolution,
    "attention": _attention,
    "recurrent": _recurrent,
    "rows": _rows,
    "pointwise": _sweep,
    "update": _update,
}
