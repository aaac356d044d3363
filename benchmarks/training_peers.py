"""The peers of the training benchmark, each as its own documentation advises.

Targets of `suanli.measure.isolation.Worker`: `block(steps)` trains on for so many steps and gives
the milliseconds from the end of one step to the end of the next, data loading included. All train
the same network on the same data with the same batch and optimiser.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from suanli.base import codec
from suanli.base.train_plan import TrainPlan
from suanli.training.batches import Batches
from suanli.training.forward import machine_as_planned
from suanli.training.judging import judge
from suanli.training.recipe import Recipe
from suanli.training.recipes import resolve_recipe
from suanli.training.schedules import rate
from suanli.training.start import starting_point
from suanli.training.step import Stepper

MIDDLE = 0.5  # of a run: where the schedule of the rate is held, so that all sides have one rate
RESNET18 = f"{Path(__file__).with_name('resnet18_recipe.py')}:recipe"


def ref_of(case: str) -> str:
    """What makes the recipe of a case."""
    return RESNET18 if case == "resnet18" else case


def recipe_of(case: str, data: str | None) -> Recipe:
    """The recipe of a case."""
    return resolve_recipe(ref_of(case), data=Path(data) if data else None)


class Peer:
    """A recipe through one library.

    Args:
        recipe: Name of a recipe or workload.
        data: Folder of the data sets.
        settings: The peer's own settings.
    """

    def __init__(self, recipe: str, data: str | None = None, **settings: Any) -> None:
        torch.manual_seed(0)
        self.recipe, self.settings = recipe_of(recipe, data), settings
        workload = self.recipe.workload
        assert workload.data is not None and workload.loss is not None
        self.loss: Any = workload.loss
        data = workload.load()
        self.train, self.watched = data.train, data.search
        self.model: Any = starting_point(self.recipe, self.train, 0).train()
        self.prepare()

    def prepare(self) -> None:
        raise NotImplementedError

    def block(self, steps: int) -> list[float]:
        raise NotImplementedError

    def epoch(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.train) // self.recipe.settings.batch)

    def quality(self) -> float:
        """Quality on the samples that runs are watched with."""
        return judge(
            self.model,
            self.watched,
            loss=self.loss,
            predict=self.recipe.predict,
            batch=self.recipe.settings.batch,
        )

    def loader(self) -> "DataLoader[Any]":
        """Shuffled batches, with the workers that the program as written has."""
        workers = self.recipe.settings.loader_workers
        assert self.train.labels is not None
        return DataLoader(
            TensorDataset(*self.train.inputs, self.train.labels),
            batch_size=self.recipe.settings.batch,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def optimizer(self) -> torch.optim.Optimizer:
        s = self.recipe.settings
        trained = [p for p in self.model.parameters() if p.requires_grad]
        lr = s.lr * rate(self.recipe, MIDDLE)
        if s.optimizer == "muon":  # no framework brings it: SGD costs them less
            return torch.optim.SGD(
                trained, lr=1e-3, momentum=s.momentum, weight_decay=s.weight_decay
            )
        if s.optimizer == "sgd":
            return torch.optim.SGD(
                trained,
                lr=lr,
                momentum=s.momentum,
                nesterov=s.nesterov,
                weight_decay=s.weight_decay,
            )
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[s.optimizer]
        return kind(trained, lr=lr, betas=s.betas, weight_decay=s.weight_decay)


def _endless(loader: "DataLoader[Any]") -> Iterator[list[torch.Tensor]]:
    while True:
        yield from loader


class Plain(Peer):
    """The PyTorch tutorial's loop, with autocast, channels last or torch.compile where set."""

    def prepare(self) -> None:
        if self.settings.get("channels_last"):
            self.model = self.model.to(memory_format=torch.channels_last)
        self.step = self.optimizer()
        self.call = torch.compile(self.model) if self.settings.get("compile") else self.model
        self.batches = _endless(self.loader())

    def block(self, steps: int) -> list[float]:
        times, last = [], time.perf_counter()
        clip = self.recipe.settings.clip_norm
        for _ in range(steps):
            *inputs, labels = next(self.batches)
            self.step.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(self.settings.get("bf16"))):
                output = self.call(*inputs)
            self.loss(output.float(), labels).backward()
            if clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.step.step()
            now = time.perf_counter()
            times.append(1e3 * (now - last))
            last = now
        return times


class Accelerate(Peer):
    """Hugging Face Accelerate: everything through `prepare`."""

    def prepare(self) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True, mixed_precision=self.settings["precision"])
        self.model, self.step, loader = self.accelerator.prepare(
            self.model, self.optimizer(), self.loader()
        )
        self.batches = _endless(loader)

    def block(self, steps: int) -> list[float]:
        times, last = [], time.perf_counter()
        clip = self.recipe.settings.clip_norm
        for _ in range(steps):
            *inputs, labels = next(self.batches)
            self.step.zero_grad()
            with self.accelerator.autocast():
                output = self.model(*inputs)
            self.accelerator.backward(self.loss(output.float(), labels))
            if clip:
                self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
            self.step.step()
            now = time.perf_counter()
            times.append(1e3 * (now - last))
            last = now
        return times


class Lightning(Peer):
    """Lightning's Trainer, without logger, checkpoints and progress bar."""

    def prepare(self) -> None:
        import lightning

        outer = self

        class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                super().__init__()
                self.net = outer.model

            def training_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
                *inputs, labels = batch
                return outer.loss(self.net(*inputs).float(), labels)  # type: ignore[no-any-return]

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return outer.optimizer()

        class Clock(lightning.Callback):  # type: ignore[name-defined,misc]
            def on_train_batch_end(self, *_args: Any) -> None:
                outer.ends.append(time.perf_counter())

        self.ends: list[float] = []
        self.module, self.clock, self.batches = Module(), Clock(), self.loader()

    def block(self, steps: int) -> list[float]:
        import lightning

        self.ends = []
        lightning.Trainer(
            accelerator="cpu",
            precision=self.settings["precision"],
            max_steps=steps + 1,
            gradient_clip_val=self.recipe.settings.clip_norm or None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[self.clock],
        ).fit(self.module, self.batches)
        return [1e3 * (b - a) for a, b in zip(self.ends, self.ends[1:], strict=False)]


class Keras(Peer):
    """Keras 3 on torch: `fit` with arrays, in fp32 or with its policy of mixed precision."""

    def prepare(self) -> None:
        import os

        os.environ["KERAS_BACKEND"] = "torch"
        import keras

        from benchmarks.keras_networks import network, optimizer

        outer, name = self, self.recipe.name
        keras.mixed_precision.set_global_policy(self.settings["policy"])
        self.model = network(name)
        logits = name != "mnist-cnn"
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=logits)
        self.model.compile(optimizer(self.recipe), loss)

        class Clock(keras.callbacks.Callback):  # type: ignore[name-defined,misc]
            def on_train_batch_end(self, *_args: Any, **_kw: Any) -> None:
                outer.ends.append(time.perf_counter())

        self.ends: list[float] = []
        self.clock = Clock()
        inputs = self.train.inputs[0]
        images = inputs.dim() == 4
        self.inputs = (inputs.permute(0, 2, 3, 1).contiguous() if images else inputs).numpy()

    def block(self, steps: int) -> list[float]:
        assert self.train.labels is not None
        self.ends = []
        count = (steps + 1) * self.recipe.settings.batch
        rows = torch.randint(0, len(self.train), (count,))
        self.model.fit(
            self.inputs[rows],
            self.train.labels[rows].numpy(),
            batch_size=self.recipe.settings.batch,
            epochs=1,
            verbose=0,
            callbacks=[self.clock],
        )
        return [1e3 * (b - a) for a, b in zip(self.ends, self.ends[1:], strict=False)]


class Suanli(Peer):
    """Suanli's loop under a plan (`plan`: its JSON file; "" is the recipe's own or the default)."""

    def prepare(self) -> None:
        from suanli.training.fit import default_plan

        path = self.settings.get("plan")
        self.plan = (
            codec.read(TrainPlan, Path(path))
            if path
            else default_plan(self.recipe, "cpu", self.train)
        )
        self._machine = machine_as_planned(self.plan)
        self._machine.__enter__()  # for as long as the process lives
        self.stepper = Stepper(self.model, self.recipe, self.plan)
        self.model = self.stepper.model
        self.batches = Batches(self.train, self.recipe, self.plan, 0)

    def block(self, steps: int) -> list[float]:
        times, last = [], time.perf_counter()
        for _ in range(steps):
            batch = self.batches.next()
            self.stepper(batch.inputs, batch.labels, MIDDLE)
            now = time.perf_counter()
            times.append(1e3 * (now - last))
            last = now
        return times
