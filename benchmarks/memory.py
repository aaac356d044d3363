"""Predicted against measured peak memory of a step on this CPU, for the built-in workloads.

    python -m benchmarks.memory [--batch 4] [--workload NAME ...] [--out FOLDER]

Measured is what torch's CPU allocator hands out and takes back during one eager step, read from
the profiler's memory events (the first step is left out), on top of weights and inputs. It is not
the process's resident size, which also holds the interpreter, the libraries and freed pages: that
is printed beside. Predicted is `suanli.cost.memory` on fake tensors. The optimiser is plain SGD.
"""

import argparse
import gc
import json
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from suanli.base import units
from suanli.cost.memory import Held, memory_use
from suanli.measure.capturing.traffic import moved_bytes, tensors_in
from suanli.predicting.here import make_step
from suanli.predicting.subject import subject
from suanli.workloads.resolve import names, resolve

_AIM = 0.10


@dataclass(frozen=True, kw_only=True)
class Row:
    workload: str
    mode: str
    dtype: str
    batch: int
    predicted_bytes: int
    measured_bytes: int
    error: float
    resident_bytes: int


def measured_peak(name: str, batch: int, *, training: bool, dtype: str) -> int:
    """Bytes at the fullest moment of the second step, weights and inputs included."""
    workload = resolve(name)
    step = make_step(workload, batch, training=training, dtype=dtype)
    step()
    for parameter in _parameters(step):
        parameter.grad = None
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    events = run.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    now = most = 0
    for _, size in changes:
        now += size
        most = max(most, now)
    return most + _held(step)


def _cells(step: object) -> dict[str, object]:
    names_ = step.__code__.co_freevars
    return {n: c.cell_contents for n, c in zip(names_, step.__closure__, strict=True)}


def _parameters(step: object) -> list[torch.nn.Parameter]:
    return list(_cells(step)["model"].parameters())


def _held(step: object) -> int:
    """Weights, buffers and inputs, which were there before."""
    cells = _cells(step)
    model = cells["model"]
    tensors = [*model.parameters(), *model.buffers()]
    tensors += tensors_in([cells["args"], cells["kwargs"]])
    return moved_bytes(tensors)


def predicted_peak(name: str, batch: int, *, training: bool, dtype: str) -> int:
    captured = subject(resolve(name), training=training, precision=dtype, optimizer="sgd", cpu=True)
    use = memory_use(captured.footprint(batch), captured.shape, Held())
    return use.total_bytes


def rows(workloads: list[str], batch: int, dtypes: list[str]) -> list[Row]:
    found = []
    for name in workloads:
        for training in (False, True):
            for dtype in dtypes:
                mode = "train" if training else "infer"
                predicted = predicted_peak(name, batch, training=training, dtype=dtype)
                measured = measured_peak(name, batch, training=training, dtype=dtype)
                found.append(
                    Row(
                        workload=name,
                        mode=mode,
                        dtype=dtype,
                        batch=batch,
                        predicted_bytes=predicted,
                        measured_bytes=measured,
                        error=predicted / measured - 1.0,
                        resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                    )
                )
                show(found[-1])
                gc.collect()
    return found


def show(row: Row) -> None:
    flag = "" if abs(row.error) <= _AIM else "  <- beyond 10 %"
    print(
        f"{row.workload:20} {row.mode:5} {row.dtype:5} {units.size(row.predicted_bytes):>10} "
        f"predicted {units.size(row.measured_bytes):>10} measured {row.error:+7.1%}{flag}",
        flush=True,
    )


def table(found: list[Row]) -> str:
    """The rows as people read them."""
    lines = [
        "| workload | step | batch | predicted | measured | error |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.workload} | {row.mode}, {row.dtype} | {row.batch} | "
        f"{units.size(row.predicted_bytes)} | {units.size(row.measured_bytes)} | "
        f"{100 * row.error:+.1f} % |"
        for row in found
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workload", action="append", choices=names())
    parser.add_argument("--dtype", action="append", choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = rows(arguments.workload or names(), arguments.batch, arguments.dtype or ["fp32"])
    within = sum(abs(row.error) <= _AIM for row in found)
    print(f"{within} of {len(found)} within {_AIM:.0%}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        record = {"schema": "suanli.memory-errors/1", "rows": [asdict(row) for row in found]}
        (arguments.out / "memory.json").write_text(json.dumps(record, indent=1) + "\n")
        (arguments.out / "memory.md").write_text(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
