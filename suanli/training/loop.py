"""The one training loop: steps, reports, judgements, the end; and its state, exactly.

Everything that learns goes through it: `fit`, `suanli train`, the trials of the plan search.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from suanli.base.errors import SuanliError
from suanli.base.train_plan import TrainPlan
from suanli.base.train_results import TrainProgress
from suanli.training.batches import Batch, Batches, Place
from suanli.training.before import Before
from suanli.training.blame import first_bad_value
from suanli.training.chance import generators, seed_all, set_generators
from suanli.training.judging import JudgementStoppedError, judge, metric_of, reached
from suanli.training.recipe import Averaging, Recipe
from suanli.training.step import Stepper
from suanli.training.stopping import StopRequests
from suanli.training.work_of import Limit
from suanli.workloads.record import Samples
from suanli.workloads.stream import Stream, own_generators

_REPORT_EVERY_S = 1.0
_JUDGING_SHARE = 0.1  # of the time, unless a target asks for more
# after the end was asked for: of a judgement, and for a sample of a data set
_LONGEST_JUDGING_S, _LONGEST_WAIT_S = 10.0, 10.0
_MOST_TIMES = 20_000
_APART = 1_000_003  # between the seeds of two processes

Report = Callable[[TrainProgress], None]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a run ends, whichever comes first.

    Attributes:
        epochs: Passes over the training part; the schedule of the rate is over them.
        steps: Stop after so many steps, with the schedule as it is.
        max_seconds: Of training. Where the epochs do not fit, the schedule is shortened to it.
        target: Quality at which to stop.
    """

    epochs: int
    steps: int | None = None
    max_seconds: float | None = None
    target: float | None = None


class NotFiniteError(SuanliError):
    """The loss is no longer finite; `step` is the first such step."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message, next_step="lower the learning rate, or look at the data")
        self.step = step


class Loop:
    """State of one run.

    Attributes:
        step: Steps so far.
        seconds: Seconds of steps so far, without judging and saving.
        epoch_losses: Mean loss of each epoch that was begun.
        quality: The newest judgement of the watched part.
        reached_at_s: Seconds at which the target was first seen to be reached.
        step_ms: Milliseconds of the steps of this part of the run.
        limit: Bound of one step, for reports; None where it is not known.
    """

    def __init__(
        self,
        stepper: Stepper,
        train: Samples,
        *,
        seed: int,
        limits: Limits,
        watched: Samples | None = None,
    ) -> None:
        """Prepare; nothing is computed yet.

        Args:
            stepper: Model, optimiser and plan.
            train: What to learn from.
            seed: Of the data order and of chance inside the model.
            limits: When to end.
            watched: Samples that the model is judged on at epochs' ends.
        """
        self.stepper, self.limits = stepper, limits
        self._seed, self._stop = seed, StopRequests()
        replicas = stepper.replicas
        # what counts in a batch is seen by all its labels, where some of them are ignored
        partly = isinstance(train, Stream) and train.ignored is not None
        share = replicas.share if replicas.world > 1 and not partly else None
        self.batches = Batches(train, self.recipe, self.plan, seed, share)
        self.batches.given_up = lambda: self._stop.waited(_LONGEST_WAIT_S)
        self.steps = limits.epochs * self.batches.per_epoch
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.epoch_losses: list[float] = []
        self.quality: float | None = None
        self.reached_at_s: float | None = None
        self.step_ms: list[float] = []
        self.limit: Limit | None = None
        self.on_report: list[Report] = []
        self.on_step: list[Callable[[], None]] = []
        self._watched = watched
        self._losses: list[torch.Tensor] = []
        self._reported = 0
        self._judged_s = self._cost_s = 0.0
        self._begun_s, self._begun_samples = 0.0, 0
        self._cuda = self.plan.kind == "cuda"
        # the generators' states between runs; inside one the process's own are used
        self._running = False
        self._chance = self._drawn_from(seed + _APART * stepper.replicas.rank)
        self._before = Before(stepper.model, self.plan.device)

    @property
    def recipe(self) -> Recipe:
        """What is trained."""
        return self.stepper.recipe

    @property
    def plan(self) -> TrainPlan:
        """How it is computed."""
        return self.stepper.plan

    @property
    def averaging(self) -> Averaging | None:
        """The recipe's average of weights; None where it has none."""
        return self.stepper.averaging

    @property
    def done(self) -> float:
        """Share of the run that is over."""
        limit = self.limits.max_seconds
        return min(1.0, max(self.step / self.steps, self._clock / limit if limit else 0.0))

    @property
    def _clock(self) -> float:
        """Seconds that decide: of several processes the first one's, as they last agreed."""
        agreed = self.stepper.agreed
        return self.seconds if agreed is None else agreed.seconds

    @property
    def epochs_done(self) -> float:
        """Passes over the training part."""
        place = self.batches.place
        return place.epoch + place.position / self.batches.per_epoch

    def run(self, stop: StopRequests | None = None) -> str:
        """Train until a limit; the caller's generators are left as they were.

        Returns:
            Which one: "epochs", "steps", "time", "target" or "asked".

        Raises:
            NotFiniteError: The loss is no longer finite.
        """
        with own_generators(), torch.random.fork_rng(devices=self._devices()):
            set_generators(self._chance, self.plan.device)
            self._begun_s, self._begun_samples = self.seconds, self.samples
            self._running = True
            try:
                self._stop = stop or StopRequests()
                return self._run()
            finally:
                self._running = False
                self._chance = generators(self.plan.device)
                self.batches.close()

    def _devices(self) -> list[torch.device]:
        return [torch.device(self.plan.device)] if self._cuda else []

    def _drawn_from(self, seed: int) -> tuple[Any, ...]:
        """The generators' states as a seed makes them."""
        with own_generators(), torch.random.fork_rng(devices=self._devices()):
            seed_all(seed)
            return generators(self.plan.device)

    def _run(self) -> str:
        reported = time.monotonic()
        if self._epoch_open:  # this goes on with a run whose last judgement was broken off
            self._end_epoch()
            self._report()
        while not (reason := self._over()):
            self._one_step()
            at_end = self._epoch_open
            if at_end:
                self._end_epoch()
            now = time.monotonic()
            if at_end or now - reported >= _REPORT_EVERY_S:
                reported = now
                self._report()
            # behind the epoch's end, so that a state that is saved now has it
            for listener in self.on_step:
                listener()
        if self._losses:
            self._settle()
            self._note_epoch()
        if self._reported < len(self._losses):
            self._report()
        return reason

    @property
    def _epoch_open(self) -> bool:
        """Whether an epoch's last step is done, and what belongs to its end is not."""
        return bool(self._losses) and self.batches.place.position >= self.batches.per_epoch

    def _settle(self) -> None:
        """Wait for the GPU, on the run's time."""
        if self._cuda:
            start = time.perf_counter()
            torch.cuda.synchronize(self.plan.device)
            self.seconds += time.perf_counter() - start

    def _over(self) -> str:
        """Why the run ends here; "" where it goes on. The same in all processes."""
        limits, agreed = self.limits, self.stepper.agreed
        stop = bool(self._stop.asked)
        if self.stepper.replicas.world > 1:
            # a judgement that was broken off is known to all
            stop = (agreed is not None and agreed.stop) or self._epoch_open
        if self.step >= self.steps:
            return "epochs"
        if limits.max_seconds is not None and self._clock >= limits.max_seconds:
            return "time"
        if limits.steps is not None and self.step >= limits.steps:
            return "steps"
        if limits.target is not None and self.reached_at_s is not None:
            return "target"
        return "asked" if stop else ""

    def _one_step(self) -> None:
        start = time.perf_counter()
        self._before.keep(self.batches.place)
        stepper, batch = self.stepper, self.batches.next()
        loss = stepper.gradients(
            batch.inputs, batch.labels, stop=bool(self._stop.asked), seconds=self.seconds
        )
        if not self._cuda and not math.isfinite(float(loss)):
            self._blame(float(loss), self.step + 1, batch)
        self._before.drop()  # what fails from here on leaves half a step behind
        stepper.update(self.done)
        self.step += 1
        self.samples += len(batch)
        stepper.follow(self.step, self.done)
        self._losses.append(loss)
        self._before.stands()
        spent = time.perf_counter() - start
        self.seconds += spent
        if len(self.step_ms) < _MOST_TIMES:
            self.step_ms.append(1e3 * spent)

    def go_back(self) -> bool:
        """After an error: be where the last whole step ended.

        Returns:
            False where the error came in the midst of an update, so that there is no such state.
        """
        if not self._before.whole:
            return False
        found = self._before.restore()
        if found is not None:
            place, chance = found
            self.batches.move_to(place)
            self._chance = self._chance if chance is None else chance
        return True

    def _blame(self, value: float, step: int, batch: Batch | None) -> None:
        where = ""
        stepper = self.stepper
        # processes that share the parameters would wait for each other at different layers
        if batch is not None and not stepper.sharded:
            where = first_bad_value(stepper.model, stepper.forward, batch.inputs, batch.labels)
        raise NotFiniteError(f"the loss is {value} at step {step}: {where}".rstrip(": "), step=step)

    def _end_epoch(self) -> None:
        """Note the epoch's loss, and judge; where that is broken off, the epoch stays open."""
        self._note_epoch()
        if self._watched is not None:
            due = self.seconds - self._judged_s >= self._cost_s / _JUDGING_SHARE
            due |= self.stepper.replicas.world > 1  # each has a clock of its own
            asked_for = self.limits.target is not None or self.step >= self.steps
            if (due or asked_for) and not self.watch():
                return
        self._losses, self._reported = [], 0

    def judged(self, samples: Samples) -> float | None:
        """The model's quality on some samples; None where the end was asked for meanwhile.

        All processes call it; the first one judges, of a sharded model all together. When a run is
        judged depends on clocks, so what it draws then is no part of the run's chance.
        """
        stepper, recipe, stop = self.stepper, self.recipe, self._stop
        replicas, value, stopped = stepper.replicas, 0.0, False

        def late() -> bool:
            own = stop.waited(_LONGEST_JUDGING_S)
            return replicas.any(own) if stepper.sharded else own

        if replicas.first or stepper.sharded:  # whose forward pass takes all processes
            try:
                with own_generators(), torch.random.fork_rng(devices=self._devices()):
                    value = judge(
                        stepper.model,
                        samples,
                        loss=recipe.workload.loss,
                        device=self.plan.device,
                        predict=recipe.predict,
                        batch=recipe.settings.batch,
                        stop=late,
                    )
            except JudgementStoppedError:
                stopped = True
        stopped = replicas.from_first(float(stopped)) > 0
        value = replicas.from_first(value)
        return None if stopped else value

    def watch(self) -> bool:
        """Judge the watched part now.

        Returns:
            False where the end was asked for meanwhile; what was known of it stays.
        """
        assert self._watched is not None
        start = time.monotonic()
        found = self.judged(self._watched)
        if found is None:
            return False
        self.quality = found
        if self.reached_at_s is None and self._at_target():
            self.reached_at_s = self.seconds
        self._judged_s, self._cost_s = self.seconds, time.monotonic() - start
        return True

    def _at_target(self) -> bool:
        """Whether the newest judgement is as good as the target."""
        limit, watched = self.limits.target, self._watched
        target = limit if limit is not None else self.recipe.workload.target
        if target is None or watched is None or self.quality is None:
            return False
        return reached(metric_of(watched), self.quality, target)

    def _note_epoch(self) -> None:
        epoch = self.batches.place.epoch
        mean = self._mean(self._losses)
        self.epoch_losses[epoch:] = [mean]

    def _mean(self, losses: list[torch.Tensor]) -> float:
        values = torch.stack(losses).float()
        mean = float(values.mean())
        if not math.isfinite(mean):
            first = int((~values.isfinite()).nonzero()[0])
            self._blame(float(values[first]), self.step - len(losses) + first + 1, None)
        return mean

    def _report(self) -> None:
        self._settle()
        fresh = self._losses[self._reported :]
        loss = self._mean(fresh) if fresh else (self.epoch_losses or [math.nan])[-1]
        self._reported = len(self._losses)
        for listener in self.on_report:
            listener(self.progress(loss))

    def progress(self, loss: float) -> TrainProgress:
        """Where the run stands."""
        done, place, limit = self.done, self.batches.place, self.limit
        left = self.seconds / done * (1.0 - done) if done > 0 else None
        step_ms = 1e3 * self.recipe.settings.batch / max(self.rate(), 1e-9)
        return TrainProgress(
            step=self.step,
            steps=self.steps,
            epoch=min(place.epoch + 1, self.limits.epochs),
            epochs=self.limits.epochs,
            done=done,
            loss=loss,
            samples_per_s=self.rate(),
            seconds=self.seconds,
            left_s=left,
            quality=self.quality,
            sol_fraction=limit.sol_ms / step_ms if limit else None,
            mfu=limit.mfu(step_ms) if limit else None,
        )

    def rate(self) -> float:
        """Samples per second of this part of the run."""
        spent = max(self.seconds - self._begun_s, 1e-9)
        return (self.samples - self._begun_samples) / spent

    # -- state ----------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Any]]:
        """Everything that the next step depends on, in the parts that a checkpoint has."""
        return {
            "model": dict(self.stepper.model.state_dict()),
            "optimizer": self.stepper.optimizer.state_dict(),
            "averaging": self.averaging.state_dict() if self.averaging is not None else {},
            "run": self.run_state(),
        }

    def run_state(self) -> dict[str, Any]:
        """The part of the state that is neither weights nor the optimiser's."""
        place = self.batches.place
        chance = generators(self.plan.device) if self._running else self._chance
        return {
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "epoch_losses": list(self.epoch_losses),
            "quality": self.quality,
            "reached_at_s": self.reached_at_s,
            "epoch": place.epoch,
            "position": place.position,
            "order_at_start": place.at_start,
            "order_now": place.now,
            "chance": chance,
            "scaler": self.stepper.scaler.state_dict(),
            "losses": torch.stack(self._losses).float().cpu() if self._losses else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; the next step is the one that would have come.

        Raises:
            RuntimeError: It is the state of another model.
        """
        run = state["run"]
        self.stepper.restore(state["model"], state["optimizer"], run["scaler"])
        if self.averaging is not None:
            self.averaging.load_state_dict(state["averaging"])
            self.stepper.forward.take_over()
        self.restore_run(run)

    def restore_run(self, run: dict[str, Any]) -> None:
        """Go on from a `run_state`; model and optimiser are there already."""
        self.step, self.samples = int(run["step"]), int(run["samples"])
        self.seconds = float(run["seconds"])
        self.epoch_losses = list(run["epoch_losses"])
        self.quality, known = run["quality"], run["reached_at_s"]
        if self.limits.target is not None:  # it may be another one than before
            since = known if known is not None else self.seconds
            known = since if self._at_target() else None
        self.reached_at_s = known
        self.batches.move_to(
            Place(
                epoch=int(run["epoch"]),
                position=int(run["position"]),
                at_start=run["order_at_start"],
                now=run["order_now"],
            )
        )
        self._chance = run["chance"]
        rank = self.stepper.replicas.rank
        if rank:  # the checkpoint is the first process's: the others draw anew
            self._chance = self._drawn_from(self._seed + _APART * rank + self.step)
        losses = run["losses"]
        self._losses = list(losses) if losses is not None else []
        self._reported = len(self._losses)
