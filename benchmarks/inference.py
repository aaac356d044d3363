"""Suanli beside its peers on inference, interleaved in one run.

    python -m benchmarks.inference [--cases resnet50-b1,bert-base-b1] [--seconds 60] [--out FILE]

Every peer runs in a process of its own; the sides take short turns round and round, and the idle
ones are stopped (SIGSTOP), so that a drift of the machine falls on all of them. Figures are medians
over the turns; ratios come from turns of the same round. A peer's answer is held against eager fp32
before it is timed; one whose error is more than twice that of eager bf16 is listed as wrong.
Whether int8 is right is no matter of error: Suanli's was accepted on labelled samples, the others'
was not looked at.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, moment
from suanli.base.lazy import present
from suanli.measure.isolation import Worker
from suanli.measure.timing import median_interval

HERE = Path(__file__).parent
_TURN_MS = 250.0

# name: (workload, batch, objective, int8 allowed, data)
CASES: dict[str, dict[str, Any]] = {
    "resnet50-b1": {"workload": "resnet50", "batch": 1},
    "resnet50-b32": {"workload": "resnet50", "batch": 32},
    "bert-base-b1": {"workload": "bert-base", "batch": 1},
    "digits-resnet-b1": {"workload": "digits-resnet", "batch": 1, "trained": True},
    "digits-resnet-b32": {"workload": "digits-resnet", "batch": 32, "trained": True},
    "resnet18-cifar-b1": {"workload": "resnet18-cifar", "batch": 1, "trained": True},
    "resnet18-cifar-b128": {"workload": "resnet18-cifar", "batch": 128, "trained": True},
}


def peers(case: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (class, settings) of everything that is compared with Suanli."""
    batch = case["batch"]
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "eager fp32": ("Eager", {}),
        "eager bf16 autocast": ("Eager", {"autocast": True, "channels_last": _images(case)}),
        "eager bf16 cast": ("Eager", {"cast": True, "channels_last": _images(case)}),
        "torch.compile bf16": ("Eager", {"cast": True, "compile": True}),
        "torch.compile autocast": ("Eager", {"autocast": True, "compile": True}),
    }
    if present("onnxruntime"):
        found["ONNX Runtime fp32"] = ("OnnxRuntime", {})
    if present("openvino"):
        found["OpenVINO bf16 latency"] = ("OpenVino", {"hint": "LATENCY", "precision": "bf16"})
        if batch > 1:
            for streams in (1, 2):
                found[f"OpenVINO bf16 {streams} streams"] = (
                    "OpenVinoStreams",
                    {"streams": streams, "precision": "bf16"},
                )
            found["OpenVINO bf16 2 streams 8 parts"] = (
                "OpenVinoStreams",
                {"streams": 2, "parts": 8, "precision": "bf16"},
            )
        if case.get("trained"):
            found["OpenVINO int8"] = (
                "OpenVino",
                {"hint": "LATENCY", "precision": "bf16", "int8": True},
            )
            if batch > 1:
                found["OpenVINO int8 2 streams"] = (
                    "OpenVinoStreams",
                    {"streams": 2, "precision": "bf16", "int8": True},
                )
    return found


def _images(case: dict[str, Any]) -> bool:
    return "bert" not in case["workload"] and "gpt" not in case["workload"]


def build_engine(ref: str, case: dict[str, Any], folder: Path, budget: float) -> dict[str, Any]:
    """Run `suanli optimize` as a person would."""
    batch = case["batch"]
    command = [
        sys.executable, "-m", "suanli.cli", "optimize", ref,
        "--for", "latency" if batch == 1 else "throughput",
        "--batch", str(batch), "--max-batch", str(max(batch, 8)),
        "--budget", str(budget), "-o", str(folder), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stdout[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def compare(ref: str, case: dict[str, Any], engine: Path, seconds: float) -> dict[str, Any]:
    """Time all sides in turns; gives figures per side, with ratios to eager fp32 and to Suanli."""
    sides = {**peers(case), "Suanli": ("Suanli", {"engine": str(engine)})}
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    for name, (kind, settings) in sides.items():
        try:
            workers[name] = Worker(
                f"benchmarks.peers:{kind}",
                {"workload": ref, "batch": case["batch"], **settings},
                start_timeout_s=600,
            )
            workers[name].call("block", timeout_s=600, calls=3)
            workers[name].pause()
            print(f"    {name} ready", file=sys.stderr)
        except Exception as error:
            failed[name] = str(error)
            print(f"    {name} failed: {error}", file=sys.stderr)
    try:
        errors = _errors(workers)
        turns = _turns(workers, seconds)
    finally:
        for worker in workers.values():
            worker.close()
    return _figures(turns, errors, failed, case["batch"])


def _errors(workers: dict[str, Worker]) -> dict[str, float]:
    from safetensors.torch import load_file

    outputs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, worker in workers.items():
            path = Path(folder) / "output.safetensors"
            worker.call("first_output", timeout_s=300, path=str(path))
            worker.pause()
            outputs[name] = load_file(path)["output"].double()
    wanted = outputs["eager fp32"]
    scale = float(wanted.square().mean().sqrt())
    return {
        name: float((output - wanted).square().mean().sqrt()) / scale
        for name, output in outputs.items()
    }


def _turns(workers: dict[str, Worker], seconds: float) -> dict[str, list[float]]:
    """Rounds of turns, forwards and backwards, until time is out; medians of each turn in ms."""
    calls: dict[str, int] = {}
    for name, worker in workers.items():
        once = min(worker.call("block", timeout_s=300, calls=3))
        calls[name] = max(1, min(500, int(_TURN_MS / once)))
        worker.pause()
    turns: dict[str, list[float]] = {name: [] for name in workers}
    started, forwards = time.monotonic(), True
    while time.monotonic() - started < seconds or len(turns["Suanli"]) < 6:
        order = list(workers) if forwards else list(reversed(workers))
        for name in order:
            times = workers[name].call("block", timeout_s=300, calls=calls[name] + 1)
            workers[name].pause()
            turns[name].append(statistics.median(times[1:]))
        forwards = not forwards
    return turns


def _figures(
    turns: dict[str, list[float]], errors: dict[str, float], failed: dict[str, str], batch: int
) -> dict[str, Any]:
    rows = {}
    for name, times in turns.items():
        step = median_interval(times)
        rows[name] = {
            "step_ms": {"p50": step.p50, "lo95": step.lo95, "hi95": step.hi95},
            "samples_per_s": batch / step.p50 * 1e3,
            "relative_error": errors[name],
            "over_eager_fp32": _ratio(turns["eager fp32"], times),
            "suanli_over_it": _ratio(times, turns["Suanli"]),
            "turns": len(times),
        }
    rows |= {name: {"failed": reason} for name, reason in failed.items()}
    return rows


def _ratio(a: list[float], b: list[float]) -> dict[str, float]:
    logs = median_interval([math.log(x / y) for x, y in zip(a, b, strict=True)])
    return {key: math.exp(getattr(logs, key)) for key in ("p50", "lo95", "hi95")}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    here = report["machine"]
    lines = [
        f"# Inference on {here['cpu']}, {here['cores']} cores",
        "",
        f"{here['date']}; {', '.join(f'{k} {v}' for k, v in here['libraries'].items())}; "
        f"load average at the start {here['load_average']:.2f}. Made by "
        "`python -m benchmarks.inference`.",
    ]
    for name, case in report["cases"].items():
        result = case["optimize"]
        sol = result["sol"] or {}
        fraction = f"{sol['fraction'] * 100:.0f} %" if sol.get("fraction") else "unknown"
        lines += [
            "",
            f"## {name}",
            "",
            f"Chosen: `{case['plan']}`; share of the speed of light: {fraction}; "
            f"search of at most {case['budget_s']:.0f} s; ended {case['measured']['date']}.",
            *_quality_line(result["quality"]),
            "",
            "| side | ms | samples/s | over eager fp32 | Suanli over it | relative error |",
            "|---|---|---|---|---|---|",
        ]
        allowed = 2 * case["sides"].get("eager bf16 cast", {}).get("relative_error", 0.025)
        ordered = sorted(
            case["sides"].items(), key=lambda item: item[1].get("step_ms", {}).get("p50", 1e9)
        )
        for side, row in ordered:
            if "failed" in row:
                lines.append(f"| {side} | failed: {row['failed'][:60]} | | | | |")
                continue
            over, mine = row["over_eager_fp32"], row["suanli_over_it"]
            if "int8" in (case["plan"] if side == "Suanli" else side):
                verdict = " (labels decide)"
            else:
                verdict = " **wrong**" if row["relative_error"] > allowed else ""
            lines.append(
                f"| {side} | {row['step_ms']['p50']:.3g} | {row['samples_per_s']:,.0f} "
                f"| {over['p50']:.2f} ({over['lo95']:.2f}-{over['hi95']:.2f}) "
                f"| {mine['p50']:.3f} ({mine['lo95']:.3f}-{mine['hi95']:.3f}) "
                f"| {row['relative_error']:.2g}{verdict} |"
            )
    return "\n".join(lines) + "\n"


def _quality_line(quality: dict[str, Any] | None) -> list[str]:
    if quality is None:
        return []
    return [
        "",
        f"{quality['metric']} on {quality['n']:,} unseen samples: "
        f"{quality['reference'] * 100:.2f} % before, {quality['value'] * 100:.2f} % after; drop at "
        f"most {quality['drop_upper95'] * 100:.2f} points (95 %).",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="names, with commas")
    parser.add_argument("--seconds", type=float, default=40.0, help="turns per case")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds per search")
    parser.add_argument("--weights", action="append", default=[], help="WORKLOAD=weights file")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu" / "inference")
    parser.add_argument("--append", action="store_true", help="keep the other cases of --out")
    args = parser.parse_args()
    weights = dict(item.split("=", 1) for item in args.weights)
    report: dict[str, Any] = {"machine": machine(), "cases": {}}
    if args.append and args.out.with_suffix(".json").exists():
        report["cases"] = json.loads(args.out.with_suffix(".json").read_text())["cases"]
    for name in args.cases.split(","):
        case = CASES[name]
        ref = case["workload"]
        if ref in weights:
            ref = f"{ref}?weights={Path(weights[ref]).resolve()}"
        print(f"{name}: searching", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="suanli-bench-") as folder:
            engine = Path(folder) / "engine"
            result = build_engine(ref, case, engine, args.budget)
            print(f"{name}: racing", file=sys.stderr)
            sides = compare(ref, case, engine, args.seconds)
        from suanli.base import codec
        from suanli.base.plan import Plan

        plan = codec.from_json(Plan, result["chosen"]["plan"])
        kept = {key: result[key] for key in (
            "chosen", "baseline", "speedup_vs_eager", "speedup_vs_best_baseline", "quality", "sol",
            "seconds_spent",
        )}  # fmt: skip
        report["cases"][name] = {
            "plan": plan.title,
            "budget_s": args.budget,
            "measured": moment(),
            "optimize": kept,
            "sides": sides,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(report))
        print(table(report), file=sys.stderr)


if __name__ == "__main__":
    main()
