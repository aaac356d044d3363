"""How good a model is on labelled samples, in fp32 and evaluation mode."""

from collections.abc import Callable

import torch
from torch import nn

from suanli.base.errors import BadInputError
from suanli.training.losses import Loss, class_axis, counting, is_mean
from suanli.training.readers import chunks
from suanli.training.recipe import Tensors
from suanli.workloads.record import Samples

_BATCH, _LEAST_BATCH = 256, 64

Predict = Callable[[nn.Module, Tensors], torch.Tensor]


class JudgementStoppedError(Exception):
    """Somebody asked for the end while samples were judged."""


def metric_of(samples: Samples) -> str:
    """The metric: accuracy of classes, token_accuracy where positions have one each, else loss."""
    labels = samples.head(1).labels
    if labels is None or labels.is_floating_point():
        return "loss"
    return "accuracy" if labels.dim() == 1 else "token_accuracy"


def reached(metric: str, value: float, target: float) -> bool:
    """Whether a value is at least as good as the target."""
    return value <= target if metric == "loss" else value >= target


@torch.inference_mode()
def judge(
    model: nn.Module,
    samples: Samples,
    *,
    loss: Loss | None = None,
    device: str = "cpu",
    predict: Predict | None = None,
    batch: int = _BATCH,
    stop: Callable[[], bool] | None = None,
) -> float:
    """Accuracy as a fraction, or the mean loss of a sample where labels are no classes.

    Labels that name no class count for nothing. The model is left in the mode that it was in.

    Args:
        model: On the device.
        samples: With labels.
        loss: For metric "loss", a mean or a sum over samples; and where it is not clear from the
            shapes along which axis the classes lie.
        device: "cpu" or "cuda:0".
        predict: In the place of calling the model.
        batch: Samples of a step in training, which no piece is much larger than.
        stop: Asked before each piece.

    Raises:
        BadInputError: There are no labels.
        JudgementStoppedError: `stop` gave True.
    """
    if samples.head(1).labels is None:
        raise BadInputError("accuracy needs labels")
    metric = metric_of(samples)
    was_training = model.training
    model.eval()
    total, counted = 0.0, 0
    mean: bool | None = None
    try:
        for chunk in chunks(samples, min(_BATCH, max(_LEAST_BATCH, batch))):
            if stop is not None and stop():
                raise JudgementStoppedError
            assert chunk.labels is not None
            # a copy: a forward may change its input, and these are the owner's samples
            inputs = tuple(placed(part.clone(), device) for part in chunk.inputs)
            labels = chunk.labels.to(device)
            output = predict(model, inputs) if predict else model(*inputs)
            if metric == "loss":
                assert loss is not None
                if mean is None:
                    mean = _is_mean(loss, output.float(), labels)
                total += float(loss(output.float(), labels)) * (len(labels) if mean else 1)
                counted += len(labels)
            else:
                axis = class_axis(output, labels, loss)
                total += float((output.argmax(axis) == labels).sum())
                counted += int(counting(labels, int(output.shape[axis])).sum())
    finally:
        model.train(was_training)
    return total / max(counted, 1)


def _is_mean(loss: Loss, output: torch.Tensor, labels: torch.Tensor) -> bool:
    """Whether a batch's loss is a mean; one that is neither mean nor sum is taken as such."""
    try:
        return is_mean(loss, output, labels)
    except BadInputError:
        return True


def accuracy(model: nn.Module, samples: Samples, *, device: str = "cpu") -> float:
    """Share of samples (or positions) whose largest logit is their label's, in fp32."""
    return judge(model, samples, device=device)


def placed(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on the device, four-dimensional ones with the channels last."""
    if tensor.dim() == 4:
        return tensor.to(device, memory_format=torch.channels_last)
    return tensor.to(device)
