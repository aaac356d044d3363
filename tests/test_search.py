"""The search against a machine that is made of a table, with a clock of its own."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suanli.base import codec
from suanli.base.errors import BadInputError, MissingBackendError, TrialFailedError
from suanli.base.events import Event
from suanli.base.plan import BackendSpec, Plan, Quantization
from suanli.base.timing import Estimate
from suanli.base.trial import Trial
from suanli.plans.outlook import Outlook, expected_gain
from suanli.plans.ranking import ranked
from suanli.plans.replay import ReplayEvaluator
from suanli.plans.search import SearchResult, search
from suanli.plans.space import Candidate, Situation, candidates, family
from suanli.plans.store import TrialStore

EAGER = BackendSpec(
    name="eager",
    install="",
    packages=(),
    precisions={"cpu": ("fp32", "bf16")},
    layouts=("contiguous", "channels_last"),
    promise={"fp32": 1.0, "bf16": 0.45},
    build_s=0.5,
    needs_export=False,
    baselines=(
        Plan(backend="eager", options={"source": True}),
        Plan(backend="eager", precision="bf16", options={"source": True}),
    ),
)
COMPILER = BackendSpec(
    name="compiler",
    install="",
    packages=(),
    precisions={"cpu": ("fp32", "bf16")},
    promise={"fp32": 0.7, "bf16": 0.25},
    build_s=22.0,
    baselines=(Plan(backend="compiler", options={"source": True}),),
)
ENGINE = BackendSpec(
    name="engine",
    install="pip install engine",
    packages=("engine",),
    precisions={"cpu": ("fp32", "bf16")},
    quantizations={"cpu": ("int8-static",)},
    promise={"fp32": 0.6, "bf16": 0.15, "int8-static": 0.1},
    options={"pin": (True, False)},
    build_s=5.0,
    streams=True,
)
RUNTIME = BackendSpec(
    name="runtime",
    install="pip install runtime",
    packages=("runtime",),
    precisions={"cpu": ("fp32",)},
    promise={"fp32": 0.6},
    build_s=2.0,
    streams=True,
)
SPECS = (EAGER, COMPILER, ENGINE, RUNTIME)
HERE = Situation(
    device="cpu",
    cores=2,
    features=("amx_bf16", "amx_int8"),
    objective="latency",
    batch=32,
    max_batch=32,
    images=True,
    accepts_quantised=True,
    calibration_samples=64,
    present=frozenset(spec.name for spec in SPECS),
)
# Milliseconds of the families on two cores (ResNet-50, batch 1), as measured once.
STEP_MS = {
    "eager fp32": 53.7,
    "eager bf16": 21.6,
    "compiler fp32": 33.0,
    "compiler bf16": 10.4,
    "engine fp32": 27.0,
    "engine bf16": 6.6,
    "engine int8-static": 3.9,
    "runtime fp32": 30.5,
}
BUILD_S = {"eager": 4.0, "compiler": 27.0, "engine": 8.0, "runtime": 6.0}


def trial_of(plan: Plan, ms: float, seconds: float = 5.0, **changes: object) -> Trial:
    settled = {
        "plan": plan,
        "status": "verified",
        "step_ms": Estimate(p50=ms, lo95=ms * 0.99, hi95=ms * 1.01),
        "samples_per_s": 32_000 / ms if ms else None,
        "batch": 32,
        "seconds_spent": seconds,
    }
    return Trial(**(settled | changes))  # type: ignore[arg-type]


def step_ms(plan: Plan) -> float:
    """The table's machine: two streams help, other variations cost a little."""
    figure = STEP_MS[family(plan)]
    figure *= 1.1 if plan.memory_layout == "contiguous" else 1.0
    figure *= 0.8 if plan.streams > 1 else 1.6 if plan.threads == 1 else 1.0
    figure *= {0: 1.0, 16: 0.97}.get(plan.sub_batch, 1.3)
    return figure * 1.02 ** len(plan.options)


class Machine:
    """Evaluates plans by a table and moves its own clock."""

    def __init__(self, table: Callable[[Plan], float] = step_ms) -> None:
        self.table = table
        self.now = 0.0
        self.asked: list[Plan] = []
        self.limits: list[float] = []
        self.seconds = dict(BUILD_S)

    def clock(self) -> float:
        return self.now

    def __call__(self, plan: Plan, limit_s: float) -> Trial:
        self.asked.append(plan)
        self.limits.append(limit_s)
        seconds = self.seconds[plan.backend]
        self.now += min(seconds, limit_s)
        if seconds > limit_s:
            raise TrialFailedError("too slow", kind="timeout")
        return trial_of(plan, self.table(plan), seconds)


def space(**changes: object) -> tuple[Candidate, ...]:
    here = replace(HERE, **changes)  # type: ignore[arg-type]
    return candidates(SPECS, here, eager_ms=50.0)


def run(machine: Machine, budget_s: float, **more: object) -> SearchResult:
    plans = more.pop("plans", None) or space()
    return search(plans, machine, budget_s=budget_s, clock=machine.clock, **more)  # type: ignore[arg-type]


def skipped(result: SearchResult, name: str) -> list[str]:
    return [t.reason for t in result.trials if t.status == "skipped" and family(t.plan) == name]


def test_the_usual_budget_finds_the_best_family_and_its_streams() -> None:
    result = run(Machine(), 120.0)
    assert result.winner is not None
    assert family(result.winner.plan) == "engine int8-static"
    assert result.winner.plan.streams == 2
    assert result.seconds_spent <= 120.0
    assert result.best_baseline is not None
    assert family(result.best_baseline.plan) == "eager bf16"
    assert not result.interrupted


def test_baselines_come_first_and_in_order() -> None:
    machine = Machine()
    run(machine, 600.0)
    assert [p.title for p in machine.asked[:3]] == [
        *("eager fp32 source", "eager bf16 source", "compiler fp32 source")
    ]


def test_a_slow_baseline_waits_until_the_promising_plans_are_done() -> None:
    machine = Machine()
    result = run(machine, 45.0)
    order = [p.backend for p in machine.asked]
    assert order[:2] == ["eager", "eager"]
    assert order[2] == "engine"
    reasons = skipped(result, "compiler fp32")
    assert any("s needed" in reason for reason in reasons)


@pytest.mark.parametrize("budget_s", [0.0, 0.5, 3.0])
def test_the_reference_is_tried_whatever_the_budget(budget_s: float) -> None:
    machine = Machine()
    result = run(machine, budget_s)
    assert [p.title for p in machine.asked] == ["eager fp32 source"]
    assert machine.limits == [300.0]
    assert result.winner is not None
    assert result.winner.baseline
    assert skipped(result, "engine bf16")


def test_the_first_plan_is_tried_where_that_is_asked_for() -> None:
    machine = Machine()
    result = run(machine, 0.0, first_plan=100.0)
    assert len(machine.asked) == 2
    assert result.winner is not None
    assert not result.winner.baseline
    assert 0 < machine.limits[1] <= 100.0 * result.seconds_spent


def test_the_reserve_is_left_for_the_confirmation() -> None:
    machine = Machine()
    result = run(machine, 60.0, reserve_s=20.0)
    assert result.seconds_spent <= 40.0
    assert max(machine.limits[1:]) <= 40.0


def test_a_lower_bound_above_the_best_is_hopeless() -> None:
    bounds = {"compiler bf16": 8.0}
    result = run(Machine(), 600.0, lower_bound_ms=lambda plan: bounds.get(family(plan), 0.1))
    reasons = skipped(result, "compiler bf16")
    assert any("its lower bound 8 ms is above the best" in reason for reason in reasons)


def test_a_dominated_sibling_is_hopeless() -> None:
    machine = Machine()
    result = run(machine, 600.0)
    assert "eager bf16" not in {family(p) for p in machine.asked if not p.options}
    reasons = skipped(result, "eager bf16")
    assert any("its sibling eager bf16 source was 3." in reason for reason in reasons)
    assert any("slower than the best floating-point plan" in reason for reason in reasons)


def test_a_short_budget_leaves_a_floating_point_plan_to_fall_back_on() -> None:
    result = run(Machine(), 60.0)
    assert result.winner is not None
    assert result.winner.plan.quantized
    floats = [t for t in result.runner_ups if not t.plan.quantized]
    assert family(floats[0].plan) == "engine bf16"


def test_variations_only_near_the_best() -> None:
    machine = Machine()
    result = run(machine, 600.0)
    runtime = [p for p in machine.asked if p.backend == "runtime"]
    assert len(runtime) == 1
    assert any("variations not tried" in reason for reason in skipped(result, "runtime fp32"))


def test_each_trial_is_made_once() -> None:
    machine = Machine()
    run(machine, math.inf)
    keys = [p.key for p in machine.asked]
    assert len(keys) == len(set(keys))
    assert len(keys) == len([c for c in space() if not c.why_not])


def test_what_cannot_be_tried_is_among_the_trials() -> None:
    plans = space(present=frozenset({"eager"}), features=())
    result = run(Machine(), 100.0, plans=plans)
    assert skipped(result, "engine fp32") == ["engine is not installed (pip install engine)"]
    assert any("no instructions" in reason for reason in skipped(result, "eager bf16"))


def test_the_build_time_of_this_machine_is_learned() -> None:
    machine = Machine()
    machine.seconds["engine"] = 38.0  # four times what its row says
    result = run(machine, 130.0)
    assert result.seconds_spent <= 130.0
    engine = [p for p in machine.asked if p.backend == "engine"]
    assert len(engine) == 2
    waiting = [reason for reason in skipped(result, "engine fp32") if "s needed" in reason]
    assert waiting
    assert "about 38 s needed" in waiting[0]


def test_a_changed_decision_is_learned_across_families() -> None:
    outlook = Outlook()
    one = Candidate(plan=Plan(backend="a"), expected_ms=10.0, build_s=1.0, coarse=True)
    two = replace(one, plan=one.plan.with_(streams=2, threads=1), coarse=False)
    outlook.learn(one, trial_of(one.plan, 10.0), 5.0)
    outlook.learn(two, trial_of(two.plan, 7.0), 5.0)
    other = replace(one, plan=Plan(backend="b"))
    outlook.learn(other, trial_of(other.plan, 20.0), 5.0)
    parent = next(m for m in outlook.siblings("b"))
    varied = replace(two, plan=other.plan.with_(streams=2, threads=1))
    assert outlook.step_after(parent, varied)[0] == pytest.approx(14.0)


def test_expected_gain_against_sampling() -> None:
    draw = random.Random(7)
    for best, expected, sigma in [(10.0, 8.0, 0.3), (10.0, 12.0, 0.5), (4.0, 20.0, 0.5)]:
        gains = [
            max(0.0, best - expected * math.exp(sigma * draw.gauss(0, 1))) for _ in range(200_000)
        ]
        assert expected_gain(best, expected, sigma) == pytest.approx(
            sum(gains) / len(gains), rel=0.05, abs=0.003
        )


class Troubled(Machine):
    """Some families crash, hang, lie or are not there."""

    def __init__(self, trouble: dict[str, Callable[[Plan, float], Trial]]) -> None:
        super().__init__()
        self.trouble = trouble

    def __call__(self, plan: Plan, limit_s: float) -> Trial:
        if family(plan) in self.trouble and "source" not in plan.options:
            self.asked.append(plan)
            self.limits.append(limit_s)
            return self.trouble[family(plan)](plan, limit_s)
        return super().__call__(plan, limit_s)


def crash(plan: Plan, limit_s: float) -> Trial:
    raise TrialFailedError("killed by SIGSEGV", kind="crash")


def test_failures_are_trials_and_the_search_goes_on() -> None:
    def bug(plan: Plan, limit_s: float) -> Trial:
        raise RuntimeError("a\nlong story")

    def absent(plan: Plan, limit_s: float) -> Trial:
        raise MissingBackendError("engine", "pip install engine")

    def untimed(plan: Plan, limit_s: float) -> Trial:
        return trial_of(plan, 0.001, samples_per_s=None)

    def impossible(plan: Plan, limit_s: float) -> Trial:
        return trial_of(plan, 0.0, samples_per_s=math.inf)

    machine = Troubled(
        {
            "engine bf16": crash,
            "engine fp32": absent,
            "engine int8-static": untimed,
            "runtime fp32": bug,
            "compiler bf16": impossible,
        }
    )
    result = run(machine, math.inf)
    found = {family(t.plan): t for t in result.trials if "source" not in t.plan.options}
    assert found["engine bf16"].reason == "killed by SIGSEGV"
    assert found["engine bf16"].details["failure"] == "crash"
    assert found["runtime fp32"].reason == "RuntimeError: a long story"
    assert found["engine fp32"].status == "skipped"
    assert found["engine int8-static"].status == "failed"
    assert found["compiler bf16"].status == "failed"
    assert result.winner is not None
    assert family(result.winner.plan) == "eager bf16"


def test_a_hanging_plan_does_not_eat_the_budget() -> None:
    machine = Machine()

    def hang(plan: Plan, limit_s: float) -> Trial:
        machine.now += limit_s
        raise TrialFailedError("no answer", kind="timeout")

    class Hanging(Troubled):
        clock = machine.clock

        def __call__(self, plan: Plan, limit_s: float) -> Trial:
            if family(plan) == "engine int8-static":
                self.limits.append(limit_s)
                return hang(plan, limit_s)
            return machine(plan, limit_s)

    hanging = Hanging({})
    result = search(space(), hanging, budget_s=150.0, clock=machine.clock)
    assert max(hanging.limits) < 60.0
    assert result.winner is not None
    assert family(result.winner.plan) == "engine bf16"


def test_rejected_plans_never_win_and_are_not_varied() -> None:
    def wrong(plan: Plan, limit_s: float) -> Trial:
        return trial_of(plan, 0.5, status="rejected", reason="class 3 is biased")

    machine = Troubled({"engine int8-static": wrong})
    result = run(machine, 600.0)
    assert result.winner is not None
    assert family(result.winner.plan) == "engine bf16"
    assert sum(family(p) == "engine int8-static" for p in machine.asked) == 1


def test_a_backend_whose_families_all_fail_is_left_alone() -> None:
    machine = Troubled(dict.fromkeys(["engine bf16", "engine int8-static", "engine fp32"], crash))
    result = run(machine, 600.0)
    assert sum(p.backend == "engine" for p in machine.asked) == 2
    reasons = [t.reason for t in result.trials if t.plan.backend == "engine"]
    assert "2 of its siblings failed, the last: killed by SIGSEGV" in reasons


def test_ctrl_c_keeps_what_was_found(tmp_path: Path) -> None:
    def stop(plan: Plan, limit_s: float) -> Trial:
        raise KeyboardInterrupt

    machine = Troubled({"engine bf16": stop, "engine int8-static": stop})
    store = TrialStore("interrupted", folder=tmp_path)
    result = run(machine, 600.0, store=store)
    assert result.interrupted
    assert result.winner is not None
    assert len([t for t in result.trials if t.status == "verified"]) == len(store)
    assert all(t.status == "verified" for t in result.trials)
    again = run(Machine(), 600.0, store=TrialStore("interrupted", folder=tmp_path))
    assert again.winner is not None
    assert again.winner.plan.backend == "engine"


def test_a_second_run_evaluates_nothing_again(tmp_path: Path) -> None:
    first, second = Machine(), Machine()
    before = run(first, 600.0, store=TrialStore("again", folder=tmp_path))
    after = run(second, 600.0, store=TrialStore("again", folder=tmp_path))
    assert {p.key for p in first.asked}.isdisjoint(p.key for p in second.asked)
    assert before.winner is not None
    assert after.winner is not None
    assert after.winner.plan == before.winner.plan
    assert after.winner.resumed
    assert any(t.baseline and t.resumed for t in after.trials)


def test_a_plan_that_the_build_completed_is_found_again(tmp_path: Path) -> None:
    class Completing(Machine):
        def __call__(self, plan: Plan, limit_s: float) -> Trial:
            trial = super().__call__(plan, limit_s)
            return replace(trial, plan=plan.with_(float_operators=("norm",)))

    run(Completing(), 200.0, store=TrialStore("filled", folder=tmp_path))
    second = Completing()
    result = run(second, 200.0, store=TrialStore("filled", folder=tmp_path))
    assert result.winner is not None
    assert result.winner.plan.float_operators == ("norm",)
    assert "eager fp32 source" not in {p.title for p in second.asked}


def test_what_failed_on_this_side_is_not_stored(tmp_path: Path) -> None:
    def full(plan: Plan, limit_s: float) -> Trial:
        raise OSError("no space left on device")

    run(Troubled({"engine bf16": full}), 600.0, store=TrialStore("side", folder=tmp_path))
    second = Machine()
    run(second, 600.0, store=TrialStore("side", folder=tmp_path))
    assert "engine bf16" in {family(p) for p in second.asked}


def test_events_tell_what_goes_on() -> None:
    events: list[Event] = []
    result = run(Machine(), 120.0, on_event=events.append)
    trials = [event for event in events if event.kind == "trial"]
    assert [e.trial for e in trials] == [t for t in result.trials if t.status != "skipped"]
    assert events[0].text == "trying eager fp32 source (about 4 s)"
    assert all(event.budget_s == 120.0 and event.spent_s is not None for event in events)


# -- ranking ------------------------------------------------------------------------------------

FLOAT = Plan(backend="engine", precision="bf16")
INT8 = FLOAT.with_(precision="int8", quantization=Quantization(scheme="int8-static"))


def test_a_tie_goes_to_floating_point() -> None:
    order = ranked([trial_of(INT8, 10.0), trial_of(FLOAT, 10.15)])
    assert [t.plan for t in order] == [FLOAT, INT8]
    clear = ranked([trial_of(INT8, 10.0), trial_of(FLOAT, 10.9)])
    assert [t.plan for t in clear] == [INT8, FLOAT]


def test_overlapping_intervals_tie_a_little_further() -> None:
    wide = Estimate(p50=10.4, lo95=9.9, hi95=11.0)
    order = ranked([trial_of(INT8, 10.0), trial_of(FLOAT, 10.4, step_ms=wide)])
    assert order[0].plan == FLOAT
    wider = Estimate(p50=10.8, lo95=9.0, hi95=12.0)
    order = ranked([trial_of(INT8, 10.0), trial_of(FLOAT, 10.8, step_ms=wider)])
    assert order[0].plan == INT8


def test_a_tie_never_falls_behind_a_baseline() -> None:
    baseline = Plan(backend="compiler", options={"source": True})
    trials = [
        trial_of(INT8, 10.0),
        trial_of(baseline, 10.05, baseline=True),
        trial_of(FLOAT, 10.1),
    ]
    winner = ranked(trials)[0]
    assert winner.plan != FLOAT
    fastest = ranked([trial_of(baseline, 9.9, baseline=True), trial_of(FLOAT, 10.0)])[0]
    assert fastest.plan == baseline


# -- replay -------------------------------------------------------------------------------------


def test_a_recording_replays_the_search(tmp_path: Path) -> None:
    machine = Machine()
    recorded = run(machine, 600.0)
    shapes = {
        "list.json": codec.to_json(recorded.trials),
        "result.json": {"trials": codec.to_json(recorded.trials)},
    }
    for name, data in shapes.items():
        path = tmp_path / name
        path.write_text(json.dumps(data))
        replay = ReplayEvaluator.from_file(path)
        result = search(space(), replay, budget_s=600.0, clock=replay.clock)
        assert replay.asked == [p.key for p in machine.asked]
        assert [t.plan for t in result.trials] == [t.plan for t in recorded.trials]
        assert result.seconds_spent == pytest.approx(recorded.seconds_spent)


def test_a_store_is_a_recording_too(tmp_path: Path) -> None:
    store = TrialStore("recording", folder=tmp_path)
    machine = Machine()
    run(machine, 600.0, store=store)
    replay = ReplayEvaluator.from_file(store.path)
    search(space(), replay, budget_s=600.0, clock=replay.clock)
    assert replay.asked == [p.key for p in machine.asked]


def test_a_replay_keeps_to_the_limit_and_knows_what_it_lacks() -> None:
    replay = ReplayEvaluator([trial_of(FLOAT, 5.0, seconds=20.0)])
    with pytest.raises(TrialFailedError):
        replay(FLOAT, 10.0)
    assert replay.clock() == 10.0
    with pytest.raises(BadInputError, match="not in the recording"):
        replay(INT8, 10.0)


@pytest.mark.parametrize("text", ["", "7", "nonsense", "[1]", '{"trials": 3}', '[{"plan": 1}]'])
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recording.json"
    path.write_text(text)
    if text:
        with pytest.raises(BadInputError):
            ReplayEvaluator.from_file(path)
    with pytest.raises(BadInputError):
        ReplayEvaluator.from_file(tmp_path / "absent.json")


# -- properties ---------------------------------------------------------------------------------

statuses = st.sampled_from(["verified", "verified", "verified", "rejected", "failed"])


def random_machine(seed: int, lying: bool) -> Machine:
    """A machine whose times have nothing to do with the promises, and where plans fail."""

    def table(plan: Plan) -> float:
        return random.Random(f"{seed} {plan.key}").uniform(1.0, 100.0)

    class Random(Machine):
        def __call__(self, plan: Plan, limit_s: float) -> Trial:
            draw = random.Random(f"{seed} {plan.key} how")
            self.seconds[plan.backend] = draw.uniform(0.5, 40.0)
            fate = draw.choice(["ok", "ok", "ok", "rejected", "crash", "bug"])
            trial = super().__call__(plan, limit_s)
            if fate == "rejected":
                return replace(trial, status="rejected", reason="wrong")
            if fate == "crash":
                raise TrialFailedError("crashed", kind="crash")
            if fate == "bug" and lying:
                raise ValueError("bug")
            return trial

    return Random(table)


@given(seed=st.integers(0, 10_000), budget_s=st.floats(0.0, 700.0), lying=st.booleans())
@settings(max_examples=60, deadline=None)
def test_promises_hold_on_any_machine(seed: int, budget_s: float, lying: bool) -> None:
    machine = random_machine(seed, lying)
    result = run(machine, budget_s)
    assert machine.asked[0] == EAGER.baselines[0]
    assert len({p.key for p in machine.asked}) == len(machine.asked)
    # the reference may take what it needs; after it nothing passes the end of the budget
    first_s = min(40.0, 300.0)
    assert result.seconds_spent <= max(budget_s, first_s)
    verified = [t for t in result.trials if t.status == "verified"]
    if result.winner is None:
        assert not verified
    else:
        assert result.winner.status == "verified"
        fastest = max(t.samples_per_s or 0 for t in verified)
        assert (result.winner.samples_per_s or 0) >= 0.95 * fastest
        assert all(
            (result.winner.samples_per_s or 0) >= (t.samples_per_s or 0)
            for t in verified
            if t.baseline
        )
        assert {t.plan.key for t in (result.winner, *result.runner_ups)} == {
            t.plan.key for t in verified
        }
    assert {t.plan.key for t in result.trials} >= {p.key for p in machine.asked}
    assert all(t.reason for t in result.trials if t.status != "verified")


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_an_unlimited_budget_finds_the_best(seed: int) -> None:
    machine = random_machine(seed, lying=False)

    def bound(plan: Plan) -> float:
        return 0.9 * machine.table(plan)

    plans = space(batch=1, images=False)
    bounded = run(machine, math.inf, plans=plans, lower_bound_ms=bound)
    everything = run(random_machine(seed, lying=False), math.inf, plans=plans)
    assert (bounded.winner is None) == (everything.winner is None)
    if bounded.winner is not None and everything.winner is not None:
        verified = [t for t in everything.trials if t.status == "verified"]
        fastest = max(t.samples_per_s or 0 for t in verified)
        assert max(
            t.samples_per_s or 0 for t in (bounded.winner, *bounded.runner_ups)
        ) == pytest.approx(fastest)


@given(seed=st.integers(0, 10_000), budget_s=st.floats(10.0, 400.0))
@settings(max_examples=20, deadline=None)
def test_equal_trials_give_an_equal_search(seed: int, budget_s: float) -> None:
    first, second = random_machine(seed, lying=True), random_machine(seed, lying=True)
    one, two = run(first, budget_s), run(second, budget_s)
    assert first.asked == second.asked
    assert one == two
