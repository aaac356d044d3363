"""What is said of a race beside its figures."""

from dataclasses import replace

import pytest

from suanli.base.results import Confirmation
from suanli.base.timing import Estimate
from suanli.engines.confirm import rough
from tests import planted_results as planted


def confirmation(batch: int, lo: float, hi: float, eager: Estimate | None = None) -> Confirmation:
    return Confirmation(
        batch=batch,
        step_ms=planted.estimate(1.0),
        samples_per_s=batch * 1e3,
        speedup_vs_eager=eager,
        speedup_vs_best_baseline=Estimate(p50=(lo + hi) / 2, lo95=lo, hi95=hi),
        baseline_ms=planted.estimate((lo + hi) / 2),
        best_baseline=planted.EAGER,
    )


def test_a_quiet_race_has_no_note() -> None:
    quiet = (confirmation(1, 2.0, 2.49), confirmation(32, 3.0, 3.1, planted.estimate(5.0)))
    assert rough(quiet, planted.ENVIRONMENT) == ""


@pytest.mark.parametrize("where", ["baseline", "eager"])
def test_a_wide_interval_is_called_rough_with_the_load(where: str) -> None:
    wide = Estimate(p50=4.0, lo95=3.0, hi95=5.0)
    busy = confirmation(8, 3.0, 5.0) if where == "baseline" else confirmation(8, 1.0, 1.1, wide)
    environment = replace(planted.ENVIRONMENT, load_average=5.3)
    said = rough((confirmation(1, 2.0, 2.1), busy), environment)
    assert "load average 5.3 on 2 cores" in said
    assert "batch 8, 3.00x to 5.00x, is rough" in said


def test_without_a_load_average_it_is_said_all_the_same() -> None:
    environment = replace(planted.ENVIRONMENT, load_average=None)
    said = rough((confirmation(1, 1.0, 2.0),), environment)
    assert said.startswith("the machine was busy: the speed-up at batch 1")
