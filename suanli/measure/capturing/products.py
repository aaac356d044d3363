"""Operations of the operators that matrix units can do: products, convolutions, attention.

A multiply-add counts as two operations. Biases, scales and softmax are not counted here, as in the
published figures for networks. Each formula gives two numbers: the full count, and the count that
no implementation can go below because it would have to skip products that are not zero by
construction (`needed`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

Arguments = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Count:
    """Operations of one call: all of them, and those that nothing can skip."""

    flops: int
    needed: int


Formula = Callable[[Arguments, Any], Count]


def _plain(flops: int) -> Count:
    return Count(flops=flops, needed=flops)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in value.shape)


def _product(left: str) -> Formula:
    """2 * elements of the output * length of the sum: true of every plain matrix product."""

    def count(arguments: Arguments, out: Any) -> Count:
        result = out[0] if isinstance(out, tuple | list) else out
        return _plain(2 * result.numel() * _shape(arguments[left])[-1])

    return count


def _batch_summed_product(arguments: Arguments, out: Any) -> Count:
    """`addbmm`: the products of a batch are added up, so the output does not show the batch."""
    return _plain(2 * arguments["batch1"].numel() * _shape(arguments["batch2"])[-1])


def _grouped_product(arguments: Arguments, out: Any) -> Count:
    """Products with groups along one side: each element of that side meets one group only."""
    left, right = _shape(arguments["self"]), _shape(arguments["mat2"])
    if len(left) == 3 and len(right) == 2:  # groups of columns of the right matrix
        return _plain(2 * out.numel() * left[-1])
    return _plain(2 * prod(left) * right[-1])


def grouped_shape(left: Any, right: Any, offsets: Any) -> tuple[int, ...]:
    """Shape of a product with groups, for which torch's own rule refuses what its CPU computes.

    Left [M, K] with right [G, K, N] gives [M, N]; left [G, M, K] with right [K, N] gives [M, N];
    two matrices whose shared side is grouped give [G, M, N]; two batches multiply plainly.
    """
    rows, columns = left.shape[-2], right.shape[-1]
    if left.dim() == right.dim():
        groups = left.shape[0] if left.dim() == 3 else offsets.shape[0]
        return int(groups), int(rows), int(columns)
    return int(rows), int(columns)


def valid_taps(positions: int, taps: int, other: int, *, stride: int, pad: int, step: int) -> int:
    """Pairs (position, tap) of one dimension of a convolution that fall inside the other side.

    Position p and tap t meet the element p * stride - pad + t * step of a side of length `other`;
    the rest meets zero padding.

    Args:
        positions: Output length; the input length for a transposed convolution.
        taps: Kernel length.
        other: Input length; the output length for a transposed convolution.
        stride: Stride of the convolution.
        pad: Zeros added on the low side.
        step: Dilation.
    """
    total = 0
    for tap in range(taps):
        shift = tap * step - pad
        first = max(0, -(shift // stride))  # smallest p with p * stride + shift >= 0
        last = min(positions - 1, (other - 1 - shift) // stride)
        total += max(0, last - first + 1)
    return total


def _each(value: Any, dims: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
    return values * dims if len(values) == 1 else values


def _convolution(x: Any, weight: Any, out: Any, arguments: Arguments) -> Count:
    """Input [N, C, ...], weight [K, C / groups, ...] ([C, K / groups, ...] when transposed).

    2 * N * K * (C / groups) * product over the dimensions of (positions * taps). A transposed
    convolution spreads each input position over the taps, so positions are the input's.
    """
    transposed = bool(arguments.get("transposed", False))
    kernel = _shape(weight)
    x_shape, out_shape = _shape(x), _shape(out)
    dims = len(kernel) - 2
    near, far = (x_shape, out_shape) if transposed else (out_shape, x_shape)
    batch = prod(x_shape[: len(x_shape) - dims - 1])  # 1 for an input without a batch dimension
    channels = x_shape[-dims - 1] if transposed else out_shape[-dims - 1]
    stride, pad = _each(arguments["stride"], dims), _each(arguments["padding"], dims)
    step = _each(arguments["dilation"], dims)
    full, inside = 1, 1
    for d in range(dims):
        positions, taps = near[d - dims], kernel[2 + d]
        full *= positions * taps
        inside *= valid_taps(
            positions, taps, far[d - dims], stride=stride[d], pad=pad[d], step=step[d]
        )
    outer = 2 * batch * channels * kernel[1]
    return Count(flops=outer * full, needed=outer * inside)


def _convolution_forward(arguments: Arguments, out: Any) -> Count:
    x = arguments["input"] if "input" in arguments else arguments["self"]
    return _convolution(x, arguments["weight"], out, arguments)


def _convolution_backward(arguments: Arguments, out: Any) -> Count:
    """Gradients of input and weight each meet the forward's pairs once; the bias only sums."""
    grad, x, weight = (arguments[name] for name in ("grad_output", "input", "weight"))
    once = _convolution(x, weight, grad, arguments)
    asked = sum(1 for wanted in arguments["output_mask"][:2] if wanted)
    return Count(flops=asked * once.flops, needed=asked * once.needed)


def _own_convolution(arguments: Arguments, out: Any) -> Count:
    """Our training kernel of stride 1; see `suanli.training.native.convolution`."""
    plain = {**arguments, "stride": (1,), "padding": (arguments["padding"],), "dilation": (1,)}
    return _convolution(arguments["images"], arguments["weight"], out, plain)


def _own_convolution_backward(arguments: Arguments, out: Any) -> Count:
    """Gradients of images and weight, as they are wanted."""
    plain = {**arguments, "stride": (1,), "padding": (arguments["padding"],), "dilation": (1,)}
    once = _convolution(arguments["images"], arguments["weight"], arguments["gradient"], plain)
    asked = sum(1 for wanted in arguments["wanted"][:2] if wanted)
    return Count(flops=asked * once.flops, needed=asked * once.needed)


def _quantised_convolution(arguments: Arguments, out: Any) -> Count:
    """Every output element sums over the weight's other dimensions; padding is not looked at."""
    flops = 2 * out.numel() * prod(_shape(arguments["qw"])[1:])
    return Count(flops=flops, needed=0)


def causal_pairs(queries: int, keys: int) -> int:
    """Pairs (query, key) that a causal mask aligned at the first position leaves."""
    square = min(queries, keys)
    return square * (square + 1) // 2 + (queries - square) * keys


def attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *, causal: bool, products: int
) -> Count:
    """Scaled dot-product attention over shapes [..., H, S, D].

    Two products forward (scores and output): 2 * pairs * (D + Dv). Four backward, of the gradients
    of value, scores, query and key; recomputing the scores is a choice of some kernels and is not
    counted. Heads are the query's: grouped heads share keys, not work.

    Args:
        query: [..., H, Sq, D].
        key: [..., Hkv, Sk, D].
        value: [..., Hkv, Sk, Dv].
        causal: Whether query i sees only the keys up to i.
        products: 2 forward; 1 to 4 backward.
    """
    heads = prod(query[:-2])
    queries, keys = query[-2], key[-2]
    mean_width = (query[-1] + value[-1]) / 2
    per_pair = 2 * products * mean_width * heads
    inside = causal_pairs(queries, keys) if causal else queries * keys
    return Count(flops=int(per_pair * queries * keys), needed=int(per_pair * inside))


def _attention_forward(arguments: Arguments, out: Any) -> Count:
    shapes = (_shape(arguments[name]) for name in ("query", "key", "value"))
    return attention(*shapes, causal=bool(arguments.get("is_causal")), products=2)


def _attention_backward(arguments: Arguments, out: Any) -> Count:
    shapes = (_shape(arguments[name]) for name in ("query", "key", "value"))
    return attention(*shapes, causal=bool(arguments.get("is_causal")), products=4)


def flexible_attention(query: Any, key: Any, value: Any) -> Count:
    """Attention with a mask given as code: which pairs it leaves cannot be known."""
    count = attention(_shape(query), _shape(key), _shape(value), causal=False, products=2)
    return Count(flops=count.flops, needed=0)


def _recurrent_layer(arguments: Arguments, out: Any) -> Count:
    """One LSTM layer in one direction, input [T, B, I]: input and state meet the four gates."""
    steps, batch = _shape(arguments["input"])[:2]
    weights = arguments["weight0"].numel() + arguments["weight1"].numel()
    return _plain(2 * steps * batch * weights)


def _recurrent_layer_backward(arguments: Arguments, out: Any) -> Count:
    """Twice the forward; the gradient of the input is not needed by a network's first layer."""
    steps, batch = _shape(arguments["input"])[:2]
    inner, outer = arguments["weight1"].numel(), arguments["weight2"].numel()
    return Count(
        flops=4 * steps * batch * (inner + outer), needed=2 * steps * batch * (inner + 2 * outer)
    )


def _recurrent_network(arguments: Arguments, out: Any) -> Count:
    """All layers of a fused recurrent network: every weight matrix meets every step once."""
    first, second = _shape(arguments["input"])[:2]
    weights = sum(weight.numel() for weight in arguments["weight"] if weight.dim() > 1)
    return _plain(2 * first * second * weights)


FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(
        ("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot"), _product("self")
    ),
    **dict.fromkeys(
        (
            "aten::_int_mm",
            "aten::_scaled_mm",
            "aten::_weight_int8pack_mm",
            "aten::_weight_int4pack_mm",
            "aten::_weight_int4pack_mm_for_cpu",
            "aten::mkldnn_linear",
        ),
        _product("self"),
    ),
    **dict.fromkeys(("aten::addmm", "aten::_addmm_activation"), _product("mat1")),
    "aten::linear": _product("input"),
    "aten::addmv": _product("mat"),
    "aten::baddbmm": _product("batch1"),
    "aten::addbmm": _batch_summed_product,
    "aten::_dyn_quant_matmul_4bit": _product("inp"),
    **dict.fromkeys(("aten::_grouped_mm", "aten::_scaled_grouped_mm"), _grouped_product),
    **dict.fromkeys(
        (
            "quantized::linear",
            "quantized::linear_relu",
            "quantized::linear_dynamic",
            "quantized::linear_relu_dynamic",
            "quantized::linear_dynamic_fp16",
        ),
        _product("X"),
    ),
    "onednn::qlinear_pointwise": _product("qx"),
    "mkldnn::_linear_pointwise": _product("X"),
    **dict.fromkeys(
        (
            "aten::convolution",
            "aten::_convolution",
            "aten::convolution_overrideable",
            "aten::mkldnn_convolution",
            "aten::cudnn_convolution",
        ),
        _convolution_forward,
    ),
    "aten::convolution_backward": _convolution_backward,
    "suanli::conv2d": _own_convolution,
    "suanli::conv2d_backward": _own_convolution_backward,
    **dict.fromkeys(
        ("onednn::qconv_pointwise", "onednn::qconv2d_pointwise"), _quantised_convolution
    ),
    **dict.fromkeys(
        (
            "aten::scaled_dot_product_attention",
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_cudnn_attention",
            "aten::_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention_forward,
    ),
    **dict.fromkeys(
        (
            "aten::_scaled_dot_product_flash_attention_backward",
            "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
            "aten::_scaled_dot_product_efficient_attention_backward",
            "aten::_scaled_dot_product_cudnn_attention_backward",
            "aten::_scaled_dot_product_fused_attention_overrideable_backward",
        ),
        _attention_backward,
    ),
    "aten::mkldnn_rnn_layer": _recurrent_layer,
    "aten::mkldnn_rnn_layer_backward": _recurrent_layer_backward,
    "aten::_cudnn_rnn": _recurrent_network,
}
