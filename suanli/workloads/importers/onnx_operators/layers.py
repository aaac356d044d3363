"""Convolutions, pooling, normalisation, matrix products, resizing."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from suanli.workloads.importers.onnx_value import Call, Operator, Result, Table

_CONVOLUTIONS: tuple[Callable[..., torch.Tensor], ...] = (
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
)
_TRANSPOSED: tuple[Callable[..., torch.Tensor], ...] = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)

_HALF_PIXEL = ("half_pixel", "pytorch_half_pixel")


def _window(
    call: Call, x: torch.Tensor, kernel: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and pads (begins, then ends) of a sliding window."""
    rank = len(kernel)
    strides = list(call.attribute("strides") or [1] * rank)
    dilations = list(call.attribute("dilations") or [1] * rank)
    pads = list(call.attribute("pads") or [0] * (2 * rank))
    automatic = call.attribute("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        totals = []
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            totals.append(max((math.ceil(int(size) / s) - 1) * s + (k - 1) * d + 1 - int(size), 0))
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        pads = small + large if automatic == "SAME_UPPER" else large + small
    elif automatic == "VALID":
        pads = [0] * (2 * rank)
    return strides, dilations, pads


def _symmetric(
    x: torch.Tensor, pads: list[int], fill: float = 0.0
) -> tuple[torch.Tensor, list[int]]:
    """Pads that torch's layers take; unequal ones are applied to the input first."""
    rank = len(pads) // 2
    begins, ends = pads[:rank], pads[rank:]
    if begins == ends:
        return x, begins
    pairs = [size for pair in reversed(list(zip(begins, ends, strict=True))) for size in pair]
    return functional.pad(x, pairs, "constant", fill), [0] * rank


def _convolution(call: Call) -> Result:
    x, weight = call.tensor(0), call.tensor(1)
    strides, dilations, pads = _window(call, x, list(weight.shape[2:]))
    x, padding = _symmetric(x, pads)
    function = _CONVOLUTIONS[weight.dim() - 3]
    groups = call.attribute("group", 1)
    return function(x, weight, call.optional(2), strides, padding, dilations, groups)


def _transposed(call: Call) -> Result:
    x, weight = call.tensor(0), call.tensor(1)
    if call.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise call.error("uses automatic padding, which is not supported")
    if call.attribute("output_shape") is not None:
        raise call.error("gives its output shape, which is not supported")
    rank = weight.dim() - 2
    strides, dilations, pads = _window(call, x, list(weight.shape[2:]))
    extra = list(call.attribute("output_padding") or [0] * rank)
    begins, ends = pads[:rank], pads[rank:]
    # torch has one pad for both ends; a smaller one at the end is more output there
    extra = [more + b - e for more, b, e in zip(extra, begins, ends, strict=True)]
    if min(extra) < 0:
        raise call.error("pads its end more than its begin, which is not supported")
    groups = call.attribute("group", 1)
    function = _TRANSPOSED[rank - 1]
    return function(x, weight, call.optional(2), strides, begins, extra, groups, dilations)


def _max_pool(call: Call) -> Result:
    x, kernel = call.tensor(0), list(call.attribute("kernel_shape"))
    if call.node.results > 1 and call.node.outputs[1]:
        raise call.error("is asked for positions, which is not supported")
    strides, dilations, pads = _window(call, x, kernel)
    x, padding = _symmetric(x, pads, -math.inf)
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[
        len(kernel) - 1
    ]
    ceil = bool(call.attribute("ceil_mode", 0))
    return function(x, kernel, strides, padding, dilations, ceil)


def _average_pool(call: Call) -> Result:
    x, kernel = call.tensor(0), list(call.attribute("kernel_shape"))
    strides, dilations, pads = _window(call, x, kernel)
    if any(d != 1 for d in dilations):
        raise call.error("is dilated, which is not supported")
    pools = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
    pool: Callable[..., torch.Tensor] = pools[len(kernel) - 1]
    ceil, counts = (
        bool(call.attribute("ceil_mode", 0)),
        bool(call.attribute("count_include_pad", 0)),
    )
    padded, padding = _symmetric(x, pads)
    if padded is x or counts:
        return pool(padded, kernel, strides, padding, ceil, counts)
    real, _ = _symmetric(torch.ones_like(x[:1, :1]), pads)
    return pool(padded, kernel, strides, 0, ceil) / pool(real, kernel, strides, 0, ceil)


def _global_pool(function: Callable[..., torch.Tensor]) -> Operator:
    return lambda call: function(call.tensor(0), list(range(2, call.tensor(0).dim())), True)


def _batch_norm(call: Call) -> Result:
    if call.attribute("training_mode", 0):
        raise call.error("is in training mode: export the model in evaluation mode")
    scale, bias, mean, variance = (call.tensor(index) for index in range(1, 5))
    return functional.batch_norm(
        call.tensor(0), mean, variance, scale, bias, False, 0.0, call.attribute("epsilon", 1e-5)
    )


def _instance_norm(call: Call) -> Result:
    epsilon = call.attribute("epsilon", 1e-5)
    return functional.instance_norm(
        call.tensor(0), weight=call.tensor(1), bias=call.tensor(2), eps=epsilon
    )


def _layer_norm(call: Call) -> Result:
    x, scale, bias = call.tensor(0), call.tensor(1), call.optional(2)
    if call.node.results > 1 and any(call.node.outputs[1:]):
        raise call.error("is asked for mean and deviation, which is not supported")
    axis = call.attribute("axis", -1) % x.dim()
    shape = list(x.shape[axis:])
    return functional.layer_norm(
        x,
        shape,
        scale.expand(shape),
        None if bias is None else bias.expand(shape),
        call.attribute("epsilon", 1e-5),
    )


def _group_norm(call: Call) -> Result:
    x, scale, bias = (call.tensor(index) for index in range(3))
    groups = call.attribute("num_groups")
    if call.node.version < 21:
        each = x.shape[1] // groups  # one scale per group, not per channel
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return functional.group_norm(x, groups, scale, bias, call.attribute("epsilon", 1e-5))


def _rms_norm(call: Call) -> Result:
    x, scale = call.tensor(0), call.tensor(1)
    axis = call.attribute("axis", -1) % x.dim()
    return functional.rms_norm(x, list(x.shape[axis:]), scale, call.attribute("epsilon", 1e-5))


def _local_response(call: Call) -> Result:
    return functional.local_response_norm(
        call.tensor(0),
        call.attribute("size"),
        alpha=call.attribute("alpha", 1e-4),
        beta=call.attribute("beta", 0.75),
        k=call.attribute("bias", 1.0),
    )


def _gemm(call: Call) -> Result:
    a, b, c = call.tensor(0), call.tensor(1), call.optional(2)
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    a = a.t() if call.attribute("transA", 0) else a
    if alpha == 1.0 and beta == 1.0 and (c is None or c.dim() == 1):
        weight = b if call.attribute("transB", 0) else b.t()
        return functional.linear(a, weight, c)
    product: torch.Tensor = alpha * (a @ (b.t() if call.attribute("transB", 0) else b))
    return product if c is None else product + beta * c


def _einsum(call: Call) -> Result:
    operands = [call.tensor(index) for index in range(len(call.inputs))]
    result: torch.Tensor = torch.einsum(call.attribute("equation"), *operands)
    return result


def _resize(call: Call) -> Result:
    x = call.tensor(0)
    mode = call.attribute("mode", "nearest")
    place = call.attribute("coordinate_transformation_mode", "half_pixel")
    sizes = _resized(call, x)
    if mode == "nearest":
        rounding = call.attribute("nearest_mode", "round_prefer_floor")
        if place == "asymmetric" and rounding == "floor":
            return functional.interpolate(x, sizes, mode="nearest")
        whole = all(int(new) % int(old) == 0 for new, old in zip(sizes, x.shape[2:], strict=True))
        if whole and place in _HALF_PIXEL:
            return functional.interpolate(x, sizes, mode="nearest")
    elif mode in ("linear", "cubic") and place in (
        "half_pixel",
        "pytorch_half_pixel",
        "align_corners",
    ):
        linear = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()]
        kind = linear if mode == "linear" else "bicubic"
        return functional.interpolate(x, sizes, mode=kind, align_corners=place == "align_corners")
    raise call.error(f"resizes by {mode} with {place}, which is not supported")


def _resized(call: Call, x: torch.Tensor) -> list[Any]:
    if call.node.version < 11:
        scales = call.numbers(1)
        return [math.floor(int(n) * s) for n, s in zip(x.shape[2:], scales[2:], strict=True)]
    if call.attribute("axes") is not None or call.attribute("antialias", 0):
        raise call.error("resizes some axes or with antialiasing, which is not supported")
    if call.has(3) and call.numbers(3):
        return call.numbers(3)[2:]
    scales = call.numbers(2)
    return [math.floor(int(n) * s) for n, s in zip(x.shape[2:], scales[2:], strict=True)]


LAYERS: Table = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool(torch.mean),
    "GlobalMaxPool": _global_pool(torch.amax),
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "RMSNormalization": _rms_norm,
    "LRN": _local_response,
    "Gemm": _gemm,
    "MatMul": lambda call: torch.matmul(call.tensor(0), call.tensor(1)),
    "Einsum": _einsum,
    "Resize": _resize,
    "Upsample": _resize,
}
