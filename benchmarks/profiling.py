"""What profiling costs, and how near the expected gains come to the measured ones.

    python -m benchmarks.profiling [--cases resnet50,…] [--data DATA] [--check 4] [--out FILE]

Every case is one `suanli profile --check` in a process of its own, which races each change against
the step without it in alternating turns. The error of an expected speed-up is expected over
measured, less one, without its sign; the median over all cases is the figure that the goal of 20 %
is about. A table goes beside the results in JSON. Cases that are there already are not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, moment

_GOAL = 0.20
_COST_GOAL, _COST_FROM_MS = 0.15, 10.0
# Name of the case -> what `suanli profile` is given.
CASES: dict[str, list[str]] = {
    "digits-resnet b1": ["digits-resnet", "--infer"],
    "digits-resnet b32": ["digits-resnet", "--infer", "--batch", "32"],
    "digits-resnet train": ["digits-resnet", "--train"],
    "mnist-cnn b1": ["mnist-cnn", "--infer"],
    "mnist-cnn train": ["mnist-cnn", "--train"],
    "mnist-mlp b1": ["mnist-mlp", "--infer"],
    "mnist-mlp b32": ["mnist-mlp", "--infer", "--batch", "32"],
    "cifar10-cnn b32": ["cifar10-cnn", "--infer", "--batch", "32"],
    "cifar10-lenet train": ["cifar10-lenet", "--train"],
    "resnet18-cifar b32": ["resnet18-cifar", "--infer", "--batch", "32"],
    "resnet18-cifar train": ["resnet18-cifar", "--train"],
    "resnet18 b1": ["resnet18", "--infer"],
    "resnet50 b1": ["resnet50", "--infer"],
    "resnet50 b8": ["resnet50", "--infer", "--batch", "8"],
    "mobilenetv2 b1": ["mobilenetv2", "--infer"],
    "vit-small b1": ["vit-small", "--infer"],
    "unet b1": ["unet", "--infer"],
    "bert-base b1": ["bert-base", "--infer"],
    "bert-base b8": ["bert-base", "--infer", "--batch", "8"],
    "gpt2-small b1": ["gpt2-small", "--infer"],
    "gpt-mini b1": ["gpt-mini", "--infer"],
    "gpt-mini train": ["gpt-mini", "--train"],
    "cifar10-fast train": ["cifar10-fast", "--train"],
    "worked-rnn-5x256 b32": ["worked-rnn-5x256", "--infer", "--batch", "32"],
}


def run_case(name: str, check: int, data: Path | None, limit_s: float) -> dict[str, Any]:
    """The profile of one case, cut down to what this benchmark is about."""
    command = [sys.executable, "-m", "suanli", "profile", *CASES[name]]
    command += ["--check", str(check), "--json"]
    environment = {**os.environ, **({"SUANLI_DATA": str(data)} if data else {})}
    started = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=limit_s, env=environment
    )
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return {"case": name, "error": done.stderr.strip().splitlines()[-1:] or ["no output"]}
    if "error" in found:
        return {"case": name, "error": found["error"]}
    parts = sum(found["categories"].values())
    memory, predicted = found["memory"], (found["memory"] or {}).get("predicted")
    return {
        "case": name,
        "step_ms": found["step_ms"],
        "sol_fraction": (found["sol"] or {}).get("fraction"),
        "verdict": found["verdict"],
        "sum_over_step": parts / found["step_ms"]["p50"],
        "profiler_cost": (found["profiler"] or {}).get("cost"),
        "memory_bytes": memory and memory["total_bytes"],
        "memory_error": memory
        and predicted
        and predicted["total_bytes"] / memory["total_bytes"] - 1,
        "advice": [
            {key: item[key] for key in ("kind", "change", "expected_speedup", "failed")}
            | {"measured_speedup": item["measured_speedup"]}
            for item in found["advice"]
        ],
        "seconds": time.monotonic() - started,
        **moment(),
    }


def errors_of(cases: list[dict[str, Any]]) -> list[tuple[str, str, float, float, float]]:
    """(case, kind, expected, measured, error) of every change that was tried."""
    found = []
    for case in cases:
        for item in case.get("advice", []):
            if item["measured_speedup"] is None:
                continue
            measured, expected = item["measured_speedup"]["p50"], item["expected_speedup"]
            error = abs(expected / measured - 1)
            found.append((case["case"], item["kind"], expected, measured, error))
    return found


def table(cases: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Profiles: what they cost, and what their advice is worth", ""]
    lines += [f"Machine: {json.dumps(about, ensure_ascii=False)}", ""]
    found = errors_of(cases)
    if found:
        middle = statistics.median(error for *_, error in found)
        verdict = "met" if middle <= _GOAL else "missed"
        lines += [
            f"Median error of {len(found)} expected speed-ups: **{middle:.1%}** "
            f"(goal {_GOAL:.0%}: {verdict}).",
            "",
        ]
    costs = [
        c["profiler_cost"]
        for c in cases
        if c.get("profiler_cost") is not None and c["step_ms"]["p50"] > _COST_FROM_MS
    ]
    if costs:
        lines += [
            f"Profiler cost of the {len(costs)} steps over {_COST_FROM_MS:g} ms: median "
            f"{statistics.median(costs):.1%}, largest {max(costs):.1%} (goal {_COST_GOAL:.0%}).",
            "",
        ]
    lines += ["| case | step ms | of SOL | parts / step | profiler | memory, predicted | verdict |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for c in cases:
        if "error" in c:
            lines.append(f"| {c['case']} | {c['error']} | | | | | |")
            continue
        lines.append(
            f"| {c['case']} | {c['step_ms']['p50']:.3g} | {_share(c['sol_fraction'])} "
            f"| {c['sum_over_step']:.3f} | {_share(c['profiler_cost'])} "
            f"| {_share(c['memory_error'])} | {c['verdict']} |"
        )
    lines += ["", "| case | change | expected | measured | error |", "|---|---|---|---|---|"]
    for case, kind, expected, measured, error in found:
        lines.append(f"| {case} | {kind} | {expected:.2f}x | {measured:.2f}x | {error:.0%} |")
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def main() -> None:
    """Run the cases, one after the other, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--check", type=int, default=4)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu/profiling.json"))
    asked = parser.parse_args()
    kept: dict[str, dict[str, Any]] = {}
    if asked.out.is_file():
        kept = {c["case"]: c for c in json.loads(asked.out.read_text())["cases"]}
    about = machine()
    for name in asked.cases.split(","):
        if name in kept and "error" not in kept[name]:
            continue
        print(name, flush=True)
        try:
            kept[name] = run_case(name, asked.check, asked.data, asked.limit)
        except subprocess.TimeoutExpired:
            kept[name] = {"case": name, "error": f"no end after {asked.limit:g} s"}
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        cases = [kept[n] for n in CASES if n in kept]
        asked.out.write_text(json.dumps({"machine": about, "cases": cases}, indent=1))
        asked.out.with_suffix(".md").write_text(table(cases, about))
    print(asked.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
