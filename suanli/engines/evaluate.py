"""One plan to one trial: build, check and time it in a process of its own."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from suanli.base import codec
from suanli.base.errors import MissingBackendError, SuanliError, TrialFailedError
from suanli.base.plan import Plan
from suanli.base.timing import Timing
from suanli.base.trial import Quality, Trial, ValueCheck
from suanli.devices import cpu_info
from suanli.engines.labels import Labelled
from suanli.measure.isolation import Worker
from suanli.plans.store import failed_within

_MEMORY_SHARE = 0.8  # of what is available when the search begins
_HOST = "suanli.engines.host:TrialHost"
_SEARCH_SECONDS = 1.0  # of timing at the asked batch
_OTHER_SECONDS = 0.3  # of timing at each other batch
# What a quantised plan that is judged at the asked batch may lose at another one: as many times its
# relative error at the asked one, or this much. The acceptance samples judge it there for good.
_OTHER_TIMES, _OTHER_ERROR = 2.0, 0.05
# Labelled samples on which a floating-point plan is screened. If it loses more than the budget on
# them all of the search part decides: some answers near a tie change sides in any precision.
SCREENED = 512


@dataclass(frozen=True, kw_only=True)
class TrialLimits:
    """What one trial may take.

    Attributes:
        seconds: Wall time of the whole trial.
        memory_bytes: Resident size of its process group; None for no limit.
    """

    seconds: float
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trials of one search share.

    Attributes:
        program: Folder of the program.
        verification: Folder of the verification set.
        builds: Folder that gets one folder per plan.
        batch: Samples in the step that decides.
        other_batches: Batch sizes at which the plan must be right, and is timed too.
        k: See promise 2: times eager's own error.
        budget: Largest drop of quality, as a fraction.
        tolerance: Largest relative RMS error of a quantised plan that is accepted without labels.
        calibration: File of calibration samples.
        search: Labelled samples that the search may look at.
        backend_modules: Rows added to the backend table.
    """

    program: Path
    verification: Path
    builds: Path
    batch: int
    other_batches: tuple[int, ...]
    k: float = 2.0
    budget: float = 0.005
    tolerance: float | None = None
    calibration: Path | None = None
    search: Labelled | None = None
    backend_modules: tuple[str, ...] = ()


class Evaluator:
    """Turns plans into trials. Failures come back as trials, only Ctrl-C leaves as an exception."""

    def __init__(
        self,
        setting: Setting,
        *,
        allowance: Callable[[str], str | None],
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        """Prepare.

        Args:
            setting: What the trials share.
            allowance: Makes sure that eager's outputs at a precision exist in the verification set;
                says why no plan can be proved right at it, if so.
            on_step: Told what the trial is doing: "building", "checking", "timing".
        """
        self._setting = setting
        self._allowance = allowance
        self._on_step = on_step

    def __call__(self, plan: Plan, limits: TrialLimits) -> Trial:
        """Try one plan.

        Raises:
            KeyboardInterrupt: The person stopped it; nothing of the trial is left running.
        """
        started = time.monotonic()
        empty = Trial(plan=plan, status="failed", batch=self._setting.batch)
        try:
            trial = self._try(plan, limits, started)
        except MissingBackendError as error:
            trial = replace(empty, status="skipped", reason=str(error))
        except TrialFailedError as error:
            failed = replace(empty, reason=f"{error.kind}: {error}")
            trial = failed_within(failed, error.kind, limits.seconds)
        except SuanliError as error:
            trial = replace(empty, reason=str(error))
        return replace(trial, seconds_spent=time.monotonic() - started)

    def _try(self, plan: Plan, limits: TrialLimits, started: float) -> Trial:
        def left() -> float:
            remaining = limits.seconds - (time.monotonic() - started)
            if remaining <= 0:
                raise TrialFailedError(f"not done after {limits.seconds:.0f} s", kind="timeout")
            return remaining

        folder = self._setting.builds / plan.key
        setup = {
            "program": str(self._setting.program),
            "plan": codec.to_json(plan),
            "folder": str(folder),
            "verification": str(self._setting.verification),
            "backend_modules": list(self._setting.backend_modules),
        }
        if not plan.quantized:
            why_not = self._allowance(plan.precision)
            if why_not and ships(plan):
                batch = self._setting.batch
                return Trial(plan=plan, status="rejected", reason=why_not, batch=batch)
        with Worker(
            _HOST, setup, memory_bytes=limits.memory_bytes, start_timeout_s=left()
        ) as worker:
            self._on_step("building")
            note = worker.call("build", timeout_s=left(), **build_call(plan, self._setting))
            worker.call("open", timeout_s=left())
            built = codec.from_json(Plan, note["plan"])
            trial = Trial(
                plan=built,
                status="verified",
                batch=self._setting.batch,
                build_dir=plan.key,
                details=note["details"],
            )
            self._on_step("checking")
            trial = self._judge(trial, worker, left)
            self._on_step("timing")
            trial = self._time(trial, worker, left)
            return replace(trial, peak_bytes=worker.peak_bytes)

    def _judge(self, trial: Trial, worker: Worker, left: Callable[[], float]) -> Trial:
        if not trial.plan.quantized:
            checked = worker.call(
                "check_values",
                timeout_s=left(),
                precision=trial.plan.precision,
                batches=self._batches() if ships(trial.plan) else [self._setting.batch],
                k=self._setting.k,
            )
            values = codec.from_json(ValueCheck, checked)
            trial = replace(trial, values=values)
            if not values.ok:
                return replace(trial, status="rejected", reason=values.reason)
            if self._setting.search is None or not ships(trial.plan):
                return trial
            batch = max(self._batches())
            for most in (SCREENED, None):  # a few samples are quick, and too few to refuse by
                judged = self._judge_by_labels(trial, worker, left, batch=batch, most=most)
                if judged.status == "verified":
                    break
            return judged
        if self._setting.search is None:
            return self._judge_by_tolerance(trial, worker, left)
        trial = self._judge_by_labels(trial, worker, left, batch=self._setting.batch)
        return trial if trial.status != "verified" else self._at_other_batches(trial, worker, left)

    def _judge_by_labels(
        self,
        trial: Trial,
        worker: Worker,
        left: Callable[[], float],
        *,
        batch: int,
        most: int | None = None,
    ) -> Trial:
        """Screen a plan on the search part: the acceptance part decides later, once."""
        search = self._setting.search
        assert search is not None
        outputs = self._setting.builds / f"{trial.build_dir}.search.safetensors"
        worker.call(
            "predict",
            timeout_s=left(),
            samples=str(search.samples),
            out=str(outputs),
            batch=batch,
            most=most,
        )
        quality = search.quality(outputs, self._setting.budget)
        trial = replace(trial, quality=replace(quality, batch=batch))
        reason = point_loss(quality, "search")
        if trial.plan.quantized and quality.majority is not None:
            # what is clearly better is for the acceptance samples to say, this is the plain case
            reason = reason or (quality.reason if quality.reference <= quality.majority else "")
        return replace(trial, status="rejected", reason=reason) if reason else trial

    def _at_other_batches(self, trial: Trial, worker: Worker, left: Callable[[], float]) -> Trial:
        """Hold a quantised plan at the other batch sizes to what it does at the asked one."""
        batches = self._batches()
        errors = worker.call("relative_errors", timeout_s=left(), batches=batches)
        allowed = max(_OTHER_ERROR, _OTHER_TIMES * (errors[0] or 0.0))
        for batch, error in zip(batches, errors, strict=True):
            if error is None:
                reason = f"not finite, or stale, at batch {batch}"
                return replace(trial, status="rejected", reason=reason)
            if error > allowed:
                reason = (
                    f"relative error {error:.3g} at batch {batch}, {errors[0]:.3g} at batch "
                    f"{batches[0]}: the answer depends on the size of the batch"
                )
                return replace(trial, status="rejected", reason=reason)
        shown = f"{max(errors):.3g}"
        return replace(trial, details={**trial.details, "relative_error": shown})

    def _judge_by_tolerance(self, trial: Trial, worker: Worker, left: Callable[[], float]) -> Trial:
        tolerance = self._setting.tolerance
        if tolerance is None:
            reason = "quantised plans need labelled data or an explicit tolerance"
            return replace(trial, status="rejected", reason=reason)
        batches = self._batches()
        errors = worker.call("relative_errors", timeout_s=left(), batches=batches)
        for batch, error in zip(batches, errors, strict=True):
            if error is None or error > tolerance:
                shown = "not finite or stale" if error is None else f"{error:.3g}"
                reason = f"relative error {shown} at batch {batch}, {tolerance:.3g} is allowed"
                return replace(trial, status="rejected", reason=reason)
        shown = f"{max(errors):.3g}"
        return replace(trial, details={**trial.details, "relative_error": shown})

    def _time(self, trial: Trial, worker: Worker, left: Callable[[], float]) -> Trial:
        def timed(batch: int, seconds: float) -> Timing:
            answer = worker.call(
                "time",
                timeout_s=left(),
                batch=batch,
                min_seconds=seconds,
                max_seconds=3 * seconds,
            )
            return codec.from_json(Timing, answer)

        main = timed(self._setting.batch, _SEARCH_SECONDS)
        others = []
        if trial.status == "verified":
            others = [timed(b, _OTHER_SECONDS) for b in self._setting.other_batches]
        return replace(
            trial,
            step_ms=main.step_ms,
            samples_per_s=main.samples_per_s,
            timings=(main, *others),
        )

    def _batches(self) -> list[int]:
        return [self._setting.batch, *self._setting.other_batches]


def point_loss(quality: Quality, part: str) -> str:
    """Why a plan is refused that is plainly worse on labelled samples than the budget allows.

    This is the estimate itself, not its upper limit: it proves nothing, and is what a plan that is
    proved by its values has to stand beside.

    Args:
        quality: On these samples.
        part: "search" or "acceptance".
    """
    drop = quality.reference - quality.value
    if drop <= quality.budget:
        return ""
    return (
        f"loses {drop * 100:.2f} points on the {part} samples, "
        f"{quality.budget * 100:.2f} are allowed"
    )


def build_call(plan: Plan, setting: Setting) -> dict[str, Any]:
    """Arguments of `TrialHost.build`; the same for a trial and for building it anew."""
    return {
        "calibration": str(setting.calibration) if setting.calibration else None,
        "samples": plan.quantization.calibration_samples if plan.quantization else 0,
        "labelled": setting.search.as_json() if setting.search and plan.quantized else None,
        "budget": setting.budget,
    }


def steps_per_check(batches: Sequence[int], labelled: int = 0) -> float:
    """About how many steps of the asked batch the checks of one trial cost.

    Each batch size gets two passes over at most some 64 calls; larger batches cost more per call.

    Args:
        batches: The asked one first.
        labelled: Samples of the search part that each plan is run on.
    """
    samples = {batch: max(2 * batch, min(64 * batch, 128)) for batch in batches}
    return (2 * sum(samples.values()) + labelled) / batches[0]


def ships(plan: Plan) -> bool:
    """Whether an engine may hold the plan; one that runs the user's own module never ships."""
    return not plan.options.get("source")


def reference_setup(setting: Setting, device: str) -> dict[str, Any]:
    """Setup of the worker that makes the reference."""
    return {
        "program": str(setting.program),
        "folder": str(setting.verification),
        "device": device,
        "batches": [setting.batch, *setting.other_batches],
    }


def timing_at(trial: Trial, batch: int) -> Timing | None:
    """The trial's timing at a batch size, where there is one."""
    return next((timing for timing in trial.timings if timing.batch == batch), None)


def fastest_at(trials: Sequence[Trial], batch: int) -> Trial | None:
    """The verified trial with the least median step at a batch size."""
    timed = [
        (timing.step_ms.p50, trial)
        for trial in trials
        if trial.status == "verified" and (timing := timing_at(trial, batch)) is not None
    ]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def memory_limit() -> int:
    """Resident bytes that one trial may use: a share of what is available now."""
    return int(cpu_info().memory_available_bytes * _MEMORY_SHARE)
