"""What is given back where no engine beats what the person has, and what may never ship."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import suanli
from suanli.base.errors import SuanliError
from suanli.base.plan import Plan
from suanli.base.timing import Estimate, Timing
from suanli.base.trial import Trial
from suanli.engines import confirm
from suanli.engines.evaluate import Setting
from suanli.engines.finalists import baseline_caveats
from suanli.engines.unchanged import Unchanged
from tests import planted_results as planted

pytestmark = pytest.mark.usefixtures("quick_search", "in_process")
OPTIONS: dict[str, Any] = {"budget_s": 12.0, "max_batch": 4, "backends": ("eager",)}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every race is lost at the asked batch."""
    monkeypatch.setattr(confirm, "losing_batches", lambda races: [races[0].batch])


def test_the_baseline_is_returned_and_said(losing: None, tmp_path: Path) -> None:
    model, inputs = net(), torch.randn(2, 16)
    with suanli.optimize(model, inputs, out=tmp_path / "engine", **OPTIONS) as found:
        assert isinstance(found, Unchanged)
        result = found.result
        assert result.chosen == result.baseline
        assert result.engine_dir is None
        assert result.speedup_vs_best_baseline == Estimate(p50=1.0, lo95=1.0, hi95=1.0)
        assert "nothing beat" in result.notes[0]
        torch.testing.assert_close(found(inputs), model(inputs), rtol=0.05, atol=0.02)
        assert not found(inputs).requires_grad
        with pytest.raises(SuanliError, match="no engine to save"):
            found.save(tmp_path / "other")
        with pytest.raises(SuanliError, match="neither pickled nor copied"):
            pickle.dumps(found)
    assert not (tmp_path / "engine").exists()
    with pytest.raises(SuanliError, match="closed"):
        found(inputs)
    found.forked()
    with pytest.raises(SuanliError, match="fork"):
        found(inputs)


def test_keep_writes_the_slower_engine_and_says_so(losing: None, tmp_path: Path) -> None:
    with suanli.optimize(
        net(), torch.randn(2, 16), out=tmp_path / "engine", keep=True, **OPTIONS
    ) as found:
        assert any("slower than what you have" in note for note in found.result.notes)
    assert (tmp_path / "engine" / "manifest.json").exists()


def test_the_baselines_own_speedup_comes_from_the_two_races() -> None:
    rival = Plan(backend="inductor", precision="bf16", options={"source": True})
    trials = (
        *planted.trials(),
        Trial(plan=rival, status="verified", step_ms=planted.estimate(2.0), baseline=True),
    )
    lost = planted.optimize_result(
        baseline=replace(planted.optimize_result().baseline, plan=rival),
        speedup_vs_eager=Estimate(p50=2.0, lo95=1.9, hi95=2.1),
        speedup_vs_best_baseline=Estimate(p50=0.5, lo95=0.4, hi95=0.6),
    )
    said = confirm.baseline_wins(lost, trials)
    assert said.chosen.plan == rival
    assert said.speedup_vs_eager.p50 == pytest.approx(4.0)
    assert said.speedup_vs_eager.lo95 == pytest.approx(1.9 / 0.6)
    assert said.speedup_vs_eager.hi95 == pytest.approx(2.1 / 0.4)
    assert said.quality is None
    assert said.engine_dir is None


def test_eager_over_itself_is_one() -> None:
    lost = planted.optimize_result(speedup_vs_best_baseline=Estimate(p50=0.5, lo95=0.4, hi95=0.6))
    said = confirm.baseline_wins(lost, planted.trials())
    assert said.speedup_vs_eager == Estimate(p50=1.0, lo95=1.0, hi95=1.0)


def timed(plan: Plan, step_ms: dict[int, float], *, baseline: bool = False) -> Trial:
    timings = tuple(
        Timing(
            step_ms=planted.estimate(ms),
            batch=batch,
            samples_per_s=batch / ms * 1e3,
            repeats=9,
        )
        for batch, ms in step_ms.items()
    )
    return Trial(
        plan=plan,
        status="verified",
        baseline=baseline,
        step_ms=timings[0].step_ms,
        timings=timings,
    )


def test_a_plan_on_the_users_own_files_never_serves(tmp_path: Path) -> None:
    source = timed(planted.EAGER, {1: 9.0, 8: 10.0}, baseline=True)
    exported = timed(Plan(backend="eager"), {1: 9.0, 8: 12.0})
    winner = timed(Plan(backend="openvino", precision="bf16"), {1: 1.0, 8: 20.0})
    setting = Setting(
        program=tmp_path, verification=tmp_path, builds=tmp_path, batch=1, other_batches=(8,)
    )
    serving = confirm.variants_for(winner, [source, exported, winner], [source], setting)
    assert serving[1] is winner
    assert serving[8] is exported


def test_baselines_that_were_not_measured_are_named() -> None:
    missing = Trial(
        plan=planted.LONG, status="skipped", reason="about 25 s needed, 3 s left", baseline=True
    )
    (line,) = baseline_caveats([*planted.trials()[:1], missing])
    assert missing.plan.title in line
    assert "25 s needed" in line
    assert baseline_caveats(planted.trials()[:1]) == []


def test_a_faster_baseline_that_was_wrong_is_named() -> None:
    right = timed(planted.EAGER, {1: 9.0}, baseline=True)
    wrong = replace(timed(planted.LONG, {1: 4.0}, baseline=True), status="rejected")
    slower = replace(timed(planted.LONG, {1: 12.0}, baseline=True), status="rejected")
    (line,) = baseline_caveats([right, wrong])
    assert wrong.plan.title in line
    assert baseline_caveats([right, slower]) == []
