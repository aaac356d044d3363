"""How far the CPU's predicted step is from the measured one, for built-in workloads.

    python -m benchmarks.cpu_prediction --out benchmarks/results/cpu/prediction-infer.json
    python -m benchmarks.cpu_prediction --train --out benchmarks/results/cpu/prediction-train.json
    python -m benchmarks.fit_cpu [--check]

Some minutes each; `--workloads resnet50,bert-base` takes some, `--seconds 1` is a trial. Measures
this machine's ceilings (or reads those that `suanli doctor` kept), then eager fp32 steps, each
workload in a process of its own: what glibc's heap gives back to the system, and takes anew in the
next step, depends on all that ran in the process before. Its page faults are counted.

So that another process on the machine does not make the model look wrong, a large product and a
large read are timed beside every few steps, the ceilings are brought to what these reach at that
moment, and the ratio of prediction to measurement is the median over such blocks. Figures to be
published still want a quiet machine. The file holds the ceilings and every block, so that
`benchmarks.fit_cpu` can fit the constants to them and say how far off they are on workloads left
out.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
from suanli.cost.heap import handed_out_anew
from suanli.cost.rates import achieved
from suanli.measure.capture import capture
from suanli.measure.ceilings import ceilings
from suanli.measure.footprint import footprint
from suanli.workloads.record import Inputs
from suanli.workloads.resolve import resolve

_SECONDS = 4.0
_BLOCK_SECONDS = 0.5
_FEWEST_BLOCKS = 3
_WARM_UPS = 4  # steps until the heap's ends are where they stay
_PAGE = 4096

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
    """Predicted and measured milliseconds of one step of a workload, in this process."""
    workload = resolve(name, weights="none")
    model, inputs = workload.make_model(), workload.make_inputs(batch)
    step = _training_step(model, inputs) if training else _inference(model, inputs)
    blocks = list(_blocks(step, seconds))
    work = work_of(name, batch, training=training)
    fresh = fresh_bytes(name, batch, training=training)
    for block in blocks:
        now = as_of_now(found, block)
        block["predicted_ms"] = predict_cpu_ms(work, now, precision="fp32", fresh_bytes=fresh).p50
    ratio = statistics.median(b["predicted_ms"] / b["measured_ms"] for b in blocks)
    measured_ms = statistics.median(b["measured_ms"] for b in blocks)
    return {
        "workload": name,
        "batch": batch,
        "training": training,
        "blocks": blocks,
        "measured_ms": measured_ms,
        "predicted_ms": ratio * measured_ms,
        "fresh_bytes": fresh,
        "fault_bytes": statistics.median(b["fault_bytes"] for b in blocks),
        "quiet_predicted_ms": predict_cpu_ms(work, found, precision="fp32", fresh_bytes=fresh).p50,
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


def fresh_bytes(name: str, batch: int, *, training: bool) -> float:
    """Bytes that the system hands out anew in each of the workload's steps."""
    workload = resolve(name, weights="none")
    inputs = workload.make_inputs(batch)
    model = workload.make_model()
    found = footprint(model, inputs.args, inputs.kwargs, batch=batch, training=training, cpu=True)
    return handed_out_anew(found)


def _blocks(step: Callable[[], None], seconds: float) -> Iterator[dict[str, float]]:
    """Milliseconds of blocks of steps, each beside its yardsticks."""
    yardsticks = _Yardsticks()
    for _ in range(_WARM_UPS):
        step()
    end = time.perf_counter() + seconds
    count = 0
    while count < _FEWEST_BLOCKS or time.perf_counter() < end:
        before = yardsticks.rates()
        before_faults = _faults()
        durations = _durations_ms(step, _BLOCK_SECONDS)
        faults = (_faults() - before_faults) / len(durations)
        after = yardsticks.rates()
        now = {what: math.sqrt(before[what] * after[what]) for what in before}
        measured = statistics.median(durations)
        yield {"measured_ms": measured, "fault_bytes": _PAGE * faults, **now}
        count += 1


class _Yardsticks:
    """A product and a read that are large enough to show what the machine has left to give."""

    def __init__(self) -> None:
        # what it gives stands ready: a block that comes and goes would move the heap's thresholds
        self._square, self._out = torch.randn(1024, 1024), torch.empty(1024, 1024)
        self._long = torch.randn(2**25)  # 128 MiB, beyond every cache

    def rates(self) -> dict[str, float]:
        """FLOP/s of the product and B/s of the read."""
        with torch.inference_mode():
            product_ms = statistics.median(_durations_ms(self._multiply, 0.15))
            read_ms = statistics.median(_durations_ms(self._long.sum, 0.15))
        return {"matmul": 2e3 * 1024**3 / product_ms, "read": 4e3 * 2**25 / read_ms}

    def _multiply(self) -> None:
        torch.mm(self._square, self._square, out=self._out)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _durations_ms(run: Callable[[], Any], seconds: float) -> list[float]:
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while len(durations) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        durations.append(1e3 * (time.perf_counter() - started))
    return durations


def as_of_now(found: Ceilings, now: Mapping[str, float]) -> Ceilings:
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


def _row(name: str, found: Ceilings, training: bool, seconds: float) -> dict[str, Any]:
    return compare(name, CASES.get(name, 1), found, training=training, seconds=seconds)


def _apart(name: str, *, training: bool, seconds: float) -> dict[str, Any] | None:
    """The row of a workload that is timed in a process of its own; None where it fails."""
    command = [sys.executable, "-m", "benchmarks.cpu_prediction", "--here"]
    command += ["--workloads", name, "--seconds", str(seconds), *["--train"] * training]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{name}: its process failed", file=sys.stderr)
        return None
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Compare all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default=",".join(CASES))
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="of steps, a workload")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help="one, and its row as JSON")
    options = parser.parse_args()
    found = ceilings("cpu")
    if options.here:
        name = options.workloads
        print(json.dumps(_row(name, found, options.train, options.seconds)))
        return
    report: dict[str, Any] = {
        "schema": "suanli.cpu-prediction/1",
        "machine": machine(),
        "ceilings": json.loads(codec.dumps(found)),
        "rows": [],
    }
    for name in options.workloads.split(","):
        row = _apart(name, training=options.train, seconds=options.seconds)
        if row is None:
            continue
        report["rows"].append(row)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(
            f"{name:18} measured {row['measured_ms']:8.2f} ms, predicted "
            f"{row['predicted_ms']:8.2f} ms, ratio {row['ratio']:.2f}, anew "
            f"{1e-6 * row['fault_bytes']:6.1f} MB, predicted {1e-6 * row['fresh_bytes']:6.1f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
