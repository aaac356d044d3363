"""The clock, against clocks and machines that are made up, so that nothing here depends on time."""

import gc
import math
import random
from itertools import cycle
from types import SimpleNamespace

import pytest

from suanli.measure import timing
from suanli.measure.timing import Contender, measure, median_interval, race, timed_calls


class _Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now_ns = 0

    def pass_ms(self, ms: float) -> None:
        self.now_ns += round(ms * 1e6)

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def perf_counter(self) -> float:
        return self.now_ns / 1e9


@pytest.fixture
def clock(monkeypatch):
    made = _Clock()
    monkeypatch.setattr(timing, "time", made)
    monkeypatch.setattr(timing, "_clock_ns", lambda: 50.0)
    return made


def test_the_interval_is_made_of_the_tabulated_order_statistics():
    # Tables for the median at 95 %: n = 6 -> 1st, 10 -> 2nd, 20 -> 6th, 50 -> 18th, 100 -> 40th.
    for n, rank in ((6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (50, 18), (100, 40), (1000, 469)):
        values = [float(v) for v in range(1, n + 1)]
        found = median_interval(values)
        assert (found.lo95, found.hi95) == (rank, n + 1 - rank)
        assert found.p50 == (n + 1) / 2


def test_few_values_give_their_range_and_order_does_not_matter():
    found = median_interval([3.0, 1.0, 2.0])
    assert (found.p50, found.lo95, found.hi95) == (2.0, 1.0, 3.0)
    one = median_interval([5.0])
    assert (one.p50, one.lo95, one.hi95) == (5.0, 5.0, 5.0)
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_the_interval_of_many_values_joins_the_exact_one():
    exact = median_interval([float(v) for v in range(1000)])
    wide = median_interval([float(v) for v in range(1001)])
    assert abs(exact.lo95 - wide.lo95) <= 2
    assert abs(exact.hi95 - wide.hi95) <= 2


def test_the_interval_covers_the_median_of_a_skewed_distribution():
    """Log-normal samples; 95 % coverage asked, 2000 repeats, so 0.93 is four deviations below."""
    rng = random.Random(4)
    hits = 0
    for _ in range(2000):
        found = median_interval([rng.lognormvariate(0, 1) for _ in range(25)])
        hits += found.lo95 <= 1.0 <= found.hi95
    assert hits / 2000 > 0.93


def test_a_steady_call_is_timed_exactly(clock):
    found = measure(lambda: clock.pass_ms(5), batch=8)
    assert found.step_ms.p50 == pytest.approx(5)
    assert found.step_ms.relative_width == 0
    assert found.samples_per_s == pytest.approx(1600)
    assert found.batch == 8
    assert found.repeats >= 10


def test_short_calls_share_one_reading_of_the_clock(clock):
    calls = 0

    def tiny():
        nonlocal calls
        calls += 1
        clock.now_ns += 1000

    found = measure(tiny, min_seconds=0.001, max_seconds=1)
    # The clock may add 50 ns; under 0.1 % of a sample that takes 50 calls of 1 us.
    assert found.repeats % 50 == 0
    assert found.repeats <= calls
    assert found.step_ms.p50 == pytest.approx(0.001)


def test_warm_up_is_not_counted(clock):
    lengths = iter([400.0, 90, 60, 40, 30, 20, 15, 12] + [10.0] * 100_000)
    found = measure(lambda: clock.pass_ms(next(lengths)), max_seconds=10)
    assert found.step_ms.p50 == pytest.approx(10)
    assert found.step_ms.hi95 == pytest.approx(10)


def test_a_call_longer_than_the_cap_is_made_once(clock):
    calls = 0

    def slow():
        nonlocal calls
        calls += 1
        clock.pass_ms(5000)

    found = measure(slow, max_seconds=2)
    assert calls == 1
    assert found.repeats == 1
    assert found.step_ms.p50 == pytest.approx(5000)


def test_the_cap_is_passed_by_one_call_at_most(clock):
    for length in (10.0, 700, 1500, 1999):
        clock.now_ns = 0
        found = measure(lambda ms=length: clock.pass_ms(ms), max_seconds=2)
        assert clock.now_ns / 1e6 <= 2000 + length
        assert found.step_ms.p50 == pytest.approx(length)


def test_noise_is_sampled_until_the_cap_and_steadiness_ends_early(clock):
    wild = cycle([10.0, 20, 30, 15, 25])
    measure(lambda: clock.pass_ms(next(wild)), min_seconds=0.1, max_seconds=2)
    assert clock.now_ns / 1e6 >= 2000
    clock.now_ns = 0
    measure(lambda: clock.pass_ms(10), min_seconds=0.1, max_seconds=2)
    assert clock.now_ns / 1e6 < 500


def test_synchronising_counts_as_part_of_the_call(clock):
    found = measure(lambda: clock.pass_ms(1), sync=lambda: clock.pass_ms(4))
    assert found.step_ms.p50 == pytest.approx(5)
    assert timed_calls(lambda: clock.pass_ms(1), 3, sync=lambda: clock.pass_ms(4)) == [5, 5, 5]


def test_settling_calls_are_not_timed(clock):
    lengths = iter([100.0, 50, 3, 4])
    assert timed_calls(lambda: clock.pass_ms(next(lengths)), 2, settle=2) == [3, 4]


def test_collection_is_off_during_samples_and_on_again_after(clock):
    states = []

    def call():
        states.append(gc.isenabled())
        clock.pass_ms(5)
        if len(states) == 40:
            raise RuntimeError("stop")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="stop"):
        measure(call)
    assert states[-1] is False
    assert gc.isenabled()
    timed_calls(lambda: clock.pass_ms(1), 2)
    assert gc.isenabled()


def test_the_real_clock_works():
    found = measure(lambda: sum(range(200)), min_seconds=0.01, max_seconds=0.2)
    assert 0 < found.step_ms.lo95 <= found.step_ms.p50 <= found.step_ms.hi95
    assert found.repeats >= 10
    assert timing._clock_ns() > 0


class _Machine:
    """Two sides on a machine whose speed drifts and jumps; records what ran and what was paused."""

    def __init__(self, *, drift: float = 0.0, noise: float = 0.0, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._drift, self._noise = drift, noise
        self.turns = 0
        self.running = {"a", "b"}
        self.order = ""

    def contender(self, name: str, ms: float) -> Contender:
        def run(n: int) -> list[float]:
            assert self.running == {name}
            self.turns += 1
            factor = math.exp(self._drift * self.turns + self._rng.gauss(0, self._noise))
            self.order += name
            return [ms * factor] * n

        return Contender(
            run=run,
            pause=lambda: self.running.discard(name),
            resume=lambda: self.running.add(name),
        )


def _race(machine: _Machine, a_ms: float, b_ms: float, **options):
    # Calls as long as a turn: one settling call and one timed call a turn.
    return race(
        machine.contender("a", a_ms),
        machine.contender("b", b_ms),
        turn_seconds=min(a_ms, b_ms) / 1e3,
        **options,
    )


def test_only_one_side_runs_at_a_time_and_the_order_is_balanced():
    machine = _Machine()
    found = _race(machine, 20.0, 10.0)
    assert machine.running == set()
    assert found.ratio.p50 == pytest.approx(2)
    assert (found.a_ms.p50, found.b_ms.p50) == (pytest.approx(20), pytest.approx(10))
    assert found.pairs == 8
    # After the two learning calls, blocks of ABBA and BAAB alternate.
    assert machine.order.replace("aa", "a").replace("bb", "b").count("ab") > 2
    assert abs(machine.order.count("a") - machine.order.count("b")) <= 1


def test_a_drift_of_the_machine_cancels():
    found = _race(_Machine(drift=0.05), 10.0, 10.0)
    assert found.ratio.p50 == pytest.approx(1, rel=0.01)
    assert found.ratio.lo95 < 1 < found.ratio.hi95


def test_the_race_goes_on_until_the_interval_is_narrow():
    quiet = _race(_Machine(noise=0.001), 10.0, 10.0)
    loud = _race(_Machine(noise=0.1), 10.0, 10.0)
    assert quiet.pairs == 8
    assert quiet.ratio.relative_width < 0.04
    assert loud.pairs == 48


def test_the_race_ends_when_time_is_out():
    found = _race(_Machine(), 10.0, 10.0, max_seconds=0.0)
    assert found.pairs == 2
    assert found.ratio.p50 == pytest.approx(1)


@pytest.mark.parametrize(("noise", "drift"), [(0.02, 0.0), (0.05, 0.002), (0.3, 0.0)])
def test_the_interval_of_a_race_covers_in_spite_of_ending_early(noise, drift):
    """400 races; at 95 % coverage fewer than 365 hits have a chance under 0.2 %."""
    hits = 0
    for seed in range(400):
        found = _race(_Machine(noise=noise, drift=drift, seed=seed), 11.0, 10.0)
        hits += found.ratio.lo95 <= 1.1 <= found.ratio.hi95
    assert hits >= 365


def test_the_length_of_a_turn_is_learnt(clock):
    counts = []

    def run(n: int) -> list[float]:
        counts.append(n)
        clock.pass_ms(n)
        return [1.0] * n

    race(Contender(run=run), Contender(run=run), turn_seconds=0.1, blocks=(1, 1))
    assert counts[-1] == 101  # one to settle


@pytest.mark.parametrize("times", [[], [0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0]])
def test_times_that_cannot_be_are_refused(times):
    side = Contender(run=lambda _n: times)
    with pytest.raises(ValueError, match="positive times"):
        race(side, Contender(run=lambda n: [1.0] * n))


def test_the_idle_side_is_paused_when_a_side_fails():
    paused = []

    def fail(_n):
        raise RuntimeError("crashed")

    with pytest.raises(RuntimeError, match="crashed"):
        race(
            Contender(run=fail, pause=lambda: paused.append("a")),
            Contender(run=lambda n: [1.0] * n, pause=lambda: paused.append("b")),
        )
    assert paused == ["a", "b", "a"]


def test_load_is_recorded_where_the_system_knows_it(monkeypatch):
    monkeypatch.setattr(timing, "os", SimpleNamespace(getloadavg=lambda: (1.5, 0, 0)))
    assert _race(_Machine(), 10.0, 10.0).load_average == (1.5, 1.5)
    monkeypatch.setattr(timing, "os", SimpleNamespace())
    assert _race(_Machine(), 10.0, 10.0).load_average is None


def test_first_call_that_compiles_does_not_set_the_turn() -> None:
    asked: list[int] = []

    def run(calls: int) -> list[float]:
        asked.append(calls)
        return [5000.0 if len(asked) == 1 and i == 0 else 1.0 for i in range(calls)]

    steady = Contender(run=lambda calls: [2.0] * calls)
    result = race(Contender(run=run), steady, blocks=(3, 3), turn_seconds=0.05)
    assert max(asked) > 10
    assert result.ratio.p50 == pytest.approx(0.5)
