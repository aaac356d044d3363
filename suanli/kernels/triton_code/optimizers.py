"""Triton functions: optimiser steps over many tensors in one launch.

Tensors come as a table of addresses and a table of chunks: chunk p works on `chunk_tensor[p]` from
element `chunk_start[p]` on. All tensors of a role have one dtype, given by a pointer of that dtype.
"""

import triton
import triton.language as tl


@triton.jit
def _tensor(table_ptr, tensor, KIND: tl.constexpr):
    """Pointer to the tensor with this number."""
    return tl.load(table_ptr + tensor).to(tl.pointer_type(KIND), bitcast=True)


@triton.jit
def adamw(
    param_table, grad_table, average_table, square_table, chunk_tensor, chunk_start, sizes,
    lr, beta1, beta2, eps, decay, correction1, correction2,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk: decay, both averages and the update, all in fp32.

    `correction1` is 1 - beta1**step and `correction2` the root of 1 - beta2**step.
    """
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensor + chunk)
    at = tl.load(chunk_start + chunk) + tl.arange(0, BLOCK)
    inside = at < tl.load(sizes + tensor)
    param_ptr = _tensor(param_table, tensor, PARAM) + at
    average_ptr = _tensor(average_table, tensor, STATE) + at
    square_ptr = _tensor(square_table, tensor, STATE) + at
    grad_ptr = _tensor(grad_table, tensor, GRAD) + at
    grad = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32)
    param = tl.load(param_ptr, mask=inside, other=0.0).to(tl.float32)
    average = tl.load(average_ptr, mask=inside, other=0.0).to(tl.float32)
    square = tl.load(square_ptr, mask=inside, other=0.0).to(tl.float32)
    average += (1.0 - beta1) * (grad - average)
    square = square * beta2 + (1.0 - beta2) * grad * grad
    param *= 1.0 - lr * decay
    param -= (lr / correction1) * average / (tl.sqrt(square) / correction2 + eps)
    tl.store(param_ptr, param.to(PARAM), mask=inside)
    tl.store(average_ptr, average.to(STATE), mask=inside)
    tl.store(square_ptr, square.to(STATE), mask=inside)


@triton.jit
def momentum(
    grad_table, average_table, out_table, chunk_tensor, chunk_start, sizes, beta,
    GRAD: tl.constexpr, STATE: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of Nesterov's momentum: average = beta a + (1 - beta) g; out looks one step on."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensor + chunk)
    at = tl.load(chunk_start + chunk) + tl.arange(0, BLOCK)
    inside = at < tl.load(sizes + tensor)
    grad_ptr = _tensor(grad_table, tensor, GRAD) + at
    average_ptr = _tensor(average_table, tensor, STATE) + at
    grad = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32)
    average = tl.load(average_ptr, mask=inside, other=0.0).to(tl.float32)
    average += (1.0 - beta) * (grad - average)
    ahead = grad + beta * (average - grad)
    tl.store(average_ptr, average.to(STATE), mask=inside)
    tl.store(_tensor(out_table, tensor, OUT) + at, ahead.to(OUT), mask=inside)


@triton.jit
def descend(
    param_table, update_table, chunk_tensor, chunk_start, sizes, shrink, rate,
    PARAM: tl.constexpr, UPDATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk: param = param * shrink - rate * update."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensor + chunk)
    at = tl.load(chunk_start + chunk) + tl.arange(0, BLOCK)
    inside = at < tl.load(sizes + tensor)
    param_ptr = _tensor(param_table, tensor, PARAM) + at
    update_ptr = _tensor(update_table, tensor, UPDATE) + at
    param = tl.load(param_ptr, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(update_ptr, mask=inside, other=0.0).to(tl.float32)
    tl.store(param_ptr, (param * shrink - rate * update).to(PARAM), mask=inside)


@triton.jit
def product_sum(
    a_ptr, b_ptr, c_ptr, out_ptr, rows, inner, columns, alpha, beta,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of out = alpha * (a @ b) + beta * c for one matrix of a batch, all contiguous.

    a is [rows, inner], b [inner, columns], or [columns, inner] where TRANSPOSED; with beta 0 c is
    not read.
    """
    batch = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptr += batch * rows * inner
    b_ptr += batch * inner * columns
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, inner, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a_mask = (m < rows)[:, None] & (k < inner)[None, :]
        b_mask = (k < inner)[:, None] & (n < columns)[None, :]
        a = tl.load(a_ptr + m.to(tl.int64)[:, None] * inner + k[None, :], mask=a_mask, other=0.0)
        if TRANSPOSED:
            b_at = n.to(tl.int64)[None, :] * inner + k[:, None]
        else:
            b_at = k.to(tl.int64)[:, None] * columns + n[None, :]
        b = tl.load(b_ptr + b_at, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    out = batch * rows * columns + m.to(tl.int64)[:, None] * columns + n[None, :]
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    acc *= alpha
    if beta != 0.0:
        acc += beta * tl.load(c_ptr + out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=mask)
