"""How a budget is shared out, and what is said when it does not do."""

import pytest

from suanli.engines.spending import Spending


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_search_gets_what_the_rest_leaves(clock: Clock) -> None:
    spending = Spending(120.0, clock)
    clock.now = 20.0
    assert spending.search_s() == pytest.approx(100.0 - 36.0)
    assert spending.race_s() == pytest.approx(0.6 * 36.0)


def test_slow_processes_are_kept_room_for(clock: Clock) -> None:
    spending = Spending(60.0, clock)
    clock.now = 10.0
    spending.process_s = 6.0
    assert spending.search_s() == pytest.approx(50.0 - (4 * 6.0 + 6.0))
    spending.process_s = 100.0
    assert spending.search_s() == pytest.approx(50.0 * 0.4), "the search keeps its part"


def test_a_late_race_is_short_but_never_nothing(clock: Clock) -> None:
    spending = Spending(120.0, clock)
    spending.process_s = 3.0
    clock.now = 101.0
    assert spending.race_s() == pytest.approx(19.0 - 9.0)
    clock.now = 119.0
    assert spending.race_s() == 6.0


def test_an_overrun_is_said_with_its_parts(clock: Clock) -> None:
    spending = Spending(10.0, clock)
    for name, seconds in (("capture", 2.0), ("search", 1.0), ("race", 6.0), ("capture", 0.4)):
        with spending.part(name):
            clock.now += seconds
    assert spending.overrun() == ""
    with spending.part("writing"):
        clock.now += 4.0
    said = "budget 10 s, took 13 s: capture 2 s, search 1 s, race 6 s, writing 4 s"
    assert spending.overrun() == said


def test_a_failed_part_counts_too(clock: Clock) -> None:
    spending = Spending(1.0, clock)
    with pytest.raises(ZeroDivisionError), spending.part("search"):
        clock.now += 5.0
        raise ZeroDivisionError
    assert "search 5 s" in spending.overrun()
