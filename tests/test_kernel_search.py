"""A search that is cut short: limits of time, Ctrl-C, and the run that goes on with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from suanli.api_kernel import kernel_tune
from suanli.base.errors import BadInputError
from suanli.base.timing import Estimate
from suanli.kernels import tuning
from suanli.kernels.compiled import CompiledKernel
from suanli.kernels.cuda import bench as cuda_bench
from suanli.kernels.search_log import SearchLog
from suanli.kernels.tuning import RaceFigures, SearchLimits, Static, TuneResult, tune
from tests.kernel_parts import ref

SIZES = {"n": 4096}
CANDIDATES = [{"block": 32 * n} for n in range(1, 9)]
FUNCTION = CompiledKernel(name="f", arch="sm_90", compiler="x", registers=32, threads=32)


class Clock:
    """Time that passes only where the bench says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(tuning.time, "monotonic", lambda: self.now)


class Machine:
    """Compiles in 1 s, times in 2 s, races in 5 s; larger blocks are faster, and 256 is wrong."""

    can_time = True
    where = "a stand-in"
    fingerprint = "stand-in"

    def __init__(self, clock: Clock, *, stops_at: int = -1) -> None:
        self.clock, self.stops_at = clock, stops_at
        self.compiled: list[int] = []
        self.timed: list[int] = []
        self.raced: list[str] = []

    def _step(self, seconds: float) -> None:
        if len(self.compiled) + len(self.timed) + len(self.raced) == self.stops_at:
            raise KeyboardInterrupt
        self.clock.now += seconds

    def compile(self, config: Mapping[str, int]) -> Static:
        self._step(1.0)
        self.compiled.append(config["block"])
        if config["block"] == 64:
            return Static(reason="took too long")
        return Static(functions=(FUNCTION,), predicted_ms=1.0 / config["block"])

    def verify(self, config: Mapping[str, int]) -> str:
        return "wrong" if config["block"] == 256 else ""

    def time(self, config: Mapping[str, int]) -> Estimate:
        self._step(2.0)
        self.timed.append(config["block"])
        value = 100.0 / config["block"]
        return Estimate(p50=value, lo95=value, hi95=value)

    def rivals(self) -> Sequence[str]:
        return ("eager", "torch.compile")

    def race(self, config: Mapping[str, int], rival: str) -> RaceFigures:
        self._step(5.0)
        self.raced.append(rival)
        one = Estimate(p50=1.0, lo95=1.0, hi95=1.0)
        return RaceFigures(rival_ms=one, winner_ms=one, speedup=one)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchLog:
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path))
    return SearchLog("f", {"sizes": SIZES})


def searched(machine: Machine, log: SearchLog | None = None, **limits: Any) -> TuneResult:
    return tune("f", SIZES, "fp32", CANDIDATES, machine, limits=SearchLimits(**limits), log=log)


def test_the_budget_leaves_time_for_every_phase(clock: Clock) -> None:
    """Half of it for compiling, a quarter for timing, and the rest for the rivals."""
    machine = Machine(clock)
    result = searched(machine, budget_s=12.0)
    assert machine.compiled == [32 * n for n in range(1, 8)]  # 7 s: the last began at 6
    assert machine.timed == [32, 224]  # the default first, then from the top of the ranking
    assert machine.raced == ["eager"]
    assert result.config == {"block": 224} and result.verified
    assert result.out_of_time and not result.interrupted
    assert "the 12 s were over with 5 configurations left" in result.note
    assert "torch.compile: not raced, the 12 s were over" in result.note


def test_however_little_time_there_is_one_is_tried(clock: Clock) -> None:
    result = searched(Machine(clock), budget_s=0.001)
    assert result.config == {"block": 32} and result.verified
    assert [trial.status for trial in result.trials] == ["verified"]


def test_without_limits_everything_is_tried(clock: Clock, log: SearchLog) -> None:
    machine = Machine(clock)
    result = searched(machine, log)
    assert len(machine.compiled) == 8 and machine.raced == ["eager", "torch.compile"]
    assert result.config == {"block": 224} and not result.note
    assert not log.path.exists()  # a search that came to its end leaves nothing


@pytest.mark.parametrize("stops_at", range(17))
def test_wherever_it_is_stopped_the_next_run_goes_on(
    clock: Clock, log: SearchLog, stops_at: int
) -> None:
    whole = searched(Machine(clock))
    first = Machine(clock, stops_at=stops_at)
    cut = searched(first, log)
    assert cut.interrupted and "interrupted" in cut.note
    second = Machine(clock)
    result = searched(second, log)
    assert result.config == whole.config
    assert [t.status for t in result.trials] == [t.status for t in whole.trials]
    assert list(result.races) == ["eager", "torch.compile"]
    # nothing is done twice, but for what failed: the limit may be another one
    assert set(first.compiled) & set(second.compiled) <= {64}
    assert not set(first.timed) & set(second.timed)
    if first.compiled not in ([], [32]):
        assert "known from a run that was cut short" in result.note
    assert not log.path.exists()


def test_a_log_that_was_damaged_costs_its_lines_only(clock: Clock, log: SearchLog) -> None:
    searched(Machine(clock, stops_at=4), log)
    kept = log.known()
    assert len(kept) == 4
    with log.path.open("a") as file:
        file.write('{"config": {"block": 1')
    assert log.known() == kept
    log.path.write_bytes(b"\xff\xfe\x00")
    assert log.known() == {}
    assert SearchLog("f", {"sizes": {"n": 8}}).path != log.path


def test_a_log_that_cannot_be_written_stops_nothing(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path / "file"))
    result = searched(Machine(clock), SearchLog("f", {}))
    assert result.config == {"block": 224}


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"most": 0}, "--most must be at least 1"),
        ({"timeout_s": 0.0}, "--timeout must be more than 0 s, not 0"),
        ({"budget_s": -1.0}, "--budget must be more than 0 s, not -1"),
        ({"budget_s": float("nan")}, "--budget must be more than 0 s, not nan"),
    ],
)
def test_limits_that_leave_no_room(limits: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInputError, match=text):
        SearchLimits(**limits).check()


def test_the_verb_goes_on_with_what_ctrl_c_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path))
    compiled: list[float] = []

    def judged(*given: Any) -> Static:
        if len(compiled) == 1:
            raise KeyboardInterrupt
        compiled.append(given[-1])
        return Static(functions=(FUNCTION,), predicted_ms=1.0 / len(compiled))

    monkeypatch.setattr(cuda_bench, "judged", judged)
    monkeypatch.setattr(cuda_bench, "check_config", lambda *_, **__: [])
    cut = kernel_tune(ref("matmul"), gpu="H200", most=2, timeout_s=7.0)
    assert cut.interrupted and not cut.verified and len(cut.trials) == 1
    assert compiled == [7.0]  # the limit of one compilation
    compiled.clear()
    again = kernel_tune(ref("matmul"), gpu="H200", most=2)
    assert len(compiled) == 1 and len(again.trials) == 2
    assert again.verified and not again.interrupted
    assert "1 were known from a run" in again.notes[0]
    compiled.clear()
    with pytest.raises(BadInputError, match="--timeout"):
        kernel_tune(ref("matmul"), gpu="H200", timeout_s=0)
