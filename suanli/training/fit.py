"""The plain training loop: one device, one model, the workload's own hyper-parameters."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from suanli.base.errors import BadInputError, SuanliError
from suanli.training._allocator import kept_memory
from suanli.training.augment import augment
from suanli.workloads.record import Samples, TrainingSettings, Workload
from suanli.workloads.weights import kept_weights, save_weights

_WARM_UP = 0.25  # share of a cycle in which the rate rises; airbench94 uses 0.23
_REPORT_EVERY_S = 1.0
_EVALUATION_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class FitProgress:
    """Where a fit stands.

    Attributes:
        done: Share of the fit that is over, 0 to 1.
        loss: Mean over the steps since the last report.
    """

    epoch: int
    epochs: int
    done: float
    loss: float
    samples_per_s: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit gave.

    Attributes:
        model: Trained, in evaluation mode, fp32, on the CPU.
        search_accuracy: On the search part, as a fraction, in fp32.
        acceptance_accuracy: On the acceptance part; no decision was made from it.
        validation_accuracy: On the held-out end of the training part; None where none is held out.
        epochs: Passes over the training part, a broken one as a fraction.
        epoch_losses: Mean loss of each epoch.
        seconds: Of the loop, without loading and final evaluation.
    """

    model: nn.Module
    search_accuracy: float
    acceptance_accuracy: float
    validation_accuracy: float | None
    epochs: float
    epoch_losses: tuple[float, ...]
    seconds: float
    samples_per_s: float
    precision: str


Progress = Callable[[FitProgress], None]


def fit(
    workload: Workload,
    *,
    seed: int = 0,
    epochs: int | None = None,
    max_seconds: float | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> FitResult:
    """Train a classifier with the hyper-parameters it comes with.

    A workload that is untrained starts from its layers' own initialisation, drawn from `seed`;
    one with weights starts from those. With the same seed, threads and no time limit that binds,
    two fits give the same weights.

    Args:
        workload: With data, a loss and training settings.
        seed: Of the initialisation, the order of samples and the augmentation.
        epochs: Instead of the workload's own.
        max_seconds: Where the epochs do not fit in this, the cycle of the rate is shortened to it.
        device: "cpu" or "cuda:0".
        progress: Called about once a second and at the end of each epoch.

    Raises:
        BadInputError: There is nothing to train with, or a limit that leaves no time.
        SuanliError: The loss is no longer finite.
    """
    settings = workload.training
    if workload.data is None or workload.loss is None or settings is None:
        raise BadInputError(
            f"{workload.name} has no labelled data to train with",
            next_step=workload.note or "give --data, or a workload with data, loss and training",
        )
    if (epochs is not None and epochs < 1) or (max_seconds is not None and max_seconds <= 0):
        raise BadInputError("training needs at least one epoch and some time")
    if epochs is not None:
        settings = replace(settings, epochs=epochs)
    data = workload.data()
    train, held_out = _held_out(data.train, settings.validation_split)
    model = _starting_point(workload, seed)
    loop = _Loop(model, workload.loss, settings, train, device=device, seed=seed)
    with kept_memory():
        loop.run(max_seconds, progress)
        model = model.eval()
        accuracies = [
            accuracy(model, part, device=device) for part in (data.search, data.acceptance)
        ]
        validation = accuracy(model, held_out, device=device) if held_out else None
    return FitResult(
        model=_arranged(model.to("cpu"), torch.contiguous_format),
        search_accuracy=accuracies[0],
        acceptance_accuracy=accuracies[1],
        validation_accuracy=validation,
        epochs=loop.samples_seen / len(train),
        epoch_losses=tuple(loop.epoch_losses),
        seconds=loop.seconds,
        samples_per_s=loop.samples_seen / loop.seconds,
        precision="bf16" if loop.autocast else "fp32",
    )


def fit_and_keep(
    workload: Workload, *, seed: int = 0, progress: Progress | None = None
) -> tuple[FitResult, Path]:
    """Fit a built-in workload and keep its weights where `resolve` finds them by name.

    Raises:
        BadInputError: See `fit`; or the workload is no built-in one.
        OSError: The cache folder cannot be written.
    """
    name = workload.name
    if workload.training is None or workload.ref.partition("?")[0] != name:
        raise BadInputError(f"{name} is no built-in workload that can be trained")
    result = fit(workload, seed=seed, progress=progress)
    path = kept_weights(name, workload.training)
    save_weights(
        result.model,
        path,
        {
            "workload": name,
            "seed": str(seed),
            "search_accuracy": f"{result.search_accuracy:.4f}",
            "acceptance_accuracy": f"{result.acceptance_accuracy:.4f}",
        },
    )
    return result, path


@torch.inference_mode()
def accuracy(model: nn.Module, samples: Samples, *, device: str = "cpu") -> float:
    """Share of samples whose largest logit is their label's, in fp32."""
    if samples.labels is None:
        raise BadInputError("accuracy needs labels")
    right = 0
    for start in range(0, len(samples), _EVALUATION_BATCH):
        rows = slice(start, start + _EVALUATION_BATCH)
        output = model(*(_placed(part[rows], device) for part in samples.inputs))
        right += int((output.argmax(1).cpu() == samples.labels[rows]).sum())
    return right / len(samples)


class _Loop:
    """State of one fit."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        settings: TrainingSettings,
        train: Samples,
        *,
        device: str,
        seed: int,
    ) -> None:
        if train.labels is None:
            raise BadInputError("training needs labels")
        self.settings, self.train, self.labels = settings, train, train.labels
        self.loss, self.device = loss, device
        self.images = all(part.dim() == 4 for part in train.inputs)
        self.model = model.to(device).train()
        if self.images:
            self.model = _arranged(self.model, torch.channels_last)
        self.optimizer = _optimizer(self.model, settings)
        self.autocast = settings.precision == "bf16" and _has_bf16_units(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = settings.epochs * math.ceil(len(train) / settings.batch)
        self.epoch_losses: list[float] = []
        self.samples_seen, self.step, self.seconds = 0, 0, 0.0

    def run(self, max_seconds: float | None, progress: Progress | None) -> None:
        """Train until the epochs or the time are over."""
        start = last_report = time.monotonic()
        for epoch in range(self.settings.epochs):
            losses: list[torch.Tensor] = []
            reported = 0
            order = torch.randperm(len(self.train), generator=self.generator)
            for rows in torch.split(order, self.settings.batch):
                now = time.monotonic()
                done = self._done(now - start, max_seconds)
                if done >= 1.0:
                    break
                if progress and now - last_report > _REPORT_EVERY_S and losses:
                    last_report = now
                    progress(self._report(epoch, done, losses[reported:], now - start))
                    reported = len(losses)
                losses.append(self._one_step(rows, done))
            self.seconds = max(time.monotonic() - start, 1e-9)
            if not losses:
                break
            self.epoch_losses.append(self._mean(losses))
            done = self._done(self.seconds, max_seconds)
            if progress:
                progress(self._report(epoch, done, losses, self.seconds))
            if done >= 1.0:
                break

    def _done(self, seconds: float, max_seconds: float | None) -> float:
        by_time = seconds / max_seconds if max_seconds else 0.0
        return min(1.0, max(self.step / self.steps, by_time))

    def _one_step(self, rows: torch.Tensor, done: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self._rate(done)
        inputs = [part[rows] for part in self.train.inputs]
        if self.images and self.settings.augmentation:
            inputs = [augment(part, self.settings.augmentation, self.generator) for part in inputs]
        placed = [_placed(part, self.device) for part in inputs]
        kind = torch.device(self.device).type
        context: AbstractContextManager[object] = torch.autocast(
            kind, torch.bfloat16, enabled=self.autocast
        )
        with context:
            output = self.model(*placed)
        loss = self.loss(output.float(), self.labels[rows].to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        self.samples_seen += len(rows)
        return loss.detach()

    def _rate(self, done: float) -> float:
        if self.settings.schedule == "constant":
            return 1.0
        if done < _WARM_UP:
            return 0.1 + 0.9 * done / _WARM_UP
        return (1.0 - done) / (1.0 - _WARM_UP)

    def _mean(self, losses: list[torch.Tensor]) -> float:
        value = float(torch.stack(losses).mean())
        if not math.isfinite(value):
            raise SuanliError(
                f"the loss is {value} after {self.step} steps", next_step="lower the learning rate"
            )
        return value

    def _report(
        self, epoch: int, done: float, losses: list[torch.Tensor], seconds: float
    ) -> FitProgress:
        return FitProgress(
            epoch=epoch + 1,
            epochs=self.settings.epochs,
            done=done,
            loss=self._mean(losses),
            samples_per_s=self.samples_seen / seconds,
            seconds=seconds,
        )


def _held_out(train: Samples, fraction: float) -> tuple[Samples, Samples | None]:
    if not fraction:
        return train, None
    edge = len(train) - int(len(train) * fraction)
    parts = []
    for rows in (slice(0, edge), slice(edge, None)):
        labels = None if train.labels is None else train.labels[rows]
        parts.append(Samples(inputs=tuple(part[rows] for part in train.inputs), labels=labels))
    return parts[0], parts[1]


def _starting_point(workload: Workload, seed: int) -> nn.Module:
    model = workload.make_model()
    if workload.untrained:
        # children first, so that a network's own rule has the last word over its layers'
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in reversed(list(model.modules())):
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
    return model.requires_grad_()


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=decay,
            fused=True,
        )
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=settings.lr, weight_decay=decay, fused=True)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=decay, fused=True)
    raise BadInputError(f"unknown optimizer {settings.optimizer!r}", next_step="sgd, adam, adamw")


def _arranged(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    arranged: nn.Module = model.to(memory_format=layout)  # type: ignore[call-overload]
    return arranged


def _has_bf16_units(device: str) -> bool:
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


def _placed(tensor: torch.Tensor, device: str) -> torch.Tensor:
    if tensor.dim() == 4:
        return tensor.to(device, memory_format=torch.channels_last)
    return tensor.to(device)
