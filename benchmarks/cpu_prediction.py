"""How far the CPU's predicted step is from the measured one, for built-in workloads.

    python -m benchmarks.cpu_prediction --out benchmarks/results/cpu/prediction-infer.json
    python -m benchmarks.cpu_prediction --train --out benchmarks/results/cpu/prediction-train.json
    python -m benchmarks.fit_cpu [--check]

Some minutes each; `--workloads resnet50,bert-base` takes some, `--seconds 1` is a trial. Measures
this machine's ceilings (or reads those that `suanli doctor` kept), then eager fp32 steps in this
process. So that another process on the machine does not make the model look wrong, a large product
and a large read are timed beside every few steps, the ceilings are brought to what these reach at
that moment, and the ratio of prediction to measurement is the median over such blocks. Figures to
be published still want a quiet machine. The file holds the ceilings and every block, so that
`benchmarks.fit_cpu` can fit the constants to them and say how far off they are on
workloads left out.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import machine
from suanli.base import codec
from suanli.base.hardware import Ceilings
from suanli.base.work import Work
from suanli.cost.cpu_time import predict_cpu_ms
from suanli.cost.rates import achieved
from suanli.measure.capture import capture
from suanli.measure.ceilings import ceilings
from suanli.workloads.record import Inputs
from suanli.workloads.resolve import resolve

_SECONDS = 4.0
_BLOCK_SECONDS = 0.5
_FEWEST_BLOCKS = 3

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


def compare(
    name: str, batch: int, found: Ceilings, *, training: bool, seconds: float = _SECONDS
) -> dict[str, Any]:
    """Predicted and measured milliseconds of one step of a workload."""
    workload = resolve(name, weights="none")
    model, inputs = workload.make_model(), workload.make_inputs(batch)
    step = _training_step(model, inputs) if training else _inference(model, inputs)
    work = work_of(name, batch, training=training)
    blocks = list(_blocks(step, work, found, seconds))
    ratio = statistics.median(b["predicted_ms"] / b["measured_ms"] for b in blocks)
    measured_ms = statistics.median(b["measured_ms"] for b in blocks)
    return {
        "workload": name,
        "batch": batch,
        "training": training,
        "blocks": blocks,
        "measured_ms": measured_ms,
        "predicted_ms": ratio * measured_ms,
        "quiet_predicted_ms": predict_cpu_ms(work, found, precision="fp32").p50,
        "ratio": ratio,
    }


def work_of(name: str, batch: int, *, training: bool) -> Work:
    """The step's operators; the update is plain SGD, as it is timed."""
    workload = resolve(name, weights="none")
    inputs = workload.make_inputs(batch)
    return capture(
        workload.make_model(),
        inputs.args,
        inputs.kwargs,
        batch=batch,
        training=training,
        optimizer="sgd",
    )


def _blocks(
    step: Callable[[], None], work: Work, found: Ceilings, seconds: float
) -> Iterator[dict[str, float]]:
    """Milliseconds of blocks of steps, each beside its yardsticks."""
    yardsticks = _Yardsticks()
    step()
    end = time.perf_counter() + seconds
    count = 0
    while count < _FEWEST_BLOCKS or time.perf_counter() < end:
        before = yardsticks.rates()
        measured = _median_ms(step, _BLOCK_SECONDS)
        after = yardsticks.rates()
        now = {what: math.sqrt(before[what] * after[what]) for what in before}
        predicted = predict_cpu_ms(work, as_of_now(found, now), precision="fp32").p50
        yield {"measured_ms": measured, "predicted_ms": predicted, **now}
        count += 1


class _Yardsticks:
    """A product and a read that are large enough to show what the machine has left to give."""

    def __init__(self) -> None:
        self._square = torch.randn(1024, 1024)
        self._long = torch.randn(2**25)  # 128 MiB, beyond every cache

    def rates(self) -> dict[str, float]:
        """FLOP/s of the product and B/s of the read."""
        with torch.inference_mode():
            product_ms = _median_ms(lambda: torch.mm(self._square, self._square), 0.15)
            read_ms = _median_ms(self._long.sum, 0.15)
        return {"matmul": 2e3 * 1024**3 / product_ms, "read": 4e3 * 2**25 / read_ms}


def _median_ms(run: Callable[[], Any], seconds: float) -> float:
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while len(durations) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        durations.append(1e3 * (time.perf_counter() - started))
    return statistics.median(durations)


def as_of_now(found: Ceilings, now: dict[str, float]) -> Ceilings:
    """The ceilings scaled to what the yardsticks reach, where that is less than they did."""
    slowest = found.read_bytes_per_s(float("inf")) or now["read"]
    fp32 = achieved(found, "fp32") or now["matmul"]
    scale = {"matmul": min(1.0, now["matmul"] / fp32), "read": min(1.0, now["read"] / slowest)}
    items = tuple(
        replace(
            item,
            hardware=item.hardware and item.hardware * scale[item.what],
            achieved=item.achieved and item.achieved * scale[item.what],
        )
        if item.what in scale
        else item
        for item in found.items
    )
    return replace(found, items=items)


def _inference(model: nn.Module, inputs: Inputs) -> Any:
    model.eval()

    def step() -> None:
        with torch.inference_mode():
            model(*inputs.args, **inputs.kwargs)

    return step


def _training_step(model: nn.Module, inputs: Inputs) -> Any:
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
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="of steps, a workload")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = ceilings("cpu")
    report: dict[str, Any] = {
        "schema": "suanli.cpu-prediction/1",
        "machine": machine(),
        "ceilings": json.loads(codec.dumps(found)),
        "rows": [],
    }
    for name in options.workloads.split(","):
        try:
            row = compare(
                name,
                CASES.get(name, 1),
                found,
                training=options.train,
                seconds=options.seconds,
            )
        except Exception as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        report["rows"].append(row)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(
            f"{name:18} measured {row['measured_ms']:8.2f} ms, predicted "
            f"{row['predicted_ms']:8.2f} ms, ratio {row['ratio']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
