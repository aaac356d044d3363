"""Programs as written: does the plan that was found learn as well as the plain loop?

    python -m benchmarks.seed_band --data DATA [--cases mnist-cnn] [--seeds 3] [--epochs 2]

Each program is trained with the plain fp32 loop and with the plan that `suanli train --plan auto`
finds, both from the same seeds with the hyper-parameters as written. The difference of the mean
accuracies is held against the spread over the seeds: a one-sided t-test (Welch) at 95 % that the
plan is not worse by more than 0.5 points. What is in the results already is not done again.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, moment
from suanli.base import codec
from suanli.base.train_plan import TrainPlan

HERE = Path(__file__).parent
CASES = ("cifar10-lenet", "mnist-cnn", "mnist-cnn-small", "mnist-mlp", "cifar10-cnn")
_MARGIN = 0.005  # of accuracy
_BUDGET_S = 120.0  # for the one search per program


def train(case: str, plan: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run; its quality, seconds and plan."""
    with tempfile.TemporaryDirectory(prefix="suanli-bench-") as folder:
        command = [
            *(sys.executable, "-m", "suanli", "train", case, "--plan", plan, "--json"),
            *("--seed", str(seed), "-o", f"{folder}/run", "--data", str(args.data)),
            *(["--epochs", str(args.epochs)] if args.epochs else []),
            *(["--budget", str(_BUDGET_S)] if plan == "auto" else []),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    result = json.loads(done.stdout)
    return {
        "accuracy": result["quality"]["value"],
        "train_seconds": result["train_seconds"],
        "samples_per_s": result["samples_per_s"],
        "epochs": result["epochs"],
        "plan": result["plan"],
        "speedup": result["speedup"],
    }


def verdict(plain: list[float], found: list[float]) -> dict[str, Any]:
    """The difference of the means, and the least it is with 95 % (None from one seed)."""
    difference = statistics.fmean(found) - statistics.fmean(plain)
    if min(len(plain), len(found)) < 2:
        return {"difference": difference, "lower95": None, "within": None}
    from scipy import stats

    parts = [statistics.variance(side) / len(side) for side in (plain, found)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return {"difference": difference, "lower95": difference, "within": difference >= -_MARGIN}
    sizes = [len(side) - 1 for side in (plain, found)]
    freedom = sum(parts) ** 2 / sum(p**2 / n for p, n in zip(parts, sizes, strict=True))
    lower = difference - float(stats.t.ppf(0.95, freedom)) * error
    return {"difference": difference, "lower95": lower, "within": lower >= -_MARGIN}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    here = report["machine"]
    lines = [
        f"# The articles' programs as written, on {here['cpu']}, {here['cores']} cores",
        "",
        f"{here['date']}. Made by `python -m benchmarks.seed_band`. Accuracy on the acceptance "
        "part; seconds of training. The plain loop here is Suanli's own in eager fp32, which "
        "streams batches without a DataLoader: the articles' loops are slower (see training.md).",
        "",
        "| program | seeds | plain: accuracy, seconds | plan: accuracy, seconds "
        "| difference (least with 95 %) | not worse by 0.5 points |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in report["cases"].items():
        if "verdict" not in case:
            continue
        cells = []
        for side in ("plain", "auto"):
            runs = case[side].values()
            accuracy = statistics.fmean(run["accuracy"] for run in runs)
            seconds = statistics.fmean(run["train_seconds"] for run in runs)
            cells.append(f"{accuracy:.2%}, {seconds:.3g}")
        found = case["verdict"]
        least = "one seed" if found["lower95"] is None else f"{100 * found['lower95']:+.2f}"
        words = {True: "yes", False: "not shown", None: "not shown"}[found["within"]]
        lines.append(
            f"| {name} | {len(case['plain'])} | {cells[0]} | {cells[1]} "
            f"| {100 * found['difference']:+.2f} ({least}) points | {words} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--cases", default=",".join(CASES), help="names, with commas")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=int, help="instead of those as written, to try it out")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu" / "seed-band")
    args = parser.parse_args()
    path = args.out.with_suffix(".json")
    report: dict[str, Any] = {"machine": machine(), "cases": {}}
    if path.exists():
        report["cases"] = json.loads(path.read_text())["cases"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="suanli-bench-") as folder:
        plain = Path(folder) / "plain.json"
        plain.write_text(codec.dumps(TrainPlan()))
        for name in args.cases.split(","):
            case = report["cases"].setdefault(name, {"plain": {}, "auto": {}})
            for seed in range(args.seeds):
                for side, plan in (("plain", str(plain)), ("auto", "auto")):
                    if str(seed) in case[side]:
                        continue
                    print(f"{name}, {side}, seed {seed}", file=sys.stderr)
                    case[side][str(seed)] = train(name, plan, seed, args)
                    case["measured"] = moment()
                    path.write_text(json.dumps(report, indent=1) + "\n")
            sides = [[run["accuracy"] for run in case[s].values()] for s in ("plain", "auto")]
            case["verdict"] = verdict(*sides)
            path.write_text(json.dumps(report, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
