"""What a job will need: as an earlier one like it was measured, or as `suanli predict` has it."""

from collections.abc import Sequence
from pathlib import Path

from suanli.base.errors import SuanliError
from suanli.base.hardware import GpuInfo
from suanli.base.queue_results import Job, Need
from suanli.devices import cpu_info, gpu_infos, sheet_for
from suanli.jobs import command as commands
from suanli.jobs.place import Place
from suanli.measure.ceilings import kept_ceilings
from suanli.predicting.ask import Ask
from suanli.predicting.here import predict_cpu
from suanli.predicting.measured import as_measured
from suanli.predicting.one import predict_on
from suanli.predicting.subject import STATES, Subject, subject
from suanli.training.readers import stays
from suanli.training.recipe import Recipe
from suanli.training.recipes import resolve_recipe

_OPTIMIZE_S = 120.0  # the budget of `optimize` where none is given
_BEHIND_SEARCH = 1.3  # `optimize` builds, confirms and reloads after its search
_LIBRARIES_BYTES = 400 << 20  # what a process with torch holds before it does anything


def places() -> list[Place]:
    """The devices here, the CPU first, with what is free now."""
    import psutil

    memory = psutil.virtual_memory()
    total = min(int(memory.total), cpu_info().memory_bytes)
    found = [Place(device="cpu", memory_bytes=total, free_bytes=min(total, memory.available))]
    for gpu in gpu_infos():
        free = gpu.memory_bytes - used_bytes(gpu)
        found.append(
            Place(device=f"cuda:{gpu.index}", memory_bytes=gpu.memory_bytes, free_bytes=free)
        )
    return found


def used_bytes(gpu: GpuInfo) -> int:
    """Bytes that everybody together holds on a GPU; 0 where the driver cannot say.

    It asks the driver: torch's own question would take a part of the card for this process.
    """
    from suanli.devices.gpu_facts import ask, nvml_session

    with nvml_session() as nvml:
        if nvml is None or gpu.uuid is None:
            return 0
        handle = ask(nvml.nvmlDeviceGetHandleByUUID, gpu.uuid)
        memory = None if handle is None else ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        return 0 if memory is None else int(memory.used)


def needs_of(job: Job, devices: Sequence[Place], earlier: Sequence[Job]) -> tuple[Need, ...]:
    """What a job needs on each device.

    Args:
        job: Its command and folder.
        devices: Those that are here.
        earlier: Jobs that may have been like it.

    Raises:
        BadInputError: The workload is unknown, or it cannot be trained.
    """
    found = {place.device: measured_need(job, place.device, earlier) for place in devices}
    if job.command[0] == "optimize":
        budget = commands.number_of(job.command, "--budget") or _OPTIMIZE_S
        guess = Need(device="", seconds=_BEHIND_SEARCH * budget, source="predicted")
        return tuple(known or _on(guess, device) for device, known in found.items())
    folder = commands.value_of(job.command, "--data")
    recipe = resolve_recipe(job.command[1], data=Path(job.folder) / folder if folder else None)
    if all(known is not None for known in found.values()):
        return tuple(known for known in found.values() if known is not None)
    predictor = _Predictor(job, recipe)
    return tuple(known or predictor.need(device) for device, known in found.items())


def measured_need(job: Job, device: str, earlier: Sequence[Job]) -> Need | None:
    """What the newest job with the same command took on a device; None where there is none."""
    mine = commands.about(job.command)
    for other in reversed(earlier):
        same = (other.state, other.device) == ("done", device)
        if same and commands.about(other.command) == mine:
            return Need(
                device=device,
                memory_bytes=other.peak_bytes,
                seconds=other.spent_s,
                source="measured",
            )
    return None


class _Predictor:
    """Predicts one training job on several devices; the work is captured once."""

    def __init__(self, job: Job, recipe: Recipe) -> None:
        self._recipe = recipe
        train = recipe.workload.load().train
        settings = recipe.settings
        epochs = int(commands.number_of(job.command, "--epochs") or settings.epochs)
        self._steps = epochs * -(-len(train) // settings.batch)
        first = sum(part.nbytes for part in train.head(1).inputs)
        self._data_bytes = first * len(train) if stays(train, "cpu") else 0
        self._most_s = commands.number_of(job.command, "--max-seconds")
        self._subjects: dict[bool, Subject] = {}

    def need(self, device: str) -> Need:
        """The need on a device; an empty one where it cannot be predicted."""
        try:
            return self._predicted(device)
        except SuanliError:  # no ceilings, no sheet, a model that cannot be captured without data
            return Need(device=device, seconds=self._most_s)

    def _predicted(self, device: str) -> Need:
        settings = self._recipe.settings
        plan = self._recipe.plan
        dtype = plan.precision if plan is not None else settings.precision
        ask = Ask(training=True, batch=settings.batch, dtype=dtype).checked()
        if device == "cpu":
            ceilings = kept_ceilings("cpu")
            if ceilings is None:
                return Need(device=device, seconds=self._most_s)
            found = predict_cpu(self._subject(dtype, cpu=True), ceilings, ask, settings.batch)
            memory = found.memory.total_bytes + self._data_bytes + _LIBRARIES_BYTES
        else:
            gpu = next(g for g in gpu_infos() if f"cuda:{g.index}" == device)
            sheet = sheet_for(gpu.name)
            if sheet is None:
                return Need(device=device, seconds=self._most_s)
            found = predict_on(self._subject(dtype, cpu=False), as_measured(sheet), ask)
            memory = found.memory.total_bytes + self._data_bytes
        seconds = 1e-3 * found.step_ms.p50 * self._steps
        if self._most_s is not None:
            seconds = min(seconds, self._most_s)
        return Need(device=device, memory_bytes=int(memory), seconds=seconds, source="predicted")

    def _subject(self, dtype: str, *, cpu: bool) -> Subject:
        if cpu not in self._subjects:
            own = self._recipe.settings
            name = "sgd-momentum" if own.optimizer == "sgd" and own.momentum else own.optimizer
            self._subjects[cpu] = subject(
                self._recipe.workload,
                training=True,
                precision=dtype,
                optimizer=name if name in STATES else "sgd-momentum",
                cpu=cpu,
            )
        return self._subjects[cpu]


def _on(need: Need, device: str) -> Need:
    return Need(
        device=device,
        memory_bytes=need.memory_bytes,
        seconds=need.seconds,
        source=need.source,
    )
