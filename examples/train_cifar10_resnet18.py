"""Train a ResNet-18 with the CIFAR stem on CIFAR-10 and save its weights.

python examples/train_cifar10_resnet18.py --data DATA --out resnet18-cifar.safetensors

DATA is a folder with `cifar10/` in it: the official binary batches or parquet files. Then:

suanli optimize resnet18-cifar --weights resnet18-cifar.safetensors --data DATA
"""

import argparse
import sys
from pathlib import Path

from suanli.base.errors import SuanliError
from suanli.base.train_results import TrainProgress
from suanli.training.fit import fit
from suanli.workloads.resolve import resolve
from suanli.workloads.weights import save_weights


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with cifar10/ (or set SUANLI_DATA)")
    parser.add_argument("--out", type=Path, default=Path("resnet18-cifar.safetensors"))
    parser.add_argument("--epochs", type=int, help="passes over the 50,000 images")
    parser.add_argument("--max-seconds", type=float, help="shorten the training to this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    try:
        workload = resolve("resnet18-cifar", data=arguments.data, weights="none")
        result = fit(
            workload,
            seed=arguments.seed,
            epochs=arguments.epochs,
            max_seconds=arguments.max_seconds,
            device=arguments.device,
            progress=_show,
        )
    except SuanliError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"\n{result.epochs:.2f} epochs in {result.seconds:.0f} s "
        f"({result.samples_per_s:.0f} images/s, {result.precision})"
    )
    print(f"accuracy on the search part: {result.search_accuracy:.2%}")
    print(f"accuracy on the acceptance part: {result.acceptance_accuracy:.2%}")
    facts = {"workload": workload.name, "acceptance_accuracy": f"{result.acceptance_accuracy:.4f}"}
    save_weights(result.model, arguments.out, facts)
    print(f"saved {arguments.out}")
    return 0


def _show(progress: TrainProgress) -> None:
    end = "\n" if not sys.stdout.isatty() else "\r"
    print(
        f"epoch {progress.epoch}/{progress.epochs}  {progress.done:6.1%}  "
        f"loss {progress.loss:.3f}  {progress.samples_per_s:.0f} images/s  "
        f"{progress.seconds:.0f} s",
        end=end,
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
