"""Data sets for tests of reading while a run goes on, one of which fails in every way."""

import multiprocessing
import os
import random
import signal
import time
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from suanli.base.train_plan import TrainPlan
from suanli.training.batches import Batches
from suanli.training.recipe import Recipe
from suanli.workloads.record import Samples
from tests.train_parts import recipe, samples

STREAMED = TrainPlan()
Kind = Dataset[Any]


class Pictures(Kind):
    """The stripes of `train_parts`, one at a time; `noise` draws from all three generators."""

    def __init__(self, count: int = 70, *, noise: bool = True, seed: int = 1) -> None:
        made = samples(count, seed)
        assert made.labels is not None
        self.pictures, self.labels, self.noise = made.inputs[0].numpy(), made.labels, noise
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.reads.append(index)
        picture = self.pictures[index]
        if self.noise:
            shift = random.random() + np.random.rand() + float(torch.rand(()))
            picture = picture + np.float32(0.1 * shift)
        return picture, int(self.labels[index])


class Broken(Pictures):
    """One sample does something that it should not, as `how` says."""

    def __init__(self, how: str, at: int = 17, **options: Any) -> None:
        super().__init__(**options)
        self.how, self.at, self.owner = how, at, os.getpid()

    def __getitem__(self, index: int) -> Any:
        picture, label = super().__getitem__(index)
        if index != self.at or not self.how:
            return picture, label
        if self.how == "killed" and os.getpid() != self.owner:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "exit" and os.getpid() != self.owner:
            os._exit(3)
        if self.how == "raises":
            raise OSError("image file is truncated\nat byte 7")
        wrong = {
            "nan": (picture * np.float32("nan"), label),
            "label": (picture, 7),
            "shape": (picture[:, :4], label),
            "dtype": (picture.astype(np.float64), label),
            "object": (object(), label),
            "dict": {"x": picture, "y": label},
            "more": (picture, picture, label),
        }
        return wrong.get(self.how, (picture, label))


class Stuck(Pictures):
    """One sample never comes, as from a file system that hangs."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index == 17 and multiprocessing.parent_process() is not None:
            time.sleep(600)
        return super().__getitem__(index)


def taken(
    train: Samples, plan: TrainPlan, count: int, *, made: Recipe | None = None, seed: int = 3
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches = Batches(train, made or recipe(), plan, seed)
    try:
        found = [batches.next() for _ in range(count)]
    finally:
        batches.close()
    return [(batch.inputs[0], batch.labels) for batch in found]
