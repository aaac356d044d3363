"""A recipe whose samples wait for their file, for tests of the search."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset

from suanli.training.recipe import Recipe
from suanli.workloads.record import Data
from tests import train_parts

_WAIT_S = 0.004


class Waiting(Dataset[Any]):
    """Stripes with noise that each of them draws."""

    def __init__(self, count: int, seed: int) -> None:
        self._made = train_parts.samples(count, seed)

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: int) -> Any:
        time.sleep(_WAIT_S)
        assert self._made.labels is not None
        return self._made.inputs[0][index] + 0.1 * torch.rand(()), int(self._made.labels[index])


def recipe() -> Recipe:
    """Three parts that are read on demand."""
    made = train_parts.recipe(augmentation=())
    parts: Any = {"train": Waiting(400, 1), "search": Waiting(60, 2), "acceptance": Waiting(60, 3)}
    return replace(made, workload=replace(made.workload, data=lambda: Data(**parts)))
