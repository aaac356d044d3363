"""What a training run tells while it goes on, and what `suanli train` gives back."""

from dataclasses import dataclass

from suanli.base.hardware import Ceiling, DeviceInfo, Environment
from suanli.base.plan import Option
from suanli.base.results import SchemaName
from suanli.base.timing import Estimate
from suanli.base.train_plan import TrainPlan
from suanli.base.trial import Trial
from suanli.base.work import SpeedOfLight


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Where a run stands.

    Attributes:
        step: Optimiser steps so far, earlier parts of a resumed run included.
        steps: Steps that the epochs amount to.
        epoch: The epoch that is going on, from 1.
        done: Share of the run that is over, 0 to 1, by steps or by time.
        loss: Mean over the steps since the last report.
        samples_per_s: Of this part of the run.
        seconds: Seconds of steps, without judging and saving.
        left_s: Seconds left at this pace; None before there is one.
        quality: The newest judgement, as a fraction (a loss where the metric is "loss").
        sol_fraction: Share of the speed of light; None where no ceilings are known.
        mfu: Model FLOPs utilisation: the products' operations per second over the peak of the
            plan's precision.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    done: float
    loss: float
    samples_per_s: float
    seconds: float
    left_s: float | None = None
    quality: float | None = None
    sol_fraction: float | None = None
    mfu: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainQuality:
    """How good the trained model is.

    Attributes:
        metric: "accuracy", "token_accuracy" or "loss" (the lower the better).
        value: On the acceptance part, which decided nothing.
        search: On the part that the run was judged on while it went on.
        n: Samples of the acceptance part.
        target: What was asked for, or what the workload expects; None where nothing is.
        reached_at_s: Seconds of training at which the target was first seen to be reached, on the
            part that `search` is of; None where it was not.
    """

    metric: str
    value: float
    search: float
    n: int
    target: float | None = None
    reached_at_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `suanli train` did. Field meanings stand in docs/train.md.

    Attributes:
        hyper_parameters: What the model was trained with, by name.
        as_written: Whether they are the workload's own.
        step_ms: Of the run itself, judging and saving left out.
        loss: Mean of the last epoch's steps, or of the part of it that was run.
        epochs: Passes over the training part, a broken one as a fraction.
        train_seconds: Seconds of steps, earlier parts of a resumed run included.
        resumed_from: Step that this part of the run began at; None for a new run.
        stopped: Why it ended: "epochs", "steps", "target", "time" or "asked".
        speedup: Step of the best verified baseline over the chosen plan's, raced; None without a
            search.
        baseline: Title of that baseline.
    """

    schema: SchemaName
    verb: str
    workload: str
    device: DeviceInfo
    environment: Environment
    plan: TrainPlan
    hyper_parameters: dict[str, Option]
    as_written: bool
    batch: int
    seed: int
    step_ms: Estimate | None
    samples_per_s: float
    sol: SpeedOfLight | None
    mfu: float | None
    loss: float
    quality: TrainQuality | None
    epochs: float
    steps: int
    train_seconds: float
    seconds_spent: float
    stopped: str
    resumed_from: int | None
    run_dir: str
    checkpoint: str | None
    weights: str | None
    trials: tuple[Trial, ...] = ()
    speedup: Estimate | None = None
    baseline: str | None = None
    ceilings: tuple[Ceiling, ...] = ()
    flops: int = 0
    parameters: int = 0
    interrupted: bool = False
    notes: tuple[str, ...] = ()
