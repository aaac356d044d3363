"""What profiling costs, and how near the expected gains come to the measured ones.

    python -m benchmarks.profiling [--data DATA] [--minutes 20] [--cases "resnet50 b1,…"]

Every case is a process of its own (`benchmarks.profiling_case`): a profile whose first changes are
raced against the step without them, then steps with and without the recorder in turns. The error of
an expected speed-up is expected over measured, less one, without its sign; the median over all
changes that were tried is the figure that the goal of 20 % is about.

The time is shared among the cases: one that takes more than its part is asked to stop (SIGINT) and
keeps what it has tried. Results and their table are written after each case; those that are there
already, on the same machine, are not run again. The table in `docs/profile.md` is made from the
results, too.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, moment

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "profiling.json"
DOCS = ROOT / "docs" / "profile.md"
BEGIN, END = "<!-- benchmarks.profiling: begin -->", "<!-- benchmarks.profiling: end -->"
_GOAL = 0.20
_COST_GOAL, _COST_FROM_MS = 0.15, 10.0
_MEMORY_GOAL = 0.10
# A case may take this part more than its share, since others take less; and this long at least.
_OVER, _LEAST_SECONDS, _TO_STOP_SECONDS = 1.6, 30.0, 30.0

_ENGINE = {"backend": "openvino", "precision": "bf16"}
CASES: dict[str, dict[str, Any]] = {
    "resnet50 b1": {"what": "resnet50", "train": False},
    "resnet50 b8": {"what": "resnet50", "train": False, "batch": 8},
    "bert-base b1": {"what": "bert-base", "train": False},
    "cifar10-fast train": {"what": "cifar10-fast", "train": True},
    "digits-resnet b1": {"what": "digits-resnet", "train": False},
    "digits-resnet b32": {"what": "digits-resnet", "train": False, "batch": 32},
    "digits-resnet b32 OpenVINO": {
        "what": "digits-resnet",
        "train": False,
        "batch": 32,
        "plan": _ENGINE,
    },
    "digits-resnet train": {"what": "digits-resnet", "train": True},
    "mnist-cnn b1": {"what": "mnist-cnn", "train": False},
    "mnist-cnn train": {"what": "mnist-cnn", "train": True},
    "mnist-mlp b1": {"what": "mnist-mlp", "train": False},
    "mnist-mlp b32": {"what": "mnist-mlp", "train": False, "batch": 32},
    "cifar10-cnn b32": {"what": "cifar10-cnn", "train": False, "batch": 32},
    "cifar10-lenet train": {"what": "cifar10-lenet", "train": True},
    "resnet18-cifar b32": {"what": "resnet18-cifar", "train": False, "batch": 32},
    "resnet18-cifar train": {"what": "resnet18-cifar", "train": True},
    "resnet18 b1": {"what": "resnet18", "train": False},
    "mobilenetv2 b1": {"what": "mobilenetv2", "train": False},
    "vit-small b1": {"what": "vit-small", "train": False},
    "unet b1": {"what": "unet", "train": False},
    "bert-base b8": {"what": "bert-base", "train": False, "batch": 8},
    "gpt2-small b1": {"what": "gpt2-small", "train": False},
    "gpt-mini b1": {"what": "gpt-mini", "train": False},
    "gpt-mini train": {"what": "gpt-mini", "train": True},
    "worked-rnn-5x256 b32": {"what": "worked-rnn-5x256", "train": False, "batch": 32},
}


def run_case(name: str, asked: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """One case, stopped after `limit_s` seconds; what it had found then counts."""
    command = [sys.executable, "-m", "benchmarks.profiling_case", json.dumps(CASES[name])]
    command += ["--check", str(asked.check), "--seconds", str(asked.race)]
    data = {"SUANLI_DATA": str(asked.data.resolve())} if asked.data else {}
    started, before = time.monotonic(), moment()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **data},
    )
    try:
        said, wrong = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            said, wrong = process.communicate(timeout=_TO_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            said, wrong = "", f"no end after {limit_s:.0f} s"
    try:
        found = json.loads(said.strip().splitlines()[-1])
    except (ValueError, IndexError):
        found = {"error": (wrong.strip().splitlines() or ["no output"])[-1][:300]}
    return {"case": name, **found, "seconds": time.monotonic() - started, **before}


def errors_of(cases: list[dict[str, Any]]) -> list[tuple[str, str, float, dict[str, float], float]]:
    """(case, change, expected, measured, error) of every change that was tried."""
    found = []
    for case in cases:
        for item in case.get("advice", []):
            if item["measured_speedup"] is None:
                continue
            measured, expected = item["measured_speedup"], item["expected_speedup"]
            error = abs(expected / measured["p50"] - 1)
            found.append((case["case"], item["change"], expected, measured, error))
    return found


def summary(cases: list[dict[str, Any]]) -> list[str]:
    """The figures that goals are about, a sentence each."""
    lines, found = [], errors_of(cases)
    if found:
        middle = statistics.median(error for *_, error in found)
        tried = len({case for case, *_ in found})
        lines.append(
            f"Median error of {len(found)} expected speed-ups of {tried} cases: **{middle:.1%}** "
            f"(goal {_GOAL:.0%}: {_verdict(middle <= _GOAL)})."
        )
    costs = [
        (c["recording_ratio"]["p50"] - 1, c["case"])
        for c in cases
        if c.get("recording_ratio") and c["step_ms"]["p50"] > _COST_FROM_MS
    ]
    if costs:
        most, where = max(costs)
        lines.append(
            f"Recording operators added {statistics.median(cost for cost, _ in costs):.1%} to the "
            f"{len(costs)} steps over {_COST_FROM_MS:g} ms (median), {most:.1%} at most ({where}); "
            f"goal {_COST_GOAL:.0%}: {_verdict(most <= _COST_GOAL)}."
        )
    memory = [
        (abs(c["memory_error"]), c["case"]) for c in cases if c.get("memory_error") is not None
    ]
    if memory:
        most, where = max(memory)
        lines.append(
            f"Memory was predicted within {most:.1%} in {len(memory)} cases ({where}), within "
            f"{statistics.median(error for error, _ in memory):.1%} in half of them; goal "
            f"{_MEMORY_GOAL:.0%}: {_verdict(most <= _MEMORY_GOAL)}."
        )
    failed = [f"{c['case']} ({c['error']})" for c in cases if "error" in c]
    cut = [c["case"] for c in cases if c.get("interrupted")]
    lines += [f"Without a result: {'; '.join(failed)}."] if failed else []
    lines += [f"Not all changes were tried, time was out: {', '.join(cut)}."] if cut else []
    return lines


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def table(cases: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Profiles: what they cost, and what their advice is worth", ""]
    lines += [f"Machine: {json.dumps(about, ensure_ascii=False)}", ""]
    for sentence in summary(cases):
        lines += [sentence, ""]
    lines += [
        "| case | step ms | of SOL | parts / step | recording | memory, predicted | verdict |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for c in cases:
        if "error" in c:
            lines.append(f"| {c['case']} | | | | | | {c['error']} |")
            continue
        lines.append(
            f"| {c['case']} | {c['step_ms']['p50']:.3g} | {_share(c['sol_fraction'])} "
            f"| {c['sum_over_step']:.3f} | {_cost(c['recording_ratio'])} "
            f"| {_share(c['memory_error'])} | {c['verdict']} |"
        )
    lines += ["", "| case | change | expected | measured | error |", "|---|---|---|---|---|"]
    for case, change, expected, measured, error in errors_of(cases):
        lines.append(f"| {case} | {change} | {expected:.2f}x | {_gain(measured)} | {error:.0%} |")
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _cost(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['p50'] - 1:+.1%} ({ratio['lo95'] - 1:+.1%} to {ratio['hi95'] - 1:+.1%})"


def _gain(measured: dict[str, float]) -> str:
    return f"{measured['p50']:.2f}x ({measured['lo95']:.2f} to {measured['hi95']:.2f})"


def docs_block(found: dict[str, Any]) -> str:
    """What `docs/profile.md` shows of the results: each case with the change that gave the most."""
    about, cases = found["machine"], found["cases"]
    loads = [c["load_average"] for c in cases]
    lines = [
        BEGIN,
        f"Measured {about['date'].partition(' ')[0]} on {about['cores']} cores of "
        f"{about['cpu']}, load average {min(loads):.1f} to {max(loads):.1f} before each case; all "
        "changes that were tried, with what recording cost, are in "
        "[benchmarks/results/cpu/profiling.md](../benchmarks/results/cpu/profiling.md).",
        "",
        "| profile | step | verdict | what gave the most of what was tried | expected | measured |",
        "|---|---|---|---|---|---|",
    ]
    for c in cases:
        if "error" in c:
            continue
        tried = [item for item in c["advice"] if item["measured_speedup"]]
        best = max(tried, key=lambda item: item["measured_speedup"]["p50"], default=None)
        end = "nothing was tried | |"
        if best is not None:
            expected, measured = best["expected_speedup"], best["measured_speedup"]
            end = f"{best['change']} | {expected:.2f}x | {_gain(measured)}"
        lines.append(f"| {c['case']} | {c['step_ms']['p50']:.3g} ms | {c['verdict']} | {end} |")
    return "\n".join([*lines, "", *summary(cases), END])


def with_block(page: str, block: str) -> str:
    """The page with the block in the place of the one that it has.

    Raises:
        ValueError: It has none.
    """
    return page[: page.index(BEGIN)] + block + page[page.index(END) + len(END) :]


def main() -> None:
    """Run the cases, one after the other, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="", help="only these, with commas; run anew")
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--check", type=int, default=4)
    parser.add_argument("--race", type=float, default=5.0, help="seconds for each change")
    parser.add_argument("--minutes", type=float, default=20.0, help="for all cases together")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    about = machine()
    kept = results_there(asked.out, about)
    named = [name.strip() for name in asked.cases.split(",") if name.strip()]
    unknown = [name for name in named if name not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    wanted = named or [n for n in CASES if n not in kept or "error" in kept[n]]
    end = time.monotonic() + 60 * asked.minutes
    for place, name in enumerate(wanted):
        left = end - time.monotonic()
        if left < _LEAST_SECONDS:
            print(f"time is out; not run: {', '.join(wanted[place:])}")
            break
        share = max(_LEAST_SECONDS, _OVER * left / (len(wanted) - place))
        print(f"{name} …", end=" ", flush=True)
        kept[name] = run_case(name, asked, min(share, left))
        print(f"{kept[name]['seconds']:.0f} s {kept[name].get('error', '')}", flush=True)
        write(asked.out, {"machine": about, "cases": [kept[n] for n in CASES if n in kept]})
    if asked.out.is_file():
        print(asked.out.with_suffix(".md").read_text())


def results_there(out: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results of the same processor that a file holds, by case."""
    if not out.is_file():
        return {}
    before = json.loads(out.read_text())
    if before["machine"]["cpu"] != about["cpu"]:
        return {}
    return {c["case"]: c for c in before["cases"] if c["case"] in CASES}


def write(out: Path, found: dict[str, Any]) -> None:
    """The results, their table, and of the committed ones the table in the documentation."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(found["cases"], found["machine"]))
    if out.resolve() == RESULTS.resolve():
        DOCS.write_text(with_block(DOCS.read_text(), docs_block(found)))


if __name__ == "__main__":
    main()
