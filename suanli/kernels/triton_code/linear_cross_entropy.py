"""Triton functions: cross-entropy of a linear layer whose logits never reach memory."""

import triton
import triton.language as tl


@triton.jit
def _logits(
    x_ptr, w_ptr, rows, columns, n_rows, n_columns, width,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of x @ w.T in fp32; both matrices are contiguous with `width` columns."""
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    x_start = x_ptr + rows.to(tl.int64)[:, None] * width
    w_start = w_ptr + columns.to(tl.int64)[None, :] * width
    for first in range(0, width, BLOCK_D):
        inner = first + tl.arange(0, BLOCK_D)
        x_mask = (rows < n_rows)[:, None] & (inner < width)[None, :]
        w_mask = (inner < width)[:, None] & (columns < n_columns)[None, :]
        x = tl.load(x_start + inner[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_start + inner[:, None], mask=w_mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def forward(
    x_ptr, w_ptr, target_ptr, lse_ptr, hit_ptr, n_rows, n_classes, width, tiles_per_split,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of rows against a split of the classes: partial log-sum-exp and target logit.

    Writes lse and hit at [split, row]; every split holds at least one class.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    target = tl.load(target_ptr + rows, mask=rows < n_rows, other=-1)
    highest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_R,), tl.float32)
    hit = tl.zeros((BLOCK_R,), tl.float32)
    begin = split * tiles_per_split * BLOCK_V
    end = tl.minimum(begin + tiles_per_split * BLOCK_V, n_classes)
    for first in range(begin, end, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        acc = _logits(
            x_ptr, w_ptr, rows, columns, n_rows, n_classes, width,
            BLOCK_R, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        hit += tl.sum(tl.where(columns[None, :] == target[:, None], acc, 0.0), axis=1)
        acc = tl.where((columns < n_classes)[None, :], acc, float("-inf"))
        new = tl.maximum(highest, tl.max(acc, axis=1))
        sums = sums * tl.exp(highest - new) + tl.sum(tl.exp(acc - new[:, None]), axis=1)
        highest = new
    out = split.to(tl.int64) * n_rows + rows
    tl.store(lse_ptr + out, highest + tl.log(sums), mask=rows < n_rows)
    tl.store(hit_ptr + out, hit, mask=rows < n_rows)


@triton.jit
def logit_gradient(
    x_ptr, w_ptr, target_ptr, lse_ptr, scale_ptr, grad_ptr, n_rows, first_class, n_classes, width,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of (softmax - target) * scale for the classes first_class ... + n_classes.

    `w_ptr` points at the first of these classes; the result is [n_rows, n_classes].
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = _logits(
        x_ptr, w_ptr, rows, columns, n_rows, n_classes, width,
        BLOCK_R, BLOCK_V, BLOCK_D, PRECISION,
    )  # fmt: skip
    inside = rows < n_rows
    target = tl.load(target_ptr + rows, mask=inside, other=-1)
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + rows, mask=inside, other=0.0)
    wanted = tl.where((columns + first_class)[None, :] == target[:, None], 1.0, 0.0)
    grad = (tl.exp(acc - lse[:, None]) - wanted) * scale[:, None]
    grad = tl.where((scale == 0.0)[:, None], 0.0, grad)
    out = grad_ptr + rows.to(tl.int64)[:, None] * n_classes + columns[None, :]
    mask = inside[:, None] & (columns < n_classes)[None, :]
    tl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=mask)
