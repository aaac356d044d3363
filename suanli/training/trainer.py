"""From a recipe to a trained model: choose the plan, run, keep, judge."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from suanli.base import codec, schema
from suanli.base.errors import ArtefactError, BadInputError, SuanliError
from suanli.base.events import Event, Listener
from suanli.base.files import write_atomic
from suanli.base.hardware import Ceilings
from suanli.base.train_plan import TrainPlan
from suanli.base.train_results import TrainProgress, TrainQuality, TrainResult
from suanli.devices import device as find_device
from suanli.measure.ceilings import kept_ceilings
from suanli.measure.environment import environment
from suanli.measure.timing import median_interval
from suanli.parallel.replicas import Replicas, restarted
from suanli.training.checks import check_samples
from suanli.training.choosing import PlanChoice
from suanli.training.failing import in_one_line, in_own_code
from suanli.training.faster_device import faster_device
from suanli.training.forward import machine_as_planned
from suanli.training.judging import metric_of
from suanli.training.loop import Limits, Loop, NotFiniteError
from suanli.training.readers import ReadingError, how_read, in_memory, stays
from suanli.training.recipe import Recipe
from suanli.training.request import TrainRequest
from suanli.training.run_folder import NotSavableError, RunFolder, RunRecord
from suanli.training.start import freeze, frozen_norms, held_out_end, starting_point, take_weights
from suanli.training.step import Stepper
from suanli.training.stopping import StopRequests
from suanli.training.trials import Chosen
from suanli.training.work_of import Limit, limit_of
from suanli.workloads.record import Data, Samples
from suanli.workloads.stream import Stream
from suanli.workloads.weights import kept_weights, save_weights

_GPU = "cuda:0"  # the one that "auto" may take
_LOWERED, _MOST_ROLLBACKS = 0.5, 3
_MOST_WAIT_S = 300.0  # of the other processes, while the first looks at the run's folder


class Trainer:
    """One call of `train`."""

    def __init__(
        self,
        recipe: Recipe,
        request: TrainRequest,
        listener: Listener,
        accepted: Callable[[], object] = lambda: None,
    ) -> None:
        """Take in what is asked; nothing is done yet.

        Args:
            recipe: What is trained.
            request: What is asked.
            listener: Told what is going on.
            accepted: Called once data, model and settings are found to fit each other.
        """
        self._recipe, self._request, self._listener = recipe, request, listener
        self._accepted = accepted
        self._started = time.monotonic()
        self._replicas = Replicas.from_environment(request.device)
        # the processes that torchrun starts again go on with what the first ones began
        self._resume = request.resume or (restarted() and RunFolder(request.out).exists)
        self._folder = RunFolder(request.out, request.keeping, new_key=not self._resume)
        if request.sharded:
            self._check_sharded()
        self._notes: list[str] = []
        self._chosen: Chosen | None = None
        self._limit: Limit | None = None
        self._ceilings: Ceilings | None = None
        self._fresh = False  # whether the run's folder was made here
        self._begun: Loop | None = None
        self._rates: list[float] = []  # as the settings have them

    def run(self) -> tuple[TrainResult, nn.Module]:
        """Train.

        Returns:
            The result, and the trained model in evaluation mode on the CPU.

        Raises:
            BadInputError: What was asked or given cannot be used.
            NotFiniteError: The loss is no longer finite.
            SuanliError: The person's own code failed; the steps that were done are saved. After any
                error before the end of the first one nothing is left of the run.
        """
        try:
            return self._run()
        except Exception as error:
            unsaved = isinstance(error, NotSavableError)
            if self._fresh and (unsaved or self._begun is None or not self._begun.step):
                self._folder.withdraw()
            if isinstance(error, SuanliError) or not in_own_code(error):
                raise
            raise SuanliError(in_one_line(error)) from error

    def _run(self) -> tuple[TrainResult, nn.Module]:
        for line in self._request.notes:
            self._note(line)
        record, plan = self._record(), None
        if self._resume:
            record, plan = self._folder.read(go_on=True)
            record = self._gone_on_with(record)
            if isinstance(self._request.plan, TrainPlan) and self._request.plan != plan:
                self._note("the run goes on with its own plan, which is not the one given")
        else:
            self._first_does(self._folder.check_free)
        self._say(f"loading the data of {self._recipe.name}")
        data = self._recipe.workload.load()
        train, held_out = held_out_end(data.train, self._recipe.settings.validation_split)
        model = self._model(record, train)
        train = check_samples(model, self._recipe, train)
        # what is judged at the end must not fail there
        watched = check_samples(model, self._recipe, held_out or data.search, part="search")
        accepted = check_samples(model, self._recipe, data.acceptance, part="acceptance")
        data = replace(data, acceptance=accepted)
        record = self._with_limits(record, metric_of(watched))
        self._accepted()
        if self._request.device == "auto":
            self._take_device(model, train)
        if plan is None:
            plan = self._choose(model, train)
            chosen = plan
            self._first_does(lambda: self._folder.begin(record, chosen, environment()))
            self._fresh = self._replicas.first
        if self._replicas.world > 1:
            plan = plan.with_(device=self._replicas.device)
        self._measure_limit(model, train, plan)
        self._say_how_read(train, plan)
        if plan.data == "resident" and stays(watched, "cpu"):
            watched = in_memory(watched)
        with machine_as_planned(plan), StopRequests() as stop:
            self._begun = loop = self._loop(model, plan, record, train, watched)
            resumed_from = self._folder.restore(loop, self._note) if self._resume else None
            self._replicas.wait()  # before the first one writes again
            if self._resume:
                self._first_does(lambda: self._folder.keep(record, self._note))
            self._folder.follow(loop, self._note)
            try:
                stopped = self._train(loop, stop)
            finally:
                self._folder.close()
            outcome = self._finish(loop, data, record, stopped, resumed_from)
            self._replicas.wait()
            self._replicas.close()
            return outcome

    def _first_does(self, act: Callable[[], None]) -> None:
        """Let the first process do something that the others need; they end where it fails."""

        def acted() -> str:
            act()
            return ""

        self._replicas.told_by_first(acted, limit_s=_MOST_WAIT_S)

    # -- before the run -------------------------------------------------------------------------

    def _check_sharded(self) -> None:
        if self._replicas.world == 1 and not self._resume:
            raise BadInputError(
                "a sharded run needs several processes",
                next_step="torchrun --nproc-per-node 4 -m suanli train ... --sharded",
            )
        if self._request.keeping.key is not None:
            raise BadInputError("the checkpoints of a sharded run cannot be encrypted yet")

    def _record(self) -> RunRecord:
        """What the run is, from what was asked."""
        request, recipe = self._request, self._recipe
        if request.epochs is not None:
            settings = replace(recipe.settings, epochs=request.epochs)
            self._recipe = recipe = replace(recipe, settings=settings)
        return RunRecord(
            workload=recipe.name,
            ref=recipe.ref,
            seed=request.seed,
            settings=recipe.settings,
            as_written=not recipe.changes and request.epochs is None,
            start=str(request.start.resolve()) if request.start else "",
            frozen=request.frozen,
            encrypted=request.keeping.key is not None,
            prune=request.prune,
            teacher=request.teacher,
        )

    def _with_limits(self, record: RunRecord, metric: str) -> RunRecord:
        """The record with its limits, of a run that goes on those that are given anew.

        The quality to stop at is a fraction; a loss stays as it is.
        """
        to, most_s = self._request.to, self._request.max_seconds
        if to is not None and to > 1 and metric != "loss":
            to /= 100
        if self._resume:
            to = to if to is not None else record.target
            most_s = most_s if most_s is not None else record.max_seconds
        return replace(record, target=to, max_seconds=most_s)

    def _gone_on_with(self, record: RunRecord) -> RunRecord:
        """The record of a run that goes on, with other epochs where they are asked for."""
        if record.workload != self._recipe.name:
            raise BadInputError(
                f"{self._request.out} holds a run of {record.workload}, not of {self._recipe.name}"
            )
        epochs, begun = self._request.epochs, record.settings.epochs
        if epochs is not None and epochs != begun:
            self._note(f"the run goes on to {epochs} epochs, and was begun with {begun}")
            settings = replace(record.settings, epochs=epochs)
            record = replace(record, settings=settings, as_written=False)
        elif record.settings != self._recipe.settings:
            self._note("the run's own hyper-parameters are used, which are not the workload's")
        self._recipe = replace(self._recipe, settings=record.settings)
        return record

    def _model(self, record: RunRecord, train: Samples) -> nn.Module:
        model = starting_point(self._recipe, train, record.seed)
        # a run that was ended before its first checkpoint begins again where it began
        if record.start and not (self._resume and self._folder.checkpoints.any_whole):
            for line in take_weights(model, Path(record.start)):
                self._note(line)
        if record.frozen:
            freeze(model, record.frozen)
        still = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        if still:
            self._note(f"{still} parameters are not trained")
        if norms := frozen_norms(model):
            self._note(
                f"{norms} batch norms without a trained parameter still follow their batches: "
                "put them into evaluation mode in the model's own train() to keep them"
            )
        return model

    def _choose(self, model: nn.Module, train: Samples) -> TrainPlan:
        choice = PlanChoice(self._recipe, self._request, self._replicas, self._listener, self._note)
        plan = choice.plan(model, train)
        self._chosen, self._ceilings = choice.chosen, choice.ceilings
        return plan

    def _take_device(self, model: nn.Module, train: Samples) -> None:
        """Settle on the faster device."""
        self._say("timing a step on each device")
        device, line = faster_device(model, self._recipe, train, _GPU)
        if line:
            self._note(line)
        self._request = replace(self._request, device=device)

    # -- the run --------------------------------------------------------------------------------

    def _loop(
        self,
        model: nn.Module,
        plan: TrainPlan,
        record: RunRecord,
        train: Samples,
        watched: Samples,
    ) -> Loop:
        request, settings = self._request, self._recipe.settings
        limits = Limits(
            epochs=settings.epochs,
            steps=request.steps,
            max_seconds=record.max_seconds,
            target=record.target,
        )
        stepper = Stepper(model, self._recipe, plan, self._replicas)
        self._rates = stepper.peak_rates
        loop = Loop(stepper, train, seed=record.seed, limits=limits, watched=watched)
        loop.limit = self._limit
        for line in stepper.own_rates:
            self._note(line)
        if self._replicas.first:
            loop.on_report.append(self._progress)
        return loop

    def _train(self, loop: Loop, stop: StopRequests) -> str:
        """Run, and where it was asked for go back and on with half the rate after a NaN."""
        if self._request.on_nan == "rollback":
            self._save(loop)
        for attempt in range(_MOST_ROLLBACKS + 1):
            try:
                stopped = loop.run(stop)
            except (BadInputError, ReadingError):
                self._save_alone(loop)  # a sample that cannot be read costs no step that was done
                raise
            except NotFiniteError as error:
                if self._request.on_nan != "rollback" or attempt == _MOST_ROLLBACKS:
                    raise
                self._replicas.wait()
                rates = [_LOWERED * rate for rate in loop.stepper.peak_rates]
                step = self._folder.restore(loop, self._note)
                loop.stepper.peak_rates = rates  # the checkpoint's may be those of an earlier try
                self._note(
                    f"{error}; back to step {step}, with {_LOWERED ** (attempt + 1):g} of the rate"
                )
                continue
            except SuanliError:
                raise
            except Exception as error:
                raise self._explained(error, loop) from error
            self._save(loop)
            return stopped
        raise AssertionError("unreachable")

    def _save_alone(self, loop: Loop) -> bool:
        """After an error, save the steps that are whole; gives whether there is something."""
        # the other processes may wait elsewhere, or be gone
        alone = self._replicas.first and not loop.stepper.sharded
        if alone and loop.go_back() and loop.step:
            self._folder.save(loop, self._note)
        return self._folder.newest is not None

    def _explained(self, error: Exception, loop: Loop) -> SuanliError:
        """What went wrong in a step, and how to go on; the steps before it are saved."""
        words = f"step {loop.step + 1}: {in_one_line(error)}"
        if not self._save_alone(loop):
            return SuanliError(words)
        assert self._folder.newest is not None
        step = int(self._folder.newest.name.rpartition("-")[2])
        return SuanliError(
            words, next_step=f"--resume -o {self._request.out} goes on behind step {step}"
        )

    # -- after the run --------------------------------------------------------------------------

    def _finish(
        self,
        loop: Loop,
        data: Data,
        record: RunRecord,
        stopped: str,
        resumed_from: int | None,
    ) -> tuple[TrainResult, nn.Module]:
        asked, first = stopped == "asked", self._replicas.first
        if loop.stepper.peak_rates != self._rates:  # a rollback halved them, now or before
            record = replace(record, as_written=False)
        if loop.averaging is not None and not asked:
            loop.averaging.finish()
        quality = None if asked else self._judged(loop, data)
        if quality is None and not asked:
            self._note("stopped while it was judged: --resume judges the trained model")
            stopped = "asked"
        loop.stepper.close()
        model = loop.stepper.plain_model().eval()
        facts = {"workload": record.workload, "seed": str(record.seed), "steps": str(loop.step)}
        if quality is not None:
            facts[quality.metric] = f"{quality.value:.4f}"
        result = self._result(loop, record, quality, stopped, resumed_from)
        if not first:
            return result, model
        try:
            save_weights(model, self._folder.weights, facts)
            self._keep_for_optimize(model, record, facts, stopped)
            write_atomic(self._request.out / "result.json", codec.dumps(result))
        except OSError as error:
            reason = error.strerror or str(error)
            if self._recipe.ref:
                newest = self._folder.newest
                where = f"goes on from {newest.name}" if newest else "begins anew: no step is kept"
                raise SuanliError(
                    f"the trained weights cannot be written to {self._request.out}: {reason}",
                    next_step=f"make room; --resume {where}",
                ) from None
            # the trained module lives in the caller's process, who must not lose it
            self._note(f"the trained weights are not kept on disk: {reason}")
            result = replace(result, notes=tuple(self._notes))
        return result, model

    def _keep_for_optimize(
        self, model: nn.Module, record: RunRecord, facts: dict[str, str], stopped: str
    ) -> None:
        """Keep a built-in workload's weights, trained as written, where its name finds them."""
        built_in = record.ref.partition("?")[0] == record.workload
        whole = stopped == "epochs" and not record.frozen and not record.start
        if built_in and record.as_written and whole:
            save_weights(model, kept_weights(record.workload, record.settings), facts)

    def _judged(self, loop: Loop, data: Data) -> TrainQuality | None:
        """The trained model's quality; None where the end was asked for meanwhile."""
        self._say("judging on the acceptance samples")
        workload, target = self._recipe.workload, loop.limits.target
        loop.quality = None  # an earlier one is not this model's
        loop.watch()
        value = None if loop.quality is None else loop.judged(data.acceptance)
        if value is None or loop.quality is None:
            return None
        return TrainQuality(
            metric=metric_of(data.acceptance),
            value=value,
            search=loop.quality,
            n=len(data.acceptance),
            target=target if target is not None else workload.target,
            reached_at_s=loop.reached_at_s,
        )

    def _result(
        self,
        loop: Loop,
        record: RunRecord,
        quality: TrainQuality | None,
        stopped: str,
        resumed_from: int | None,
    ) -> TrainResult:
        step_ms = median_interval(loop.step_ms) if loop.step_ms else None
        limit, chosen, newest = self._limit, self._chosen, self._folder.newest
        samples_per_s, before = loop.rate(), self._result_before(loop)
        trials = chosen.found.trials if chosen else ()
        speedup, baseline = (chosen.speedup, chosen.baseline) if chosen else (None, None)
        if before is not None:  # a resumed run searches nothing, and may have no step left to do
            trials, speedup, baseline = before.trials, before.speedup, before.baseline
            if step_ms is None:
                step_ms, samples_per_s = before.step_ms, before.samples_per_s
        return TrainResult(
            schema=schema.name("train"),
            verb="train",
            workload=record.workload,
            device=find_device(loop.plan.device).info,
            environment=environment(),
            plan=loop.plan,
            hyper_parameters=record.hyper_parameters,
            as_written=record.as_written,
            batch=self._recipe.settings.batch,
            seed=record.seed,
            step_ms=step_ms,
            samples_per_s=samples_per_s,
            sol=limit.reached(step_ms.p50) if limit and step_ms else None,
            mfu=limit.mfu(step_ms.p50) if limit and step_ms else None,
            loss=loop.epoch_losses[-1] if loop.epoch_losses else float("nan"),
            quality=quality,
            epochs=loop.epochs_done,
            steps=loop.step,
            train_seconds=loop.seconds,
            seconds_spent=time.monotonic() - self._started,
            stopped=stopped,
            resumed_from=resumed_from,
            run_dir=str(self._request.out),
            checkpoint=str(newest) if newest else None,
            weights=str(self._folder.weights),
            trials=trials,
            speedup=speedup,
            baseline=baseline,
            ceilings=self._ceilings.items if self._ceilings else (),
            flops=limit.work.flops if limit else 0,
            parameters=sum(p.numel() for p in loop.stepper.model.parameters()),
            interrupted=stopped == "asked",
            notes=tuple(self._notes),
        )

    def _result_before(self, loop: Loop) -> TrainResult | None:
        """What the part of the run said that this one goes on with, where it came to its end."""
        if not self._resume:
            return None
        try:
            found = codec.read(TrainResult, self._request.out / "result.json")
        except ArtefactError:
            return None
        return found if found.plan == loop.plan else None

    def _save(self, loop: Loop) -> None:
        if self._replicas.first or loop.stepper.sharded:
            self._folder.save(loop, self._note)
        self._replicas.wait()

    # -- small things ---------------------------------------------------------------------------

    def _measure_limit(self, model: nn.Module, train: Samples, plan: TrainPlan) -> None:
        """Find the bound of a step, where the device's ceilings are known."""
        if self._ceilings is None:
            self._ceilings = kept_ceilings(plan.device)
        if self._ceilings is not None:
            self._limit = limit_of(model, self._recipe, train, plan, self._ceilings)

    def _say_how_read(self, train: Samples, plan: TrainPlan) -> None:
        """Tell where the samples of a data set will come from, and what that costs."""
        for line in how_read(train, plan):
            self._note(line)
        if isinstance(train, Stream) and plan.data == "resident":
            self._say(f"reading {len(train)} samples")

    def _progress(self, progress: TrainProgress) -> None:
        self._listener(Event(kind="progress", text="training", progress=progress))

    def _say(self, text: str) -> None:
        self._listener(Event(kind="step", text=text))

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._listener(Event(kind="note", text=text))
