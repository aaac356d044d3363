"""Plans are verified by their first steps: right ones pass, planted bugs are caught and placed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from suanli.base import codec
from suanli.base.train_plan import TrainPlan
from suanli.base.trial import ValueCheck
from suanli.training.averaging import ExponentialAverage, Lookahead
from suanli.training.host import eager_name
from suanli.training.prune import Masks
from suanli.training.recipe import Averaging, Recipe
from suanli.training.step import Stepper, standard_optimizer
from suanli.training.trials import PlanSearch, situation_of
from suanli.training.verify import compare, eager_too_far
from suanli.workloads.record import TrainingSettings
from suanli.workloads.seeding import seeded
from tests.train_parts import Bench, recipe

FAST32 = TrainPlan(
    memory_layout="channels_last", optimizer_kernel="fused", data="resident", keep_memory=True
)
FAST16 = FAST32.with_(precision="bf16")


@pytest.fixture(scope="module")
def sgd(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("sgd"), recipe(schedule="constant"))


@pytest.fixture(scope="module")
def adam(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = recipe(optimizer="adamw", lr=0.003, schedule="constant")
    return Bench(tmp_path_factory.mktemp("adam"), made)


GOOD = [
    TrainPlan(),
    FAST32,
    FAST16,
    FAST16.with_(weights="bf16"),
    FAST32.with_(threads=1, data="streamed", prefetch=2),
    FAST16.with_(optimizer_kernel="loop", memory_layout="contiguous"),
]


@pytest.mark.parametrize("plan", GOOD, ids=lambda plan: plan.title)
@pytest.mark.parametrize("which", ["sgd", "adam"])
def test_right_plans_pass(which: str, plan: TrainPlan, request: pytest.FixtureRequest) -> None:
    bench: Bench = request.getfixturevalue(which)
    found = bench.check(plan)
    assert found.ok, found.reason
    names = {output.name.partition("/")[0] for output in found.outputs}
    assert names == {"loss", "gradient", "update", "buffer", "output"}


@pytest.mark.parametrize("seed", range(4))
def test_right_plans_pass_from_any_seed(seed: int, tmp_path: Path) -> None:
    bench = Bench(tmp_path, recipe(optimizer="adamw", lr=0.003), seed)
    for plan in (FAST32, FAST16, FAST16.with_(weights="bf16")):
        found = bench.check(plan)
        assert found.ok, f"{plan.title}: {found.reason}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", ["sgd", "adam"])
def test_compiled_plans_pass_and_compiled_bugs_do_not(
    which: str, request: pytest.FixtureRequest
) -> None:
    bench: Bench = request.getfixturevalue(which)
    for plan in (
        FAST32.with_(compile="default"),
        FAST32.with_(compile="default", compile_scope="step"),
        FAST32.with_(compile="default", compile_scope="joint"),
        FAST16.with_(compile="default"),
    ):
        found = bench.check(plan)
        assert found.ok, f"{plan.title}: {found.reason}"
    slow = replace(bench.made, optimizer=_slow)
    assert not bench.check(FAST32.with_(compile="default", compile_scope="step"), slow).ok


# -- planted bugs ------------------------------------------------------------------------------


def _with_model(made: Recipe, change: Callable[[nn.Module], None]) -> Recipe:
    def make() -> nn.Module:
        model = made.workload.make_model()
        change(model)
        return model

    return replace(made, workload=replace(made.workload, make_model=make))


def _drop_gradient(model: nn.Module) -> None:
    model.head.bias.register_hook(torch.zeros_like)  # type: ignore[union-attr, operator]


def _stale_statistics(model: nn.Module) -> None:
    model.body[1].momentum = 0.0  # type: ignore[union-attr, index]


def _late_statistics(model: nn.Module) -> None:
    norm: Any = model.body[1]  # type: ignore[index]
    norm.momentum = 0.09


def _unclosed_epsilon(model: nn.Module) -> None:
    model.body[1].eps = 1e-3  # type: ignore[union-attr, index]


def _slow(model: nn.Module, settings: TrainingSettings, plan: TrainPlan) -> Any:
    return standard_optimizer(model, replace(settings, lr=0.9 * settings.lr), plan)


def _no_decay(model: nn.Module, settings: TrainingSettings, plan: TrainPlan) -> Any:
    return standard_optimizer(model, replace(settings, weight_decay=0.0), plan)


def _forgets_momentum(model: nn.Module, settings: TrainingSettings, plan: TrainPlan) -> Any:
    return standard_optimizer(model, replace(settings, momentum=0.0), plan)


def _not_augmented(inputs: Any, epoch: int, generator: torch.Generator) -> Any:
    return inputs


BUGS: dict[str, tuple[Callable[[Recipe], Recipe], str]] = {
    "dropped gradient": (lambda r: _with_model(r, _drop_gradient), "gradient of head.bias"),
    "stale statistic": (lambda r: _with_model(r, _stale_statistics), "buffer body.1.running"),
    "statistic 10 % short": (lambda r: _with_model(r, _late_statistics), "buffer body.1.running"),
    "rate off by 10 %": (lambda r: replace(r, optimizer=_slow), "step 1: update"),
    "no augmentation": (lambda r: replace(r, arrange=_not_augmented), "step 1: loss"),
    "another loss": (
        lambda r: replace(
            r,
            workload=replace(
                r.workload, loss=lambda o, y: functional.cross_entropy(o, y, label_smoothing=0.1)
            ),
        ),
        "step 1: ",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("plan", [FAST32, FAST16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("which", ["sgd", "adam"])
def test_planted_bugs_are_caught_and_placed(
    bug: str, plan: TrainPlan, which: str, request: pytest.FixtureRequest
) -> None:
    bench: Bench = request.getfixturevalue(which)
    plant, words = BUGS[bug]
    if bug == "statistic 10 % short" and plan.precision == "bf16":
        pytest.skip("bf16 rounds more than this bug does")
    found = bench.check(plan, plant(bench.made))
    assert not found.ok
    assert words in found.reason
    assert "is allowed" in found.reason


def test_a_lost_momentum_shows_at_the_second_step(sgd: Bench) -> None:
    found = sgd.check(FAST32, replace(sgd.made, optimizer=_forgets_momentum))
    assert found.reason.startswith("step 2: update")


def test_a_forgotten_decay_is_caught_in_fp32(sgd: Bench) -> None:
    found = sgd.check(FAST32, replace(sgd.made, optimizer=_no_decay))
    assert not found.ok
    assert "update" in found.reason


def test_a_wrong_epsilon_is_caught_in_fp32(sgd: Bench) -> None:
    assert not sgd.check(FAST32, _with_model(sgd.made, _unclosed_epsilon)).ok


def test_micro_batches_with_batch_norm_are_rejected(sgd: Bench) -> None:
    found = sgd.check(FAST32.with_(micro_batch=16))
    assert not found.ok


def test_nan_and_missing_entries_never_pass(sgd: Bench) -> None:
    reference = sgd.exchange.trace("reference-0")
    eager = [sgd.exchange.trace(eager_name("fp32", 0, draw)) for draw in range(3)]
    assert compare(eager[0], reference, eager, "fp32").ok
    broken = {**eager[0], "gradient/2/head.bias": torch.full((3,), float("nan"))}
    assert "step 2: gradient of head.bias" in compare(broken, reference, eager, "fp32").reason
    short = {k: v for k, v in eager[0].items() if k != "output"}
    assert "output is only in one" in compare(short, reference, eager, "fp32").reason
    counted = {**eager[0], "buffer/body.1.num_batches_tracked": torch.tensor(1)}
    assert "num_batches_tracked" in compare(counted, reference, eager, "fp32").reason


def test_an_eager_that_overflows_shows_nothing(sgd: Bench) -> None:
    reference = sgd.exchange.trace("reference-0")
    eager = [dict(sgd.exchange.trace(eager_name("bf16", 0, draw))) for draw in range(3)]
    right = dict(eager[0])
    assert compare(right, reference, eager, "bf16").ok
    eager[1]["gradient/1/head.bias"] = torch.full((3,), float("inf"))
    found = compare(right, reference, eager, "bf16")
    assert not found.ok
    assert "step 1: gradient of head.bias" in found.reason


def test_gradients_that_eager_misses_show_nothing(sgd: Bench) -> None:
    reference = sgd.exchange.trace("reference-0")
    right = [dict(sgd.exchange.trace(eager_name("bf16", 0, draw))) for draw in range(3)]
    assert eager_too_far(reference, right) == ""
    draw = torch.Generator().manual_seed(0)
    cases = (
        (0.35, "1", True),
        (0.6, "2", True),  # by then the runs have parted
        (0.6, "23", False),
        (0.6, "1", False),
    )
    for share, steps, shown in cases:
        wrong = [dict(trace) for trace in right]
        for name in reference:
            if name.startswith("gradient/") and name.split("/")[1] in steps:
                noise = torch.randn(reference[name].shape, generator=draw)
                size = reference[name].norm() / noise.norm()
                wrong[1][name] = reference[name] + share * size * noise
        found = compare(right[0], reference, wrong, "bf16")
        assert found.ok == shown
        assert (eager_too_far(reference, wrong) == "") == shown
    assert found.reason == eager_too_far(reference, wrong)
    assert found.reason.startswith("step 1: eager itself is 0.6 off in its gradients")
    assert "0.45 is the most" in found.reason


def _far_from_zero(inputs: Any, epoch: int, generator: torch.Generator) -> Any:
    return tuple(part + 300.0 for part in inputs)


def test_a_precision_that_rounds_the_signal_away_is_refused(tmp_path: Path) -> None:
    def make() -> nn.Module:
        with seeded():
            dense = (nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
            return nn.Sequential(nn.Flatten(), *dense).eval()

    made = recipe(schedule="constant")
    workload = replace(made.workload, make_model=make)
    bench = Bench(tmp_path, replace(made, workload=workload, arrange=_far_from_zero))
    assert bench.check(FAST32).ok
    found = bench.check(FAST16)
    assert not found.ok
    assert "eager itself is" in found.reason
    host = bench.host(TrainPlan())
    assert host.too_far("fp32") == ""
    assert host.too_far("bf16") == found.reason


def _in_bf16(inputs: Any, epoch: int, generator: torch.Generator) -> Any:
    return tuple(part.bfloat16() for part in inputs)


def test_images_that_a_recipe_arranges_in_bf16_go_with_every_precision(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replace(recipe(), arrange=_in_bf16))
    for plan in (TrainPlan(), FAST32, FAST16):
        found = bench.check(plan)
        assert found.ok, f"{plan.title}: {found.reason}"


def test_plans_of_a_refused_precision_are_not_built(sgd: Bench) -> None:
    class Far(_Attempts):
        def call(self, method: str, **args: Any) -> Any:
            if method == "too_far":
                self.asked.append(args["attempt"])
                return "eager is off" if args["precision"] == "bf16" else ""
            return super().call(method, **args)

    situation = situation_of(
        sgd.made, sgd.made.workload.make_model(), "cpu", images=True, blocks=False
    )
    finder = PlanSearch(sgd.made, sgd.exchange, situation, lambda event: None)
    host = finder._references = Far(set())
    for _ in range(2):
        trial = finder._evaluate(FAST16.as_plan(), 10.0)
        assert trial.status == "rejected"
        assert trial.reason == "bf16: eager is off"
    assert host.asked == [0, 1]  # two draws of batches, once for all plans
    assert finder._why_refused(FAST32) == ""


# -- averages of weights -----------------------------------------------------------------------


def _masks(model: nn.Module) -> Averaging:
    return Masks(model, "0.5")


def _lookahead(model: nn.Module) -> Averaging:
    return Lookahead(model, every=1, decay=0.8, power=0.0)


AVERAGES: dict[str, Callable[[nn.Module], Averaging]] = {
    "masks": _masks,
    "lookahead": _lookahead,
    "ema": ExponentialAverage,
}


class _NoAverage:
    """Has the tensors of an average and does nothing with them."""

    def __init__(self, model: nn.Module) -> None:
        pass

    def after_step(self, step: int, done: float) -> None:
        pass

    def finish(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.fixture(scope="module", params=list(AVERAGES))
def averaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = replace(recipe(schedule="constant"), averaging=AVERAGES[request.param])
    return Bench(tmp_path_factory.mktemp(request.param), made)


@pytest.mark.parametrize(
    "plan", [FAST32, FAST16, FAST16.with_(weights="bf16")], ids=lambda plan: plan.title
)
def test_plans_with_an_average_pass_and_one_that_leaves_it_out_does_not(
    plan: TrainPlan, averaged: Bench
) -> None:
    found = averaged.check(plan)
    assert found.ok, found.reason
    names = {output.name.partition("/")[0] for output in found.outputs}
    assert {"average", "average-buffer"} <= names
    assert not averaged.check(plan, replace(averaged.made, averaging=_NoAverage)).ok
    without = averaged.check(plan, replace(averaged.made, averaging=None))
    assert "is only in one of the two runs" in without.reason


def test_copies_that_keep_weights_from_before_the_average_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replace(recipe(schedule="constant"), averaging=_lookahead)
    bench, plan = Bench(tmp_path, made), FAST16.with_(weights="bf16")
    assert bench.check(plan).ok

    def follow(stepper: Stepper, step: int, done: float) -> None:
        assert stepper.averaging is not None
        stepper.averaging.after_step(step, done)

    monkeypatch.setattr(Stepper, "follow", follow)
    assert bench.check(FAST16).ok  # which has no copies
    assert not bench.check(plan).ok


def test_timing_takes_real_steps(sgd: Bench) -> None:
    timing = sgd.host(FAST32).time(0.05, 0.2)
    assert timing["batch"] == 32
    assert timing["step_ms"]["p50"] > 0
    calls = sgd.host(FAST32)
    assert len(calls.calls(3)) == 3
    assert all(ms > 0 for ms in calls.calls(2))


# -- a kink is no bug --------------------------------------------------------------------------


class _Attempts:
    """A host whose checks fail at the attempts that it is told."""

    def __init__(self, failing: set[int]) -> None:
        self.failing, self.asked = failing, list[int]()

    def call(self, method: str, *, timeout_s: float, attempt: int = 0, **_: Any) -> Any:
        if method != "check":
            return ""
        self.asked.append(attempt)
        ok = attempt not in self.failing
        return codec.to_json(ValueCheck(ok=ok, k=2.0, reason="" if ok else f"parted {attempt}"))


@pytest.mark.parametrize(
    ("failing", "ok", "asked"),
    [
        (set(), True, [0]),
        ({0}, True, [0, 1, 2]),
        ({0, 1}, False, [0, 1]),
        ({0, 2}, False, [0, 1, 2]),
        ({1, 2}, True, [0]),
    ],
)
def test_two_of_three_attempts_reject(
    failing: set[int], ok: bool, asked: list[int], sgd: Bench
) -> None:
    situation = situation_of(
        sgd.made, sgd.made.workload.make_model(), "cpu", images=True, blocks=False
    )
    finder = PlanSearch(sgd.made, sgd.exchange, situation, lambda event: None)
    host = finder._references = _Attempts(failing)
    found = finder._checked(host, FAST32, lambda: 10.0)
    assert found.ok == ok
    assert host.asked == asked
    if not ok:
        assert found.reason == "parted 0"
