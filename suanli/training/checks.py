"""Bad input, found before the first step and said in one line."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from suanli.base import codec
from suanli.base.errors import ArtefactError, BadInputError, SuanliError
from suanli.training.failing import in_one_line
from suanli.training.judging import metric_of
from suanli.training.losses import class_axis, counting, ignores
from suanli.training.recipe import Recipe
from suanli.workloads.record import Samples, TrainingSettings
from suanli.workloads.stream import Stream, own_generators

_USUALLY_IGNORED = (-100, 255)  # by torch's cross-entropy; by data sets of segmentation
_FEW = 16  # samples of a data set that are looked at before the first step
_LEAST = {"batch": 1, "epochs": 1, "lr": 0, "momentum": 0, "weight_decay": 0, "clip_norm": 0}


def checked_settings(settings: TrainingSettings) -> TrainingSettings:
    """The hyper-parameters, each of its own type.

    Raises:
        BadInputError: One of them makes no sense; the message names it.
    """
    try:
        settings = codec.from_json(TrainingSettings, codec.to_json(settings))
    except ArtefactError as error:
        reason = str(error).removeprefix("not a TrainingSettings: ")
        raise BadInputError(f"the hyper-parameters cannot be used: {reason}") from None
    except TypeError as error:
        raise BadInputError(
            f"the hyper-parameters cannot be used: {error}",
            next_step="an optimiser of your own: see suanli.training.recipe.Recipe",
        ) from None
    for name, least in _LEAST.items():
        if getattr(settings, name) < least:
            raise BadInputError(f"{name} must be at least {least}, not {getattr(settings, name)}")
    if not all(0 <= beta < 1 for beta in settings.betas):
        raise BadInputError(f"betas must lie between 0 and 1, not {settings.betas}")
    if not 0 <= settings.validation_split < 1:
        raise BadInputError(f"validation_split must be under 1, not {settings.validation_split:g}")
    if settings.nesterov and settings.optimizer == "sgd" and not settings.momentum:
        raise BadInputError("nesterov needs a momentum")
    return settings


def check_samples(model: nn.Module, recipe: Recipe, train: Samples, *, part: str = "") -> Samples:
    """Look at all labels and inputs, and let the model answer for two samples.

    Of samples that are read on demand the first few are looked at here, and each when it is read.

    Args:
        model: On the CPU.
        recipe: What is trained.
        train: The samples.
        part: Name of the part of the data, for the message.

    Returns:
        The samples to go on with.

    Raises:
        BadInputError: There are no samples or labels, counts differ, an input is not finite, a
            label names no class, or the model or the loss does not take them.
    """
    what = f"{part or 'training'} samples"
    count = len(train)
    if count == 0:
        raise BadInputError(f"there are no {what}")
    if not part:
        _check_model(model, recipe, train)
    seen = train.head(_FEW) if isinstance(train, Stream) else train
    if seen.labels is None:
        raise BadInputError(f"training needs labels, the {what} have none")
    called = partial(_called, train, what=what)
    for number, tensor in enumerate((*seen.inputs, seen.labels)):
        if len(tensor) != len(seen):
            name = "labels" if number == len(seen.inputs) else f"entries of input {number}"
            raise BadInputError(f"{count} {what} but {len(tensor)} {name}")
        _check_finite(tensor, called)
    output = _answer(model, recipe, seen)
    labels = _check_labels(output, recipe, seen, called)
    _check_loss(output, recipe, seen)
    if not part:
        _check_last(model, recipe, seen, count)
    if not isinstance(train, Stream) or labels is None:
        return train
    return train.held_to(labels.classes, labels.ignored)


def _check_model(model: nn.Module, recipe: Recipe, train: Samples) -> None:
    """Refuse what would only show at the first step, or at the last one."""
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise BadInputError(
                f"{name} is a {type(value).__name__}: a run keeps tensors only",
                next_step="let get_extra_state give a tensor",
            )
    for name, parameter in model.named_parameters():
        kind = str(parameter.dtype).removeprefix("torch.")
        if parameter.requires_grad and kind not in ("float32", "float64"):
            raise BadInputError(
                f"{name} is {kind}, a run trains fp32 weights",
                next_step="model.float(); the plan decides what is computed in bf16",
            )
    images = all(part.dim() == 4 for part in train.head(1).inputs)
    if recipe.settings.augmentation and recipe.arrange is None and not images:
        raise BadInputError(
            f"augmentation by {', '.join(recipe.settings.augmentation)} is for images [C, H, W]"
        )


def _called(samples: Samples, row: int, *, what: str) -> str:
    """What a sample is called in its owner's own set, or, where the part is all there is, in it."""
    index = samples.index(row)
    return f"number {row} of the {what}" if index is None else f"sample {index} of the data set"


def _check_finite(tensor: torch.Tensor, called: Callable[[int], str]) -> None:
    if not tensor.is_floating_point():
        return
    for start in range(0, len(tensor), 4096):
        bad = ~tensor[start : start + 4096].isfinite()
        if bad.any():
            row = start + int(
                bad.flatten(1).any(1).nonzero()[0] if bad.dim() > 1 else bad.nonzero()[0]
            )
            raise BadInputError(f"{called(row)} holds NaN or infinity")


@torch.no_grad()
def _answer(model: nn.Module, recipe: Recipe, train: Samples) -> torch.Tensor:
    """The model's output for two samples, in evaluation mode."""
    was = model.training
    model.eval()
    few = tuple(part[:2].clone() for part in train.inputs)  # forward may change its input
    try:
        output = model(*few)
    except SuanliError:
        raise
    except Exception as error:
        shapes = ", ".join(str(list(part.shape[1:])) for part in train.inputs)
        raise BadInputError(
            f"{recipe.name} does not take samples of shape {shapes}: {in_one_line(error)}"
        ) from None
    finally:
        model.train(was)
    if not isinstance(output, torch.Tensor):
        raise BadInputError(
            f"{recipe.name} gives a {type(output).__name__}, training needs one tensor",
            next_step="wrap the model so that its forward returns what the loss takes",
        )
    return output


def _check_last(model: nn.Module, recipe: Recipe, seen: Samples, count: int) -> None:
    """Let a copy of the model take one sample as in training, where an epoch ends with one.

    Batch norm over [B, C] cannot, which else would show at the end of the first epoch only.
    """
    size = recipe.settings.batch
    if (count % size or size) != 1:
        return
    twin = copy.deepcopy(model).train()
    try:
        with torch.no_grad(), own_generators():
            twin(*(part[:1].clone() for part in seen.inputs))
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        raise BadInputError(
            f"{recipe.name} cannot take the last batch of an epoch, which is one sample: {reason}",
            next_step=f"a batch that is not {size}, or samples that are not {count}",
        ) from None


@dataclass(frozen=True, kw_only=True)
class _Labels:
    """What labels may be: below `classes`, or `ignored`."""

    classes: int
    ignored: int | None


def _check_labels(
    output: torch.Tensor, recipe: Recipe, train: Samples, called: Callable[[int], str]
) -> _Labels | None:
    """What labels may be; None where they are no classes."""
    assert train.labels is not None
    loss, labels = recipe.workload.loss, train.labels
    assert loss is not None
    if metric_of(train) == "loss":
        return None
    few = labels[: len(output)]
    classes = int(output.shape[class_axis(output, few, loss)])
    beyond = labels[~counting(labels, classes)]
    wrong: list[int] = torch.unique(beyond).tolist()
    # a data set may hold the usual ones further on
    usual = [value for value in _USUALLY_IGNORED if not 0 <= value < classes]
    ignored = next((v for v in (*wrong[:1], *usual) if ignores(loss, output, few, int(v))), None)
    if unknown := [value for value in wrong if value != ignored]:
        first = int((labels == unknown[0]).flatten(1 if labels.dim() > 1 else 0).nonzero()[0][0])
        raise BadInputError(
            f"label {unknown[0]} of {called(first)} is out of range, the model has classes 0 to "
            f"{classes - 1}"
        )
    return _Labels(classes=classes, ignored=ignored)


def _check_loss(output: torch.Tensor, recipe: Recipe, train: Samples) -> None:
    assert train.labels is not None
    assert recipe.workload.loss is not None
    labels, own = train.labels[: len(output)], recipe.workload.loss
    if isinstance(own, nn.Module) and any(p.requires_grad for p in own.parameters()):
        raise BadInputError(
            "the loss has parameters of its own, which would not be trained",
            next_step="make them a part of the model, or freeze them: requires_grad_(False)",
        )
    try:
        loss = recipe.workload.loss(output.float(), labels)
    except SuanliError:
        raise
    except Exception as error:
        raise BadInputError(
            f"the loss does not take outputs {list(output.shape)} with labels "
            f"{list(labels.shape)}: {in_one_line(error)}"
        ) from None
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise BadInputError("the loss must be one number per batch, a tensor of one element")
