"""How good a model is on labelled samples, in fp32 and evaluation mode."""

from collections.abc import Callable

import torch
from torch import nn

from suanli.base.errors import BadInputError
from suanli.training.readers import chunks
from suanli.training.recipe import Tensors
from suanli.workloads.record import Samples

_BATCH = 256

Predict = Callable[[nn.Module, Tensors], torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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
) -> float:
    """Accuracy as a fraction, or the mean loss where labels are no classes.

    The model is left in the mode that it was in.

    Args:
        model: On the device.
        samples: With labels.
        loss: For metric "loss".
        device: "cpu" or "cuda:0".
        predict: In the place of calling the model.

    Raises:
        BadInputError: There are no labels.
    """
    if samples.head(1).labels is None:
        raise BadInputError("accuracy needs labels")
    metric = metric_of(samples)
    was_training = model.training
    model.eval()
    total, counted = 0.0, 0
    try:
        for chunk in chunks(samples, _BATCH):
            assert chunk.labels is not None
            inputs = tuple(placed(part, device) for part in chunk.inputs)
            labels = chunk.labels.to(device)
            output = predict(model, inputs) if predict else model(*inputs)
            if metric == "loss":
                assert loss is not None
                total += float(loss(output.float(), labels)) * len(labels)
                counted += len(labels)
            else:
                total += float((output.argmax(class_axis(output, labels)) == labels).sum())
                counted += labels.numel()
    finally:
        model.train(was_training)
    return total / max(counted, 1)


def class_axis(output: torch.Tensor, labels: torch.Tensor) -> int:
    """Where the classes of an output lie: last, or behind the samples as in torch's own losses.

    Args:
        output: [B, …, C] or [B, C, …].
        labels: [B, …].

    Raises:
        BadInputError: The output holds no class for each label.
    """
    if output.shape[:-1] == labels.shape:
        return -1
    if output.dim() > 2 and output.shape[:1] + output.shape[2:] == labels.shape:
        return 1
    raise BadInputError(
        f"outputs {list(output.shape)} hold no class for each of the labels {list(labels.shape)}",
        next_step="labels that are numbers and no classes have to be floating-point",
    )


def accuracy(model: nn.Module, samples: Samples, *, device: str = "cpu") -> float:
    """Share of samples (or positions) whose largest logit is their label's, in fp32."""
    return judge(model, samples, device=device)


def placed(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on the device, four-dimensional ones with the channels last."""
    if tensor.dim() == 4:
        return tensor.to(device, memory_format=torch.channels_last)
    return tensor.to(device)
