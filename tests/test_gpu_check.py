"""The driver of what needs a GPU, with other commands in place of the GPU's."""

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Outcome, Part, Run, grouped, in_turn, parts

ROOT = Path(__file__).parent.parent


def python(name: str, code: str, **changes: Any) -> Part:
    given: dict[str, Any] = {"most_s": 30.0, "least_s": 0.0, **changes}
    return Part(name=name, command=(sys.executable, "-c", code), **given)


def kept(run: Run) -> dict[str, Any]:
    made = json.loads((run.out / "gpu-check.json").read_text())
    return {part["name"]: part for part in made["parts"]}


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    run = Run(out=tmp_path, seconds=60)
    hanging = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    run.go(
        [
            python("wrong", "raise SystemExit('it broke')"),
            python("slow", hanging, most_s=1.0),
            python("json", "print('{\"a\": 1}')", gives_json=True),
            python("no json", "print('oh')", gives_json=True),
        ]
    )
    found = kept(run)
    assert {name: part["status"] for name, part in found.items()} == {
        "wrong": "failed",
        "slow": "timeout",
        "json": "done",
        "no json": "failed",
    }
    assert "it broke" in found["wrong"]["said"] and found["json"]["result"] == {"a": 1}
    assert "it broke" in (tmp_path / "gpu-check.log").read_text()
    # no more files than may come back from a borrowed machine
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu-check.json", "gpu-check.log"]


def test_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    run = Run(out=tmp_path, seconds=gpu_check._MARGIN_S + 20)
    run.go(
        [python("long", "", least_s=60.0, most_s=90.0), python("short", "print(1)", least_s=5.0)]
    )
    assert [part["status"] for part in kept(run).values()] == ["not begun", "done"]


def test_a_command_is_told_its_time_and_the_folder(tmp_path: Path) -> None:
    run = Run(out=tmp_path, seconds=60)
    code = "import sys, json; print(json.dumps(sys.argv[1:]))"
    command = (sys.executable, "-c", code, "{seconds}", "{out}")
    run.go([Part(name="told", command=command, most_s=30, gives_json=True)])
    assert kept(run)["told"]["result"] == ["20", str(tmp_path)]


def test_only_timed_parts_are_alone() -> None:
    listed = [python(n, "", alone=a) for n, a in (("a", False), ("b", False), ("c", True))]
    listed += [python("d", "", alone=True), python("e", "", alone=False)]
    assert [[p.name for p in group] for group in grouped(listed)] == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e"],
    ]
    for part in parts(4):
        timed = {"doctor", "kernels", "kernels-all", "tests-tune", "tests-ceilings"}
        assert part.alone or not (part.name in timed or part.name.startswith(("tune", "optimize")))


def test_a_second_run_goes_on(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    run = Run(out=first, seconds=60)
    run.go([python("good", ""), python("bad", "raise SystemExit(3)")])
    run.go([python("late", "", least_s=1000.0)])
    (first / "kernels-a-card.json").write_text("{}")
    again = Run(out=second, seconds=60)
    again.resume(first)
    assert (second / "kernels-a-card.json").is_file()
    wanted = [python(name, "") for name in ("good", "bad", "late")]
    assert [part.name for part in in_turn(wanted, again.outcomes)] == ["late", "bad"]
    again.write()
    again._keep(Outcome(name="bad", status="not begun"))
    assert kept(run)["bad"] == kept(again)["bad"]  # what was found is not lost
    again.go(in_turn(wanted, again.outcomes))
    assert {part["status"] for part in kept(again).values()} == {"done"}


def test_main_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> Any:
        return {"device": "a card", "present": []}

    with pytest.raises(SystemExit, match="unknown parts nonsense"):
        gpu_check.main(["--out", str(tmp_path), "--parts", "nonsense"], look)
    assert gpu_check.main(["--out", str(tmp_path), "--seconds", "1"], look) == 0
    made = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {part["status"] for part in made["parts"]} == {"not begun"}
    assert made["environment"]["device"] == "a card"
    assert gpu_check.main(["--list"]) == 0
    assert "tests-triton" in capsys.readouterr().out


def test_every_gpu_test_and_example_has_a_part() -> None:
    words = " ".join(" ".join(part.command) for part in parts(1))
    marked = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]
    mine = Path(__file__).name
    assert [p.name for p in marked if f"tests/{p.name}" not in words and p.name != mine] == []
    for part in parts(1):
        files = [w for w in part.command if w.startswith(("examples/", "tests/"))]
        assert all((ROOT / file.partition(".py")[0]).with_suffix(".py").is_file() for file in files)
    for example in sorted((ROOT / "examples" / "kernels").glob("*.py")):
        assert f"examples/kernels/{example.name}" in words


def test_wheels_cover_what_the_package_needs() -> None:
    """Each dependency is named in the script: carried, or said to be on the machine."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    script = (ROOT / "benchmarks" / "gpu_wheels.sh").read_text()
    names = [re.split(r"[><=]", need)[0] for need in needs]
    assert [name for name in names if name not in script] == []
    probed = gpu_check._PROBE
    assert all(name.replace("scikit-learn", "sklearn") in probed for name in names)
