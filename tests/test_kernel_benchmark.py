"""The benchmark of the shipped kernels, with the GPU replaced by figures."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import kernels as bench
from suanli.base.hardware import Ceilings
from suanli.base.timing import Estimate
from suanli.kernels.tuning import RaceFigures, SearchLimits, TuneResult


def tuned(name: str, sizes: dict[str, int], *, limits: SearchLimits) -> TuneResult:
    if name == "stencil":
        raise RuntimeError("out of memory")
    own, rival = Estimate(p50=1.0, lo95=0.9, hi95=1.1), Estimate(p50=2.0, lo95=1.9, hi95=2.1)
    return TuneResult(
        kernel=name,
        sizes=dict(sizes),
        dtype="bf16",
        where="a card",
        ranking=False,
        trials=(),
        config={"block": 1},
        step_ms=own,
        verified=True,
        races={"eager": RaceFigures(rival_ms=rival, winner_ms=own, speedup=rival)},
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`main` with a card; returns its code and the rows by kernel."""
    limits = SimpleNamespace(read_bytes_per_s=lambda size: 1e12, peak_flops=lambda dtype: 1e14)
    monkeypatch.setattr(bench, "gpu_infos", lambda: [SimpleNamespace(name="NVIDIA H200")])
    monkeypatch.setattr(bench, "ceilings", lambda device: limits)
    original = bench.codec.to_json
    monkeypatch.setattr(
        bench.codec, "to_json", lambda record: {} if record is limits else original(record)
    )
    calls: list[str] = []

    def counted(name: str, sizes: dict[str, int], *, limits: SearchLimits) -> TuneResult:
        calls.append(name)
        assert 0 < limits.budget_s <= 600
        return tuned(name, sizes, limits=limits)

    monkeypatch.setattr(bench, "tune_kernel", counted)

    def go(*words: str) -> tuple[int, dict[str, Any], list[str]]:
        calls.clear()
        command = ["kernels", "--out", str(tmp_path), "--shapes", "1", *words]
        monkeypatch.setattr("sys.argv", command)
        code = bench.main()
        made = json.loads((tmp_path / "kernels-nvidia-h200.json").read_text())
        return code, {row["kernel"]: row for row in made["kernels"]}, list(calls)

    return go


def test_rows_are_written_and_a_failure_stops_nothing(run: Any) -> None:
    code, rows, _ = run("--kernels", "norm,stencil,gate")
    assert code == 1
    assert rows["norm"]["verified"] and rows["norm"]["share_of_bound"] > 0
    assert rows["stencil"]["failed"] == "RuntimeError: out of memory"
    assert rows["gate"]["verified"]


def test_a_run_that_was_cut_short_goes_on(run: Any) -> None:
    run("--kernels", "norm,stencil")
    code, rows, calls = run("--kernels", "norm,stencil,gate", "--append")
    assert calls == ["stencil", "gate"]  # what failed is tried again
    assert set(rows) == {"norm", "stencil", "gate"} and code == 1
    code, rows, calls = run("--kernels", "norm,gate", "--append", "--budget", "-1")
    assert calls == []


def test_ceilings_are_what_the_bound_asks_for() -> None:
    assert {"read_bytes_per_s", "peak_flops"} <= set(dir(Ceilings))
