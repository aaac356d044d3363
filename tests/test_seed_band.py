"""The benchmark of the seed band: its verdict, its order, and that it goes on where it stopped."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import seed_band
from benchmarks.seed_band import FailedError, in_turn, measure, table, verdict
from suanli.base import codec
from suanli.base.train_plan import TrainPlan

PLAN = TrainPlan(precision="bf16", data="resident")


def test_the_band_is_two_deviations_of_the_plain_loop() -> None:
    plain = [0.68, 0.70, 0.72, 0.69, 0.71]
    same = verdict(plain, [0.69, 0.70, 0.71, 0.70, 0.70])
    assert same["band"] == pytest.approx(2 * math.sqrt(0.001 / 4))
    assert same["within"] and same["lower95"] < 0 == pytest.approx(same["difference"])
    worse = verdict(plain, [value - 0.03 for value in plain])
    assert worse["difference"] == pytest.approx(-0.03) and worse["within"] is False
    better = verdict(plain, [value + 0.03 for value in plain])
    assert better["within"] and better["lower95"] > 0


def test_a_narrow_band_is_half_a_point() -> None:
    plain = [0.9900, 0.9901, 0.9899]
    assert verdict(plain, plain)["band"] == 0.005
    assert verdict(plain, [0.9870, 0.9871, 0.9872])["within"]
    assert not verdict(plain, [0.9848, 0.9849, 0.9850])["within"]


def test_few_seeds_that_differ_widely_show_nothing() -> None:
    assert verdict([0.70, 0.71], [0.69, 0.70])["within"] is False
    assert verdict([0.70], [0.70])["within"] is None


def test_each_program_gets_a_seed_before_any_gets_the_next() -> None:
    order = in_turn({"a": 2, "b": 1})
    assert order == [(0, "a"), (0, "b"), (1, "a")]


def _arguments(folder: Path, **changes: Any) -> argparse.Namespace:
    plans = folder / "training.json"
    cases = {name: {"plan": codec.to_json(PLAN)} for name in ("mnist-mlp", "mnist-cnn")}
    plans.write_text(json.dumps({"cases": cases}))
    given = {"data": folder, "epochs": None, "minutes": math.inf, "plans": plans}
    return argparse.Namespace(**{**given, "out": folder / "band", **changes})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, TrainPlan]]:
    """What would be trained: the case, the seed and the plan."""
    found: list[tuple[str, str, TrainPlan]] = []

    def train(case: str, plan: str, _args: argparse.Namespace, *more: str) -> dict[str, Any]:
        seed = more[more.index("--seed") + 1]
        if case == "mnist-cnn" and seed == "1":
            raise FailedError("it ended with 1")
        found.append((case, seed, codec.read(TrainPlan, Path(plan))))
        quality = {"value": 0.9 + 0.01 * int(seed), "n": 8000}
        rest = {"train_seconds": 1.0, "samples_per_s": 1.0, "epochs": 2.0, "as_written": True}
        return {"quality": quality, **rest}

    monkeypatch.setattr(seed_band, "train", train)
    return found


def test_it_goes_on_and_outlives_a_program_that_fails(
    tmp_path: Path, runs: list[tuple[str, str, TrainPlan]]
) -> None:
    args = _arguments(tmp_path)
    wanted = {"mnist-cnn": 3, "mnist-mlp": 2}
    report = seed_band.begin(args)
    measure(report, wanted, args)
    assert [run[:2] for run in runs] == [
        *[("mnist-cnn", "0")] * 2,
        *[("mnist-mlp", "0")] * 2,
        *[("mnist-mlp", "1")] * 2,
    ]
    assert [run[2] for run in runs[:2]] == [TrainPlan(), PLAN]
    runs.clear()
    again = seed_band.begin(args)
    assert again["cases"] == report["cases"]
    measure(again, {"mnist-mlp": 3}, args)
    assert {run[:2] for run in runs} == {("mnist-mlp", "2")}
    text = table(again)
    assert "| mnist-mlp |" in text and "91.00% (90.00% to 92.00%)" in text
    with pytest.raises(SystemExit, match="other epochs"):
        seed_band.begin(_arguments(tmp_path, epochs=1))


def test_no_run_is_begun_that_the_time_does_not_allow(
    tmp_path: Path, runs: list[tuple[str, str, TrainPlan]]
) -> None:
    args = _arguments(tmp_path, minutes=1.0)
    report = seed_band.begin(args)
    measure(report, {"mnist-mlp": 1}, args)
    for side in seed_band.SIDES:
        report["cases"]["mnist-mlp"][side]["0"]["whole_seconds"] = 50.0
    runs.clear()
    measure(report, {"mnist-mlp": 3}, args)
    assert not runs
