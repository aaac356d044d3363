"""Triton functions: weights kept as int8 with one scale a row, and products with them."""

import triton
import triton.language as tl


@triton.jit
def quantize(weight_ptr, out_ptr, scale_ptr, width, BLOCK: tl.constexpr):
    """One row per program: scale = largest magnitude / 127, values rounded to the nearest."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        w = tl.load(weight_ptr + row * width + column, mask=column < width, other=0.0)
        largest = tl.maximum(largest, tl.abs(w.to(tl.float32)))
    scale = tl.max(largest, axis=0) / 127.0
    tl.store(scale_ptr + row, scale)
    per_scale = tl.where(scale > 0.0, 1.0 / scale, 0.0)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        w = tl.load(weight_ptr + row * width + column, mask=column < width, other=0.0)
        q = tl.floor(w.to(tl.float32) * per_scale + 0.5)
        q = tl.minimum(tl.maximum(q, -127.0), 127.0)
        tl.store(out_ptr + row * width + column, q.to(tl.int8), mask=column < width)


@triton.jit
def linear(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, rows, inner, columns,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of x @ (weight * scale).T + bias; weight is int8 [columns, inner].

    Programs walk in groups of GROUP row blocks, so that neighbours share tiles of the weight in L2.
    """
    program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    in_group = GROUP * blocks_n
    first_m = program // in_group * GROUP
    height = tl.minimum(blocks_m - first_m, GROUP)
    m = (first_m + program % in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % in_group // height * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, inner, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x_mask = (m < rows)[:, None] & (k < inner)[None, :]
        w_mask = (k < inner)[:, None] & (n < columns)[None, :]
        x = tl.load(x_ptr + m.to(tl.int64)[:, None] * inner + k[None, :], mask=x_mask, other=0.0)
        w_at = n.to(tl.int64)[None, :] * inner + k[:, None]
        w = tl.load(weight_ptr + w_at, mask=w_mask, other=0)
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision=PRECISION)
    acc *= tl.load(scale_ptr + n, mask=n < columns, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + m.to(tl.int64)[:, None] * columns + n[None, :]
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)
