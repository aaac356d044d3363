"""The row "fused-loss": cross-entropy of the last linear layer by slices of its classes, on a CPU.

The output of that layer has a row for each position and a column for each word; in eager it goes
through memory several times, in fp32. Here a slice of the columns is computed at a time, small
enough for the caches, and again in the backward pass: 8 N V D operations in the place of 6 N V D.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from suanli.base.train_plan import TrainPlan
from suanli.training.headless import HeadLoss, behead, last_linear
from suanli.training.loss_forms import CrossEntropyForm, Loss, cross_entropy_form
from suanli.workloads.record import Workload

# Of one slice, in fp32, and the classes in it. On one core with AMX, interleaved with eager, slices
# of 512 classes took 0.61, 0.77 and 0.66 of its time (2048 rows with 8192 and with 32768 classes,
# width 384; 4096 rows with 16384 classes, width 768), slices of 4096 classes 1.04 to 1.14.
# Steps of embedding, layer norm and the layer took 0.54 (first of these) and 0.68 (last) of it.
_SLICE_BYTES = 8 * 2**20
_LEAST_SLICE, _MOST_SLICE = 128, 512
_MANY_CLASSES = 4096  # from which on the row is tried


def fused_loss(model: nn.Module, loss: Loss, plan: TrainPlan) -> tuple[nn.Module, HeadLoss]:
    """A twin without its last linear layer, and that layer's cross-entropy by slices.

    Raises:
        BadInputError: As `headless.behead`.
    """
    return behead(model, loss, plan, sliced)


def suits_fused_loss(model: nn.Module, workload: Workload | None) -> bool:
    """Whether the last layer has many classes, and the loss is their mean cross-entropy."""
    head = last_linear(model)
    if head is None or head[1].out_features < _MANY_CLASSES:
        return False
    form = cross_entropy_form(workload.loss if workload else None)
    return form is not None and form.takes_rows()


def sliced(x: Tensor, layer: nn.Linear, target: Tensor, form: CrossEntropyForm) -> Tensor:
    """Mean cross-entropy of a linear layer; see `headless.Product`."""
    weight = layer.weight.to(x.dtype)
    losses: Tensor = _Sliced.apply(  # type: ignore[no-untyped-call]
        *(x, weight, layer.bias, target, form.label_smoothing)
    )
    counted = target != form.ignore_index
    return torch.where(counted, losses, 0.0).sum() / counted.sum()


class _Sliced(torch.autograd.Function):
    """x [N, D], weight [V, D], bias [V] or None, target [N] -> losses [N] in fp32.

    The loss of a row whose target is no class is NaN, with no part in the gradients' sums where its
    own gradient is 0.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, smoothing: float
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = torch.full((len(x),), -torch.inf, dtype=dtype)  # log of the sum of exponentials
        hit, plain = torch.full_like(total, torch.nan), torch.zeros_like(total)
        for first, part in _slices(x, weight):
            logits = _logits(x, part, bias, first)
            total = torch.logaddexp(total, torch.logsumexp(logits, 1))
            inside, place = _place(target, first, part)
            hit = torch.where(inside, logits.gather(1, place)[:, 0], hit)
            if smoothing:
                plain += logits.sum(1)
        ctx.save_for_backward(x, weight, bias, target, total)
        ctx.smoothing = smoothing
        losses = total - hit
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * (total - plain / len(weight))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, total = ctx.saved_tensors
        smoothing, scale = ctx.smoothing, gradients[0][:, None]
        of_x = torch.zeros(x.shape, dtype=total.dtype)
        of_weight = torch.empty_like(weight)
        of_bias = None if bias is None else torch.empty_like(bias)
        for first, part in _slices(x, weight):
            held = _logits(x, part, bias, first).sub_(total[:, None]).exp_()
            inside, place = _place(target, first, part)
            held.scatter_add_(1, place, (smoothing - 1) * inside[:, None].to(held.dtype))
            if smoothing:
                held.sub_(smoothing / len(weight))
            held.mul_(scale)
            rows = slice(first, first + len(part))
            if of_bias is not None:
                of_bias[rows] = held.sum(0)
            low = held.to(x.dtype)
            of_x += low @ part
            torch.mm(low.t(), x, out=of_weight[rows])
        return of_x.to(x.dtype), of_weight, of_bias, None, None


def _slices(x: Tensor, weight: Tensor) -> list[tuple[int, Tensor]]:
    """Rows of the weight, with the first class of each."""
    count = min(max(_LEAST_SLICE, _SLICE_BYTES // (4 * max(1, len(x)))), _MOST_SLICE)
    return [(first, weight[first : first + count]) for first in range(0, len(weight), count)]


def _logits(x: Tensor, part: Tensor, bias: Tensor | None, first: int) -> Tensor:
    """[N, classes of the slice] in fp32, or wider where `x` is."""
    logits = x @ part.t()
    logits = logits.to(torch.promote_types(x.dtype, torch.float32))
    return logits if bias is None else logits.add_(bias[first : first + len(part)])


def _place(target: Tensor, first: int, part: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each row's target is in the slice, [N], and where, [N, 1] (anywhere if it is not)."""
    inside = (target >= first) & (target < first + len(part))
    return inside, (target - first).clamp(0, len(part) - 1)[:, None]
