"""Suanli beside its peers on training, interleaved in one run.

    python -m benchmarks.training --data DATA [--cases mnist-cnn] [--seconds 60] [--out FILE]
    python -m benchmarks.training --data DATA --append   # goes on where it was interrupted

Every side trains in a process of its own; the sides take short turns, forwards and backwards, and
the idle ones are stopped (SIGSTOP), so that a drift of the machine falls on all of them. A step
counts from the end of the one before, so loading data is in it. Figures are medians over the
turns; ratios come from turns of the same round. Then Suanli and the fastest other side train anew,
one after the other, until the quality of TARGETS: seconds of training, compiling included, without
judging. Suanli's plan is found before by `suanli train`, which verifies it. No side augments: what
the frameworks leave to the person is left out of all, but for `cifar10-fast`, whose recipe mirrors,
shifts and cuts each epoch as a whole and pays for it here.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, moment
from suanli.base import codec
from suanli.base.lazy import present
from suanli.base.train_plan import TrainPlan
from suanli.measure.isolation import Worker
from suanli.measure.timing import median_interval

HERE = Path(__file__).parent
_TURN_MS = 400.0
_LEAST_ROUNDS = 6
CASES = (
    *("mnist-cnn", "cifar10-lenet", "cifar10-fast", "resnet18", "gpt-mini"),
    *("mnist-cnn-small", "mnist-mlp", "cifar10-cnn"),  # the other programs of the articles
)

# Quality (accuracy, of tokens where positions have labels) that the time is taken to. The others
# have no quality of their own: random pictures, or a recipe that no framework brings.
TARGETS = {
    "mnist-cnn": 0.98,
    "cifar10-lenet": 0.45,
    "gpt-mini": 0.30,
    "mnist-cnn-small": 0.97,
    "mnist-mlp": 0.95,
    "cifar10-cnn": 0.55,
}
_JUDGED = 4  # times an epoch
_MOST_EPOCHS = 6


def sides_of(case: str, plan: Path | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (class, settings)."""
    layout = case != "gpt-mini"
    sides: dict[str, tuple[str, dict[str, Any]]] = {
        "plain loop, fp32": ("Plain", {}),
        "plain loop, bf16 autocast": ("Plain", {"bf16": True, "channels_last": layout}),
        "plain loop, torch.compile": ("Plain", {"compile": True, "channels_last": layout}),
    }
    if present("accelerate"):
        sides["Accelerate fp32"] = ("Accelerate", {"precision": "no"})
        sides["Accelerate bf16"] = ("Accelerate", {"precision": "bf16"})
    if present("lightning"):
        sides["Lightning fp32"] = ("Lightning", {"precision": "32-true"})
        sides["Lightning bf16"] = ("Lightning", {"precision": "bf16-mixed"})
    if present("keras"):
        sides["Keras fp32"] = ("Keras", {"policy": "float32"})
        sides["Keras bf16"] = ("Keras", {"policy": "mixed_bfloat16"})
    sides["Suanli"] = ("Suanli", {"plan": str(plan) if plan else ""})
    return sides


def find_plan(case: str, data: Path | None, folder: Path, budget: float) -> dict[str, Any]:
    """Let `suanli train` find and verify a plan; gives its result."""
    from benchmarks.training_peers import ref_of

    command = [
        sys.executable, "-m", "suanli.cli", "train", ref_of(case), "--plan", "auto",
        "--budget", str(budget), "--max-seconds", "5", "-o", str(folder), "--json",
    ]  # fmt: skip
    if data:
        command += ["--data", str(data)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stdout[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(
    case: str, data: Path | None, plan: Path | None, seconds: float
) -> dict[str, dict[str, Any]]:
    """Figures of each side, with ratios to the plain loop and to Suanli."""
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    for name, (kind, settings) in sides_of(case, plan).items():
        setup = {"recipe": case, "data": str(data) if data else None, **settings}
        try:
            workers[name] = Worker(f"benchmarks.training_peers:{kind}", setup, start_timeout_s=600)
            workers[name].call("block", timeout_s=600, steps=3)
            workers[name].pause()
            print(f"    {name} ready", file=sys.stderr)
        except Exception as error:
            failed[name] = str(error)
            print(f"    {name} failed: {error}", file=sys.stderr)
    try:
        turns = _turns(workers, seconds)
    finally:
        for worker in workers.values():
            worker.close()
    return _figures(turns, failed)


def _turns(workers: dict[str, Worker], seconds: float) -> dict[str, list[float]]:
    steps: dict[str, int] = {}
    for name, worker in workers.items():
        once = statistics.median(worker.call("block", timeout_s=300, steps=2))
        steps[name] = max(1, min(2000, int(_TURN_MS / once)))
        worker.pause()
    turns: dict[str, list[float]] = {name: [] for name in workers}
    started, forwards = time.monotonic(), True
    while time.monotonic() - started < seconds or len(turns["Suanli"]) < _LEAST_ROUNDS:
        for name in list(workers) if forwards else list(reversed(workers)):
            times = workers[name].call("block", timeout_s=300, steps=steps[name] + 1)
            workers[name].pause()
            # the mean of a turn: what a loader does between some steps belongs to all of them
            turns[name].append(statistics.fmean(times[1:]))
        forwards = not forwards
    return turns


def to_quality(
    case: str, data: Path | None, plan: Path | None, sides: dict[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Seconds of training until a quality, of Suanli and of the fastest other side."""
    if case not in TARGETS:
        return None
    # Keras keeps its weights in an order of its own, and is judged by nothing here
    others = [n for n in sides if "step_ms" in sides[n] and n != "Suanli" and "Keras" not in n]
    fastest = min(others, key=lambda name: sides[name]["step_ms"]["p50"])
    found: dict[str, Any] = {"target": TARGETS[case]}
    for name in (fastest, "Suanli"):
        kind, settings = sides_of(case, plan)[name]
        setup = {"recipe": case, "data": str(data) if data else None, **settings}
        worker = Worker(f"benchmarks.training_peers:{kind}", setup, start_timeout_s=600)
        try:
            found[name] = _trained(worker, TARGETS[case])
        finally:
            worker.close()
        print(f"    {name}: {found[name]}", file=sys.stderr)
    return found


def _trained(worker: Worker, target: float) -> dict[str, Any]:
    seconds, quality, parts = 0.0, 0.0, 0
    steps = -(-int(worker.call("epoch", timeout_s=60)) // _JUDGED)
    while quality < target and parts < _JUDGED * _MOST_EPOCHS:
        seconds += sum(worker.call("block", timeout_s=1200, steps=steps)) / 1e3
        quality = float(worker.call("quality", timeout_s=600))
        parts += 1
    return {"seconds": seconds if quality >= target else None, "quality": quality, "parts": parts}


def _figures(turns: dict[str, list[float]], failed: dict[str, str]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    plain = turns.get("plain loop, fp32") or turns["Suanli"]
    for name, times in turns.items():
        step = median_interval(times)
        rows[name] = {
            "step_ms": {"p50": step.p50, "lo95": step.lo95, "hi95": step.hi95},
            "over_plain_loop": _ratio(plain, times),
            "suanli_over_it": _ratio(times, turns["Suanli"]),
            "turns": len(times),
        }
    return rows | {name: {"failed": reason} for name, reason in failed.items()}


def _ratio(a: list[float], b: list[float]) -> dict[str, float]:
    logs = median_interval([math.log(x / y) for x, y in zip(a, b, strict=True)])
    return {key: math.exp(getattr(logs, key)) for key in ("p50", "lo95", "hi95")}


def _share(found: dict[str, Any], sides: dict[str, dict[str, Any]]) -> float | None:
    """Suanli's share of the speed of light in the race, where the ceilings are known."""
    sol = found.get("sol")
    return sol["ms"] / sides["Suanli"]["step_ms"]["p50"] if sol else None


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    here = report["machine"]
    lines = [
        f"# Training on {here['cpu']}, {here['cores']} cores",
        "",
        f"{here['date']}; {', '.join(f'{k} {v}' for k, v in here['libraries'].items())}; "
        f"load average at the start {here['load_average']:.2f}. Made by "
        "`python -m benchmarks.training`.",
    ]
    for name, case in report["cases"].items():
        sol = f"; {case['sol']:.0%} of the speed of light" if case.get("sol") else ""
        lines += [
            *("", f"## {name}, batch {case['batch']}", ""),
            f"Suanli's plan: `{case['title']}`{sol}; ended {case['measured']['date']}.",
            "",
            "| side | ms a step | samples/s | s an epoch | over the plain loop | Suanli over it |",
            "|---|---|---|---|---|---|",
        ]
        rows = sorted(
            case["sides"].items(), key=lambda item: item[1].get("step_ms", {}).get("p50", 1e9)
        )
        for side, row in rows:
            if "failed" in row:
                lines.append(f"| {side} | failed: {row['failed'][:60]} | | | | |")
                continue
            over, mine = row["over_plain_loop"], row["suanli_over_it"]
            rate = case["batch"] / row["step_ms"]["p50"] * 1e3
            lines.append(
                f"| {side} | {row['step_ms']['p50']:.3g} | {rate:,.0f} "
                f"| {case['samples'] / rate:.3g} "
                f"| {over['p50']:.2f} ({over['lo95']:.2f}-{over['hi95']:.2f}) "
                f"| {mine['p50']:.2f} ({mine['lo95']:.2f}-{mine['hi95']:.2f}) |"
            )
        if case.get("to_quality"):
            lines += ["", _said(case["to_quality"])]
    return "\n".join(lines) + "\n"


def _said(found: dict[str, Any]) -> str:
    """A line on the time to quality."""
    parts = [
        f"{name} {side['seconds']:.3g} s ({side['quality']:.2%} after {side['parts'] / _JUDGED:g} "
        "epochs)"
        if side["seconds"] is not None
        else f"{name} not within {_MOST_EPOCHS} epochs ({side['quality']:.2%})"
        for name, side in found.items()
        if name != "target"
    ]
    return (
        f"Training until {found['target']:.0%}, from the same weights, compiling included: "
        f"{', '.join(parts)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="names, with commas")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--seconds", type=float, default=60.0, help="turns per case")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds per search")
    parser.add_argument("--plan", choices=["auto", "default"], default="auto")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu" / "training")
    parser.add_argument(
        "--append", action="store_true", help="keep the cases of --out, do the others"
    )
    parser.add_argument("--again", action="store_true", help="with --append, do them all again")
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "cases": {}}
    if args.append and args.out.with_suffix(".json").exists():
        report["cases"] = json.loads(args.out.with_suffix(".json").read_text())["cases"]
    from benchmarks.training_peers import recipe_of

    for name in args.cases.split(","):
        if name in report["cases"] and not args.again:
            continue
        with tempfile.TemporaryDirectory(prefix="suanli-bench-") as folder:
            plan, found = None, dict[str, Any]()
            if args.plan == "auto":
                print(f"{name}: searching", file=sys.stderr)
                found = find_plan(name, args.data, Path(folder) / "run", args.budget)
                plan = Path(folder) / "run" / "plan.json"
            print(f"{name}: racing", file=sys.stderr)
            sides = compare(name, args.data, plan, args.seconds)
            until = to_quality(name, args.data, plan, sides)
            used = codec.read(TrainPlan, plan) if plan else None
        data = str(args.data) if args.data else None
        recipe = recipe_of(name, data)
        assert recipe.workload.data is not None
        report["cases"][name] = {
            "plan": codec.to_json(used) if used else None,
            "title": used.title if used else "the default",
            "search": {key: found.get(key) for key in ("speedup", "baseline", "trials")},
            "sol": _share(found, sides),
            "batch": recipe.settings.batch,
            "samples": len(recipe.workload.load().train),
            "measured": moment(),
            "sides": sides,
            "to_quality": until,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(report))
        print(table(report), file=sys.stderr)


if __name__ == "__main__":
    main()
