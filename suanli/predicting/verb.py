"""`suanli predict`, from a reference to a result."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.base import schema
from suanli.base.errors import BadInputError
from suanli.base.events import Event, Listener, ignore
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.hardware import DeviceInfo
from suanli.base.predict_results import (
    CatalogueResult,
    ChooseResult,
    Here,
    Prediction,
    PredictResult,
)
from suanli.devices import catalogue, find_sheet, slug
from suanli.devices.lookup import device
from suanli.measure.ceilings import ceilings
from suanli.measure.environment import environment
from suanli.predicting.ask import Ask
from suanli.predicting.choose import Limits, rank
from suanli.predicting.here import here, predict_cpu
from suanli.predicting.measured import as_measured
from suanli.predicting.one import predict_on, usual_batch
from suanli.predicting.prices import Prices, read_prices
from suanli.predicting.subject import Subject, subject

if TYPE_CHECKING:
    from suanli.workloads.record import Workload

_CPU = ("cpu", "here")
_TIMED_BATCH = 8


@dataclass
class _Clock:
    """Tells the listener what is going on."""

    on_event: Listener
    started: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        self.on_event(Event(kind="step", text=text, spent_s=self.spent_s))

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self.started


def predict(
    workload: "Workload",
    gpu: str,
    ask: Ask,
    *,
    prices: Path | None = None,
    on_event: Listener = ignore,
) -> PredictResult:
    """Predict a step on a card by name, or on this machine's processor ("cpu").

    Raises:
        BadInputError: The card is unknown or cannot do it, or something asked makes no sense.
        CaptureError: The workload cannot run without data.
    """
    clock, asked = _Clock(on_event), ask.checked()
    on_cpu = gpu.lower() in _CPU
    if on_cpu and (asked.devices > 1 or asked.layout or asked.context or prices):
        raise BadInputError("--gpus, --layout, --context and --prices are of GPUs, not of the CPU")
    sheet = None if on_cpu else as_measured(find_sheet(gpu))
    known = _prices(prices)
    captured = _captured(workload, asked, clock.say, cpu=on_cpu)
    if sheet is None:
        batch = asked.batch or captured.fixed_batch or usual_batch(asked)
        measured = ceilings("cpu", progress=lambda text: clock.say(f"measuring the CPU: {text}"))
        found = predict_cpu(captured, measured, asked, batch)
        target = measured.device
    else:
        found = predict_on(captured, sheet, asked, prices=known, say=clock.say)
        target = _device(sheet)
    values = {item.name: getattr(found, item.name) for item in fields(Prediction)}
    return PredictResult(
        **values,
        schema=schema.name("predict"),
        verb="predict",
        workload=workload.name,
        device=target,
        environment=environment(),
        mode=_mode(asked),
        flops=captured.work(found.batch).flops,
        parameters=captured.parameters,
        seconds_spent=clock.spent_s,
    )


def choose(
    workload: "Workload",
    ask: Ask,
    limits: Limits,
    *,
    prices: Path | None = None,
    timed: bool = False,
    on_event: Listener = ignore,
) -> ChooseResult:
    """Rank all catalogued cards for a job.

    Args:
        workload: What is to be computed.
        ask: How it is to run on each card.
        limits: The job and what is asked of a card.
        prices: File of prices by the hour.
        timed: Whether to time some steps here too.
        on_event: Told what is going on.

    Raises:
        BadInputError: Something asked makes no sense.
        CaptureError: The workload cannot run without data.
    """
    clock, asked = _Clock(on_event), ask.checked()
    known = _prices(prices)
    limits = limits.checked(known)
    captured = _captured(workload, asked, clock.say)
    batch = captured.checked_batch(asked.batch or captured.fixed_batch or usual_batch(asked))
    asked = replace(asked, batch=batch)
    ranked, excluded = rank(captured, catalogue(), asked, limits, prices=known, say=clock.say)
    own = _here(workload, captured, asked, timed, clock.say)
    return ChooseResult(
        schema=schema.name("choose"),
        verb="predict",
        workload=workload.name,
        device=device("cpu").info,
        environment=environment(),
        mode=_mode(asked),
        batch=batch,
        n_devices=asked.devices,
        samples=limits.samples,
        flops=captured.work(batch).flops,
        parameters=captured.parameters,
        ranked=ranked,
        excluded=excluded,
        here=own,
        notes=captured.notes,
        seconds_spent=clock.spent_s,
    )


def gpus() -> CatalogueResult:
    """All catalogued cards, with what was measured of those that are here."""
    return CatalogueResult(
        schema=schema.name("gpus"),
        verb="predict",
        environment=environment(),
        gpus={slug(sheet): as_measured(sheet) for sheet in catalogue()},
    )


def _here(
    workload: "Workload",
    captured: Subject,
    asked: Ask,
    timed: bool,
    say: Callable[[str], None],
) -> Here:
    measured = ceilings("cpu", progress=lambda text: say(f"measuring the CPU: {text}"))
    batch = captured.fixed_batch or min(asked.batch or 1, _TIMED_BATCH)
    return here(workload, captured, measured, asked, timed=timed, batch=batch, say=say)


def _captured(
    workload: "Workload", asked: Ask, say: Callable[[str], None], *, cpu: bool = False
) -> Subject:
    precision = "bf16" if asked.dtype in ("fp8", "int8") else asked.dtype
    return subject(
        workload,
        training=asked.training,
        precision=precision,
        optimizer=asked.optimizer,
        cpu=cpu,
        say=say,
    )


def _prices(path: Path | None) -> Prices | None:
    return None if path is None else read_prices(path)


def _mode(asked: Ask) -> str:
    return "train" if asked.training else "infer"


def _device(sheet: GpuSheet) -> DeviceInfo:
    return DeviceInfo(
        name=slug(sheet),
        title=sheet.name,
        fingerprint=sheet.mark,
        memory_bytes=int(sheet.memory_bytes),
    )
