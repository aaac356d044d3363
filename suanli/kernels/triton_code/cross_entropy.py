"""Triton functions: softmax cross-entropy over logits that lie in memory."""

import triton
import triton.language as tl


@triton.jit
def loss_forward(
    logits_ptr, target_ptr, loss_ptr, lse_ptr, classes, row_stride, ignored, smoothing,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program: the loss and log(sum(exp)), in one pass over the logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    start = logits_ptr + row * row_stride
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, classes, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < classes
        x = tl.load(start + column, mask=inside, other=float("-inf")).to(tl.float32)
        # Each lane keeps its own maximum, so that no reduction across lanes stands in the loop.
        new = tl.maximum(highest, x)
        # a lane that has seen only -inf stays at a sum of 0
        old_part = tl.where(highest == float("-inf"), 0.0, tl.exp(highest - new))
        new_part = tl.where(x == float("-inf"), 0.0, tl.exp(x - new))
        sums = sums * old_part + new_part
        highest = new
        plain += tl.where(inside, x, 0.0)
    top = tl.max(highest, axis=0)
    total = tl.sum(tl.where(highest == float("-inf"), 0.0, sums * tl.exp(highest - top)), axis=0)
    lse = top + tl.log(total)
    counted = target != ignored
    # a target that is no class gives NaN, and reads nothing
    known = (target >= 0) & (target < classes)
    hit = tl.load(start + target, mask=known, other=float("nan")).to(tl.float32)
    loss = lse - hit
    if smoothing > 0:
        loss = (1.0 - smoothing) * loss + smoothing * (lse - tl.sum(plain, axis=0) / classes)
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))
    tl.store(lse_ptr + row, lse)


@triton.jit
def loss_backward(
    logits_ptr, target_ptr, lse_ptr, grad_loss_ptr, grad_ptr, classes, row_stride, ignored,
    smoothing, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one row per program: (softmax - target) times the row's gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < classes
    target = tl.load(target_ptr + row)
    scale = tl.where(target != ignored, tl.load(grad_loss_ptr + row), 0.0)
    lse = tl.load(lse_ptr + row)
    x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    wanted = tl.where(column == target, 1.0 - smoothing, 0.0) + smoothing / classes
    # a row without weight gives 0 even where its logits are not finite
    grad = tl.where(scale == 0.0, 0.0, (tl.exp(x - lse) - wanted) * scale)
    out = grad_ptr + row * classes + column
    tl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=inside)
