"""Training in one call, in this process, with the workload's own hyper-parameters."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.base.train_results import TrainProgress
from suanli.devices import cpu_info
from suanli.training.checks import check_samples
from suanli.training.forward import machine_as_planned
from suanli.training.judging import accuracy
from suanli.training.kernels import usable
from suanli.training.loop import Limits, Loop, Report
from suanli.training.readers import stays
from suanli.training.recipe import Recipe, as_written
from suanli.training.start import held_out_end, starting_point
from suanli.training.step import Stepper, arranged
from suanli.workloads.record import Samples, Workload
from suanli.workloads.stream import Stream
from suanli.workloads.weights import kept_weights, save_weights

__all__ = ["FitResult", "TrainProgress", "accuracy", "default_plan", "fit", "fit_and_keep"]

_MOST_WORKERS = 8


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
        seconds: Of the steps, without loading and final evaluation.
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


def fit(
    workload: Workload,
    *,
    seed: int = 0,
    epochs: int | None = None,
    max_seconds: float | None = None,
    device: str = "cpu",
    progress: Report | None = None,
) -> FitResult:
    """Train a classifier with the hyper-parameters it comes with and the default plan.

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
    recipe = as_written(workload)
    if (epochs is not None and epochs < 1) or (max_seconds is not None and max_seconds <= 0):
        raise BadInputError("training needs at least one epoch and some time")
    if epochs is not None:
        recipe = replace(recipe, settings=replace(recipe.settings, epochs=epochs))
    data = workload.load()
    train, held_out = held_out_end(data.train, recipe.settings.validation_split)
    model = starting_point(recipe, train, seed)
    train = check_samples(model, recipe, train)
    plan = default_plan(recipe, device, train)
    with machine_as_planned(plan):
        loop = Loop(
            Stepper(model, recipe, plan),
            train,
            seed=seed,
            limits=Limits(epochs=recipe.settings.epochs, max_seconds=max_seconds),
        )
        if progress is not None:
            loop.on_report.append(progress)
        loop.run()
        if loop.averaging is not None:
            loop.averaging.finish()
        model = loop.stepper.model.eval()
        accuracies = [
            accuracy(model, part, device=device) for part in (data.search, data.acceptance)
        ]
        validation = accuracy(model, held_out, device=device) if held_out else None
    return FitResult(
        model=arranged(model.to("cpu"), "contiguous"),
        search_accuracy=accuracies[0],
        acceptance_accuracy=accuracies[1],
        validation_accuracy=validation,
        epochs=loop.epochs_done,
        epoch_losses=tuple(loop.epoch_losses),
        seconds=loop.seconds,
        samples_per_s=loop.samples / max(loop.seconds, 1e-9),
        precision=plan.precision,
    )


def default_plan(recipe: Recipe, device: str, train: Samples) -> TrainPlan:
    """What is fast nearly everywhere, without a search: the recipe's own plan, or this one.

    Args:
        recipe: Its settings say whether bf16 was meant.
        device: "cpu", "cuda:0", …
        train: What is learnt from.
    """
    images = any(part.dim() == 4 for part in train.head(1).inputs)
    data = {"data": "resident"} if stays(train, device) else streaming(train, device)
    if recipe.plan is not None:
        own = usable(recipe.plan.with_(device=device))
        return own if own.data == "streamed" or data["data"] == "resident" else own.with_(**data)
    low = recipe.settings.precision == "bf16" and has_bf16_units(device)
    return TrainPlan(
        device=device,
        precision="bf16" if low else "fp32",
        memory_layout="channels_last" if images else "contiguous",
        optimizer_kernel="fused",
        keep_memory=True,
        flush_denormals=device == "cpu",
    ).with_(**data)


def streaming(train: Samples, device: str) -> dict[str, Any]:
    """What a plan decides where the samples are read while it runs, unless a search knows better.

    As many workers as their owner had, else one on a CPU, which the step computes on as well, and
    all cores, up to eight, for a GPU.
    """
    cores = min(_MOST_WORKERS, cpu_info().usable_cores)
    workers = train.workers if isinstance(train, Stream) else None
    if workers is None:
        workers = 1 if device == "cpu" else cores
    pinned = device.startswith("cuda")
    return {"data": "streamed", "workers": workers, "prefetch": 2, "pinned": pinned}


def fit_and_keep(
    workload: Workload, *, seed: int = 0, progress: Report | None = None
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


def has_bf16_units(device: str) -> bool:
    """Whether the device multiplies matrices in bf16 in units of its own."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())
