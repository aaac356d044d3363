"""Layer 7: the public verbs, and the one place that wires the parts together."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suanli.base import schema
from suanli.base.errors import BadInputError
from suanli.base.events import Event, Listener, ignore
from suanli.base.events_log import EventsLog
from suanli.base.hardware import BackendStatus, Ceilings, DeviceInfo
from suanli.base.results import (
    DoctorResult,
    ExportResult,
    OptimizeResult,
    RunResult,
    TrustResult,
    WorkloadsResult,
)

if TYPE_CHECKING:
    from torch import nn

    from suanli.base.plan import Precision
    from suanli.engines.engine import Engine
    from suanli.engines.unchanged import Unchanged
    from suanli.plans.situation import Objective
    from suanli.training.calls import Run
    from suanli.training.recipe import Recipe
    from suanli.workloads.record import Workload

_PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
_DEFAULT_BATCH = {"latency": 1, "throughput": 32}
_NO_ROWS: tuple[BackendStatus, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OptimizeOptions:
    """What a person may ask of `optimize`.

    Attributes:
        objective: "latency" or "throughput"; it decides the default batch and whether several
            streams may share it.
        batch: Samples in the step that decides; 1 for latency and 32 for throughput by default.
        max_batch: Largest batch the engine takes; by default the larger of `batch` and 32.
        max_drop: Largest drop of quality in percentage points, for quantised plans.
        tolerance: Largest relative RMS error of quantised plans where there are no labels.
        budget_s: Seconds for the whole of it. A trial that has begun may overrun it.
        out: Folder for the engine; None keeps the engine until the process ends.
        device: "cpu", "cuda:0", … or "auto", which takes the first GPU where there is one.
        backends: Names of the only backends to try; empty for all.
        backend_modules: "module:ATTRIBUTE" of backends that are not in the table.
        fresh: Whether to forget trials of earlier searches.
        precision: The lowest float precision that a plan may use: "fp32", "tf32", "fp16" or "bf16",
            in the order of their rounding. Any but "bf16" leaves quantised plans out too.
        keep: Whether to give an engine even where the best baseline beats it at the asked batch.
    """

    objective: "Objective" = "latency"
    batch: int | None = None
    max_batch: int | None = None
    max_drop: float = 0.5
    tolerance: float | None = None
    budget_s: float = 120.0
    out: Path | None = None
    device: str = "auto"
    backends: tuple[str, ...] = ()
    backend_modules: tuple[str, ...] = ()
    fresh: bool = False
    precision: "Precision" = "bf16"
    keep: bool = False

    def checked(self) -> "OptimizeOptions":
        """These options, a folder that is named by a text as a path.

        Raises:
            BadInputError: One of them makes no sense; the message names it.
        """
        if self.objective not in _DEFAULT_BATCH:
            raise BadInputError(f"--for takes latency or throughput, not {self.objective!r}")
        for name, value in (("--batch", self.batch), ("--max-batch", self.max_batch)):
            if value is not None and not 1 <= value <= 65536:
                raise BadInputError(f"{name} must be from 1 to 65536, not {value}")
        if not self.budget_s > 0:
            raise BadInputError(
                f"--budget must be more than 0 seconds, not {self.budget_s:g}",
                next_step="120 is the default",
            )
        if not 0 < self.max_drop <= 100:
            raise BadInputError(f"--max-drop must be from 0 to 100 points, not {self.max_drop:g}")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise BadInputError(f"--tolerance must be between 0 and 1, not {self.tolerance:g}")
        if self.max_batch and self.max_batch < self.step_batch:
            asked = f"the batch of {self.step_batch}"
            raise BadInputError(f"--max-batch {self.max_batch} is less than {asked}")
        if self.precision not in _PRECISIONS:
            raise BadInputError(
                f"--precision takes {', '.join(_PRECISIONS)}, not {self.precision!r}"
            )
        if self.out is None:
            return self
        from suanli.engines.request import check_target

        out = Path(self.out)
        check_target(out)
        return replace(self, out=out)

    @property
    def step_batch(self) -> int:
        """Samples in the step that decides."""
        return self.batch or _DEFAULT_BATCH[self.objective]


def optimize(
    model: "nn.Module | Workload",
    inputs: Any = None,
    *,
    on_event: Listener = ignore,
    **options: Any,
) -> "Engine | Unchanged":
    """Find the fastest verified engine for a model, in one line, as with `torch.compile`.

    Args:
        model: An `nn.Module` in evaluation mode, or a `Workload`.
        inputs: Example inputs of the module: one tensor, a tuple of positional arguments, or a
            dictionary of keyword arguments. The first dimension of every tensor is the batch.
        on_event: Told what is going on.
        **options: Fields of `OptimizeOptions`.

    Returns:
        A callable with the model's own signature. `engine.result` says what was found, and
        `engine.save(folder)` keeps it. Where nothing beats the best baseline, that baseline.

    Raises:
        BadInputError: An option or an input makes no sense.
        CaptureError: The model cannot be captured; the message names where it stopped.
    """
    from suanli.engines.optimizer import Optimizer
    from suanli.workloads.admission import admitted
    from suanli.workloads.module import of_module
    from suanli.workloads.record import Workload

    asked = OptimizeOptions(**options).checked()
    workload = model if isinstance(model, Workload) else of_module(model, inputs)
    module = admitted(workload, asked.step_batch)
    with EventsLog(asked.out, verb="optimize", workload=workload.name, listener=on_event) as told:
        engine = Optimizer(workload, module, _request(asked), told).run()
        told.finish(engine.result)
    return engine


def optimize_workload(
    ref: str,
    options: OptimizeOptions,
    *,
    data: Path | None = None,
    weights: Path | None = None,
    input_shapes: str = "",
    input_dtype: str = "",
    on_event: Listener = ignore,
) -> OptimizeResult:
    """`optimize` for a workload by name; the engine is in `result.engine_dir`.

    Args:
        ref: What `suanli optimize` takes.
        options: What is asked.
        data: Folder of the workload's labelled data.
        weights: safetensors file to fill the model from.
        input_shapes: One shape per input without the batch, such as "3x224x224,128".
        input_dtype: torch's name of the inputs' type, such as "int64".
        on_event: Told what is going on.

    Raises:
        BadInputError: The workload is unknown or cannot be used, or an option makes no sense.
    """
    from suanli.engines.optimizer import Optimizer
    from suanli.workloads.admission import admitted
    from suanli.workloads.reference import parse_shapes
    from suanli.workloads.resolve import resolve

    asked = options.checked()
    on_event(Event(kind="step", text=f"loading {ref}"))
    workload = resolve(
        ref,
        data=data,
        weights=weights,
        input_shapes=parse_shapes(input_shapes),
        input_dtype=input_dtype,
    )
    module = admitted(workload, asked.step_batch)
    with EventsLog(asked.out, verb="optimize", workload=ref, listener=on_event) as told:
        engine = Optimizer(workload, module, _request(asked), told).run()
        told.finish(engine.result)
    engine.close()
    return engine.result


def load(folder: str | os.PathLike[str], *, trust: bool = False) -> "Engine":
    """Open a saved engine.

    Args:
        folder: What `optimize` wrote.
        trust: Open it although nobody whose key is trusted here made it. It may run any code with
            your rights.

    Raises:
        ArtefactError: It is damaged or incomplete.
        UntrustedError: It holds code that no trusted key vouches for.
    """
    from suanli.engines.engine import Engine

    return Engine.load(Path(folder), trust=trust)


def run(
    folder: str | os.PathLike[str],
    inputs: Sequence[Path],
    *,
    output: Path | None = None,
    trust: bool = False,
) -> RunResult:
    """Call an engine on `.npy` or `.npz` files.

    Raises:
        ArtefactError: The engine is damaged, or the inputs do not fit it.
    """
    from suanli.engines.exchange import run_file, write_outputs
    from suanli.measure.environment import environment

    with load(folder, trust=trust) as engine:
        started = time.perf_counter()
        outputs = run_file(engine, list(inputs))
        call_ms = (time.perf_counter() - started) * 1e3
        if output is not None:
            write_outputs(output, outputs)
        return RunResult(
            schema=schema.name("run"),
            verb="run",
            workload=engine.name,
            device=_device_info(engine.plan.device),
            environment=environment(),
            engine_dir=str(folder),
            plan=engine.plan,
            portable=engine.portable,
            differences=tuple(engine.differences),
            output=str(output) if output else None,
            output_names=tuple(outputs),
            output_shapes=tuple(tuple(array.shape) for array in outputs.values()),
            output_dtypes=tuple(str(array.dtype) for array in outputs.values()),
            call_ms=call_ms,
        )


def rebuild(
    folder: str | os.PathLike[str],
    *,
    budget_s: float = 120.0,
    trust: bool = False,
    on_event: Listener = ignore,
) -> OptimizeResult:
    """Make an engine anew on this machine, from the program that it carries.

    Quantised plans are searched again where the workload's own labelled data can be loaded; else
    floating-point plans only. The older engine stays where the new one is slower, or where nothing
    beats the baselines.

    Raises:
        ArtefactError: The engine is damaged.
        UntrustedError: It was made by somebody whose key is not trusted here.
    """
    from suanli.engines.rebuild import rebuild as rebuild_engine

    return rebuild_engine(Path(folder), budget_s=budget_s, trust=trust, on_event=on_event)


def export(
    folder: str | os.PathLike[str], out: Path, *, kind: str = "onnx", trust: bool = False
) -> ExportResult:
    """Give an engine out as plain ONNX (fp32), or as safetensors with its plan.

    Args:
        folder: The engine.
        out: File (ONNX) or folder (safetensors) to write.
        kind: "onnx" or "safetensors".
        trust: See `load`.

    Raises:
        ArtefactError: The engine is damaged or untrusted.
        BadInputError: `out` cannot be written, or holds other things.
    """
    from suanli.engines.exchange import export as export_engine
    from suanli.engines.manifest import read_manifest
    from suanli.measure.environment import environment

    written = export_engine(Path(folder), Path(out), kind=kind, trust=trust)
    manifest, _ = read_manifest(Path(folder))
    return ExportResult(
        schema=schema.name("export"),
        verb="export",
        workload=manifest.name,
        device=manifest.device,
        environment=environment(),
        engine_dir=str(folder),
        kind=kind,
        output=str(written),
    )


def trust(key: str | os.PathLike[str] | None = None, *, remove: bool = False) -> TrustResult:
    """Show the user's own key and those trusted; trust another one, or withdraw that.

    Args:
        key: A public key as base64, or a file of one; to remove one its fingerprint does too. None
            changes nothing.
        remove: Withdraw the trust instead.

    Raises:
        BadInputError: It is no public key, or to be removed and not trusted.
    """
    from suanli.engines import signing
    from suanli.measure.environment import environment

    changed = ""
    if key is not None:
        change = signing.distrust if remove else signing.trust_text
        changed = change(os.fspath(key))
    return TrustResult(
        schema=schema.name("trust"),
        verb="trust",
        workload=None,
        device=_device_info("cpu"),
        environment=environment(),
        own=signing.named(signing.own_key().public_key),
        trusted=tuple(map(signing.named, sorted(signing.trusted_keys()))),
        added=changed if not remove else "",
        removed=changed if remove else "",
    )


def train(
    model: "nn.Module | Workload | Recipe",
    data: Any = None,
    loss: Callable[..., Any] | None = None,
    *,
    on_event: Listener = ignore,
    **options: Any,
) -> "Run":
    """Find the fastest verified training plan for a model, and train it.

    Args:
        model: An `nn.Module`, which is trained in place; or a `Workload` or `Recipe`, which brings
            its own data and loss.
        data: `(inputs, labels)`, a torch `Dataset` or `DataLoader`, or the three parts of a `Data`.
            Data sets are read while the run goes on and need not fit into memory. Where only
            training samples are given, a fifth is held out: half to watch, half for acceptance.
        loss: `loss(output, labels)`, a mean or a sum over the samples.
        on_event: Told what is going on.
        **options: Fields of `TrainOptions`; for a module also those of `TrainingSettings`, such as
            `optimizer="adam", lr=1e-3, batch=64`.

    Returns:
        The trained model and the result.

    Raises:
        BadInputError: An option or the data makes no sense.
        NotFiniteError: The loss is no longer finite.
    """
    from suanli.training.calls import train_module

    return train_module(model, data, loss, on_event=on_event, **options)


def doctor(
    *, device: str = "auto", refresh: bool = False, on_event: Listener = ignore
) -> DoctorResult:
    """Say what is here, what is missing, and what this machine can do at most.

    Where torch is broken there are no ceilings and no backends, and the first problem says so.

    Args:
        device: "cpu", "cuda:0", … or "auto", which takes the first GPU where there is one.
        refresh: Measure the ceilings again, which takes up to 25 s.
        on_event: Told what is being measured.

    Raises:
        BadInputError: There is no such device.
    """
    from suanli.base.compiler import find_compiler
    from suanli.devices import cpu_info, gpu_infos
    from suanli.measure.environment import environment, problems
    from suanli.measure.facts import gather_facts

    started = time.monotonic()

    def say(text: str) -> None:
        on_event(Event(kind="step", text=text, spent_s=time.monotonic() - started))

    say("looking at hardware and libraries")
    # before anything is measured: its own load is no problem of the environment
    facts, here = gather_facts(), environment()
    cpu, gpus = cpu_info(), gpu_infos()
    found, rows = _nothing_measured(), _NO_ROWS
    if not facts.torch_error:
        found = _ceilings(device_name(device), refresh, say)
        rows = _backend_rows()
    compiler = find_compiler()
    return DoctorResult(
        schema=schema.name("doctor"),
        verb="doctor",
        workload=None,
        device=found.device,
        environment=here,
        cpu=cpu,
        gpus=tuple(gpus),
        backends=rows,
        problems=tuple(problems(cpu=cpu, gpus=gpus, facts=facts)),
        ceilings=found.items,
        compiler=str(compiler) if compiler else None,
        seconds_spent=time.monotonic() - started,
        measured_at=found.measured_at,
    )


def _ceilings(name: str, refresh: bool, say: Callable[[str], None]) -> Ceilings:
    from suanli.measure.ceilings import ceilings

    return ceilings(
        name, refresh, progress=lambda text: say(f"measuring {name}, up to 25 s: {text}")
    )


def _nothing_measured() -> Ceilings:
    return Ceilings(device=_device_info("cpu"), items=(), threads=0, measured_at="")


def _backend_rows() -> tuple[BackendStatus, ...]:
    from suanli.engines.backends import backends, status

    return tuple(status(backend) for backend in backends().values())


def workloads() -> WorkloadsResult:
    """The built-in workloads."""
    from suanli.measure.environment import environment
    from suanli.workloads.catalogue import entries

    return WorkloadsResult(
        schema=schema.name("workloads"),
        verb="workloads",
        workload=None,
        device=_device_info("cpu"),
        environment=environment(),
        workloads=entries(),
    )


def device_name(wanted: str) -> str:
    """The device that "auto" stands for here; any other name as it is.

    Raises:
        BadInputError: There is no such device.
    """
    from suanli.devices import device

    if wanted == "auto":
        import torch

        return "cuda:0" if torch.cuda.is_available() else "cpu"
    device(wanted)
    return wanted


def _device_info(name: str) -> DeviceInfo:
    from suanli.devices import device

    return device(name).info


def _request(options: OptimizeOptions) -> Any:
    from suanli.engines.request import Request

    batch = options.step_batch
    return Request(
        objective=options.objective,
        batch=batch,
        max_batch=options.max_batch or max(batch, 32),
        budget=options.max_drop / 100,
        tolerance=options.tolerance,
        budget_s=options.budget_s,
        out=options.out,
        device=device_name(options.device),
        backends=options.backends,
        backend_modules=options.backend_modules,
        fresh=options.fresh,
        precision=options.precision,
        keep=options.keep,
    )
