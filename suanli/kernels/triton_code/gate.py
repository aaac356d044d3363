"""Triton functions: gated activations, act(a) * b."""

import triton
import triton.language as tl


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """The activation and its derivative at x. KIND: "silu", "gelu" or "gelu_tanh"."""
    if KIND == "silu":
        s = tl.sigmoid(x)
        value = x * s
        slope = s * (1.0 + x * (1.0 - s))
    elif KIND == "gelu":
        half = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        value = x * half
        slope = half + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh(u) = 2 sigmoid(2u) - 1, so that half of (1 + tanh) is a sigmoid
        half = tl.sigmoid(2.0 * inner)
        value = x * half
        slope = half + 2.0 * x * half * (1.0 - half) * (
            0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
        )
    return value, slope


@triton.jit
def forward(
    a_ptr, b_ptr, out_ptr, width, a_stride, b_stride, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of one row per program; rows of a and b may be parts of wider ones."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    a = tl.load(a_ptr + row * a_stride + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation(a, KIND)
    tl.store(out_ptr + row * width + column, (value * b).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    a_ptr, b_ptr, grad_ptr, grad_a_ptr, grad_b_ptr, width, a_stride, b_stride,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of both; the activation is computed again, not kept."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    a = tl.load(a_ptr + row * a_stride + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(a, KIND)
    at = row * width + column
    tl.store(grad_a_ptr + at, (g * b * slope).to(grad_a_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_b_ptr + at, (g * value).to(grad_b_ptr.dtype.element_ty), mask=inside)
