"""A recipe: a workload, the plan it was tuned with, and its hyper-parameters, in one Python file.

A recipe file is `training/recipes/NAME.py` (name with underscores) or any file of the user's own;
it holds a function or an object that gives a `Recipe`:

    def recipe() -> Recipe:
        return Recipe(workload=..., settings=TrainingSettings(...), plan=TrainPlan(...))

and `suanli train NAME`, or `suanli train file.py:recipe`, runs it. A workload with training
settings is a recipe with nothing special (`as_written`). Every special part is one optional
callable below; the loop calls it at the place that its text names, in this order:

1. `start(model, train, generator)` once, after the seeded initialisation;
2. `optimizer(model, settings, plan)` once, with the model on its device;
3. `averaging(model)` once, when the run starts;
4. `arrange(inputs, epoch, generator)` at each epoch's start;
5. `rate(done, group)` before each step, for each parameter group;
6. `averaging.after_step(step, done)` after each step, and `finish()` at the end;
7. `predict(model, inputs)` whenever quality is judged.

Chance comes from the generator that is handed in, and state lives in the optimiser or in the
averaging's `state_dict`: then a resumed run is the same run, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.workloads.record import Samples, TrainingSettings, Workload

Tensors = tuple[torch.Tensor, ...]


class Averaging(Protocol):
    """An average of weights that follows the steps (EMA, lookahead)."""

    def after_step(self, step: int, done: float) -> None:
        """Take in the weights after step number `step` (from 1), at the share `done` of the run."""

    def finish(self) -> None:
        """Put the average into the model, for the final judgement."""

    def state_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists of tensors, numbers, strings."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """What `--tune` may try for one hyper-parameter.

    Attributes:
        low: Least value.
        high: Largest value.
        log: Whether factors count, and not differences.
        choices: The only values, in the place of a range.
    """

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[float | int | str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained and how it learns.

    Attributes:
        workload: With data and a loss.
        settings: Hyper-parameters; they stand in the place of the workload's own.
        plan: How it was computed when it was tuned; None leaves that to the default or the search.
        ref: What makes the same recipe in another process; "" for one that lives only here.
        changes: In which way it is not the workload as written, in one line; "" where it is.
        start: `start(model, train, generator)` initialises in place, beyond the layers' own rule.
        optimizer: `optimizer(model, settings, plan)`. Each group's `lr` is its peak, and a group's
            "name" tells groups apart in `rate`. Its state must be in its `state_dict`.
        rate: `rate(done, group_name)` multiplies the peak `lr`; `done` goes from 0 to 1.
        arrange: `arrange(inputs, epoch, generator)` gives an epoch's inputs, augmented as a
            whole, and takes the place of `settings.augmentation`.
        averaging: Makes the average of weights.
        predict: `predict(model, inputs)` gives outputs [B, …] for judging, such as a mean over
            mirrored inputs.
        ranges: What `--tune` may try, by the name of a setting; empty for the rate and the decay.
    """

    workload: Workload
    settings: TrainingSettings
    plan: TrainPlan | None = None
    ref: str = ""
    changes: str = ""
    start: Callable[[nn.Module, Samples, torch.Generator], None] | None = None
    optimizer: Callable[[nn.Module, TrainingSettings, TrainPlan], torch.optim.Optimizer] | None = (
        None
    )
    rate: Callable[[float, str], float] | None = None
    arrange: Callable[[Tensors, int, torch.Generator], Tensors] | None = None
    averaging: Callable[[nn.Module], Averaging] | None = None
    predict: Callable[[nn.Module, Tensors], torch.Tensor] | None = None
    ranges: dict[str, Range] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The workload's name."""
        return self.workload.name


def as_written(workload: Workload) -> Recipe:
    """The recipe that a workload brings: its own batch, optimiser and epochs.

    Raises:
        BadInputError: There is nothing to train with.
    """
    if workload.data is None or workload.loss is None or workload.training is None:
        raise BadInputError(
            f"{workload.name} has no labelled data to train with",
            next_step=workload.note or "give --data, or a workload with data, loss and training",
        )
    return Recipe(workload=workload, settings=workload.training, ref=workload.ref)
