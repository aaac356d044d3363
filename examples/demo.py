"""The main job on real input: train on handwritten digits, optimise, prove, show how to call it.

    python examples/demo.py [--budget SECONDS] [-o FOLDER]

The digits ship inside scikit-learn (1,797 images of 8x8, here enlarged to 32x32); nothing is
downloaded. 720 of them are kept for acceptance, so that a drop of 1.0 point can be ruled out.
"""

import argparse
import sys
import time
from pathlib import Path

from suanli import api
from suanli.base.train_results import TrainProgress
from suanli.reports import text
from suanli.training.fit import FitResult, fit
from suanli.workloads.record import Workload
from suanli.workloads.resolve import resolve
from suanli.workloads.weights import save_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=120.0, help="seconds to search")
    parser.add_argument("-o", "--out", type=Path, default=Path("demo-engine"))
    parser.add_argument("--for", dest="objective", default="latency")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    weights = args.out.with_name(args.out.name + "-weights.safetensors")
    print("1. Training a small residual CNN on 897 handwritten digits")
    started = time.monotonic()
    workload = resolve("digits-resnet")
    trained = fit(workload, seed=args.seed, max_seconds=55, progress=_progress)
    save_weights(trained.model, weights, {"workload": "digits-resnet", "seed": str(args.seed)})
    accuracy = trained.acceptance_accuracy * 100
    print(f"   {accuracy:.2f} % on 720 unseen digits after {time.monotonic() - started:.0f} s")
    print(_shortfall(workload, trained))

    print(f"2. Searching for the fastest plan that loses at most 1.0 point ({args.objective})")
    with text.Live() as live:
        result = api.optimize_workload(
            "digits-resnet",
            api.OptimizeOptions(
                objective=args.objective, max_drop=1.0, budget_s=args.budget, out=args.out
            ),
            weights=weights,
            on_event=live.event,
        )
    text.optimize(result)


def _shortfall(workload: Workload, trained: FitResult) -> str:
    """What to know where the network is worse than it was meant to be; "" where it is not."""
    target, settings = workload.target, workload.training
    if target is None or settings is None or trained.acceptance_accuracy >= target:
        return ""
    meant = f"   note: {target * 100:.0f} % was meant"
    if trained.epochs > settings.epochs - 0.01:
        return f"{meant}; another --seed may reach it\n"
    return (
        f"{meant}, but time ran out after {trained.epochs:.1f} of {settings.epochs} epochs: this "
        "machine is slow\n   or busy. The search goes on with this weaker network: figures of "
        "speed hold, those of\n   accuracy say less\n"
    )


def _progress(at: TrainProgress) -> None:
    end = "\r" if sys.stderr.isatty() else "\n"
    sys.stderr.write(
        f"   epoch {at.epoch}/{at.epochs}, loss {at.loss:.3f}, "
        f"{at.samples_per_s:,.0f} images/s, {at.done * 100:.0f} %   {end}"
    )


if __name__ == "__main__":
    main()
