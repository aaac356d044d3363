"""What a training step has to compute, and how long it must take at least."""

import copy
import time
from dataclasses import dataclass

from torch import nn

from suanli.base.errors import SuanliError
from suanli.base.hardware import Ceilings
from suanli.base.train_plan import TrainPlan
from suanli.base.work import SpeedOfLight, Work
from suanli.cost import speed_of_light
from suanli.measure.capture import capture
from suanli.training.batches import Batches
from suanli.training.recipe import Recipe
from suanli.training.step import Stepper
from suanli.training.verify import eager_plan
from suanli.workloads.record import Samples

# Optimisers that the count of the work has a formula for; another one is counted as the nearest.
_COUNTED = {"sgd": "sgd", "adam": "adam", "adamw": "adamw"}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The bound of one step.

    Attributes:
        sol_ms: Speed of light of a whole batch, in milliseconds.
        peak_ms: Time of the matrix products at the peak of the plan's precision; None if unknown.
    """

    work: Work
    ceilings: Ceilings
    precision: str
    sol_ms: float
    peak_ms: float | None

    def mfu(self, step_ms: float) -> float | None:
        """Model FLOPs utilisation of a step that takes so long."""
        return self.peak_ms / step_ms if self.peak_ms is not None else None

    def reached(self, step_ms: float) -> SpeedOfLight:
        """How near to the speed of light a step comes that takes so long."""
        return speed_of_light(
            self.work, self.ceilings, precision=self.precision, measured_ms=step_ms
        )


def step_work(model: nn.Module, recipe: Recipe, train: Samples) -> Work | None:
    """The work of one training step of the recipe's batch; None where it cannot be counted."""
    batch = min(recipe.settings.batch, len(train))
    few = train.head(batch)
    momentum = recipe.settings.optimizer == "sgd" and recipe.settings.momentum > 0
    optimizer = _COUNTED.get(recipe.settings.optimizer, "sgd-momentum")
    try:
        return capture(
            model,
            few.inputs,
            batch=batch,
            training=True,
            loss=recipe.workload.loss,
            targets=few.labels,
            optimizer="sgd-momentum" if momentum else optimizer,
        )
    except SuanliError:
        return None


def limit_of(
    model: nn.Module, recipe: Recipe, train: Samples, plan: TrainPlan, ceilings: Ceilings
) -> Limit | None:
    """Count the work of one step and what the ceilings allow; None where it cannot be counted."""
    work = step_work(model, recipe, train)
    if work is None:
        return None
    sol = speed_of_light(work, ceilings, precision=plan.precision)
    peak = ceilings.peak_flops(plan.precision)
    return Limit(
        work=work,
        ceilings=ceilings,
        precision=plan.precision,
        sol_ms=sol.ms,
        peak_ms=1e3 * work.matmul_flops / peak if peak else None,
    )


def quick_ms(
    model: nn.Module,
    recipe: Recipe,
    train: Samples,
    device: str,
    plan: TrainPlan | None = None,
) -> float:
    """Milliseconds of a step, roughly: the second of two on a copy.

    Args:
        model: On the CPU.
        recipe: What is trained.
        train: Samples for two steps are taken of it.
        device: Where.
        plan: On that device; None is plain eager fp32.
    """
    plan = plan or eager_plan(device, "fp32")
    stepper = Stepper(copy.deepcopy(model), recipe, plan)
    batches = Batches(train.head(recipe.settings.batch * 2), recipe, plan, 0)
    spent = 0.0
    for _ in range(2):
        batch = batches.next()
        start = time.perf_counter()
        float(stepper(batch.inputs, batch.labels, 0.0))
        spent = time.perf_counter() - start
    return 1e3 * spent
