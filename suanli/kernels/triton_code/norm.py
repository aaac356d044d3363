"""Triton functions: RMSNorm and LayerNorm with an optional residual sum before."""

import triton
import triton.language as tl


@triton.jit
def forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    n_rows, width, eps,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`ROWS` whole rows per program; BLOCK is the width rounded up to a power of two."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < n_rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        # what is normalised is the sum as it is stored, so that backward sees the same values
        stored = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, stored, mask=inside)
        x = stored.to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, axis=1) / width
        x = tl.where((column < width)[None, :], x - mean[:, None], 0.0)
        tl.store(mean_ptr + row, mean, mask=row < n_rows)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        y += bias[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    x_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_out_ptr, grad_sum_ptr,
    grad_x_ptr, grad_weight_ptr, grad_bias_ptr, n_rows, width, rows_per_program,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A run of rows per program; its part of the weight's gradient at [program, column]."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    begin = program * rows_per_program
    for row in range(begin, tl.minimum(begin + rows_per_program, n_rows)):
        at = tl.cast(row, tl.int64) * width + column
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if CENTRED:
            x = tl.where(inside, x - tl.load(mean_ptr + row), 0.0)
        normal = x * rstd
        grad_weight += g * normal
        if BIAS:
            grad_bias += g
        g *= weight
        grad = g - normal * (tl.sum(g * normal, axis=0) / width)
        if CENTRED:
            grad -= tl.sum(g, axis=0) / width
        grad *= rstd
        if RESIDUAL:
            grad += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    part = tl.cast(program, tl.int64) * width + column
    tl.store(grad_weight_ptr + part, grad_weight, mask=inside)
    if BIAS:
        tl.store(grad_bias_ptr + part, grad_bias, mask=inside)
