"""Training plans as records, and the candidates of the search."""

import pytest

from suanli.base import codec
from suanli.base.errors import ArtefactError, BadInputError
from suanli.base.plan import Plan
from suanli.base.timing import Estimate
from suanli.base.train_plan import TrainPlan
from suanli.base.trial import Trial
from suanli.plans.search import search
from suanli.plans.situation import Situation
from suanli.plans.train_space import TrainSituation, train_candidates


def _situation(device: str = "cpu", **changes: object) -> TrainSituation:
    machine = Situation(
        device=device,
        cores=2,
        objective="throughput",
        batch=128,
        present=frozenset({"eager", "inductor"}),
        features=("amx_bf16", "avx512f") if device == "cpu" else (),
        capability=None if device == "cpu" else "9.0",
    )
    return TrainSituation(machine=machine, images=True, **changes)  # type: ignore[arg-type]


def test_a_plan_and_its_general_form_are_one() -> None:
    plans = [
        TrainPlan(),
        TrainPlan(precision="bf16", weights="bf16", threads=1, kernels=("pool", "norm")),
        TrainPlan(device="cuda:0", compile="max-autotune", compile_scope="step", pinned=True),
    ]
    for plan in plans:
        assert TrainPlan.from_plan(plan.as_plan()) == plan
        assert codec.loads(TrainPlan, codec.dumps(plan)) == plan
    assert len({plan.key for plan in plans}) == 3
    assert plans[0].title == "eager fp32"
    assert plans[1].title == "native bf16 1t kernels=pool,norm weights=bf16"
    with pytest.raises(BadInputError, match="no decision of a training plan"):
        TrainPlan.from_plan(Plan(backend="eager", options={"streams": 3}))
    with pytest.raises(ArtefactError, match="not a TrainPlan"):
        codec.loads(TrainPlan, '{"precision": "int4"}')


def test_every_candidate_is_legal_distinct_and_the_first_is_the_plain_loop() -> None:
    for situation in (
        _situation(blocks=True, kernels={"fused": {"precision": "bf16"}}),
        _situation("cuda:0", fits=False),
        _situation(own=TrainPlan(precision="bf16", micro_batch=7)),
    ):
        found = train_candidates(situation, eager_ms=50.0)
        plans = [TrainPlan.from_plan(c.plan) for c in found]
        assert len({p.key for p in plans}) == len(plans)
        assert found[0].baseline
        assert plans[0] == TrainPlan(device=situation.machine.device)
        assert sum(c.baseline for c in found) == 3
        assert all(c.expected_ms > 0 for c in found)
        assert all(p.checked() for p in plans)
    own = [c for c in found if TrainPlan.from_plan(c.plan).micro_batch == 7]
    assert own and own[0].coarse


def test_little_work_is_known_by_its_operations_on_a_busy_machine() -> None:
    for flops, layout in ((1e7, "contiguous"), (1e12, "channels_last"), (None, "channels_last")):
        found = train_candidates(_situation(flops=flops), eager_ms=50.0)
        coarse = [TrainPlan.from_plan(c.plan) for c in found if c.coarse]
        assert {plan.memory_layout for plan in coarse} == {layout}


def test_rows_of_kernels_come_once_and_as_they_need_it() -> None:
    from torch import nn

    from suanli.training.kernels import rows_for

    wide = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
    rows = rows_for(wide, "cpu")
    assert rows_for(wide, "cuda:0") == rows_for(nn.Linear(2, 2), "cpu") == {}
    found = train_candidates(_situation(kernels=rows), eager_ms=50.0)
    native = [c.plan for c in found if c.coarse and c.plan.backend == "native"]
    plans = list(map(TrainPlan.from_plan, native))
    assert [plan.compile_scope for plan in plans] == ["model", "joint"]
    for plan in plans:
        assert (plan.precision, plan.memory_layout) == ("bf16", "channels_last")
    found = train_candidates(_situation(kernels=rows, flops=1e12), eager_ms=50.0)
    assert len([c for c in found if c.coarse and c.plan.backend == "native"]) == 1


def test_what_the_machine_lacks_is_said() -> None:
    bare = _situation(why_not_compiled="no compiler")
    found = train_candidates(bare, eager_ms=50.0)
    compiled = [c for c in found if c.plan.backend == "inductor"]
    assert compiled and all(c.why_not == "no compiler" for c in compiled)
    old = TrainSituation(
        machine=Situation(
            device="cpu", cores=1, objective="throughput", batch=4, present=frozenset()
        ),
        images=False,
    )
    low = [c for c in train_candidates(old, eager_ms=1.0) if c.plan.precision == "bf16"]
    assert low and all("no instructions" in c.why_not for c in low)


def test_the_search_takes_the_fastest_verified_and_a_failure_is_a_trial() -> None:
    def evaluate(plan: Plan, limit_s: float) -> Trial:
        wanted = TrainPlan.from_plan(plan)
        if wanted.compile != "none":
            return Trial(plan=plan, status="failed", reason="memory: used 9 GiB")
        if wanted.micro_batch:
            return Trial(plan=plan, status="rejected", reason="step 1: gradient of a parted")
        ms = 40.0 * (0.3 if wanted.precision == "bf16" else 1) * (0.8 if wanted.keep_memory else 1)
        ms *= 0.7 if wanted.threads == 1 else 1.0
        step = Estimate(p50=ms, lo95=ms, hi95=ms)
        return Trial(plan=plan, status="verified", step_ms=step, samples_per_s=128e3 / ms)

    found = search(train_candidates(_situation(), eager_ms=40.0), evaluate, budget_s=1e6)
    assert found.winner is not None
    best = TrainPlan.from_plan(found.winner.plan)
    assert (best.precision, best.keep_memory, best.threads) == ("bf16", True, 1)
    assert any(t.status == "failed" for t in found.trials)
    assert any(t.status == "rejected" for t in found.trials)
    assert found.best_baseline is not None
