"""How far the CPU's predicted step is from the measured one, for built-in workloads.

    python -m benchmarks.cpu_prediction [--workloads resnet50,bert-base] [--train] [--out FILE]

Measures this machine's ceilings (or reads those that `suanli doctor` kept), then eager fp32 steps
in this process. Run it on a quiet machine: any other process makes the measured step longer.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from suanli.base.hardware import Ceilings
from suanli.cost.cpu_time import predict_cpu_ms
from suanli.measure.capture import capture
from suanli.measure.ceilings import ceilings
from suanli.measure.timing import measure
from suanli.workloads.record import Inputs, Workload
from suanli.workloads.resolve import resolve

CASES = {
    "resnet50": 4,
    "bert-base": 2,
    "digits-resnet": 64,
    "resnet18-cifar": 32,
    "mobilenetv2": 4,
    "vit-small": 4,
    "unet": 2,
    "gpt2-small": 1,
    "mnist-cnn": 64,
}


def compare(name: str, batch: int, found: Ceilings, *, training: bool) -> dict[str, Any]:
    """Predicted and measured milliseconds of one step of a workload."""
    workload = resolve(name, weights="none")
    model, inputs = workload.make_model(), workload.make_inputs(batch)
    step = _training_step(model, workload, inputs) if training else _inference(model, inputs)
    work = capture(
        workload.make_model(), inputs.args, inputs.kwargs, batch=batch, training=training
    )
    predicted = predict_cpu_ms(work, found, precision="fp32")
    measured = measure(step, min_seconds=1.0, max_seconds=6.0).step_ms
    return {
        "workload": name,
        "batch": batch,
        "training": training,
        "measured_ms": measured.p50,
        "predicted_ms": predicted.p50,
        "lo90": predicted.lo90,
        "hi90": predicted.hi90,
        "ratio": predicted.p50 / measured.p50,
    }


def _inference(model: nn.Module, inputs: Inputs) -> Any:
    model.eval()

    def step() -> None:
        with torch.inference_mode():
            model(*inputs.args, **inputs.kwargs)

    return step


def _training_step(model: nn.Module, workload: Workload, inputs: Inputs) -> Any:
    model.train()
    update = torch.optim.SGD(model.parameters(), lr=1e-9)

    def step() -> None:
        update.zero_grad()
        out = model(*inputs.args, **inputs.kwargs)
        first = next(iter(out.values())) if isinstance(out, dict) else out
        first = first[0] if isinstance(first, tuple) else first
        first.float().sum().backward()
        update.step()

    return step


def main() -> None:
    """Compare all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default=",".join(CASES))
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = ceilings("cpu")
    rows = []
    for name in options.workloads.split(","):
        try:
            row = compare(name, CASES.get(name, 1), found, training=options.train)
        except Exception as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        rows.append(row)
        print(
            f"{name:18} measured {row['measured_ms']:8.2f} ms, predicted "
            f"{row['predicted_ms']:8.2f} ms, ratio {row['ratio']:.2f}",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
