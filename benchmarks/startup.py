"""What a person waits before anything happens: `suanli --help`, and importing the package.

    python -m benchmarks.startup [--runs 15] [--out FILE]

Every run is a process of its own; the commands take turns, so that a drift of the machine falls on
all of them. The first round fills the file cache and is not counted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

HERE = Path(__file__).parent
GOAL_S = 0.4  # for `suanli --help`

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "suanli --help": ["-m", "suanli.cli", "--help"],
    "suanli optimize --help": ["-m", "suanli.cli", "optimize", "--help"],
    "import suanli": ["-c", "import suanli"],
    "import torch": ["-c", "import torch"],
}


def measure(runs: int) -> dict[str, Any]:
    """Seconds per command: median, least and most of `runs` processes."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(runs + 1):
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, timeout=120
            )
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {
        name: {"p50": statistics.median(times), "least": min(times), "most": max(times)}
        for name, times in seconds.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu" / "startup.json")
    args = parser.parse_args()
    report = {"machine": machine(), "runs": args.runs, "seconds": measure(args.runs)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, times in report["seconds"].items():
        print(f"{name:24} {times['p50']:.3f} s ({times['least']:.3f}-{times['most']:.3f})")
    took = report["seconds"]["suanli --help"]["p50"]
    print(f"suanli --help: {'within' if took < GOAL_S else 'MISSES'} {GOAL_S} s")
    return 0 if took < GOAL_S else 1


if __name__ == "__main__":
    raise SystemExit(main())
