"""The search catches a wrong, a slow, a crashing, a hanging, a greedy and a lazy backend."""

from typing import Any

import pytest
import torch
from torch import nn

import suanli
from suanli.base.results import OptimizeResult
from suanli.plans import search
from suanli.plans.space import Candidate, candidates

pytestmark = pytest.mark.timeout(900)  # one search for all of them, hanging plans included
NAMES = ("wrong", "slow", "crashing", "hanging", "greedy", "unwritten", "nan")


def _few(*given: Any, **named: Any) -> list[Candidate]:
    """The planted plans, and of eager's the reference and one that can be shipped."""
    return [
        candidate
        for candidate in candidates(*given, **named)
        if candidate.plan.backend != "eager"
        or (candidate.plan.precision == "fp32" and candidate.plan.memory_layout == "contiguous")
    ]


def _short_hang(self: Any, candidate: Candidate) -> float:
    """Little for the plan that hangs; the others have their time on a busy machine too."""
    if candidate.plan.backend == "planted-hanging":
        return 8.0
    return max(120.0, _limit_s(self, candidate))


_limit_s = search._Search._limit_s


@pytest.fixture(scope="module")
def result(quick_search: pytest.MonkeyPatch) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 10),
    ).eval()
    with quick_search.context() as patch:
        patch.setattr("suanli.engines.optimizer.memory_limit", lambda: 2 * 2**30)
        patch.setattr("suanli.engines.optimizer.candidates", _few)
        patch.setattr(search._Search, "_limit_s", _short_hang)
        modules = tuple(f"tests.planted:{name.upper()}" for name in NAMES)
        engine = suanli.optimize(
            model,
            torch.randn(2, 3, 16, 16),
            budget_s=400,
            max_batch=8,
            keep=True,
            backends=("eager", *(f"planted-{name}" for name in NAMES)),
            backend_modules=modules,
        )
        with engine:
            yield engine.result


def _trial(result: OptimizeResult, name: str) -> Any:
    found = [t for t in result.trials if t.plan.backend == f"planted-{name}"]
    assert found, [t.plan.title for t in result.trials]
    return found[0]


def test_wrong_values_are_rejected_by_the_bias_of_one_class(result: OptimizeResult) -> None:
    trial = _trial(result, "wrong")
    assert trial.status == "rejected"
    assert trial.values.outputs[0].worst_channel == 3
    # hidden in the rounding of a single answer: the plain error stays within the allowance
    assert trial.values.outputs[0].rms_ratio <= trial.values.k


def test_slow_is_verified_and_loses(result: OptimizeResult) -> None:
    trial = _trial(result, "slow")
    assert trial.status == "verified"
    assert result.chosen.plan.backend != "planted-slow"


def test_crash_is_a_failed_trial(result: OptimizeResult) -> None:
    trial = _trial(result, "crashing")
    assert trial.status == "failed"
    assert "SIGSEGV" in trial.reason


def test_hang_ends_at_its_deadline(result: OptimizeResult) -> None:
    trial = _trial(result, "hanging")
    assert trial.status == "failed"
    assert "timeout" in trial.reason


def test_memory_is_limited(result: OptimizeResult) -> None:
    trial = _trial(result, "greedy")
    assert trial.status == "failed"
    assert "memory" in trial.reason


def test_stale_outputs_are_rejected(result: OptimizeResult) -> None:
    assert _trial(result, "unwritten").status == "rejected"


def test_nan_is_rejected(result: OptimizeResult) -> None:
    trial = _trial(result, "nan")
    assert trial.status == "rejected"
    assert "NaN" in trial.reason or "finite" in trial.reason


def test_the_search_still_ends_with_a_verified_engine(result: OptimizeResult) -> None:
    assert result.values is not None
    assert result.values.ok
    assert result.chosen.plan.backend == "eager"
