"""Make an engine anew on this machine, from the program that it carries."""

from dataclasses import replace
from pathlib import Path

from suanli.base.events import Listener
from suanli.base.results import OptimizeResult
from suanli.engines.engine import Engine
from suanli.engines.optimizer import Optimizer
from suanli.engines.request import check_target, workload_of_engine
from suanli.engines.unchanged import Unchanged
from suanli.measure.timing import Contender, race
from suanli.workloads.record import Inputs

_RACE_S = 4.0


def rebuild(folder: Path, *, budget_s: float, trust: bool, on_event: Listener) -> OptimizeResult:
    """Search again, and put the new engine in the older one's place unless that is the better one.

    The older engine stays where nothing beats the baselines, and where it still runs its own plans
    here and wins a race against the new one.

    Raises:
        ArtefactError: The engine is damaged.
        UntrustedError: It was made by somebody whose key is not trusted here.
        BadInputError: The folder cannot be written.
    """
    with Engine.load(folder, trust=trust) as old:
        check_target(folder)
        workload, module, request = workload_of_engine(old, budget_s)
        new = Optimizer(workload, module, request, on_event).run()
        with new:
            result = new.result
            assert result is not None
            if isinstance(new, Unchanged):
                said = f"nothing beat {result.baseline.plan.title}: the engine stays as it was"
                return replace(result, notes=(said, *result.notes[1:]))
            kept = "" if old.portable else _older_wins(old, new, workload.make_inputs(result.batch))
            if kept:
                return replace(result, engine_dir=str(folder), notes=(kept, *result.notes))
            new.save(folder)
    return replace(result, engine_dir=str(folder))


def _older_wins(old: Engine, new: Engine, inputs: Inputs) -> str:
    """What is said where the older engine is clearly the faster one; "" where it is not."""
    found = race(_side(old, inputs), _side(new, inputs), blocks=(3, 12), max_seconds=_RACE_S)
    if found.ratio.hi95 >= 1.0:
        return ""
    return (
        f"the engine that was there is {1 / found.ratio.p50:.2f}x as fast as the one found now "
        f"({', '.join(plan.title for plan in new.plans)}), and stays"
    )


def _side(engine: Engine, inputs: Inputs) -> Contender:
    return Contender.here(lambda: engine(*inputs.args, **inputs.kwargs))
