"""The plan search of a run: trials in processes of their own, then a race of the winner."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil
from torch import nn

from suanli.base import codec
from suanli.base.errors import SuanliError, TrialFailedError
from suanli.base.events import Event, Listener
from suanli.base.plan import Plan
from suanli.base.timing import Estimate, Timing
from suanli.base.train_plan import TrainPlan
from suanli.base.trial import Trial, ValueCheck
from suanli.devices import cpu_info
from suanli.measure.isolation import Worker
from suanli.measure.timing import Contender, race
from suanli.plans.search import SearchResult, search
from suanli.plans.situation import Situation
from suanli.plans.store import TrialStore, failed_within
from suanli.plans.train_space import TrainSituation, train_candidates
from suanli.training.exchange import Exchange
from suanli.training.host import DRAWS, TrainHost, eager_name
from suanli.training.readers import stays
from suanli.training.recipe import Recipe
from suanli.training.verify import K
from suanli.workloads.record import Samples
from suanli.workloads.stream import Stream

_HOST = "suanli.training.host:TrainHost"
_TIMED_S = (1.5, 4.0)
_TIMED_STEPS = 3  # of a plan whose step is long: the timing takes few of them
_ATTEMPTS, _FAILURES = 3, 2  # of a check, and how many of them reject
_REFERENCE_S = 1200.0
_FIRST_PLAN = 2.0  # times the plain loop's trial that the first other one may take
_MEMORY_SHARE = 0.8  # of what is available when the search begins
_RACE_SHARE, _MOST_RACE_S = 0.15, 20.0


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the search found.

    Attributes:
        plan: The fastest verified one, or the baseline where nothing beats it.
        speedup: Step of the best baseline over the plan's, raced; None where the plan is that
            baseline.
        baseline: Title of the best verified baseline.
    """

    plan: TrainPlan
    found: SearchResult
    speedup: Estimate | None
    baseline: str | None
    note: str = ""


class PlanSearch:
    """Finds the plan for one run."""

    def __init__(
        self,
        recipe: Recipe,
        exchange: Exchange,
        situation: TrainSituation,
        listener: Listener,
    ) -> None:
        """Prepare.

        Args:
            recipe: What is trained; without a `ref` it is tried in this process.
            exchange: The start of the run.
            situation: Where plans have to work.
            listener: Told what is going on.
        """
        self._recipe, self._exchange = recipe, exchange
        self._situation, self._listener = situation, listener
        self._memory = int(_MEMORY_SHARE * psutil.virtual_memory().available)
        self._references: Any = None
        self._refused: dict[str, str] = {}

    def run(self, *, budget_s: float, eager_ms: float, store: TrialStore | None) -> Chosen:
        """Search and race.

        Args:
            budget_s: Seconds for both.
            eager_ms: Step of plain eager fp32, roughly.
            store: Earlier trials.

        Raises:
            SuanliError: Not even the plain loop works.
        """
        started = time.monotonic()
        race_s = min(_MOST_RACE_S, _RACE_SHARE * budget_s)
        try:
            self._say("computing the reference steps")
            note = self._reference_host().call("reference", timeout_s=_REFERENCE_S, attempt=0)
            candidates = train_candidates(self._situation, eager_ms=eager_ms)
            # ahead of the trials, so that none of them is taken to last as long
            for plan in (TrainPlan.from_plan(c.plan) for c in candidates if not c.why_not):
                if plan.precision in ("fp32", "bf16"):
                    with suppress(SuanliError):  # the trials of that precision say why
                        self._prepare(plan, attempt=0)
            left = budget_s - (time.monotonic() - started)
            found = search(
                candidates,
                self._evaluate,
                budget_s=max(1.0, left),
                reserve_s=race_s,
                first_plan=_FIRST_PLAN,
                steps_per_trial=self._exchange.facts.check_steps + _TIMED_STEPS,
                store=store,
                on_event=self._listener,
            )
        finally:
            self._close()
        if found.winner is None:
            plain = next((t.reason for t in found.trials if t.baseline), "nothing was tried")
            raise SuanliError(
                f"not even the plain loop could be verified: {plain}",
                next_step="--plan default trains without a search and its proof",
            )
        return self._raced(found, race_s, str(note or ""))

    # -- one trial ------------------------------------------------------------------------------

    def _evaluate(self, plan: Plan, limit_s: float) -> Trial:
        """Check and time one plan; failures come back as trials."""
        empty = Trial(plan=plan, status="failed", batch=self._recipe.settings.batch)
        begun = time.monotonic()
        try:
            wanted = TrainPlan.from_plan(plan)
            self._prepare(wanted, attempt=0)
            if refused := self._why_refused(wanted):
                spent = time.monotonic() - begun
                return replace(empty, status="rejected", reason=refused, seconds_spent=spent)
            # what it is held against serves all plans, and is not on this one's time
            trial = self._try(plan, limit_s, time.monotonic())
        except TrialFailedError as error:
            failed = replace(empty, reason=f"{error.kind}: {error}")
            trial = failed_within(failed, error.kind, limit_s)
        except SuanliError as error:
            trial = replace(empty, reason=str(error))
        return replace(trial, seconds_spent=time.monotonic() - begun)

    def _try(self, plan: Plan, limit_s: float, started: float) -> Trial:
        def left() -> float:
            remaining = limit_s - (time.monotonic() - started)
            if remaining <= 0:
                raise TrialFailedError(f"not done after {limit_s:.0f} s", kind="timeout")
            return remaining

        wanted = TrainPlan.from_plan(plan)
        worker = self._host(wanted, left())
        try:
            values = self._checked(worker, wanted, left)
            trial = Trial(
                plan=plan,
                status="verified" if values.ok else "rejected",
                reason=values.reason,
                values=values,
                batch=self._recipe.settings.batch,
            )
            if values.ok:
                self._say("timing")
                seconds = {"min_seconds": _TIMED_S[0], "max_seconds": _TIMED_S[1]}
                timed = worker.call("time", timeout_s=left(), **seconds)
                timing = codec.from_json(Timing, timed)
                trial = replace(trial, step_ms=timing.step_ms, samples_per_s=timing.samples_per_s)
            return replace(trial, peak_bytes=getattr(worker, "peak_bytes", None))
        finally:
            worker.close()

    def _checked(self, worker: Any, plan: TrainPlan, left: Callable[[], float]) -> ValueCheck:
        """The check of a plan, where it fails on other batches as well.

        A value next to the kink of a ReLU, or two equal ones under a max-pool, fall to one side or
        the other by their last bit, and a whole gradient moves with them. That is no error of a
        plan and comes with few batches, while a bug comes with all: a plan is rejected when two of
        three attempts fail.
        """
        found: list[ValueCheck] = []
        for attempt in range(_ATTEMPTS):
            self._prepare(plan, attempt)
            self._say("checking" if attempt == 0 else "checking on other batches")
            check = worker.call("check", timeout_s=left(), k=K, attempt=attempt)
            found.append(codec.from_json(ValueCheck, check))
            failed = [one for one in found if not one.ok]
            if not failed or len(failed) == _FAILURES or attempt == _ATTEMPTS - 1:
                break
        return failed[0] if len(failed) >= _FAILURES else next(one for one in found if one.ok)

    def _why_refused(self, plan: TrainPlan) -> str:
        """Why no plan of the precision can be verified, without trying this one; "" if it can.

        One bad draw of batches is no reason: it has to be so on others as well.
        """
        precision = plan.precision
        if precision not in self._refused:
            for attempt in range(_FAILURES):
                self._prepare(plan, attempt)
                reason = self._reference_host().call(
                    "too_far", timeout_s=_REFERENCE_S, precision=precision, attempt=attempt
                )
                if not reason:
                    break
            self._refused[precision] = reason and f"{precision}: {reason}"
        return self._refused[precision]

    def _prepare(self, plan: TrainPlan, attempt: int) -> None:
        """Make sure that the reference and eager's own error are there."""
        host = self._reference_host
        if not self._exchange.has(f"reference-{attempt}"):
            host().call("reference", timeout_s=_REFERENCE_S, attempt=attempt)
        if not self._exchange.has(eager_name(plan.precision, attempt, DRAWS - 1)):
            self._say(f"eager's own error in {plan.precision}")
            host().call(
                "eager",
                timeout_s=_REFERENCE_S,
                precision=plan.precision,
                device=plan.device,
                attempt=attempt,
            )

    def _host(self, plan: TrainPlan | None, timeout_s: float) -> Any:
        setup = {
            "ref": self._recipe.ref,
            "plan": codec.to_json(plan) if plan is not None else None,
            "exchange": str(self._exchange.folder),
        }
        if not self._recipe.ref:
            return _InThisProcess(setup, self._recipe)
        env = {}
        if plan is not None and plan.kind == "cuda" and plan.keep_memory:
            env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        return Worker(_HOST, setup, env=env, memory_bytes=self._memory, start_timeout_s=timeout_s)

    def _reference_host(self) -> Any:
        if self._references is None:
            self._references = self._host(None, 180.0)
        return self._references

    def _close(self) -> None:
        if self._references is not None:
            self._references.close()
            self._references = None

    # -- the race -------------------------------------------------------------------------------

    def _raced(self, found: SearchResult, seconds: float, note: str) -> Chosen:
        winner, rival = found.winner, found.best_baseline
        assert winner is not None
        plan = TrainPlan.from_plan(winner.plan)
        if rival is None or rival.plan == winner.plan:
            title = rival.plan.title if rival else None
            return Chosen(plan=plan, found=found, speedup=None, baseline=title, note=note)
        if found.interrupted or not self._recipe.ref:
            ratio = None
        else:
            self._say("racing the plan against the best baseline")
            ratio = self._race(TrainPlan.from_plan(rival.plan), plan, seconds)
        if ratio is not None and ratio.hi95 < 1.0:
            plan = TrainPlan.from_plan(rival.plan)
            lost = f"{winner.plan.title} lost the race against {rival.plan.title}, which is taken"
            return Chosen(
                plan=plan,
                found=found,
                speedup=None,
                baseline=rival.plan.title,
                note="; ".join(part for part in (note, lost) if part),
            )
        return Chosen(plan=plan, found=found, speedup=ratio, baseline=rival.plan.title, note=note)

    def _race(self, rival: TrainPlan, plan: TrainPlan, seconds: float) -> Estimate | None:
        sides: list[Any] = []
        try:
            for side in (rival, plan):
                sides.append(self._host(side, 180.0))
                sides[-1].call("calls", timeout_s=300.0, count=2)
                sides[-1].pause()
            return race(_contender(sides[0]), _contender(sides[1]), max_seconds=seconds).ratio
        except SuanliError as error:
            self._listener(Event(kind="note", text=f"no race: {error}"))
            return None
        finally:
            for side in sides:
                side.close()

    def _say(self, text: str) -> None:
        self._listener(Event(kind="step", text=text))


class _InThisProcess:
    """A host without a process of its own, for a model that no other process can make."""

    def __init__(self, setup: dict[str, Any], recipe: Recipe) -> None:
        self._host = TrainHost(**setup, recipe=recipe)

    def call(self, method: str, *, timeout_s: float, **args: Any) -> Any:
        try:
            return getattr(self._host, method)(**args)
        except SuanliError:
            raise
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            kind = "memory" if "out of memory" in text else "error"
            raise TrialFailedError(text, kind=kind) from error

    def close(self) -> None:
        """Nothing to end."""


def situation_of(
    recipe: Recipe,
    model: nn.Module,
    device: str,
    *,
    images: bool,
    blocks: bool,
    flops: float | None = None,
    train: Samples | None = None,
    processes: int = 1,
) -> TrainSituation:
    """Where the plans of a run have to work.

    Args:
        recipe: What is trained.
        model: The network.
        device: "cpu", "cuda:0", …
        images: Whether inputs have four dimensions.
        blocks: Whether activations of blocks could be recomputed.
        flops: Operations of a step, where they are known.
        train: What is learnt from, where it may have to be read while the run goes on.
        processes: How many train together here, each with its part of the cores.
    """
    from suanli.training.fp8 import fp8_layers
    from suanli.training.kernels import rows_for, usable
    from suanli.training.native.library import present

    why_not_compiled = ""
    if not recipe.ref:
        why_not_compiled = "only eager plans are tried in this process"
    elif device == "cpu" and not _cxx():
        why_not_compiled = "torch.compile needs a C++ compiler on the CPU"
    return TrainSituation(
        machine=Situation(
            device=device,
            cores=max(1, cpu_info().usable_cores // processes),
            objective="throughput",
            batch=recipe.settings.batch,
            present=frozenset({"eager", "inductor", "native"}),
            features=cpu_info().features,
            capability=_capability(device),
        ),
        images=images,
        blocks=blocks,
        why_not_compiled=why_not_compiled,
        fits=train is None or stays(train, device),
        reads=train.workers or 0 if isinstance(train, Stream) else None,
        native_update=device == "cpu" and recipe.optimizer is None and present(),
        fp8=bool(fp8_layers(model)),
        kernels=rows_for(model, device, recipe.workload),
        flops=flops,
        written=recipe.settings.precision,
        own=usable(recipe.plan.with_(device=device)) if recipe.plan is not None else None,
    )


def _cxx() -> bool:
    """Whether Inductor will find a C++ compiler."""
    return bool(os.environ.get("CXX")) or any(map(shutil.which, ("g++", "clang++", "c++")))


def _capability(device: str) -> str | None:
    from suanli.devices import gpu_infos

    index = int(device.partition(":")[2] or 0)
    if device == "cpu":
        return None
    return next((g.compute_capability for g in gpu_infos() if g.index == index), None)


def _contender(worker: Any) -> Contender:
    def run(calls: int) -> list[float]:
        times: list[float] = worker.call("calls", timeout_s=300.0, count=calls)
        return times

    return Contender(run=run, pause=worker.pause, resume=worker.resume)
