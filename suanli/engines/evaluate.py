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
from suanli.base.trial import Trial, ValueCheck
from suanli.engines.labels import Labelled
from suanli.measure.isolation import Worker
from suanli.plans.store import failed_within

_HOST = "suanli.engines.host:TrialHost"
_SEARCH_SECONDS = 1.0  # of timing at the asked batch
_OTHER_SECONDS = 0.3  # of timing at each other batch


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
        allowance: Callable[[str], None],
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        """Prepare.

        Args:
            setting: What the trials share.
            allowance: Makes sure that eager's outputs at a precision exist in the verification set.
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
            self._allowance(plan.precision)
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
            trial = self._judge(trial, worker, folder, left)
            self._on_step("timing")
            trial = self._time(trial, worker, left)
            return replace(trial, peak_bytes=worker.peak_bytes)

    def _judge(
        self, trial: Trial, worker: Worker, folder: Path, left: Callable[[], float]
    ) -> Trial:
        if not trial.plan.quantized:
            checked = worker.call(
                "check_values",
                timeout_s=left(),
                precision=trial.plan.precision,
                batches=self._batches() if _ships(trial.plan) else [self._setting.batch],
                k=self._setting.k,
            )
            values = codec.from_json(ValueCheck, checked)
            if values.ok:
                return replace(trial, values=values)
            return replace(trial, values=values, status="rejected", reason=values.reason)
        if self._setting.search is not None:
            return self._judge_by_labels(trial, worker, folder, left, self._setting.search)
        return self._judge_by_tolerance(trial, worker, left)

    def _judge_by_labels(
        self,
        trial: Trial,
        worker: Worker,
        folder: Path,
        left: Callable[[], float],
        search: Labelled,
    ) -> Trial:
        """Screen a quantised plan on the search part: the acceptance part decides later, once."""
        outputs = folder.with_suffix(".search.safetensors")
        worker.call(
            "predict",
            timeout_s=left(),
            samples=str(search.samples),
            out=str(outputs),
            batch=self._setting.batch,
        )
        quality = search.quality(outputs, self._setting.budget)
        drop = quality.reference - quality.value
        if drop > self._setting.budget:
            reason = (
                f"loses {drop * 100:.2f} points on the search samples, "
                f"{self._setting.budget * 100:.2f} are allowed"
            )
            return replace(trial, status="rejected", reason=reason, quality=quality)
        return replace(trial, quality=quality)

    def _judge_by_tolerance(self, trial: Trial, worker: Worker, left: Callable[[], float]) -> Trial:
        tolerance = self._setting.tolerance
        if tolerance is None:
            reason = "quantised plans need labelled data or an explicit tolerance"
            return replace(trial, status="rejected", reason=reason)
        error = worker.call("relative_error", timeout_s=left(), batches=self._batches())
        if error is None or error > tolerance:
            shown = "not finite" if error is None else f"{error:.3g}"
            reason = f"relative error {shown}, {tolerance:.3g} is allowed"
            return replace(trial, status="rejected", reason=reason)
        return replace(trial, details={**trial.details, "relative_error": f"{error:.3g}"})

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


def build_call(plan: Plan, setting: Setting) -> dict[str, Any]:
    """Arguments of `TrialHost.build`; the same for a trial and for building it anew."""
    return {
        "calibration": str(setting.calibration) if setting.calibration else None,
        "samples": plan.quantization.calibration_samples if plan.quantization else 0,
        "labelled": setting.search.as_json() if setting.search and plan.quantized else None,
        "budget": setting.budget,
    }


def steps_per_check(batches: Sequence[int]) -> float:
    """About how many steps of the asked batch the checks of one trial cost.

    Each batch size gets two passes over at most some 32 calls; larger batches cost more per call.

    Args:
        batches: The asked one first.
    """
    samples = {batch: max(2 * batch, min(32 * batch, 64)) for batch in batches}
    return 2 * sum(samples.values()) / batches[0]


def _ships(plan: Plan) -> bool:
    """Whether an engine may hold the plan; one that runs the user's own module never ships."""
    return not plan.options.get("source")


def reference_setup(setting: Setting, device: str) -> dict[str, Any]:
    """Setup of the worker that makes the reference."""
    return {
        "program": str(setting.program),
        "folder": str(setting.verification),
        "device": device,
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
