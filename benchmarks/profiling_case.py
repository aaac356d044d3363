"""One case of `benchmarks.profiling`, in a process of its own: a JSON object on standard output.

    python -m benchmarks.profiling_case '{"what": "resnet50", "train": false}' --check 4

First what recording costs: steps with torch's profiler and steps without it take turns, so that a
drift of the machine falls on both; then `suanli.profile` with its checks. Ctrl-C ends what goes on
and keeps what is there.
"""

import argparse
import json
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from suanli.api_profile import profile
from suanli.base import codec
from suanli.base.plan import Plan
from suanli.base.timing import Estimate
from suanli.measure.timing import Contender, race, timed_calls
from suanli.profiling.recording import note_part, recorder
from suanli.profiling.subjects import EAGER, Subject, inference
from suanli.profiling.training_subjects import training
from suanli.training.recipes import resolve_recipe
from suanli.workloads.resolve import resolve

STEPS = 20
_TURN_SECONDS, _BLOCKS = 0.3, (3, 8)


def recording_cost(subject: Subject, seconds: float) -> Estimate:
    """Recorded over plain step, from turns that alternate; the profiler starts once per turn.

    Args:
        subject: One step on the CPU.
        seconds: Time for the turns.
    """

    def plain(calls: int) -> list[float]:
        subject.run()  # as below
        return timed_calls(subject.run, calls)

    def recorded(calls: int) -> list[float]:
        # What the profiler of the turn before gave back moves the heap, so that the next step, of
        # either side, takes up to hundreds of MB of pages anew: that step is not timed.
        subject.run()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with recorder("cpu"):
                return timed_calls(lambda: subject.step(note_part), calls)

    with subject.conditions():
        plain(3)
        found = race(
            Contender(run=recorded),
            Contender(run=plain),
            blocks=_BLOCKS,
            turn_seconds=_TURN_SECONDS,
            max_seconds=seconds,
        )
    return found.ratio


def cost_of(case: dict[str, Any], seconds: float) -> Estimate | None:
    """What recording costs a case; None for a backend with counters of its own."""
    if "plan" in case:
        return None
    with tempfile.TemporaryDirectory() as folder:
        if case["train"]:
            subject = training(resolve_recipe(case["what"]), None, device="cpu")
        else:
            workload = resolve(case["what"])
            subject = inference(workload, EAGER, case.get("batch", 1), Path(folder))
        try:
            return recording_cost(subject, seconds)
        finally:
            subject.close()


def measured(case: dict[str, Any], check: int, seconds: float) -> dict[str, Any]:
    """The profile of a case, cut down to what the benchmark is about."""
    cost = None
    with suppress(KeyboardInterrupt):  # first, so that a case that is stopped has it
        cost = cost_of(case, seconds)
    found = profile(
        case["what"],
        train=case["train"],
        batch=case.get("batch"),
        plan=codec.from_json(Plan, case["plan"]) if "plan" in case else None,
        steps=STEPS,
        check=check,
        check_seconds=seconds,
        device="cpu",
    )
    memory = found.memory
    predicted = memory.predicted if memory is not None else None
    return {
        "step_ms": codec.to_json(found.step_ms),
        "sol_fraction": found.sol.fraction if found.sol is not None else None,
        "verdict": found.verdict,
        "sum_over_step": found.categories.total_ms / found.step_ms.p50,
        "untraced_share": found.untraced_ms / found.step_ms.p50,
        "recording_ratio": None if cost is None else codec.to_json(cost),
        "memory_bytes": memory.total_bytes if memory is not None else None,
        "memory_error": predicted.total_bytes / memory.total_bytes - 1
        if memory is not None and predicted is not None
        else None,
        "advice": [
            {
                "kind": item.kind,
                "change": item.change,
                "expected_speedup": item.expected_speedup,
                "measured_speedup": None
                if item.measured_speedup is None
                else codec.to_json(item.measured_speedup),
                "failed": item.failed,
            }
            for item in found.advice
        ],
        "interrupted": found.interrupted,
    }


def main() -> None:
    """Run the case that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", type=json.loads)
    parser.add_argument("--check", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0)
    asked = parser.parse_args()
    try:
        found = measured(asked.case, asked.check, asked.seconds)
    except KeyboardInterrupt:
        found = {"error": "stopped before the profile was there"}
    except Exception as error:  # a case that fails is a result, too
        found = {"error": f"{type(error).__name__}: {error}"[:300]}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
