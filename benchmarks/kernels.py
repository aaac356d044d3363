"""Each shipped kernel on a GPU against eager, torch.compile and what is published.

    python -m benchmarks.kernels [--kernels norm,gate] [--most 60] [--budget 1200] [--each 120]

Tunes every kernel at its bench shapes (verified winners only), races it with each rival on new
timings, and gives the share of the card's ceiling: of the measured read bandwidth, or for matrix
products of the measured FLOP/s. Writes kernels-<card>.json with the card's name after each kernel;
with --append kernels that stand in it already are not tuned again, so that a run that was cut short
goes on where it ended.

    python -m benchmarks.kernels --static

compiles every kernel for three architectures, with no GPU, and prints the table of the docs.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from suanli.base import codec
from suanli.base.hardware import Ceilings
from suanli.devices import gpu_infos
from suanli.kernels.declaration import Declaration, Sizes
from suanli.kernels.isolated import CompileRequest, CompileResult, compile_isolated
from suanli.kernels.occupancy import occupancy
from suanli.kernels.shipped import shipped
from suanli.kernels.tune_kernel import tune_kernel
from suanli.kernels.tuning import SearchLimits, TuneResult
from suanli.measure.ceilings import ceilings
from suanli.measure.environment import environment

_TIMEOUT_S = 30.0  # of one compilation; the rivals' own take minutes with `max-autotune`
_ITEM = {"fp32": 4, "fp16": 2, "bf16": 2}


def _bound_ms(
    kernel: Declaration, sizes: Sizes, dtype: str, limits: Ceilings
) -> tuple[float, str] | None:
    """(least time in ms, what binds) by the card's own ceilings; None where they are unknown."""
    work = kernel.work(sizes, _ITEM[dtype])
    rate = limits.read_bytes_per_s(work.bytes)
    # fp32 outside matrix products is done by the ordinary units
    flops = limits.peak_flops(("tf32" if dtype == "fp32" else dtype) if work.matmul else "fp32")
    if not rate or not flops:
        return None
    times = {"memory": work.bytes / rate, "compute": work.flops / flops}
    binds = max(times, key=lambda name: times[name])
    return times[binds] * 1e3, binds


def _row(kernel: Declaration, sizes: Sizes, result: TuneResult, limits: Ceilings) -> dict[str, Any]:
    bound = _bound_ms(kernel, sizes, result.dtype, limits)
    raced = [figures.winner_ms.p50 for figures in result.races.values()]
    own = min(raced) if raced else (result.step_ms.p50 if result.step_ms else None)
    return {
        "kernel": kernel.name,
        "sizes": dict(sizes),
        "dtype": result.dtype,
        "config": result.config,
        "verified": result.verified,
        "step_ms": own,
        "bound_ms": bound[0] if bound else None,
        "bound_by": bound[1] if bound else None,
        "share_of_bound": bound[0] / own if bound and own else None,
        "rivals": {name: codec.to_json(figures) for name, figures in result.races.items()},
        "tried": len(result.trials),
        "note": result.note,
    }


def _print(row: dict[str, Any]) -> None:
    share = f"{row['share_of_bound']:.0%} of {row['bound_by']}" if row["share_of_bound"] else "-"
    ups = ", ".join(
        f"{figures['speedup']['p50']:.2f}x {name}" for name, figures in row["rivals"].items()
    )
    took = f"{row['step_ms']:.4f} ms" if row["step_ms"] else "none"
    print(f"{row['kernel']:32} {row['dtype']} {row['sizes']}: {took}, {share}; {ups} {row['note']}")


def _static_table(names: list[str]) -> None:
    """What the compiler says of each kernel's default configuration, as a table for the docs."""
    architectures = ("sm_80", "sm_90", "sm_100")
    print("| kernel | " + " | ".join(architectures) + " |\n|---|" + "---|" * len(architectures))
    for name in names:
        kernel = shipped()[name]
        dtype = "bf16" if "bf16" in kernel.dtypes else kernel.dtypes[0]
        sizes = kernel.bench_sizes[0]
        requests = [CompileRequest(sizes=sizes, dtype=dtype, arch=arch) for arch in architectures]
        cells = [_cell(result) for result in compile_isolated(name, requests, timeout_s=120)]
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)


def _cell(result: CompileResult) -> str:
    if result.reason:
        return result.reason
    functions = result.functions
    shares = [
        occupancy(
            f.arch,
            threads=f.threads,
            registers=f.registers,
            static_shared_bytes=f.static_shared_bytes,
            dynamic_shared_bytes=f.dynamic_shared_bytes,
        )
        for f in functions
    ]
    worst = min(shares, key=lambda share: share.fraction)
    spilled = max(f.spill_store_bytes + f.spill_load_bytes for f in functions)
    text = f"{max(f.registers for f in functions)} registers"
    text += f", {spilled} B spilled" if spilled else ""
    text += f", {max(f.shared_bytes for f in functions) / 1024:.3g} KiB"
    return f"{text}; {worst.fraction:.0%} ({worst.limited_by})"


def main() -> int:
    """Run the benchmark; 0 where every kernel was verified."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", default=",".join(shipped()))
    parser.add_argument("--most", type=int, default=60, help="configurations compiled per shape")
    parser.add_argument("--shapes", type=int, default=2, help="bench shapes per kernel")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--budget", type=float, default=7200, help="begin no kernel after SECONDS")
    parser.add_argument("--each", type=float, default=600, help="SECONDS for one kernel and shape")
    parser.add_argument("--append", action="store_true", help="go on with what stands in --out")
    parser.add_argument("--static", action="store_true", help="compile only; needs no GPU")
    given = parser.parse_args()
    if given.static:
        _static_table(given.kernels.split(","))
        return 0
    cards = gpu_infos()
    if not cards:
        print("there is no GPU here", file=sys.stderr)
        return 2
    slug = re.sub(r"[^a-z0-9]+", "-", cards[0].name.lower()).strip("-")
    results = _Results(given.out / f"kernels-{slug}.json", cards[0].name, given.append)
    end = time.monotonic() + given.budget
    for name in given.kernels.split(","):
        for sizes in shipped()[name].bench_sizes[: given.shapes]:
            if results.has(name, sizes):
                continue
            left = min(given.each, end - time.monotonic())
            if left <= 0:
                print(f"{name} {dict(sizes)}: not begun, the {given.budget:g} s are over")
                continue
            effort = SearchLimits(most=given.most, timeout_s=_TIMEOUT_S, budget_s=left)
            results.add(_measured(name, sizes, results.limits, effort))
    return 0 if results.all_verified(given.kernels.split(",")) else 1


def _measured(name: str, sizes: Sizes, limits: Ceilings, effort: SearchLimits) -> dict[str, Any]:
    """One kernel at one shape as a row; a failure is a row, too."""
    begin, kernel = time.monotonic(), shipped()[name]
    try:
        row = _row(kernel, sizes, tune_kernel(name, sizes, limits=effort), limits)
        _print(row)
    except Exception as error:  # the other kernels are still to come
        row = {"kernel": name, "sizes": dict(sizes), "failed": f"{type(error).__name__}: {error}"}
        print(f"{name} {dict(sizes)}: {row['failed']}")
    return {**row, "seconds_spent": round(time.monotonic() - begin, 1)}


class _Results:
    """The file of results, written anew after each row.

    Args:
        path: Where.
        card: The card's name.
        append: Whether to go on with what stands there.
    """

    def __init__(self, path: Path, card: str, append: bool) -> None:
        self._path, self._card = path, card
        self._rows: list[dict[str, Any]] = []
        if append and path.is_file():
            self._rows = json.loads(path.read_text(encoding="utf-8"))["kernels"]
        self.limits = ceilings("cuda:0")
        path.parent.mkdir(parents=True, exist_ok=True)

    def has(self, name: str, sizes: Sizes) -> bool:
        """Whether a measurement of it stands there."""
        return any(
            row["kernel"] == name and row["sizes"] == dict(sizes) and "failed" not in row
            for row in self._rows
        )

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, in place of an older one."""
        key = (row["kernel"], row["sizes"])
        self._rows = [old for old in self._rows if (old["kernel"], old["sizes"]) != key] + [row]
        made = {
            "device": self._card,
            "environment": codec.to_json(environment()),
            "ceilings": codec.to_json(self.limits),
            "kernels": self._rows,
        }
        self._path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")

    def all_verified(self, names: list[str]) -> bool:
        """Whether each of them has a row, and all rows are verified."""
        known = {row["kernel"] for row in self._rows}
        return set(names) <= known and all(row.get("verified") for row in self._rows)


if __name__ == "__main__":
    raise SystemExit(main())
