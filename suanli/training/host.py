"""The far side of a training trial: one plan, built, checked and timed in a process of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from suanli.base import codec
from suanli.base.train_plan import TrainPlan
from suanli.base.trial import ValueCheck
from suanli.measure.timing import measure, timed_calls
from suanli.training.batches import Batch, Batches
from suanli.training.exchange import Exchange
from suanli.training.forward import machine_as_planned
from suanli.training.prune import pruned
from suanli.training.recipe import Recipe
from suanli.training.recipes import resolve_recipe
from suanli.training.start import held_out_end
from suanli.training.step import Stepper
from suanli.training.verify import (
    Trace,
    compare,
    eager_plan,
    eager_too_far,
    moved_weights,
    record,
    reference_trace,
)
from suanli.workloads.record import Samples
from suanli.workloads.stream import Stream

_WHILE_TIMED = 0.5  # share of the run at which the rate of timed steps is taken
_OTHERWISE = "its worker processes read other samples than the run's own process does"
DRAWS = 3  # eager runs per precision: as it is, and from moved weights
_OTHER_BATCHES = 7919  # between the seeds of two attempts


def eager_name(precision: str, attempt: int, draw: int) -> str:
    """Name of a trace of eager in the exchange."""
    return f"eager-{precision}-{attempt}-{draw}"


class TrainHost:
    """Runs one plan on the start of a run."""

    def __init__(
        self, *, ref: str, plan: dict[str, Any] | None, exchange: str, recipe: Recipe | None = None
    ) -> None:
        """Make the recipe anew.

        Args:
            ref: What makes the recipe.
            plan: The plan to try, as JSON; None where only references are made.
            exchange: Folder of the exchange.
            recipe: In the place of `ref`, for a model that lives only in this process.
        """
        self._exchange = Exchange(Path(exchange))
        self._facts = self._exchange.facts
        made = recipe
        if made is None:
            made, kind = resolve_recipe(ref), self._facts.prune
            made = pruned(made, kind) if kind else made
        self._recipe = replace(made, settings=self._facts.settings)
        self._plan = codec.from_json(TrainPlan, plan).checked() if plan is not None else None
        self._stepper: Stepper | None = None
        self._steps = 0
        self._batches: Batches | None = None
        self._stream: Samples | None = None

    # -- what plans are held against ------------------------------------------------------------

    def reference(self, attempt: int = 0) -> str:
        """Write the reference trace; gives why it is not in float64, or "".

        Args:
            attempt: Which batches: each attempt has others.
        """
        plan = eager_plan("cpu", "fp32")
        batches, probe = self._first_batches(plan, attempt), self._exchange.probe()
        total = self._facts.total_steps
        model = self._fresh()
        trace, note = reference_trace(model, self._recipe, batches, total, probe)
        if note:
            stepper = Stepper(self._fresh(), self._recipe, plan)
            trace = record(stepper, batches, total, probe)
        self._exchange.put_trace(f"reference-{attempt}", trace, note)
        return note

    def eager(self, precision: str, device: str, attempt: int = 0) -> None:
        """Write the traces of eager at a precision."""
        plan = eager_plan(device, precision)
        batches = self._first_batches(plan, attempt)
        probe = tuple(part.to(device) for part in self._exchange.probe())
        with machine_as_planned(plan):
            for draw in range(DRAWS):
                model = self._fresh()
                if self._recipe.averaging is not None:
                    # pruning drops the same weights in all draws: zeros do not move
                    self._recipe.averaging(model)
                if draw:
                    moved_weights(model, precision, seed=draw)
                stepper = Stepper(model, self._recipe, plan)
                trace = record(stepper, batches, self._facts.total_steps, probe)
                self._exchange.put_trace(eager_name(precision, attempt, draw), trace)

    def too_far(self, precision: str, attempt: int = 0) -> str:
        """Why eager's traces at a precision can show nothing of a plan; "" if they can."""
        draws = range(DRAWS)
        eager = [self._exchange.trace(eager_name(precision, attempt, draw)) for draw in draws]
        return eager_too_far(self._exchange.trace(f"reference-{attempt}"), eager)

    # -- the plan -------------------------------------------------------------------------------

    def check(self, k: float, attempt: int = 0) -> Any:
        """Run the first steps under the plan and hold them against the reference.

        Returns:
            A `ValueCheck` as JSON.
        """
        plan = self._planned()
        if self._reads_otherwise(plan):
            return codec.to_json(ValueCheck(ok=False, k=k, reason=_OTHERWISE))
        with machine_as_planned(plan):
            trace = self.trace(plan, attempt)
        names = [eager_name(plan.precision, attempt, draw) for draw in range(DRAWS)]
        eager = [self._exchange.trace(name) for name in names]
        reference = self._exchange.trace(f"reference-{attempt}")
        return codec.to_json(compare(trace, reference, eager, plan.precision, k))

    def trace(self, plan: TrainPlan, attempt: int = 0) -> Trace:
        """The first steps under a plan."""
        probe = tuple(part.to(plan.device) for part in self._exchange.probe())
        stepper = Stepper(self._fresh(), self._recipe, plan)
        seed = self._facts.seed + attempt * _OTHER_BATCHES
        batches = Batches(self._exchange.samples(), self._recipe, plan, seed)
        try:
            taken = [batches.next() for _ in range(self._facts.check_steps)]
            return record(stepper, taken, self._facts.total_steps, probe)
        finally:
            batches.close()
            stepper.close()

    def time(self, min_seconds: float, max_seconds: float) -> Any:
        """Time real steps, the making of batches included; a `Timing` as JSON."""
        plan = self._planned()
        with machine_as_planned(plan):
            self._open(plan)
            try:
                timing = measure(
                    self._step,
                    batch=self._recipe.settings.batch,
                    min_seconds=min_seconds,
                    max_seconds=max_seconds,
                    sync=_sync(plan),
                )
            finally:
                self._close()
        return codec.to_json(timing)

    def calls(self, count: int) -> list[float]:
        """Milliseconds of that many steps, for a race; the plan's settings stay in force."""
        plan = self._planned()
        if self._stepper is None:
            self._setting = machine_as_planned(plan)
            self._setting.__enter__()
            self._open(plan)
        return timed_calls(self._step, count, sync=_sync(plan))

    def _open(self, plan: TrainPlan) -> None:
        self._stepper = Stepper(self._fresh(), self._recipe, plan)
        samples = self._source(plan)
        self._batches = Batches(samples, self._recipe, plan, self._facts.seed)

    def _source(self, plan: TrainPlan) -> Samples:
        """What timed steps learn from: reading a data set is a part of a streamed plan's step."""
        if not self._facts.streamed or plan.data == "resident":
            return self._exchange.samples()
        if self._stream is None:
            data = self._recipe.workload.load()
            self._stream = held_out_end(data.train, self._facts.settings.validation_split)[0]
        return self._stream

    def _reads_otherwise(self, plan: TrainPlan) -> bool:
        """Whether the plan's workers give other samples than this process reads."""
        if not self._facts.streamed or not plan.workers:
            return False
        source, found = self._source(plan), []
        if isinstance(source, Stream) and not source.nature().repeatable:
            return False  # the run itself says so
        for one in (plan, plan.with_(workers=0)):
            batches = Batches(source, self._recipe, one, self._facts.seed)
            try:
                batch = batches.next()
            finally:
                batches.close()
            found.append((*batch.inputs, batch.labels))
        return not all(map(torch.equal, *found))

    def _close(self) -> None:
        if self._batches is not None and self._stepper is not None:
            self._batches.close()
            self._stepper.close()
        self._batches = self._stepper = None

    def _step(self) -> None:
        assert self._batches is not None
        assert self._stepper is not None
        batch = self._batches.next()
        loss = self._stepper.gradients(batch.inputs, batch.labels)
        if loss.device.type == "cpu":
            float(loss)  # as the loop does
        self._stepper.update(_WHILE_TIMED)
        self._steps += 1
        self._stepper.follow(self._steps, _WHILE_TIMED)

    def _planned(self) -> TrainPlan:
        assert self._plan is not None
        return self._plan

    def _fresh(self) -> nn.Module:
        """The model at its start."""
        return self._exchange.model(self._recipe)

    def _first_batches(self, plan: TrainPlan, attempt: int) -> list[Batch]:
        seed = self._facts.seed + attempt * _OTHER_BATCHES
        batches = Batches(self._exchange.samples(), self._recipe, plan, seed)
        return [batches.next() for _ in range(self._facts.check_steps)]


def _sync(plan: TrainPlan) -> Any:
    if plan.kind != "cuda":
        return None
    return lambda: torch.cuda.synchronize(plan.device)
