"""The search with a stand-in for the GPU, the store, the static ranking, and the cold timer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from suanli.base import codec
from suanli.base.errors import BadInputError, TrialFailedError
from suanli.base.lazy import present
from suanli.base.timing import Estimate
from suanli.devices import find_sheet
from suanli.kernels import configuration, tune_kernel
from suanli.kernels.cold_timing import ColdTimer
from suanli.kernels.compiled import CompiledKernel
from suanli.kernels.configuration import Winner, checked_config, find, store
from suanli.kernels.declaration import KernelWork
from suanli.kernels.shipped import shipped, shipped_kernel
from suanli.kernels.static_model import forecast
from suanli.kernels.tuning import (
    RaceFigures,
    RecordedBench,
    SearchLimits,
    Static,
    TuneResult,
    configurations,
    tune,
)

SIZES = {"rows": 64, "width": 128}
TUNABLES = {"block": (32, 64, 128, 256), "num_warps": (1, 2, 4)}
DEFAULT = {"block": 64, "num_warps": 1}

H200 = find_sheet("h200-sxm-141gb")


def _around(value: float) -> Estimate:
    return Estimate(p50=value, lo95=value * 0.99, hi95=value * 1.01)


class Machine:
    """A GPU with known times: some configurations do not compile, crash, or answer wrongly."""

    can_time = True
    where = "a stand-in"

    def __init__(self, *, speed: float = 1.0) -> None:
        self.speed = speed
        self.verified: list[dict[str, int]] = []
        self.timed: list[dict[str, int]] = []

    def compile(self, config: Mapping[str, int]) -> Static:
        function = CompiledKernel(name="f", arch="sm_90", compiler="x", registers=32, threads=32)
        if config["block"] == 256 and config["num_warps"] == 1:
            return Static(reason="does not compile")
        if config["block"] == 256:
            return Static(functions=(function,), reason="does not fit")
        return Static(functions=(function,), predicted_ms=1000.0 / config["block"])

    def verify(self, config: Mapping[str, int]) -> str:
        self.verified.append(dict(config))
        # the fastest of all answers wrongly
        return "output 0 is wrong" if config == {"block": 128, "num_warps": 4} else ""

    def time(self, config: Mapping[str, int]) -> Estimate:
        self.timed.append(dict(config))
        if config == {"block": 128, "num_warps": 2}:
            raise TrialFailedError("an illegal memory access", kind="crash")
        return _around(10.0 / config["block"] / config["num_warps"])

    def rivals(self) -> Sequence[str]:
        return ("eager", "torch.compile", "absent")

    def race(self, config: Mapping[str, int], rival: str) -> RaceFigures:
        if rival == "absent":
            raise TrialFailedError("not installed", kind="error")
        own = self.time(config).p50
        factor = {"eager": 3.0, "torch.compile": 1.1}[rival] * self.speed
        return RaceFigures(
            rival_ms=_around(own * factor), winner_ms=_around(own), speedup=_around(factor)
        )


def _candidates() -> list[dict[str, int]]:
    return configurations(TUNABLES, lambda config: True, DEFAULT)


def _searched(machine: Machine | RecordedBench) -> TuneResult:
    return tune("f", SIZES, "bf16", _candidates(), machine)


def test_only_a_right_answer_wins() -> None:
    machine = Machine()
    result = _searched(machine)
    assert result.config == {"block": 64, "num_warps": 4}
    assert result.verified
    assert not result.ranking
    by_status = {str(t.config): (t.status, t.reason) for t in result.trials}
    assert by_status[str({"block": 128, "num_warps": 4})] == ("rejected", "output 0 is wrong")
    assert by_status[str({"block": 128, "num_warps": 2})][0] == "failed"
    assert by_status[str({"block": 256, "num_warps": 1})] == ("failed", "does not compile")
    assert by_status[str({"block": 256, "num_warps": 2})] == ("pruned", "does not fit")
    assert len(result.trials) == 12
    assert {str(c) for c in machine.timed} <= {str(t.config) for t in result.trials}
    assert not any(config["block"] == 256 for config in machine.timed)


def test_rivals_are_raced_and_an_absent_one_is_said() -> None:
    result = _searched(Machine())
    assert set(result.races) == {"eager", "torch.compile"}
    assert "absent: not installed" in result.note
    assert result.speedup_lo95 == pytest.approx(1.1 * 0.99)


def test_a_record_plays_again_and_survives_json() -> None:
    first = _searched(Machine())
    kept = codec.loads(TuneResult, codec.dumps(first))
    again = _searched(RecordedBench(kept))
    assert again.config == first.config
    assert again.races == first.races
    assert [t.status for t in again.trials] == [t.status for t in first.trials]
    unknown = tune("f", SIZES, "bf16", [{"block": 7, "num_warps": 1}], RecordedBench(kept))
    assert unknown.config is None
    assert unknown.trials[0].reason == "not in the record"


def test_without_a_gpu_it_is_a_ranking_and_says_so() -> None:
    class Compiler(Machine):
        can_time = False

        def time(self, config: Mapping[str, int]) -> Estimate:
            raise AssertionError("nothing may be timed")

        def verify(self, config: Mapping[str, int]) -> str:
            return "" if config["num_warps"] == 1 else "wrong"

    result = _searched(Compiler())
    assert result.ranking
    assert result.config == {"block": 128, "num_warps": 1}
    assert "ranking" in result.note
    assert result.step_ms is None
    assert result.races == {}
    assert {t.status for t in result.trials} == {"ranked", "pruned", "failed"}


def test_interruption_keeps_what_was_found() -> None:
    class Stopped(Machine):
        def time(self, config: Mapping[str, int]) -> Estimate:
            if len(self.timed) == 2:
                raise KeyboardInterrupt
            return super().time(config)

    result = _searched(Stopped())
    assert result.config is not None
    assert "interrupted" in result.note
    assert result.races == {}


def test_the_tail_of_a_long_ranking_is_not_timed() -> None:
    class Flat(Machine):
        def compile(self, config: Mapping[str, int]) -> Static:
            return Static(functions=super().compile(config).functions, predicted_ms=1.0)

        def time(self, config: Mapping[str, int]) -> Estimate:
            self.timed.append(dict(config))
            return _around(1.0)

    machine = Flat()
    candidates = [{"block": n, "num_warps": 1} for n in range(1, 101)]
    result = tune("f", SIZES, "bf16", candidates, machine, limits=SearchLimits(most=60))
    assert result.config == candidates[0]
    assert len(result.trials) == 60
    assert len([t for t in result.trials if "brought nothing" in t.reason]) == 60 - 25


def test_no_candidates_is_bad_input() -> None:
    with pytest.raises(BadInputError, match="no configuration is legal"):
        tune("f", SIZES, "bf16", [], Machine())


@pytest.mark.parametrize("name", shipped())
def test_defaults_are_legal_and_spaces_not_empty(name: str) -> None:
    kernel = shipped_kernel(name)
    for sizes in (*kernel.bench_sizes, *kernel.check_sizes):
        for dtype in ("bf16", "fp32"):
            assert kernel.default_for(sizes, dtype).keys() == kernel.tunables.keys()
    for sizes in kernel.bench_sizes:
        for dtype in ("bf16", "fp32"):
            checked_config(kernel, kernel.default_for(sizes, dtype), sizes)
        found = configurations(
            kernel.tunables, lambda c, s=sizes: kernel.legal(c, s), kernel.default(sizes)
        )
        assert len(found) >= 3
        work = kernel.work(sizes, 2)
        assert work.bytes_read > 0
        assert work.bytes_written > 0
        if kernel.traffic is not None:
            assert kernel.traffic(kernel.default(sizes), sizes, 2) > 0


def _winner(name: str, **changes: object) -> Winner:
    kernel = shipped_kernel(name)
    fields = {
        "kernel": name,
        "source_hash": kernel.source_hash,
        "sizes": dict(kernel.bench_sizes[0]),
        "dtype": "bf16",
        "device": "card 1",
        "compiler": configuration.compiler_version(),
        "config": dict(kernel.default(kernel.bench_sizes[0])),
        "speedup_lo95": 1.05,
        "verified": True,
    }
    return Winner(**{**fields, **changes})  # type: ignore[arg-type]


def test_winners_are_found_by_source_shape_device_and_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path))
    kernel, winner = shipped_kernel("norm"), _winner("norm")
    path = store(kernel, winner)
    assert find(kernel, winner.sizes, "bf16", "card 1") == winner
    assert find(kernel, {**winner.sizes, "rows": 1}, "bf16", "card 1") is None
    assert find(kernel, winner.sizes, "fp32", "card 1") is None
    assert find(kernel, winner.sizes, "bf16", "card 2") is None
    monkeypatch.setattr(configuration, "compiler_version", lambda: "triton 99")
    assert find(kernel, winner.sizes, "bf16", "card 1") is None
    monkeypatch.undo()
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path))
    path.write_text("{broken")
    assert find(kernel, winner.sizes, "bf16", "card 1") is None


def test_only_verified_and_measured_faster_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path))

    class Card:
        class info:
            fingerprint = "card 1"

    monkeypatch.setattr(tune_kernel, "open_device", lambda name: Card)
    kernel = shipped_kernel("norm")
    sizes = kernel.bench_sizes[0]
    ask = tune_kernel.faster_kernel
    assert ask("norm", sizes, "bf16", "cuda:0") is None
    for changes in ({"speedup_lo95": 0.98}, {"verified": False}, {"speedup_lo95": None}):
        store(kernel, _winner("norm", **changes))
        assert ask("norm", sizes, "bf16", "cuda:0") is None
    store(kernel, _winner("norm"))
    assert ask("norm", sizes, "bf16", "cuda:0") is not None
    assert ask("norm", sizes, "bf16", "cpu") is None
    with pytest.raises(BadInputError):
        ask("nonesuch", sizes, "bf16", "cuda:0")


def _function(**changes: object) -> CompiledKernel:
    fields: dict[str, object] = {"name": "f", "arch": "sm_90", "compiler": "x", "registers": 32}
    fields |= {"threads": 256, "blocks": 132 * 8 * 4}
    return CompiledKernel(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_static_model_puts_the_worse_last() -> None:
    work = KernelWork(flops=10**9, bytes_read=10**9, bytes_written=10**9)

    def ms(traffic: int | None = None, **changes: object) -> float:
        judged = forecast(
            [_function(**changes)],
            work,
            gpu=H200,
            dtype="bf16",
            traffic=traffic,
        )
        return judged.predicted_ms

    good = ms()
    assert ms(spill_store_bytes=64) > good
    assert ms(registers=255) > good  # one block of 8 warps cannot hide memory's latency
    assert ms(blocks=132 * 8 * 4 + 1) > good  # a fifth wave for one block
    assert ms(traffic=10**12) > good
    too_large = forecast(
        [_function(dynamic_shared_bytes=300 * 1024)],
        work,
        gpu=H200,
        dtype="bf16",
    )
    assert "shared memory" in too_large.reason


def test_cards_are_found_by_name() -> None:
    assert H200.compute_capability == "9.0"
    with pytest.raises(BadInputError, match="no GPU"):
        find_sheet("Voodoo")


class Clock:
    """A device whose time goes on as its calls say."""

    def __init__(self) -> None:
        self.now = 0.0

    def event(self) -> "Mark":
        return Mark(self)

    def synchronize(self) -> None:
        return None

    def work(self, ms: float) -> None:
        self.now += ms / 1e3


class Mark:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.at = clock, -1.0

    def record(self) -> None:
        self.at = self.clock.now

    def seconds_since(self, earlier: "Mark") -> float:
        return self.at - earlier.at


def _timer(clock: Clock, yardstick_ms: Sequence[float]) -> ColdTimer:
    left = list(yardstick_ms)

    def yardstick() -> None:
        clock.work(left.pop(0) if len(left) > 1 else left[0])

    return ColdTimer(
        device=clock,  # type: ignore[arg-type]
        flush=lambda: clock.work(100.0),
        yardstick=yardstick,
        seconds=0.05,
    )


def test_the_flush_is_not_part_of_the_time() -> None:
    clock = Clock()
    estimate, steady = _timer(clock, [1.0]).measure(lambda: clock.work(2.0))
    assert estimate.p50 == pytest.approx(2.0)
    assert steady


def test_a_drifting_clock_is_measured_again_and_then_said() -> None:
    clock = Clock()
    # drifts in the first attempt, stands still in the second
    figures = [1.0] * 5 + [1.2] * 5 + [1.2]
    assert _timer(clock, figures).measure(lambda: clock.work(2.0))[1]
    rising = [1.1**n for n in range(40)]
    assert not _timer(clock, rising).measure(lambda: clock.work(2.0))[1]


def test_a_race_gives_the_rivals_time_over_the_winners() -> None:
    clock = Clock()
    timer = _timer(clock, [1.0])
    done = timer.race(lambda: clock.work(3.0), lambda: clock.work(2.0), max_seconds=1.0)
    assert done.ratio.p50 == pytest.approx(1.5)


@pytest.mark.skipif(not present("triton"), reason="pip install triton")
def test_ranking_for_a_card_that_is_not_here() -> None:
    kernel = shipped_kernel("cross_entropy")
    result = tune_kernel.tune_kernel(
        "cross_entropy",
        kernel.bench_sizes[2],
        "fp16",
        gpu="H200-SXM-141GB",
        limits=SearchLimits(most=3),
        fresh=True,
    )
    assert result.ranking
    assert result.verified
    assert result.config in [t.config for t in result.trials]
    assert all(t.static.functions for t in result.trials)


def test_tuning_needs_a_gpu_or_the_name_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from suanli.kernels import benches

    monkeypatch.setattr(benches, "device_names", lambda: ["cpu"])
    with pytest.raises(BadInputError, match="h200"):
        tune_kernel.tune_kernel("norm")
