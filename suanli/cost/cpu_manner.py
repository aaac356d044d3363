"""Seconds of an operator on a CPU in a manner of running it: only ratios of them are asked for.

Constants with a meaning, found by races of single operators and of built-in workloads on two cores
of a Xeon with AMX (`benchmarks/profiling.py`), torch 2.13, OpenVINO 2026.4, 2026-11-21.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, prod
from typing import Literal

from suanli.base.hardware import Ceilings
from suanli.base.prediction import KernelKind
from suanli.base.work import Operator
from suanli.cost.rates import achieved, element_bytes, narrowed, traffic_s
from suanli.cost.work_kernels import kind_of

Fused = Literal["none", "compiled", "engine"]

# Part of the best library rate that operators reach on a CPU, by precision: the faster the units,
# the smaller the part, because data has to be brought to them.
_SHARE: dict[str, dict[KernelKind, float]] = {
    "fp32": {"product": 0.8, "convolution": 0.7, "attention": 0.5, "recurrent": 0.4},
    "bf16": {"product": 0.35, "convolution": 0.4, "attention": 0.2, "recurrent": 0.045},
    "int8": {"product": 0.3, "convolution": 0.3, "attention": 0.2, "recurrent": 0.1},
}
# The same in an engine, where images and weights lie in the units' own layout all along.
_ENGINE_SHARE: dict[str, dict[KernelKind, float]] = {
    "fp32": {"product": 0.9, "convolution": 0.9, "attention": 0.5, "recurrent": 0.4},
    "bf16": {"product": 0.4, "convolution": 0.6, "attention": 0.2, "recurrent": 0.25},
    "int8": {"product": 0.4, "convolution": 0.75, "attention": 0.2, "recurrent": 0.1},
}
# Bytes moved over bytes counted: a store of new data also reads it, norms read twice.
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
_CASTS = (
    3  # calls by which autocast narrows a product's weights, bias and data, or widens gradients
)
# What oneDNN's products cost beside MKL's of fp32: looking the kernel up, and the weights' copy
# into the units' layout at each call. An engine does that once.
_LIBRARY_CALL_S = 1.5e-5
# Images that lie channels first are copied into the units' layout and back; passes over them at the
# rate of reading. In bf16 the library does it element by element.
_IMAGE_COPIES = {"fp32": 0.5, "bf16": 10.0}
# Weights of convolutions come from main memory in every call, and go into that layout; passes too.
_WEIGHT_COPIES = {"fp32": 1.0, "bf16": 2.0}
# Part of the bytes between operators, and of their calls, that is left after fusion.
_FUSED_TRAFFIC: dict[Fused, float] = {"none": 1.0, "compiled": 0.5, "engine": 0.1}
_FUSED_CALLS: dict[Fused, float] = {"none": 1.0, "compiled": 0.1, "engine": 0.05}
# Elements of a single image up to which torch does not ask oneDNN for a convolution in fp32
# (`use_mkldnn` in its Convolution.cpp).
SMALL_IMAGE = 20480
# glibc takes blocks from here on from the system and gives them back at once (its
# DEFAULT_MMAP_THRESHOLD_MAX on 64-bit systems), so that each use faults its pages in anew.
_FRESH_BYTES = 32 * 2**20
PAGE_FAULT_S = 9e-7  # one page of 4 KiB on a virtual machine: the fault and its clearing
# Where a kernel handles elements one by one and not a register of them at a time, seconds on one
# core: an element of a window, in torch's max-pool of images that lie channels first.
_WINDOW_S = 4e-9
# An element of weights in 16 bits that a product takes as a batch (`bmm`, where the other side does
# not lie in one piece): they are copied first, rows in the place of columns.
_TURNED_S = 8e-9
# Inductor's training code: a gradient of a max-pool, which is added atomically where its index
# says; an element of a mask, which becomes a byte and is made from one (`at::vec::VecMask::from`).
_SCATTER_S, _MASK_S, _UNMASK_S = 6e-9, 8e-9, 3e-9
_POOLS, _POOLS_BACK = ("max_pool2d", "max_pool2d_with_indices"), "max_pool2d_with_indices_backward"
_THRESHOLDS = ("relu", "threshold", "hardtanh", "leaky_relu")
_THRESHOLDS_BACK = ("threshold_backward", "hardtanh_backward", "leaky_relu_backward")


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a step's operators are run.

    Attributes:
        precision: What products run in, and how wide data between operators is.
        channels_last: Whether images lie channels last.
        fused: By whom operators are fused.
        autocast: Whether weights stay in fp32 and are narrowed in every step.
        keeps_memory: Whether freed memory stays in the process.
        training: Whether a backward pass follows.
    """

    precision: str = "fp32"
    channels_last: bool = False
    fused: Fused = "none"
    autocast: bool = False
    keeps_memory: bool = False
    training: bool = False


def cpu_seconds(op: Operator, manner: Manner, ceilings: Ceilings) -> float:
    """Seconds of one operator.

    Args:
        op: As captured.
        manner: How it is run.
        ceilings: Of the processor.

    Raises:
        BadInputError: There are no products in the precision.
    """
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
        shares = _ENGINE_SHARE if manner.fused == "engine" else _SHARE
        share = shares.get(precision, shares["fp32"]).get(kind, 0.5)
        compute_s = op.flops / (rate * share) if rate else 0.0
        aside_s = _beside(op, manner, ceilings, image=kind == "convolution" and _is_image(op))
    if op.phase == "forward" and written >= _FRESH_BYTES and fused == "none":
        aside_s += 0.0 if manner.keeps_memory else written / 4096 * PAGE_FAULT_S
    call_s = _BACKWARD_CALL_S if op.phase == "backward" else _CALL_S
    moved_s = memory_s * _TRAFFIC.get(kind, 1.0) * _FUSED_TRAFFIC[fused]
    singly_s = _singly(op, manner) / max(1, ceilings.threads)
    return max(compute_s, moved_s, singly_s) + aside_s + call_s * _FUSED_CALLS[fused]


def _singly(op: Operator, manner: Manner) -> float:
    """Seconds on one core of what is handled element by element; 0 where nothing is."""
    if op.name in _POOLS and not (manner.channels_last and _may_lie_last(op, manner)):
        return op.flops * _WINDOW_S
    narrow = manner.precision in ("bf16", "fp16") and manner.fused != "engine"
    if op.name == "bmm" and op.parameter_bytes and narrow:
        return op.parameter_bytes / element_bytes(op.dtype) * _TURNED_S
    return 0.0


def _may_lie_last(op: Operator, manner: Manner) -> bool:
    """Whether a pool's image lies as the plan says: what torch itself convolves is channels first.

    Such a convolution of a single small image gives one that is not much larger.
    """
    image = op.input_shapes[0] if op.input_shapes else ()
    unfolded = manner.precision == "fp32" and manner.fused != "engine" and image[:1] == (1,)
    return not (unfolded and prod(image) <= 2 * SMALL_IMAGE)


def compiled_training_s(operators: Sequence[Operator], ceilings: Ceilings) -> float:
    """Seconds that Inductor's code for a training step spends on elements one by one.

    They depend on the clock alone, not on how fast the step's operators are as they run now. Masks
    are left for the backward pass where an activation's output is not kept anyway, as it is for a
    product behind it: where a max-pool follows.

    Args:
        operators: Of a step, in order.
        ceilings: Of the processor.
    """
    total = 0.0
    for before, op in pairwise(operators):
        if op.name in _POOLS and before.name in _THRESHOLDS:
            total += _MASK_S * _elements(op.input_shapes)
        if op.name in _THRESHOLDS_BACK and before.name == _POOLS_BACK:
            total += _UNMASK_S * _elements(op.output_shapes)
        if op.name == _POOLS_BACK:
            total += _SCATTER_S * _elements(op.input_shapes)
    return total / max(1, ceilings.threads)


def _elements(shapes: tuple[tuple[int, ...], ...]) -> int:
    """Of the first tensor."""
    return prod(shapes[0]) if shapes else 0


def _beside(op: Operator, manner: Manner, ceilings: Ceilings, *, image: bool) -> float:
    """Seconds of what a product's library does beside the product."""
    if manner.fused == "engine":
        return 0.0
    precision, weights = manner.precision, float(op.parameter_bytes)
    image = image and not (precision == "fp32" and _unfolded(op))
    seconds = 0.0
    if precision != "fp32" or image:
        narrow = narrowed(weights, op.dtype, precision)
        touched = inf if image else 2 * narrow
        copy_s, _ = traffic_s(ceilings, read=narrow, written=narrow, working_set=touched)
        copies = _WEIGHT_COPIES.get(precision, 1.0) if image else 1.0
        seconds += copies * copy_s + _LIBRARY_CALL_S
    if image and not manner.channels_last:
        read = narrowed(op.bytes_read - weights, op.dtype, precision)
        written = narrowed(op.bytes_written, op.dtype, precision)
        copy_s, _ = traffic_s(ceilings, read=read, written=written, working_set=read + written)
        seconds += copy_s * _IMAGE_COPIES.get(precision, 1.0)
    seconds += _CASTS * _CALL_S if manner.autocast else 0.0
    if manner.autocast and op.phase == "forward":
        cast_s, _ = traffic_s(
            ceilings, read=weights, written=weights / 2, working_set=1.5 * weights
        )
        seconds += cast_s
    return seconds


def _is_image(op: Operator) -> bool:
    return any(len(shape) == 4 for shape in op.input_shapes)


def _unfolded(op: Operator) -> bool:
    """Whether torch itself convolves a single small image, by MKL's product, and not oneDNN."""
    if op.phase != "forward" or len(op.input_shapes) < 2:
        return False
    image, weight = op.input_shapes[:2]
    groups = len(weight) > 1 and weight[1] != image[1]
    return image[0] == 1 and prod(image) <= SMALL_IMAGE and not groups
