"""Programs as written: does the plan that was found learn as well as the plain loop?

    python -m benchmarks.seed_band --data DATA [--cases mnist-cnn,mnist-mlp] [--minutes 45]

Each program is trained with the plain fp32 loop and with the plan of `results/cpu/training.md`, as
`suanli train --plan auto` found it (one search where that table has none), from the same seeds with
the hyper-parameters as written.

The seed band is what the plain loop's own accuracy varies by: two standard deviations over its
seeds, or 0.5 points where that is less. The plan is within it where a one-sided t-test (Welch)
shows at 95 % that its mean is not worse than the plain loop's by more than the band. How many seeds
a program gets is fixed before any of them runs, and the clock alone may cut them (`--minutes`).
Another call goes on: what is in the results already is not done again.
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
from suanli.base.train_plan import TrainPlan

HERE = Path(__file__).parent
# program -> seeds: more where they differ more; some 55 minutes on two cores
CASES = {
    "cifar10-cnn": 5,
    "cifar10-lenet": 5,
    "mnist-cnn": 3,
    "mnist-cnn-small": 3,
    "mnist-mlp": 5,
}
SIDES = ("plain", "found")  # the plain loop, and the plan that was found
_DEVIATIONS = 2.0
_LEAST_BAND = 0.005  # of accuracy
_BUDGET_S = 120.0  # for the one search of a program that has no plan yet


class FailedError(Exception):
    """A run came to nothing."""


def train(case: str, plan: str, args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The result of `suanli train`.

    Raises:
        FailedError: It ended with another code than 0.
    """
    with tempfile.TemporaryDirectory(prefix="suanli-bench-") as folder:
        command = [
            *(sys.executable, "-m", "suanli", "train", case, "--plan", plan, "--json"),
            *("-o", f"{folder}/run", "--data", str(args.data), *more),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise FailedError(f"{' '.join(command)} ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def found_plan(case: str, args: argparse.Namespace) -> TrainPlan:
    """The program's plan in the table of speeds; else one that is searched now.

    Raises:
        FailedError: The search found nothing.
    """
    if args.plans.is_file():
        known = json.loads(args.plans.read_text())["cases"].get(case, {}).get("plan")
        if known:
            return codec.from_json(TrainPlan, known).checked()
    print(f"{case}: searching a plan", file=sys.stderr)
    result = train(case, "auto", args, "--budget", str(_BUDGET_S), "--max-seconds", "5")
    return codec.from_json(TrainPlan, result["plan"]).checked()


def one_run(case: str, plan: TrainPlan, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train once; figures of the run."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="suanli-bench-") as folder:
        path = Path(folder) / "plan.json"
        path.write_text(codec.dumps(plan))
        epochs = ("--epochs", str(args.epochs)) if args.epochs else ()
        result = train(case, str(path), args, "--seed", str(seed), *epochs)
    return {
        "accuracy": result["quality"]["value"],
        "n": result["quality"]["n"],
        "train_seconds": result["train_seconds"],
        "whole_seconds": time.monotonic() - started,
        "samples_per_s": result["samples_per_s"],
        "epochs": result["epochs"],
        "as_written": result["as_written"],
        **moment(),
    }


def verdict(plain: list[float], plan: list[float]) -> dict[str, Any]:
    """Whether a plan's accuracies are within the band of the plain loop's.

    Returns:
        `difference` of the means, `lower95`, the least that it is with 95 %, `band`, and `within`;
        the last three None where a side has less than two seeds.
    """
    difference = statistics.fmean(plan) - statistics.fmean(plain)
    if min(len(plain), len(plan)) < 2:
        return {"difference": difference, "lower95": None, "band": None, "within": None}
    from scipy import stats

    parts = [statistics.variance(side) / len(side) for side in (plain, plan)]
    error, lower = math.sqrt(sum(parts)), difference
    if error > 0:
        sizes = [len(side) - 1 for side in (plain, plan)]
        freedom = sum(parts) ** 2 / sum(p**2 / n for p, n in zip(parts, sizes, strict=True))
        lower -= float(stats.t.ppf(0.95, freedom)) * error
    band = max(_LEAST_BAND, _DEVIATIONS * statistics.stdev(plain))
    return {"difference": difference, "lower95": lower, "band": band, "within": lower >= -band}


def done(case: dict[str, Any]) -> list[str]:
    """The seeds that both sides have."""
    first, second = (case[side] for side in SIDES)
    return [seed for seed in first if seed in second]


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    here = report["machine"]
    lines = [
        f"# Five programs of tutorials as written, on {here['cpu']}, {here['cores']} cores",
        "",
        f"{here['date']}. Made by `python -m benchmarks.seed_band`. Accuracy on the acceptance "
        "part (8,000 test images): mean, and the least and the most of the seeds; seconds of "
        "training, compiling included. The plain loop here is Suanli's own in eager fp32, which "
        "streams batches without a DataLoader: the tutorials' loops are slower (see training.md). "
        "The band is two standard deviations of the plain loop's seeds, at least 0.5 points; the "
        "plan is within it where the difference of the means is with 95 % no worse.",
        "",
        "| program | plan | epochs | seeds | plain: accuracy, seconds | plan: accuracy, seconds "
        "| difference (with 95 % at least), points | band | within |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in report["cases"].items():
        if "verdict" not in case:
            continue
        seeds = done(case)
        cells = [_side([case[side][seed] for seed in seeds]) for side in SIDES]
        found, words = case["verdict"], {True: "yes", False: "not shown", None: "one seed"}
        least = "-" if found["lower95"] is None else f"{100 * found['lower95']:+.2f}"
        band = "-" if found["band"] is None else f"{100 * found['band']:.2f}"
        epochs = case["plain"][seeds[0]]["epochs"]
        lines.append(
            f"| {name} | `{case['title']}` | {epochs:g} | {len(seeds)} "
            f"| {cells[0]} | {cells[1]} | {100 * found['difference']:+.2f} ({least}) "
            f"| {band} | {words[found['within']]} |"
        )
    return "\n".join(lines) + "\n"


def _side(runs: list[dict[str, Any]]) -> str:
    """Accuracy and seconds of one side's seeds."""
    accuracy = [run["accuracy"] for run in runs]
    seconds = statistics.fmean(run["train_seconds"] for run in runs)
    spread = f" ({min(accuracy):.2%} to {max(accuracy):.2%})" if len(runs) > 1 else ""
    return f"{statistics.fmean(accuracy):.2%}{spread}, {seconds:.3g}"


def in_turn(wanted: dict[str, int]) -> list[tuple[int, str]]:
    """(seed, program) in the order of the runs: a seed of each program before the next seed."""
    return [(s, name) for s in range(max(wanted.values())) for name in wanted if s < wanted[name]]


def begun(report: dict[str, Any], name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The program's entry in the report, with its plan.

    Raises:
        FailedError: The search for a plan found nothing.
    """
    if name not in report["cases"]:
        plan = found_plan(name, args)
        entry = {"plan": codec.to_json(plan), "title": plan.title}
        report["cases"][name] = {**entry, **{side: {} for side in SIDES}}
    case: dict[str, Any] = report["cases"][name]
    return case


def run_pair(case: dict[str, Any], name: str, seed: int, args: argparse.Namespace) -> None:
    """Train both sides from a seed, but for what is done, and judge the seeds so far.

    Raises:
        FailedError: A run came to nothing.
    """
    plans = {"plain": TrainPlan(), "found": codec.from_json(TrainPlan, case["plan"])}
    for side in SIDES:
        if str(seed) not in case[side]:
            print(f"{name}, {side}, seed {seed}", file=sys.stderr)
            case[side][str(seed)] = one_run(name, plans[side], seed, args)
    accuracy = [[case[side][seed]["accuracy"] for seed in done(case)] for side in SIDES]
    case["verdict"] = verdict(*accuracy)


def expected_s(case: dict[str, Any], seed: int) -> float:
    """Seconds that a seed's runs will take, by those of the other seeds; 0 where none is done."""
    todo = [case[side] for side in SIDES if str(seed) not in case[side]]
    return float(sum(max((run["whole_seconds"] for run in s.values()), default=0) for s in todo))


def measure(report: dict[str, Any], wanted: dict[str, int], args: argparse.Namespace) -> None:
    """All runs that are not done and that the time allows; the report is kept after each pair."""
    ends = time.monotonic() + 60 * args.minutes
    failed: set[str] = set()
    for seed, name in in_turn(wanted):
        if name in failed:
            continue
        try:
            case = begun(report, name, args)
            if time.monotonic() + expected_s(case, seed) > ends:
                print(f"{name}, seed {seed}: no time left", file=sys.stderr)
                continue
            run_pair(case, name, seed, args)
        except FailedError as error:
            print(f"{name}: {error}; its other seeds are left out", file=sys.stderr)
            failed.add(name)
        finally:
            args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(table(report))


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """The report so far.

    Raises:
        SystemExit: It has runs of other epochs than those that are asked for.
    """
    path = args.out.with_suffix(".json")
    report: dict[str, Any] = {"machine": machine(), "epochs": args.epochs, "cases": {}}
    if path.exists():
        before = json.loads(path.read_text())
        if before["epochs"] != args.epochs:
            raise SystemExit(f"{path} holds runs of other epochs: give another --out")
        report["cases"] = before["cases"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--cases", default=",".join(CASES), help="names, with commas")
    parser.add_argument("--seeds", type=int, help="how many of each, instead of those of CASES")
    parser.add_argument("--epochs", type=int, help="instead of those as written, to try it out")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run that passes")
    results = HERE / "results" / "cpu"
    parser.add_argument("--plans", type=Path, default=results / "training.json")
    parser.add_argument("--out", type=Path, default=results / "seed-band")
    args = parser.parse_args()
    names = args.cases.split(",")
    if unknown := set(names) - set(CASES):
        raise SystemExit(f"there is no {', '.join(sorted(unknown))}: {', '.join(CASES)}")
    report = begin(args)
    try:
        measure(report, {name: args.seeds or CASES[name] for name in names}, args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
    print(table(report))


if __name__ == "__main__":
    main()
