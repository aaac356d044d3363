"""What `optimize` is asked: by a person, or by an engine that is to be made anew."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from suanli.base.errors import BadInputError, SuanliError
from suanli.base.plan import Precision
from suanli.engines import signing
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
        keep: Whether to write an engine that the best baseline beats.
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
    keep: bool = False


def workload_of_engine(engine: Engine, budget_s: float) -> tuple[Workload, nn.Module, Request]:
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
                workload,
                data=origin.data,
                metric=origin.metric,
                make_inputs=origin.make_inputs,
                ref=engine.manifest.workload if _same_model(origin, engine) else "",
            )
    kind = engine.manifest.device.name.partition(":")[0]
    objective: Objective = "throughput" if numbers.objective == "throughput" else "latency"
    request = Request(
        objective=objective,
        batch=numbers.batch,
        max_batch=engine.max_batch,
        budget=numbers.max_drop,
        tolerance=numbers.tolerance,
        budget_s=budget_s,
        out=None,
        device=engine.manifest.device.name if kind in ("cpu", "cuda") else "cpu",
        backends=numbers.backends,
        precision=numbers.precision,
    )
    return workload, module, request


def _same_model(origin: Workload, engine: Engine) -> bool:
    """Whether a workload's module still takes the weights that an engine carries."""
    try:
        origin.make_model().load_state_dict(engine.program.weights, strict=True)
    except (SuanliError, RuntimeError):
        return False
    return True


def check_target(out: Path) -> None:
    """Refuse a target that could not be written, before any work is done.

    Raises:
        BadInputError: It is a file, a folder that is no engine, or lies where nothing can be made.
    """
    if out.is_file():
        raise BadInputError(f"{out} is a file", next_step="give a folder with -o")
    if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").exists():
        raise BadInputError(
            f"{out} holds something that is no engine", next_step="give another folder with -o"
        )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:  # what permissions and the kind of file system say is not always so
        with tempfile.TemporaryDirectory(dir=parent, prefix=".suanli-"):
            pass
    except OSError as error:
        raise BadInputError(
            f"cannot write in {parent}: {error.strerror or error}",
            next_step="give another folder with -o",
        ) from None
    _check_key()


def _check_key() -> None:
    """Refuse to search for an engine that could not be signed in the end.

    Raises:
        BadInputError: The user's key can be neither read nor made.
    """
    try:
        signing.own_key()
    except SuanliError as error:
        raise BadInputError(str(error), next_step=error.next_step) from None
    except OSError as error:
        raise BadInputError(
            f"no key to sign engines with: {error.strerror or error}: {error.filename}",
            next_step="set SUANLI_CONFIG to a folder that can be written",
        ) from None
