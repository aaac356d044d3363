"""A small network with batch norm and dropout, its data, and ways to train it, for tests."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from suanli.base import codec
from suanli.base.train_plan import TrainPlan
from suanli.base.trial import ValueCheck
from suanli.training.exchange import Exchange, Facts
from suanli.training.host import TrainHost
from suanli.training.loop import Limits, Loop
from suanli.training.recipe import Recipe, as_written
from suanli.training.start import starting_point
from suanli.training.step import Stepper
from suanli.workloads.record import Data, Inputs, Samples, TrainingSettings, Workload
from suanli.workloads.seeding import seeded


def ask_to_stop(number: int) -> None:
    """Do what a signal would have this process do, where it takes the signal.

    One that nobody takes would end the tests' own process without a word.
    """
    taken = signal.getsignal(number)
    assert callable(taken), f"signal {number} is not taken"
    taken(number, None)


def plant_nan(monkeypatch: pytest.MonkeyPatch, at_call: int) -> None:
    """Let one step's loss be NaN, once: the step that is computed as that many-th."""
    real, calls = Stepper.gradients, 0

    def once(self: Stepper, *args: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = real(self, *args, **more)
        return loss * float("nan") if calls == at_call else loss

    monkeypatch.setattr(Stepper, "gradients", once)


class Net(nn.Module):
    """[B, 1, 8, 8] -> [B, 3]."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.body(x).flatten(1)))


def samples(count: int, seed: int) -> Samples:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    images = draw.standard_normal((count, 1, 8, 8)).astype(np.float32)
    for row, label in enumerate(labels):
        images[row, 0, 2 * label : 2 * label + 2] += 1.5
    return Samples(inputs=(torch.from_numpy(images),), labels=torch.from_numpy(labels))


def data() -> Data:
    return Data(train=samples(200, 1), search=samples(60, 2), acceptance=samples(90, 3))


def make_model() -> nn.Module:
    with seeded():
        return Net().eval()


SETTINGS = TrainingSettings(
    optimizer="sgd",
    lr=0.05,
    momentum=0.9,
    weight_decay=1e-4,
    batch=32,
    epochs=4,
    schedule="one_cycle",
    augmentation=("shift1", "flip"),
)
WORKLOAD = Workload(
    name="stripes",
    make_model=make_model,
    make_inputs=lambda batch: Inputs(args=(torch.zeros(batch, 1, 8, 8),)),
    data=data,
    metric="accuracy",
    loss=functional.cross_entropy,
    training=SETTINGS,
)
PLAIN = TrainPlan()


def recipe(**changes: Any) -> Recipe:
    return as_written(replace(WORKLOAD, training=replace(SETTINGS, **changes)))


def new_loop(
    made: Recipe,
    plan: TrainPlan = PLAIN,
    *,
    seed: int = 0,
    steps: int | None = None,
    train: Samples | None = None,
) -> Loop:
    train = train or data().train
    model = starting_point(made, train, seed)
    limits = Limits(epochs=made.settings.epochs, steps=steps)
    return Loop(Stepper(model, made, plan), train, seed=seed, limits=limits)


def state_of(loop: Loop) -> dict[str, torch.Tensor]:
    """All tensors of a loop's state, by path."""
    from suanli.training._tree import taken_apart

    found: dict[str, torch.Tensor] = {}
    for part, value in loop.state().items():
        taken_apart(value, found, part)
    return {name: tensor.cpu().clone() for name, tensor in found.items()}


def _still() -> nn.Module:
    with seeded():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3)
        ).eval()


def still_recipe() -> Recipe:
    """Without batch norm and dropout: what a sample adds does not depend on the others."""
    made = recipe(optimizer="adamw", lr=0.003, batch=33, epochs=60, clip_norm=1.0)
    return replace(made, workload=replace(made.workload, name="still", make_model=_still))


class Bench:
    """The start of a run, with the reference and eager's error at hand."""

    def __init__(
        self,
        folder: Path,
        made: Recipe,
        seed: int = 0,
        *,
        total_steps: int = 28,
        precisions: tuple[str, ...] = ("fp32", "bf16"),
    ) -> None:
        self.made = made
        train = made.workload.load().train
        model = starting_point(made, train, seed)
        facts = Facts(
            settings=made.settings,
            seed=seed,
            check_steps=3,
            total_steps=total_steps,
            trained=tuple(n for n, _ in model.named_parameters()),
        )
        self.exchange = Exchange.write(folder, model, made, train, facts)
        host = self.host(TrainPlan())
        assert host.reference() == ""
        for precision in precisions:
            host.eager(precision, "cpu")

    def host(self, plan: TrainPlan, made: Recipe | None = None) -> TrainHost:
        return TrainHost(
            ref="",
            plan=codec.to_json(plan),
            exchange=str(self.exchange.folder),
            recipe=made or self.made,
        )

    def check(self, plan: TrainPlan, made: Recipe | None = None) -> ValueCheck:
        """As a trial does."""
        return codec.from_json(ValueCheck, self.host(plan, made).check(2.0))
