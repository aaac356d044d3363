"""From a workload to a verified engine: search, confirm, save."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from torch import nn

from suanli.base import schema
from suanli.base.errors import CaptureError, SuanliError
from suanli.base.events import Event, Listener
from suanli.base.hardware import Ceilings
from suanli.base.plan import Plan
from suanli.base.results import OptimizeResult, TimedPlan
from suanli.base.trial import Quality, Trial
from suanli.base.work import SpeedOfLight, Work
from suanli.cost import speed_of_light
from suanli.engines import confirm as confirming
from suanli.engines.backends import backends
from suanli.engines.engine import Engine
from suanli.engines.evaluate import (
    Evaluator,
    TrialLimits,
    memory_limit,
    point_loss,
    steps_per_check,
)
from suanli.engines.finalists import baseline_caveats, distinct_variants, finalists, refusal
from suanli.engines.inprocess import eager_trials
from suanli.engines.manifest import Numbers
from suanli.engines.own_module import over_own_module, speed_over_graph
from suanli.engines.prospects import situation, usable
from suanli.engines.request import Request
from suanli.engines.session import Session, Wish, evaluation_mode, scratch_folder
from suanli.engines.spending import Spending
from suanli.engines.staging import Confirmed, numbers_of, temporary_engine, why_not, write_variants
from suanli.engines.unchanged import Unchanged
from suanli.measure.ceilings import ceilings
from suanli.measure.environment import environment
from suanli.plans.search import SearchResult, search
from suanli.plans.space import candidates
from suanli.plans.store import TrialStore, store_key
from suanli.workloads.record import Workload


class Optimizer:
    """One call of `optimize`."""

    def __init__(
        self, workload: Workload, model: nn.Module, request: Request, listener: Listener
    ) -> None:
        self._workload, self._model, self._request = workload, model, request
        self._listener = listener
        self._backends = usable(request)
        self._spending = Spending(request.budget_s)
        self._notes: list[str] = []
        self._work: Work
        self._ceilings: Ceilings

    def run(self) -> Engine | Unchanged:
        """Search, confirm and save.

        Returns:
            The engine, opened, with `engine.result`; where nothing beats the best baseline at the
            asked batch, that baseline.

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
        with evaluation_mode(self._model), scratch_folder() as scratch:
            self._say(f"looking up the ceilings of {request.device}")
            with self._spending.part("ceilings"):
                self._ceilings = ceilings(request.device)
            with self._spending.part("capture"):
                session = Session(self._workload, self._model, wish, scratch, self._listener)
            try:
                return self._run(session)
            finally:
                session.close()

    def _run(self, session: Session) -> Engine | Unchanged:
        exported = session.program.meta.exported
        if session.work is not None:
            self._work = session.work
        elif not self._workload.ref:
            raise self._not_captured(session, self._in_process(session))
        with self._spending.part("reference"):
            note = session.reference()
        self._spending.process_s = session.process_s
        if note:
            self._notes.append(note)
        with self._spending.part("search"):
            found = self._search(session)
        trials = list(found.trials)
        baselines = [trial for trial in trials if trial.baseline]
        eager = next(
            (t for t in baselines if t.plan.backend == "eager" and t.plan.precision == "fp32"), None
        )
        if found.winner is None or eager is None or eager.status != "verified":
            reason = eager.reason if eager is not None else "nothing was tried"
            if not exported:
                why = session.program.meta.why_not
                raise CaptureError(
                    f"{self._workload.name} cannot be captured: {why}; and not even eager fp32 "
                    f"works: {reason}"
                )
            raise SuanliError(f"not even eager fp32 works: {reason}")
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
        plans = candidates(
            self._backends,
            situation(session, self._request),
            eager_ms=self._eager_ms(session),
        )
        evaluate = Evaluator(
            session.setting,
            allowance=session.allowance,
            on_step=self._say,
        )
        memory = memory_limit()
        return search(
            plans,
            lambda plan, seconds: evaluate(plan, TrialLimits(seconds=seconds, memory_bytes=memory)),
            budget_s=self._spending.search_s(),
            steps_per_trial=steps_per_check(session.batches, session.search_samples),
            lower_bound_ms=(lambda plan: self._sol(plan).ms)
            if session.program.meta.exported
            else None,
            store=TrialStore(self._store_key(session), fresh=self._request.fresh),
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
    ) -> Engine | Unchanged:
        """Confirm the best finalist that holds, and write it where no baseline beats it."""
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
            if not self._workload.ref:  # else the baselines' processes built the module itself
                outcome = self._over_own_module(session, outcome, trials)
            if session.batches[0] in confirming.losing_batches(outcome.confirmations):
                if not self._request.keep:
                    return self._unchanged(session, outcome, trials, found)
                self._notes.append("slower than what you have; kept because it was asked for")
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
    ) -> Confirmed | Trial:
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
            with self._spending.part("fresh process"):
                self._say("checking the engine in a fresh process")
                process = confirming.EngineProcess(staged, session.setting)
            with closing(process):
                with self._spending.part("fresh process"):
                    held = self._held(session, process, winner, plans, variant_of)
                if isinstance(held, Trial):
                    return held
                reopened, quality = held
                with self._spending.part("race"):
                    self._say("racing the engine against the baselines")
                    confirmations = confirming.confirm(
                        process,
                        baselines,
                        session.setting,
                        seconds=self._spending.race_s(),
                        variant_of=variant_of,
                        chosen=winner.plan,
                    )
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
        return Confirmed(
            winner=serving[session.batches[0]],
            variants=tuple(variants),
            variant_of=variant_of,
            confirmations=confirmations,
            quality=quality,
            reopened=reopened,
        )

    def _over_own_module(
        self, session: Session, confirmed: Confirmed, trials: Sequence[Trial]
    ) -> Confirmed:
        """What was confirmed, over the person's own module where that beats its exported graph."""
        self._say("timing your own module")
        with self._spending.part("race"):
            speed = speed_over_graph(self._model, session)
        races, said = over_own_module(confirmed.confirmations, trials, speed)
        if said:
            self._notes.append(said)
        return replace(confirmed, confirmations=races)

    def _held(
        self,
        session: Session,
        process: confirming.EngineProcess,
        winner: Trial,
        plans: Sequence[Plan],
        variant_of: dict[int, int],
    ) -> tuple[confirming.Reopened, Quality | None] | Trial:
        """What the fresh process found, or the winner with the reason why it is rejected."""
        reopened = process.verify(plans, variant_of, timeout_s=600.0)
        reason = why_not(reopened, session)
        if reason:
            return replace(winner, status="rejected", reason=reason)
        shown: Quality | None = None
        for quality, quantised in self._acceptance(session, process, plans, variant_of):
            if shown is None or quality.drop_upper95 > shown.drop_upper95:
                shown = quality
            if quantised and not quality.accepted:
                reason = refusal(quality)
            elif not quantised:
                reason = point_loss(quality, "acceptance")
            if reason:
                return replace(winner, status="rejected", reason=reason, quality=quality)
        return reopened, shown

    def _acceptance(
        self,
        session: Session,
        process: confirming.EngineProcess,
        plans: Sequence[Plan],
        variant_of: dict[int, int],
    ) -> Iterator[tuple[Quality, bool]]:
        """Judge the engine on labelled samples that no trial has seen, and say by which rule.

        A quantised plan is judged at every batch size that it serves. Each of these judgements has
        to hold, so each may be made at the whole confidence (intersection-union). A floating-point
        plan is proved by its values; it is looked at once.
        """
        labelled = session.acceptance()
        if labelled is None:
            return
        self._say("judging on the acceptance samples")
        seen: set[int] = set()
        for batch, index in variant_of.items():
            quantised = plans[index].quantized
            if index in seen and not quantised:
                continue
            seen.add(index)
            outputs = session.scratch / "acceptance" / f"engine-{batch}.safetensors"
            process.predict(labelled.samples, outputs, batch, timeout_s=600.0)
            quality = labelled.quality(outputs, self._request.budget)
            yield replace(quality, batch=batch), quantised

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
        with self._spending.part("writing"):
            for trial in variants:
                confirming.ensure_built(trial, session.setting)
            write_variants(
                session,
                folder,
                variants,
                variant_of,
                numbers=Numbers(),
                temporary=self._request.out is None,
            )
        return folder

    def _write(
        self,
        session: Session,
        confirmed: Confirmed,
        trials: Sequence[Trial],
        found: SearchResult,
    ) -> Engine:
        """Write the engine with its numbers where it was asked for, open it, attach the result."""
        result = self._result(session, confirmed, trials, found)
        target = self._request.out or temporary_engine()
        self._say(f"writing {target}")
        with self._spending.part("writing"):
            write_variants(
                session,
                target,
                confirmed.variants,
                confirmed.variant_of,
                numbers=numbers_of(result, self._request),
                notes=result.notes,
                temporary=self._request.out is None,
            )
            engine = Engine.load(
                target,
                backends_extra=self._request.backend_modules,
                temporary=self._request.out is None,
            )
        folder = str(target) if self._request.out else None
        engine.result = self._ended(replace(result, engine_dir=folder))
        return engine

    def _ended(self, result: OptimizeResult) -> OptimizeResult:
        """With the time that all of it took, and a note where that is more than was given."""
        overrun = self._spending.overrun()
        notes = (*result.notes, *([overrun] if overrun else []))
        return replace(result, seconds_spent=self._spending.spent_s, notes=notes)

    def _unchanged(
        self,
        session: Session,
        confirmed: Confirmed,
        trials: Sequence[Trial],
        found: SearchResult,
    ) -> Unchanged:
        """The baseline that beat the best engine, with a result that says so."""
        result = confirming.baseline_wins(self._result(session, confirmed, trials, found), trials)
        rival = next(trial for trial in trials if trial.plan == result.chosen.plan)
        confirming.ensure_built(rival, session.setting)
        return Unchanged(
            session.program,
            backends(self._request.backend_modules)[rival.plan.backend],
            confirming.build_folder(rival, session.setting),
            self._ended(result),
        )

    def _result(
        self,
        session: Session,
        confirmed: Confirmed,
        trials: Sequence[Trial],
        found: SearchResult,
    ) -> OptimizeResult:
        first = confirmed.confirmations[0]
        batch, plan = first.batch, confirmed.winner.plan
        assert first.speedup_vs_eager is not None
        assert first.baseline_ms is not None
        notes = [
            *self._notes,
            *found.notes,
            *(c.note for c in confirmed.confirmations if c.note),
            *baseline_caveats(trials),
        ]
        here = environment()
        rough = confirming.rough(confirmed.confirmations, here)
        return OptimizeResult(
            schema=schema.name("optimize"),
            verb="optimize",
            workload=self._workload.name,
            device=self._ceilings.device,
            environment=here,
            objective=self._request.objective,
            batch=batch,
            max_batch=session.program.signature.max_batch,
            untrained=self._workload.untrained,
            baseline=TimedPlan(
                plan=first.best_baseline,
                step_ms=first.baseline_ms,
                samples_per_s=batch / first.baseline_ms.p50 * 1e3,
            ),
            chosen=TimedPlan(plan=plan, step_ms=first.step_ms, samples_per_s=first.samples_per_s),
            speedup_vs_eager=first.speedup_vs_eager,
            speedup_vs_best_baseline=first.speedup_vs_best_baseline,
            quality=confirmed.quality,
            values=confirmed.reopened.values,
            relative_error=confirmed.reopened.relative_error,
            sol=self._sol(plan, first.step_ms.p50),
            trials=tuple(trials),
            confirmations=confirmed.confirmations,
            engine_dir=None,
            ceilings=self._ceilings.items,
            flops=self._work.flops,
            parameters=self._work.parameters,
            seconds_spent=self._spending.spent_s,
            interrupted=found.interrupted,
            notes=(*notes, *([rough] if rough else [])),
        )

    def _search_event(self, event: Event) -> None:
        """Pass an event of the search on with the time of the whole."""
        self._listener(
            replace(event, spent_s=self._spending.spent_s, budget_s=self._request.budget_s)
        )

    def _say(self, text: str) -> None:
        self._listener(
            Event(
                kind="step",
                text=text,
                spent_s=self._spending.spent_s,
                budget_s=self._request.budget_s,
            )
        )
