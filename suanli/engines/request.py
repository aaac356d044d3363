"""What `optimize` is asked: by a person, or by an engine that is to be made anew."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from suanli.base.errors import SuanliError
from suanli.base.plan import Precision
from suanli.engines.engine import Engine
from suanli.engines.program import unflatten_call
from suanli.plans.situation import COARSEST, Objective
from suanli.workloads.record import Inputs, Workload
from suanli.workloads.resolve import resolve


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `optimize` was asked, checked and with its defaults filled in.

    Attributes:
        objective: "latency" or "throughput".
        batch: Samples in the step that decides.
        max_batch: Largest batch the engine takes.
        budget: Largest drop of quality, as a fraction.
        tolerance: Largest relative error of quantised plans without labels.
        budget_s: Seconds for everything.
        out: Folder for the engine, or None.
        device: "cpu", "cuda:0", …
        backends: The only backends to try; empty for all.
        backend_modules: Rows added to the backend table.
        fresh: Whether to forget earlier trials.
        precision: The lowest float precision that a plan may use.
    """

    objective: Objective
    batch: int
    max_batch: int
    budget: float
    tolerance: float | None
    budget_s: float
    out: Path | None
    device: str
    backends: tuple[str, ...] = ()
    backend_modules: tuple[str, ...] = ()
    fresh: bool = False
    precision: Precision = COARSEST


def workload_of_engine(
    engine: Engine, target: Path, budget_s: float
) -> tuple[Workload, nn.Module, Request]:
    """What is needed to make an engine anew from the program that it carries.

    The weights are the engine's. Labelled data comes from the workload that it was made of, where
    that can still be loaded; without it only floating-point plans are searched.
    """
    program, numbers = engine.program, engine.numbers
    module = program.exported_module()

    def make_inputs(batch: int) -> Inputs:
        args, kwargs = unflatten_call(program.signature, program.inputs(batch))
        return Inputs(args=args, kwargs=kwargs)

    workload = Workload(
        name=engine.name,
        make_model=lambda: module,
        make_inputs=make_inputs,
        untrained=numbers.untrained,
        dynamic_batch=program.signature.dynamic,
    )
    if engine.manifest.workload:
        try:
            origin = resolve(engine.manifest.workload)
        except SuanliError:
            origin = None
        if origin is not None:
            workload = replace(
                workload, data=origin.data, metric=origin.metric, make_inputs=origin.make_inputs
            )
    kind = engine.manifest.device.name.partition(":")[0]
    objective: Objective = "throughput" if numbers.objective == "throughput" else "latency"
    request = Request(
        objective=objective,
        batch=numbers.batch,
        max_batch=engine.max_batch,
        budget=numbers.quality.budget if numbers.quality else 0.005,
        tolerance=None,
        budget_s=budget_s,
        out=target,
        device=engine.manifest.device.name if kind in ("cpu", "cuda") else "cpu",
    )
    return workload, module, request
