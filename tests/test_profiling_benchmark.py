"""The benchmark of `profile` and the example pages, on planted results."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import example_pages, profiling, profiling_case
from suanli.profiling.subjects import EAGER, inference
from suanli.workloads.module import of_module

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|mnt|opt|var)/[\w.-]+")


def tried(expected: float, measured: float | None, change: str = "compile the model") -> Any:
    speedup = None
    if measured is not None:
        speedup = {"p50": measured, "lo95": 0.9 * measured, "hi95": 1.1 * measured}
    return {
        "kind": "compile",
        "change": change,
        "expected_speedup": expected,
        "measured_speedup": speedup,
        "failed": "",
    }


def case(name: str, *advice: Any, step_ms: float = 20.0, cost: float = 1.1, **fields: Any) -> Any:
    found = {
        "case": name,
        "step_ms": {"p50": step_ms, "lo95": step_ms, "hi95": step_ms},
        "sol_fraction": 0.5,
        "verdict": "compute-bound: all of it",
        "sum_over_step": 1.0,
        "recording_ratio": {"p50": cost, "lo95": cost - 0.01, "hi95": cost + 0.01},
        "memory_error": 0.02,
        "advice": list(advice),
        "interrupted": False,
        "seconds": 1.0,
        "load_average": 1.0,
        "date": "2026-01-01 00:00 UTC",
    }
    return found | fields


ABOUT = {"cpu": "Planted Processor", "cores": 2, "date": "2026-01-01 00:00 UTC"}
CASES = [
    case("resnet50 b1", tried(2.0, 1.0), tried(3.0, 2.5, "use bf16"), tried(9.0, None)),
    case("mnist-cnn b1", tried(1.1, 1.0), step_ms=1.0, cost=1.9),
    case("bert-base b1", cost=1.2, memory_error=-0.12),
    {"case": "unet b1", "error": "no end", "load_average": 1.0},
]


def test_errors_are_of_what_was_tried() -> None:
    errors = [round(error, 3) for *_, error in profiling.errors_of(CASES)]
    assert errors == [1.0, 0.2, 0.1]


def test_goals_are_judged_by_the_figures() -> None:
    error, cost, memory, failed = profiling.summary(CASES)
    assert "**20.0%** (goal 20%: met)" in error
    assert "15.0% to the 2 steps over 10 ms (median), 20.0% at most (bert-base b1)" in cost
    assert cost.endswith("missed.")  # a step of 1 ms does not count, one of 20 ms does
    assert "within 12.0% in 3 cases (bert-base b1)" in memory
    assert memory.endswith("missed.")
    assert "unet b1 (no end)" in failed


def test_the_documentation_shows_what_gave_the_most() -> None:
    block = profiling.docs_block({"machine": ABOUT, "cases": CASES})
    rows = [line for line in block.splitlines() if line.startswith("| resnet50 b1")]
    assert rows == [
        "| resnet50 b1 | 20 ms | compute-bound: all of it | use bf16 | 3.00x "
        "| 2.50x (2.25 to 2.75) |"
    ]
    page = f"before\n{profiling.BEGIN}\nold\n{profiling.END}\nafter\n"
    assert profiling.with_block(page, block) == f"before\n{block}\nafter\n"
    with pytest.raises(ValueError, match="substring"):
        profiling.with_block("no such page", block)


def test_the_committed_documentation_is_that_of_the_committed_results() -> None:
    page = profiling.DOCS.read_text(encoding="utf-8")
    assert page.count(profiling.BEGIN) == page.count(profiling.END) == 1
    if not profiling.RESULTS.is_file():
        pytest.skip("benchmarks.profiling was not run yet")
    found = json.loads(profiling.RESULTS.read_text())
    assert profiling.with_block(page, profiling.docs_block(found)) == page
    assert profiling.RESULTS.with_suffix(".md").read_text() == profiling.table(
        found["cases"], found["machine"]
    )


def run(worker: str, monkeypatch: pytest.MonkeyPatch, limit_s: float) -> dict[str, Any]:
    """A case whose worker is a program of this test's."""
    plain = profiling.subprocess.Popen

    def other(command: list[str], **settings: Any) -> Any:
        assert command[1:3] == ["-m", "benchmarks.profiling_case"]
        return plain([sys.executable, "-c", worker], **settings)

    monkeypatch.setattr(profiling.subprocess, "Popen", other)
    asked = argparse.Namespace(check=1, race=0.1, data=None)
    return profiling.run_case("resnet50 b1", asked, limit_s)


def test_a_case_that_takes_too_long_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = (
        "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        '    print(\'{"verdict": "kept", "interrupted": true}\')\n'
    )
    found = run(worker, monkeypatch, 1.0)
    assert (found["case"], found["verdict"], found["interrupted"]) == ("resnet50 b1", "kept", True)


def test_a_case_that_breaks_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("raise SystemExit('all is lost')", monkeypatch, 30.0)
    assert found["error"] == "all is lost"


def test_results_of_another_machine_are_not_kept(tmp_path: Path) -> None:
    out = tmp_path / "profiling.json"
    profiling.write(out, {"machine": ABOUT, "cases": CASES})
    assert "| resnet50 b1 | use bf16 | 3.00x" in out.with_suffix(".md").read_text()
    assert set(profiling.results_there(out, ABOUT)) == {c["case"] for c in CASES}
    assert profiling.results_there(out, ABOUT | {"cpu": "Another"}) == {}
    assert profiling.results_there(tmp_path / "none.json", ABOUT) == {}


def test_recording_is_measured_in_turns(tmp_path: Path) -> None:
    workload = of_module(nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval(), torch.randn(4, 64))
    subject = inference(workload, EAGER, 4, tmp_path)
    found = profiling_case.recording_cost(subject, 0.5)
    assert 0 < found.lo95 <= found.p50 <= found.hi95


ROW = {
    "name": "addmm",
    "share": 0.5,
    "flops": 1,
    "bytes": 1,
    "phase": "forward",
    "module": "layer",
    "source": "mine.py:3",
}


@pytest.mark.parametrize(
    "changes", [{}, {"share": 0.001, "source": ""}, {"flops": 0, "bytes": 0, "source": ""}]
)
def test_a_page_is_taken_with_its_lines(changes: dict[str, Any]) -> None:
    example_pages.check_rows("x", {"subject": "workload", "operators": [ROW | changes]})


@pytest.mark.parametrize("changes", [{"source": ""}, {"module": ""}])
def test_a_page_without_lines_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="addmm has no module or no source line"):
        example_pages.check_rows("x", {"subject": "workload", "operators": [ROW | changes]})


def test_a_page_that_names_a_folder_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("nothing")
    example_pages.check(page)
    page.write_text(f"{sys.prefix}/lib/python")
    with pytest.raises(SystemExit, match="names"):
        example_pages.check(page)


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs" / "examples").glob("*.html")), ids=lambda p: p.name
)
def test_committed_pages_are_small_and_name_no_folder(page: Path) -> None:
    assert page.stat().st_size < 500_000
    assert not PLACE.findall(page.read_text(encoding="utf-8"))
