"""A sharded run of torchrun in which one process's share becomes NaN in the last update."""

import os
import sys
from pathlib import Path

import torch

from suanli.training.calls import TrainOptions, train_workload
from suanli.training.step import Stepper

_REF = f"{Path(__file__).with_name('train_parts.py')}:still_recipe"


def main(out: Path) -> None:
    """Train one epoch, with a checkpoint after each step."""
    real = Stepper.update

    def broken(self: Stepper, done: float) -> None:
        real(self, done)
        if done > 0.8 and os.environ["RANK"] == "1":
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.to_local().fill_(float("nan"))  # type: ignore[operator]

    Stepper.update = broken  # type: ignore[method-assign]
    options = TrainOptions(
        out=out, plan="default", device="cpu", sharded=True, epochs=1, checkpoint_s=1e-9
    )
    try:
        train_workload(_REF, options.checked())
    finally:
        print("ended", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
