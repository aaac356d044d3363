"""Fits the CPU's constants to measured steps and says how far off they are on workloads left out.

    python -m benchmarks.fit_cpu [--check] [--from FILE ...]

Reads what `benchmarks.cpu_prediction` wrote, for inference and training. Each workload is left out
once, with both of its rows, and predicted by constants that were fitted to the others; the table
of that goes to results/cpu/prediction.md, and constants fitted to all go into the package. Every
constant has a prior with a width: one machine and nine networks say little of some. Priors of the
shares, of elements in pools and of pages are medians of single operators on one thread, beside a
large product.
"""

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu_prediction import as_of_now, fresh_bytes, work_of
from benchmarks.fit_predictor import rounded
from benchmarks.predictor.fitting import FILE, Knob, as_parameters, fit, stored
from suanli.base.codec import from_json
from suanli.base.hardware import Ceilings
from suanli.base.work import Operator
from suanli.cost.cpu_time import Demand, bytes_anew, demand, seconds_of, setting
from suanli.cost.parameters import CpuParameters, Parameters
from suanli.cost.rates import achieved

_FOLDER = Path(__file__).parent / "results" / "cpu"
_TARGET = 0.25


def _knob(*path: str, prior: float, width: float) -> Knob:
    return Knob(path=("cpu", *path), prior=prior, width=width)


KNOBS = (
    _knob("share", "product", prior=0.9, width=0.15),
    _knob("share", "convolution", prior=0.85, width=0.15),
    _knob("share", "attention", prior=0.5, width=0.4),
    _knob("grouped_share", prior=0.08, width=0.3),
    _knob("gradient_share", prior=0.82, width=0.2),
    *(
        _knob("traffic", kind, prior=prior, width=0.3)
        for kind, prior in (
            ("pointwise", 1.0),
            ("rows", 1.2),
            ("update", 1.0),
            ("product", 1.0),
            ("convolution", 1.0),
        )
    ),
    _knob("layout_traffic", prior=1.0, width=0.5),
    _knob("weights_traffic", prior=1.0, width=0.3),
    _knob("element_s", prior=1e-9, width=0.2),
    _knob("fresh_s_per_byte", prior=3.5e-10, width=0.5),
    _knob("call_s", prior=4e-6, width=0.5),
    _knob("backward_call_s", prior=8e-6, width=0.5),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One workload, timed.

    Attributes:
        fresh_bytes: Of memory that the system hands out anew in a step, as predicted.
        blocks: Ceilings at the time of a block of steps, and seconds of a step in it.
        demands: What operators ask for in each block; equal ones once, with how often they run.
    """

    workload: str
    batch: int
    training: bool
    fresh_bytes: float
    blocks: tuple[tuple[Ceilings, float], ...]
    demands: tuple[tuple[tuple[Demand, int], ...], ...]


def measured(files: Sequence[Path]) -> list[Measured]:
    """What the files hold."""
    found = []
    for file in files:
        report = json.loads(file.read_text(encoding="utf-8"))
        limits = from_json(Ceilings, report["ceilings"])
        for row in report["rows"]:
            blocks = tuple(
                (as_of_now(limits, {k: b[k] for k in ("matmul", "read")}), b["measured_ms"] * 1e-3)
                for b in row["blocks"]
            )
            found.append(
                Measured(
                    workload=row["workload"],
                    batch=row["batch"],
                    training=row["training"],
                    fresh_bytes=_anew(row["workload"], row["batch"], row["training"]),
                    blocks=blocks,
                    demands=tuple(_demands(row, limits) for limits, _ in blocks),
                )
            )
    return found


def _demands(row: dict[str, Any], limits: Ceilings) -> tuple[tuple[Demand, int], ...]:
    found: Counter[Demand] = Counter()
    operators = _operators(row["workload"], row["batch"], row["training"])
    step = setting(op for op, n in operators for _ in range(n))
    for op, n in operators:
        found[demand(op, limits, "fp32", step)] += n
    return tuple(found.items())


@cache
def _operators(name: str, batch: int, training: bool) -> tuple[tuple[Operator, int], ...]:
    work = work_of(name, batch, training=training)
    plain = (replace(op, module="", source="") for op in work.operators)
    return tuple(Counter(plain).items())


@cache
def _anew(name: str, batch: int, training: bool) -> float:
    replayed = 0.0 if training else fresh_bytes(name, batch, training=False)
    operators = _operators(name, batch, training)
    return bytes_anew((op for op, n in operators for _ in range(n)), replayed)


def error(row: Measured, p: CpuParameters) -> float:
    """log(predicted / measured), the median over blocks."""
    logs = []
    for place, (limits, seconds) in enumerate(row.blocks):
        rate = achieved(limits, "fp32") or float("inf")
        total = sum(n * seconds_of(need, rate, "eager", p) for need, n in row.demands[place])
        total += p.fresh_s_per_byte * row.fresh_bytes
        logs.append(math.log(max(total, limits.overhead_s()) / seconds))
    return statistics.median(logs)


def _typical(row: Measured) -> Measured:
    """The row with its middle block alone: as good for a fit, and several times faster."""
    order = sorted(range(len(row.blocks)), key=lambda i: row.blocks[i][1])
    middle = order[len(order) // 2]
    return replace(row, blocks=(row.blocks[middle],), demands=(row.demands[middle],))


def fitted(found: Sequence[Measured]) -> dict[str, Any]:
    """The parameter file with the CPU's constants fitted to these rows."""
    quick = [_typical(row) for row in found]

    def errors(p: Parameters) -> list[Any]:
        modes = ([r for r in quick if r.training is training] for training in (False, True))
        return [np.array([error(row, p.cpu) for row in rows]) for rows in modes if rows]

    return fit(stored(), KNOBS, errors, steps=6)


def main() -> None:
    """Leave each workload out, then fit to all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fit, but do not write")
    parser.add_argument(
        "--from",
        dest="files",
        nargs="+",
        type=Path,
        default=[_FOLDER / "prediction-infer.json", _FOLDER / "prediction-train.json"],
    )
    options = parser.parse_args()
    rows = measured(options.files)
    after = rounded(fitted(rows))
    every = as_parameters(after).cpu
    lines, logs, all_in = [], [], []
    for name in dict.fromkeys(row.workload for row in rows):
        p = as_parameters(fitted([row for row in rows if row.workload != name])).cpu
        for row in rows:
            if row.workload == name:
                logs.append(error(row, p))
                all_in.append(error(row, every))
                lines.append(_line(row, logs[-1], all_in[-1]))
                print(lines[-1], flush=True)
    text = _table(lines, logs, all_in)
    print(text)
    after["cpu"]["spread"] = float(f"{max(0.1, _reach(logs) / 1.645):.2g}")
    as_parameters(after)
    if options.check:
        print(json.dumps(after["cpu"], indent=2))
        return
    FILE.write_text(json.dumps(after, indent=2) + "\n", encoding="utf-8")
    (_FOLDER / "prediction.md").write_text(text, encoding="utf-8")
    print(f"wrote {FILE.name} and prediction.md")


def _line(row: Measured, log: float, all_in: float) -> str:
    mode = "training" if row.training else "inference"
    seconds = statistics.median(block[1] for block in row.blocks)
    return (
        f"| {row.workload} | {mode} | {row.batch} | {1e3 * seconds:.2f} | "
        f"{1e3 * seconds * math.exp(log):.2f} | {_said(log)} | {_said(all_in)} |"
    )


def _said(log: float) -> str:
    mark = "" if _within(log) else " (missed)"
    return f"{100 * math.expm1(log):+.0f} %{mark}"


def _within(log: float) -> bool:
    return abs(math.expm1(log)) <= _TARGET


def _table(lines: Sequence[str], logs: Sequence[float], all_in: Sequence[float]) -> str:
    return (
        "Eager fp32 steps on this machine, each workload in a process of its own. Predicted by "
        "constants that were fitted without the workload; the last column is the error of those "
        "that ship, which were fitted to all.\n\n"
        "| workload | mode | batch | measured ms | predicted ms | error | as shipped |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(lines) + f"\n\nLeft out: {_summary(logs)}. "
        f"As shipped: {_summary(all_in)}.\n"
    )


def _summary(logs: Sequence[float]) -> str:
    middle = statistics.median(abs(math.expm1(log)) for log in logs)
    within = sum(map(_within, logs))
    return f"{within} of {len(logs)} within {100 * _TARGET:.0f} %, median {100 * middle:.0f} %"


def _reach(logs: Sequence[float]) -> float:
    """Ninth decile of the errors."""
    return float(np.quantile(np.abs(logs), 0.9))


if __name__ == "__main__":
    main()
