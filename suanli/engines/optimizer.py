"""From a workload to a verified engine: search, confirm, save."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from suanli.base import schema
from suanli.base.errors import BadInputError, CaptureError, SuanliError
from suanli.base.events import Event, Listener
from suanli.base.files import cache_dir
from suanli.base.hardware import Ceilings
from suanli.base.plan import Plan
from suanli.base.results import Confirmation, OptimizeResult, TimedPlan
from suanli.base.trial import Quality, Trial
from suanli.base.work import SpeedOfLight, Work
from suanli.cost import speed_of_light
from suanli.devices import cpu_info, gpu_infos
from suanli.engines import confirm as confirming
from suanli.engines.assembly import BuiltVariant, write_engine
from suanli.engines.backends import backends, status
from suanli.engines.engine import Engine
from suanli.engines.evaluate import Evaluator, TrialLimits, steps_per_check
from suanli.engines.finalists import batch_ranges, distinct_variants, finalists, refusal
from suanli.engines.inprocess import eager_trials
from suanli.engines.manifest import Numbers
from suanli.engines.request import Request
from suanli.engines.session import Session, Wish, scratch_folder
from suanli.measure.capture import capture as capture_work
from suanli.measure.ceilings import ceilings
from suanli.measure.environment import environment
from suanli.plans.search import SearchResult, search
from suanli.plans.situation import Situation
from suanli.plans.space import candidates
from suanli.plans.store import TrialStore, store_key
from suanli.workloads.record import Workload

# Of the budget, what is kept back for the race, the fresh process and the acceptance.
_RESERVE = 0.3
_MOST_RESERVE_S = 75.0
_RACE_SHARE = 0.6  # of the reserve
_MEMORY_SHARE = 0.8  # of what is available when the search begins


class Optimizer:
    """One call of `optimize`."""

    def __init__(
        self, workload: Workload, model: nn.Module, request: Request, listener: Listener
    ) -> None:
        self._workload, self._model, self._request = workload, model.eval(), request
        self._listener = listener
        self._started = time.monotonic()
        self._notes: list[str] = []
        self._work: Work
        self._ceilings: Ceilings

    def run(self) -> Engine:
        """Search, confirm and save.

        Returns:
            The engine, opened, with `engine.result`.

        Raises:
            SuanliError: Not even eager fp32 works, or the engine cannot be written.
            CaptureError: The model cannot be captured; `result` holds what eager plans reached.
        """
        request = self._request
        wish = Wish(
            batch=request.batch,
            max_batch=request.max_batch,
            budget=request.budget,
            tolerance=request.tolerance,
            device=request.device,
            backend_modules=request.backend_modules,
        )
        with scratch_folder() as scratch:
            self._say(f"looking up the ceilings of {request.device}")
            self._ceilings = ceilings(request.device)
            session = Session(self._workload, self._model, wish, scratch, self._listener)
            try:
                return self._run(session)
            finally:
                session.close()

    def _run(self, session: Session) -> Engine:
        self._say("counting the work")
        example = self._workload.make_inputs(session.batches[0])
        exported = session.program.meta.exported
        if exported:
            self._work = capture_work(
                self._model, example.args, example.kwargs, batch=session.batches[0]
            )
        elif not self._workload.ref:
            raise self._not_captured(session, self._in_process(session))
        note = session.reference()
        if note:
            self._notes.append(note)
        found = self._search(session)
        trials = list(found.trials)
        baselines = [trial for trial in trials if trial.baseline]
        if found.winner is None:
            eager = next((t.reason for t in baselines), "nothing was tried")
            raise SuanliError(f"not even eager fp32 works: {eager}")
        if not exported:
            raise self._not_captured(session, found.winner)
        return self._finish(session, found, trials, baselines)

    def _in_process(self, session: Session) -> Trial | None:
        """The faster verified eager plan of a model that no other process can build."""
        self._say("trying eager plans in this process")
        found = eager_trials(self._model, self._workload, session.batches[0], ("fp32", "bf16"))
        for trial in found:
            self._listener(Event(kind="trial", text=trial.plan.title, trial=trial))
        verified = [trial for trial in found if trial.status == "verified"]
        return min(verified, key=lambda t: t.step_ms.p50 if t.step_ms else 0.0, default=None)

    def _not_captured(self, session: Session, best: Trial | None) -> CaptureError:
        why = session.program.meta.why_not
        if best is None or best.step_ms is None:
            return CaptureError(f"{self._workload.name} cannot be captured: {why}")
        return CaptureError(
            f"{self._workload.name} cannot be captured: {why}; of the plans that need no capture "
            f"{best.plan.title} is the fastest ({best.step_ms.p50:.3g} ms)",
            next_step="torch.export explains what stops it: docs/optimize.md, Models that "
            "cannot be captured",
        )

    # -- search ---------------------------------------------------------------------------------

    def _search(self, session: Session) -> SearchResult:
        request = self._request
        table = backends(request.backend_modules)
        unknown = [name for name in request.backends if name not in table]
        if unknown:
            raise BadInputError(
                f"unknown backend {unknown[0]!r}", next_step=f"there are {', '.join(table)}"
            )
        usable = {
            name: backend.spec
            for name, backend in table.items()
            if not request.backends or name in (*request.backends, "eager")
        }
        found = [status(backend) for backend in table.values()]
        situation = Situation(
            device=request.device,
            cores=cpu_info().usable_cores,
            features=cpu_info().features,
            capability=_capability(request.device),
            objective=request.objective,
            batch=session.batches[0],
            max_batch=session.program.signature.max_batch,
            dynamic=session.program.signature.dynamic,
            exported=session.program.meta.exported,
            images=any(len(spec.shape) == 4 for spec in session.program.signature.inputs),
            accepts_quantised=session.setting.search is not None or request.tolerance is not None,
            calibration_samples=session.calibration_samples,
            present=frozenset(row.name for row in found if row.present),
            why_absent={row.name: row.reason for row in found if row.reason},
        )
        plans = candidates(tuple(usable.values()), situation, eager_ms=self._eager_ms(session))
        evaluate = Evaluator(
            session.setting,
            allowance=session.allowance,
            on_step=self._say,
        )
        memory = memory_limit()
        return search(
            plans,
            lambda plan, seconds: evaluate(plan, TrialLimits(seconds=seconds, memory_bytes=memory)),
            budget_s=max(1.0, request.budget_s - self._spent() - self._reserve()),
            steps_per_trial=steps_per_check(session.batches),
            lower_bound_ms=(lambda plan: self._sol(plan).ms)
            if session.program.meta.exported
            else None,
            store=TrialStore(self._store_key(session), fresh=request.fresh),
            on_event=self._search_event,
        )

    def _eager_ms(self, session: Session) -> float:
        return session.eager_ms * session.batches[0]

    def _store_key(self, session: Session) -> str:
        return store_key(
            workload=session.fingerprint(),
            device=self._ceilings.device,
            environment=environment(),
            batch=session.batches[0],
            objective=self._request.objective,
            conditions={
                "other_batches": " ".join(map(str, session.batches[1:])),
                "budget": self._request.budget,
                "tolerance": self._request.tolerance,
            },
        )

    def _sol(self, plan: Plan, measured_ms: float | None = None) -> SpeedOfLight:
        scheme = plan.quantization.scheme if plan.quantization else plan.precision
        weights = scheme.partition("-")[0]
        products = weights if not scheme.endswith("-weight") else plan.precision
        return speed_of_light(
            self._work,
            self._ceilings,
            precision=products,
            weight_precision=weights,
            measured_ms=measured_ms,
            winograd=products == "fp32",
        )

    # -- confirmation ---------------------------------------------------------------------------

    def _finish(
        self,
        session: Session,
        found: SearchResult,
        trials: list[Trial],
        baselines: list[Trial],
    ) -> Engine:
        """Confirm the best finalist that holds, and write it."""
        ordered = finalists(found, trials)
        quantised_was_refused = False
        for winner in ordered:
            if winner.plan.quantized and quantised_was_refused:
                continue  # the acceptance samples decide once; a second look would not be exact
            outcome = self._confirmed(session, winner, trials, baselines)
            if isinstance(outcome, Trial):
                trials[:] = [outcome if t.plan == winner.plan else t for t in trials]
                quantised_was_refused |= winner.plan.quantized
                self._listener(Event(kind="note", text=f"{winner.plan.title}: {outcome.reason}"))
                continue
            return self._write(session, outcome, trials, found)
        raise SuanliError(
            "no plan held in a fresh process",
            next_step="please report this with the output of `suanli doctor --json`",
        )

    def _confirmed(
        self,
        session: Session,
        winner: Trial,
        trials: Sequence[Trial],
        baselines: Sequence[Trial],
    ) -> "_Confirmed | Trial":
        """Stage an engine around `winner`, reopen it in a fresh process, judge and race it.

        Returns:
            What was confirmed, or the trial with the reason why it is rejected after all.
        """
        serving = confirming.variants_for(winner, trials, baselines, session.setting)
        for attempt in range(2):
            variants, variant_of = distinct_variants(serving)
            plans = [trial.plan for trial in variants]
            staged = self._stage(session, variants, variant_of, f"staged-{attempt}")
            for plan in plans:
                if not plan.quantized:  # a trial of an earlier search has not asked for it
                    session.allowance(plan.precision)
            process = confirming.EngineProcess(staged, session.setting)
            try:
                self._say("checking the engine in a fresh process")
                reopened = process.verify(plans, timeout_s=600.0)
                reason = _why_not(reopened, self._request.tolerance, session)
                if reason:
                    return replace(winner, status="rejected", reason=reason)
                quality = self._acceptance(session, process)
                if winner.plan.quantized and quality is not None and not quality.accepted:
                    reason = refusal(quality)
                    return replace(winner, status="rejected", reason=reason, quality=quality)
                self._say("racing the engine against the baselines")
                confirmations = confirming.confirm(
                    process,
                    baselines,
                    session.setting,
                    seconds=self._reserve() * _RACE_SHARE,
                    variant_of=variant_of,
                    chosen=winner.plan,
                )
            finally:
                process.close()
            losing = confirming.losing_batches(confirmations)
            replaced = {
                batch: trial
                for batch in losing
                if (trial := confirming.shippable_baseline(batch, confirmations, trials))
                and trial.plan != serving[batch].plan
            }
            if not replaced or attempt:
                break
            serving |= replaced
        return _Confirmed(
            winner=serving[session.batches[0]],
            variants=tuple(variants),
            variant_of=variant_of,
            confirmations=confirmations,
            quality=quality,
            reopened=reopened,
        )

    def _acceptance(self, session: Session, process: confirming.EngineProcess) -> Quality | None:
        """Judge the engine on labelled samples that no trial has seen."""
        if session.data is None:
            return None
        self._say("judging on the acceptance samples")
        labelled = session.acceptance()
        assert labelled is not None
        outputs = session.scratch / "acceptance" / "engine.safetensors"
        process.predict(labelled.samples, outputs, timeout_s=600.0)
        return labelled.quality(outputs, self._request.budget)

    # -- the engine -----------------------------------------------------------------------------

    def _stage(
        self,
        session: Session,
        variants: Sequence[Trial],
        variant_of: dict[int, int],
        name: str,
    ) -> Path:
        """Write an engine into the scratch folder, so that a fresh process can open it."""
        self._say("writing the engine")
        folder = session.scratch / name
        for trial in variants:
            confirming.ensure_built(trial, session.setting)
        self._write_folder(session, folder, variants, variant_of, Numbers())
        return folder

    def _write_folder(
        self,
        session: Session,
        folder: Path,
        variants: Sequence[Trial],
        variant_of: dict[int, int],
        numbers: Numbers,
    ) -> None:
        ranges = batch_ranges(variant_of, session.program.signature.max_batch)
        write_engine(
            folder,
            program=session.program,
            variants=[
                BuiltVariant(
                    plan=variants[index].plan,
                    folder=confirming.build_folder(variants[index], session.setting),
                    min_batch=first,
                    max_batch=last,
                )
                for first, last, index in ranges
            ],
            device=self._request.device,
            numbers=numbers,
            notes=self._notes,
            temporary=self._request.out is None,
        )

    def _write(
        self,
        session: Session,
        confirmed: "_Confirmed",
        trials: Sequence[Trial],
        found: SearchResult,
    ) -> Engine:
        """Write the engine with its numbers where it was asked for, open it, attach the result."""
        result = self._result(session, confirmed, trials, found)
        target = self._request.out or _temporary_folder()
        self._say(f"writing {target}")
        self._write_folder(
            session, target, confirmed.variants, confirmed.variant_of, _numbers(result)
        )
        engine = Engine.load(
            target,
            backends_extra=self._request.backend_modules,
            temporary=self._request.out is None,
        )
        where = str(target) if self._request.out else None
        engine.result = replace(result, engine_dir=where, seconds_spent=self._spent())
        return engine

    def _result(
        self,
        session: Session,
        confirmed: "_Confirmed",
        trials: Sequence[Trial],
        found: SearchResult,
    ) -> OptimizeResult:
        first = confirmed.confirmations[0]
        batch, plan = first.batch, confirmed.winner.plan
        rival_ms = first.step_ms.p50 * first.speedup_vs_best_baseline.p50
        rival = next(t for t in trials if t.plan == first.best_baseline)
        assert rival.step_ms is not None
        assert first.speedup_vs_eager is not None
        baseline_step = rival.step_ms.scaled(rival_ms / rival.step_ms.p50)
        notes = [*self._notes, *(c.note for c in confirmed.confirmations if c.note)]
        return OptimizeResult(
            schema=schema.name("optimize"),
            verb="optimize",
            workload=self._workload.name,
            device=self._ceilings.device,
            environment=environment(),
            objective=self._request.objective,
            batch=batch,
            max_batch=session.program.signature.max_batch,
            untrained=self._workload.untrained,
            baseline=TimedPlan(
                plan=rival.plan, step_ms=baseline_step, samples_per_s=batch / rival_ms * 1e3
            ),
            chosen=TimedPlan(plan=plan, step_ms=first.step_ms, samples_per_s=first.samples_per_s),
            speedup_vs_eager=first.speedup_vs_eager,
            speedup_vs_best_baseline=first.speedup_vs_best_baseline,
            quality=confirmed.quality,
            values=confirmed.reopened.values,
            sol=self._sol(plan, first.step_ms.p50),
            trials=tuple(trials),
            confirmations=confirmed.confirmations,
            engine_dir=None,
            ceilings=self._ceilings.items,
            flops=self._work.flops,
            parameters=self._work.parameters,
            seconds_spent=self._spent(),
            interrupted=found.interrupted,
            notes=tuple(notes),
        )

    # -- small things ---------------------------------------------------------------------------

    def _spent(self) -> float:
        return time.monotonic() - self._started

    def _reserve(self) -> float:
        return min(_RESERVE * self._request.budget_s, _MOST_RESERVE_S)

    def _search_event(self, event: Event) -> None:
        """Pass an event of the search on with the time of the whole."""
        self._listener(replace(event, spent_s=self._spent(), budget_s=self._request.budget_s))

    def _say(self, text: str) -> None:
        self._listener(
            Event(kind="step", text=text, spent_s=self._spent(), budget_s=self._request.budget_s)
        )


@dataclass(frozen=True, kw_only=True)
class _Confirmed:
    """An engine that held: its plans, which serves which batch size, and what was measured."""

    winner: Trial
    variants: tuple[Trial, ...]
    variant_of: dict[int, int]
    confirmations: tuple[Confirmation, ...]
    quality: Quality | None
    reopened: confirming.Reopened


def _capability(device_name: str) -> str | None:
    """Compute capability of a GPU, where it is known."""
    kind, _, index = device_name.partition(":")
    if kind != "cuda":
        return None
    return next((g.compute_capability for g in gpu_infos() if g.index == int(index or 0)), None)


def memory_limit() -> int:
    """Resident bytes that one trial may use: a share of what is available now."""
    return int(cpu_info().memory_available_bytes * _MEMORY_SHARE)


def _temporary_folder() -> Path:
    """Where an engine lives that nobody asked to keep."""
    parent = cache_dir() / "engines"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=parent, prefix="engine-"))
    except OSError:
        return Path(tempfile.mkdtemp(prefix="suanli-engine-"))


def _why_not(reopened: confirming.Reopened, tolerance: float | None, session: Session) -> str:
    """Why the reopened engine is not what was measured; "" if it is."""
    if reopened.portable:
        return f"does not open again as built: {'; '.join(reopened.differences)}"
    if reopened.values is not None and not reopened.values.ok:
        return f"wrong after reopening: {reopened.values.reason}"
    error = reopened.relative_error
    labelled = session.setting.search is not None
    judged = not labelled and tolerance is not None and reopened.values is None
    if judged and tolerance is not None and (error is None or error > tolerance):
        return f"relative error {error} after reopening, {tolerance:.3g} is allowed"
    return ""


def _numbers(result: OptimizeResult) -> Numbers:
    return Numbers(
        objective=result.objective,
        batch=result.batch,
        untrained=result.untrained,
        flops=result.flops,
        parameters=result.parameters,
        baseline=result.baseline,
        chosen=result.chosen,
        speedup_vs_eager=result.speedup_vs_eager,
        speedup_vs_best_baseline=result.speedup_vs_best_baseline,
        confirmations=result.confirmations,
        quality=result.quality,
        values=result.values,
        sol=result.sol,
    )
