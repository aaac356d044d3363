"""Seeds of the recipes that ship: quality and seconds, mean and spread.

    python -m benchmarks.recipes --data DATA                     # all rows of CASES
    python -m benchmarks.recipes --data DATA --only mnist-fast --seeds 0,1,2

Every run is `suanli train RECIPE --plan default` in a process of its own. Seconds of training are
those of the steps; the rest of the process (loading the data, building the kernels, judging,
checkpoints) is reported apart. A run that is in the results already is not done again.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, moment

HERE = Path(__file__).parent
# recipe, passes, seconds that it is cut to (0: none), seeds, accuracy and the seconds for it
CASES = (
    ("mnist-fast", 1, 0.0, 5, (0.99, 6.0)),
    ("mnist-fast", 1, 2.5, 5, (0.985, 3.0)),
    ("cifar10-fast", 12, 0.0, 3, (0.9083, 360.0)),
    ("cifar10-fast", 18, 0.0, 3, (0.917, 540.0)),
)


def one_run(
    recipe: str, epochs: int, most_s: float, seed: int, data: Path | None
) -> dict[str, Any]:
    """Train once; figures of the run."""
    with tempfile.TemporaryDirectory(prefix="suanli-bench-") as folder:
        command = [
            *(sys.executable, "-m", "suanli", "train", recipe, "--plan", "default", "--json"),
            *("--epochs", str(epochs), "--seed", str(seed), "-o", f"{folder}/run"),
        ]
        command += ["--data", str(data)] if data else []
        command += ["--max-seconds", str(most_s)] if most_s else []
        load, started = os.getloadavg()[0], time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        spent = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    result = json.loads(done.stdout)
    quality = result["quality"]
    # both parts make up the official test set, and no decision of the run came from either
    whole = quality["value"] * quality["n"] + quality["search"] * (10_000 - quality["n"])
    return {
        "seed": seed,
        "accuracy": whole / 10_000,
        "acceptance": quality["value"],
        "reached_at_s": quality["reached_at_s"],
        "train_seconds": result["train_seconds"],
        "other_seconds": spent - result["train_seconds"],
        "samples_per_s": result["samples_per_s"],
        "step_ms": result["step_ms"],
        "sol": result["sol"],
        "mfu": result["mfu"],
        "load_average": load,
        "date": moment()["date"],
    }


def summary(runs: list[dict[str, Any]], target: tuple[float, float]) -> dict[str, Any]:
    """Mean, spread over the seeds, and the standard error of the mean, by figure."""
    found: dict[str, Any] = {"seeds": len(runs)}
    for name in ("accuracy", "train_seconds", "other_seconds", "samples_per_s"):
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else None
        found[name] = {
            "mean": statistics.fmean(values),
            "least": min(values),
            "most": max(values),
            "deviation": spread,
            "error_of_mean": spread / math.sqrt(len(values)) if spread is not None else None,
        }
    accuracy, seconds = target
    met = found["accuracy"]["mean"] >= accuracy and found["train_seconds"]["mean"] <= seconds
    found["target"] = {"accuracy": accuracy, "seconds": seconds, "met": met}
    return found


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    here = report["machine"]
    lines = [
        f"# Recipes on {here['cpu']}, {here['cores']} cores",
        "",
        f"{here['date']}. Made by `python -m benchmarks.recipes`. Accuracy is on all 10,000 test "
        "images; seconds are those of training, the rest of the process stands beside them.",
        "",
        "| recipe | passes | seeds | accuracy: mean, spread | seconds: mean, spread "
        "| other seconds | images/s | asked |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"].values():
        found = case["summary"]
        acc, secs = found["accuracy"], found["train_seconds"]
        target = found["target"]
        met = "yes" if target["met"] else "no"
        asked = f"{target['accuracy']:.2%} in {target['seconds']:g} s: {met}"
        cut = f", cut to {case['most_s']:g} s" if case["most_s"] else ""
        lines.append(
            f"| {case['recipe']} | {case['epochs']}{cut} | {found['seeds']} "
            f"| {acc['mean']:.2%}, {acc['least']:.2%} to {acc['most']:.2%} "
            f"| {secs['mean']:.3g}, {secs['least']:.3g} to {secs['most']:.3g} "
            f"| {found['other_seconds']['mean']:.3g} "
            f"| {found['samples_per_s']['mean']:,.0f} | {asked} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--only", default="", help="one recipe, or recipe:epochs")
    parser.add_argument("--seeds", default="", help="numbers with commas; else as in CASES")
    parser.add_argument("--epochs", type=int, help="instead of those of CASES, to try it out")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu" / "recipes")
    args = parser.parse_args()
    path = args.out.with_suffix(".json")
    report: dict[str, Any] = {"machine": machine(), "cases": {}}
    if path.exists():
        report["cases"] = json.loads(path.read_text())["cases"]
    for recipe, epochs, most_s, count, target in CASES:
        if args.only and args.only not in (recipe, f"{recipe}:{epochs}"):
            continue
        passes = args.epochs or epochs
        case = report["cases"].setdefault(
            f"{recipe}:{passes}:{most_s:g}",
            {"recipe": recipe, "epochs": passes, "most_s": most_s, "runs": []},
        )
        seeds = list(map(int, args.seeds.split(","))) if args.seeds else list(range(count))
        for seed in seeds:
            if any(run["seed"] == seed for run in case["runs"]):
                continue
            print(f"{recipe}, {passes} passes, seed {seed}", file=sys.stderr)
            case["runs"].append(one_run(recipe, passes, most_s, seed, args.data))
            case["summary"] = summary(case["runs"], target)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
