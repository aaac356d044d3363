"""An engine is made anew from what it carries, and only a better one takes its place."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import suanli
from suanli import api
from suanli.base.plan import Plan
from suanli.base.timing import Estimate
from suanli.engines import rebuild as rebuilding
from suanli.engines.assembly import BuiltVariant, write_engine
from suanli.engines.backends.eager import EagerBackend
from suanli.engines.manifest import Numbers
from suanli.engines.own_module import over_own_module
from suanli.engines.program import capture
from suanli.engines.request import workload_of_engine
from suanli.engines.unchanged import Unchanged
from suanli.workloads.record import Inputs
from tests import planted_results as planted

EXAMPLE = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("quick_search", "in_process")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An engine of one eager plan in a folder, made without a search."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)).eval()
    home = tmp_path_factory.mktemp("rebuild")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUANLI_CONFIG", str(home / "config"))
        program = capture(
            model, Inputs(args=(EXAMPLE,)), folder=home / "program", name="net", max_batch=4
        )
        plan = Plan(backend="eager")
        folder = home / "build"
        folder.mkdir()
        EagerBackend().build(program, plan, folder)
        variant = BuiltVariant(plan=plan, folder=folder, min_batch=1, max_batch=4)
        numbers = Numbers(backends=("eager",))
        write_engine(home / "engine", program=program, variants=[variant], numbers=numbers)
        yield home / "engine"


def test_a_real_engine_is_made_anew(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuilding, "_RACE_S", 0.5)
    monkeypatch.setenv("SUANLI_CONFIG", str(made.parent / "config"))
    with suanli.load(made) as engine:
        before = engine(EXAMPLE)
    result = api.rebuild(made, budget_s=5)
    assert result.verb == "optimize"
    assert result.chosen.plan.backend == "eager"
    with suanli.load(made) as engine:
        assert torch.allclose(engine(EXAMPLE), before, atol=1e-5)


def planned(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    """Let every search find this."""
    search = type("Search", (), {"__init__": lambda *_: None, "run": lambda _: found})
    monkeypatch.setattr(rebuilding, "Optimizer", search)


def test_where_nothing_wins_the_older_engine_stays(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUANLI_CONFIG", str(made.parent / "config"))
    found = Unchanged.__new__(Unchanged)
    found.result = planted.optimize_result(notes=("nothing beat it", "busy"))
    monkeypatch.setattr(Unchanged, "close", lambda _: None)
    planned(monkeypatch, found)
    manifest = (made / "manifest.json").read_bytes()
    result = api.rebuild(made, budget_s=10)
    assert result.notes[1:] == ("busy",)
    assert "the engine stays as it was" in result.notes[0]
    assert (made / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(("ratio", "stays"), [(0.5, True), (1.0, False), (2.0, False)])
def test_of_two_engines_the_faster_one_stays(
    ratio: float, stays: bool, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUANLI_CONFIG", str(made.parent / "config"))
    there = suanli.load(made).save(tmp_path / "there")
    found = suanli.load(made)
    found.result = planted.optimize_result(batch=1)
    planned(monkeypatch, found)
    race = SimpleNamespace(ratio=Estimate(p50=ratio, lo95=ratio, hi95=ratio))
    monkeypatch.setattr(rebuilding, "race", lambda *_, **__: race)
    before = (there / "manifest.json").stat().st_ino
    result = api.rebuild(there, budget_s=10)
    assert ((there / "manifest.json").stat().st_ino == before) == stays
    assert ("2.00x as fast as the one found now" in " ".join(result.notes)) == stays
    assert result.engine_dir == str(there)


def test_a_workload_is_kept_only_where_its_module_takes_the_weights(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SUANLI_CONFIG", str(made.parent / "config"))
    same = tmp_path / "net.py"
    same.write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), "
        "nn.Linear(32, 4))\n"
        "def other():\n    return nn.Linear(16, 4)\n"
        "def example_inputs(batch):\n    return torch.randn(batch, 16)\n"
    )
    with suanli.load(made) as engine:
        for name, kept in (("net", True), ("other", False)):
            ref = f"{same}:{name}"
            engine.manifest = replace(engine.manifest, workload=ref)
            workload, module, request = workload_of_engine(engine, 10.0)
            assert workload.ref == (ref if kept else "")
            assert not module.training
            assert request.out is None


def confirmation(speedup: float, best: float) -> Any:
    first = planted.optimize_result().confirmations[0]
    exact = Estimate(p50=best, lo95=best, hi95=best)
    eager = Estimate(p50=speedup, lo95=speedup, hi95=speedup)
    return replace(first, speedup_vs_eager=eager, speedup_vs_best_baseline=exact)


def test_a_module_faster_than_its_graph_is_what_counts() -> None:
    races = (confirmation(6.0, 4.0),)
    (race,), said = over_own_module(races, planted.trials(), Estimate(p50=2.0, lo95=1.9, hi95=2.1))
    assert race.speedup_vs_eager.p50 == pytest.approx(3.0)
    assert race.speedup_vs_best_baseline.p50 == pytest.approx(3.0)
    assert race.best_baseline == planted.EAGER
    assert race.baseline_ms.p50 == pytest.approx(3.0 * race.step_ms.p50)
    assert "2.00x as fast as its exported graph" in said


def test_a_module_as_fast_as_its_graph_changes_nothing() -> None:
    races = (confirmation(6.0, 4.0),)
    same = over_own_module(races, planted.trials(), Estimate(p50=1.1, lo95=1.0, hi95=1.2))
    assert same == (races, "")
