"""What a loss does with a batch, found by asking it: mean or sum, ignored labels, the axis."""

from collections.abc import Callable

import torch

from suanli.base.errors import BadInputError

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_CLOSE = 1e-3  # relative difference of two sums of the same values
_SURE = 10.0  # logit of the right class in a probe, where the others are 0
_REFUSALS = (RuntimeError, IndexError, ValueError, TypeError)


def is_mean(loss: Loss, output: torch.Tensor, labels: torch.Tensor) -> bool:
    """Whether a batch given twice has the loss of the batch; False where it has twice that.

    Raises:
        BadInputError: Neither.
    """
    with torch.no_grad():
        once = float(loss(output, labels))
        twice = float(loss(torch.cat([output, output]), torch.cat([labels, labels])))
    if abs(twice - once) <= _CLOSE * max(abs(once), 1e-6):
        return True
    if abs(twice - 2 * once) <= _CLOSE * abs(twice):
        return False
    raise BadInputError(
        "the loss is neither a mean nor a sum over samples, so a batch cannot be split",
        next_step="use a plan with micro_batch 0",
    )


def class_axis(output: torch.Tensor, labels: torch.Tensor, loss: Loss | None = None) -> int:
    """Where the classes of an output lie: last, or behind the samples as in torch's own losses.

    Args:
        output: [B, …, C] or [B, C, …].
        labels: [B, …].
        loss: Decides where both fit, as with [B, 8, 8, 8] and [B, 8, 8]; without one the classes of
            pictures lie behind the samples, those of sequences last.

    Raises:
        BadInputError: The output holds no class for each label.
    """
    last = output.shape[:-1] == labels.shape
    second = output.dim() > 2 and output.shape[:1] + output.shape[2:] == labels.shape
    if last and second:
        usual = 1 if output.dim() > 3 else -1
        return usual if loss is None else _lower(output, labels, loss, usual)
    if last or second:
        return -1 if last else 1
    raise BadInputError(
        f"outputs {list(output.shape)} hold no class for each of the labels {list(labels.shape)}",
        next_step="labels that are numbers and no classes have to be floating-point",
    )


def counting(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Which labels name a class, as a mask; the others are those that the loss ignores."""
    return (labels >= 0) & (labels < classes)


def ignores(loss: Loss, output: torch.Tensor, labels: torch.Tensor, value: int) -> bool:
    """Whether a loss leaves out what has this label, as with cross-entropy's `ignore_index`.

    It does where the labels of one sample are all of that value, and the sample gets no gradient
    while another one does.

    Args:
        loss: Of an output and labels.
        output: Of a few samples, with an axis of classes.
        labels: Of the same samples; those that name no class are replaced.
        value: The label, which names no class.
    """
    axis = class_axis(output, labels, loss)
    given = labels.clone()
    given[~counting(labels, int(output.shape[axis]))] = 0
    given = torch.cat([given[:1], torch.full_like(given[:1], value)])
    with torch.enable_grad():
        probe = torch.cat([output[:1], output[:1]]).detach().float().requires_grad_()
        try:
            (gradient,) = torch.autograd.grad(loss(probe, given), probe)
        except _REFUSALS:
            return False
    return bool(gradient.isfinite().all() and gradient[0].any() and not gradient[1].any())


def _lower(output: torch.Tensor, labels: torch.Tensor, loss: Loss, usual: int) -> int:
    """The axis along which the right classes give the lower loss."""
    found = {}
    with torch.no_grad():
        for axis in (1, -1):
            classes = int(output.shape[axis])
            right = labels.clamp(0, classes - 1).unsqueeze(axis)
            hot = torch.zeros(output.shape, device=output.device).scatter_(axis, right, _SURE)
            try:
                found[axis] = float(loss(hot, labels))
            except _REFUSALS:
                return usual
    if found[1] == found[-1]:
        return usual
    return 1 if found[1] < found[-1] else -1
