"""The folder of a run: what it is, how it goes, and what it can be gone on with.

run.json            workload, seed, hyper-parameters
plan.json           how it is computed
environment.json    libraries and machine
metrics.jsonl       one line per report
tensorboard/        the same for TensorBoard
checkpoints/        see `checkpoints`
weights.safetensors the trained model, at the end
result.json         what `--json` prints, at the end
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from suanli.base import codec
from suanli.base.errors import ArtefactError, BadInputError, SuanliError
from suanli.base.files import absent_folders, remove_empty, write_atomic
from suanli.base.hardware import Environment
from suanli.base.plan import Option
from suanli.base.train_plan import TrainPlan
from suanli.base.train_results import TrainProgress
from suanli.training._tree import NotDataError, taken_apart
from suanli.training.backup_place import check_apart, check_same_run, check_unused
from suanli.training.checkpoints import Checkpoints
from suanli.training.encryption import Cipher
from suanli.training.events_file import EventsFile
from suanli.training.failing import in_one_line
from suanli.training.loop import Loop
from suanli.training.shards import facts_of, is_sharded, read_shards, write_shards
from suanli.workloads.record import TrainingSettings

_PARTS = ("environment.json", "plan.json", "run.json")  # with the last one the run exists
_SCALARS = ("loss", "quality", "samples_per_s", "sol_fraction", "mfu")

_SAVABLE = "a state_dict holds tensors, numbers, texts, and lists and dictionaries of them"

Note = Callable[[str], None]


class NotSavableError(BadInputError):
    """The state of a run is such that no checkpoint can hold it."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run is, beside its plan.

    Attributes:
        ref: What makes the recipe again; "" for a model that lived in one process only.
        as_written: Whether the hyper-parameters are the workload's own.
        start: safetensors file that the weights came from; "" for the workload's own start.
        frozen: Patterns of the parameters that were not trained.
        encrypted: Whether the checkpoints are.
        prune: Kind of pruning, or "".
        teacher: Workload that is learnt from as well, or "".
    """

    workload: str
    ref: str
    seed: int
    settings: TrainingSettings
    as_written: bool
    target: float | None = None
    max_seconds: float | None = None
    start: str = ""
    frozen: tuple[str, ...] = ()
    encrypted: bool = False
    prune: str = ""
    teacher: str = ""

    @property
    def hyper_parameters(self) -> dict[str, Option]:
        """The settings as the flat record of a result."""
        return {
            name: ",".join(map(str, value)) if isinstance(value, list) else value
            for name, value in codec.to_json(self.settings).items()
        }


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How checkpoints are kept.

    Attributes:
        every_s: Seconds between two.
        keep: How many stay.
        backup: A second folder for copies.
        key: File of the key to encrypt with; made where there is none.
    """

    every_s: float = 60.0
    keep: int = 2
    backup: Path | None = None
    key: Path | None = None


class RunFolder:
    """Writes and reads one run's folder."""

    def __init__(
        self, folder: Path, keeping: Keeping | None = None, *, new_key: bool = True
    ) -> None:
        """Name the folder; nothing is written yet.

        Args:
            folder: The run's.
            keeping: How checkpoints are kept.
            new_key: Whether a key that is not there may be made: a run that was begun has its own.

        Raises:
            BadInputError: There is no key, or the file holds none; the backup lies in the folder.
        """
        self.folder, self.keeping = folder, keeping or Keeping()
        key = self.keeping.key
        self._cipher = cipher = Cipher.from_file(key, make=new_key) if key else None
        backup = self.keeping.backup
        if backup is not None:
            check_apart(folder, backup)
        self.checkpoints = Checkpoints(
            folder / "checkpoints", keep=self.keeping.keep, backup=backup, cipher=cipher
        )
        self.newest: Path | None = None
        self._events: EventsFile | None = None
        self._saved_at = time.monotonic()
        self._failed = self._uncopied = self._unkept = False
        self._made: list[list[Path]] = []  # folders that were not there before

    @property
    def weights(self) -> Path:
        """Where the trained weights go."""
        return self.folder / "weights.safetensors"

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.folder / "run.json").is_file()

    def begin(self, record: RunRecord, plan: TrainPlan, environment: Environment) -> None:
        """Write what the run is.

        Raises:
            BadInputError: The folder or the backup holds another run, or something else, or cannot
                be written.
        """
        self.check_free()
        if self._cipher is not None:
            if plan.sharded:  # also of a plan that was given
                raise BadInputError("the checkpoints of a sharded run cannot be encrypted yet")
            self._cipher.ready()
        for left in _cut_short(self.folder):
            left.unlink(missing_ok=True)
        texts = [codec.dumps(environment), codec.dumps(plan), codec.dumps(record)]
        try:
            for place in self._places:
                self._made.append(absent_folders(place))
                for name, text in zip(_PARTS, texts, strict=True):
                    write_atomic(place / name, text)
        except BaseException as error:
            self.withdraw()
            if isinstance(error, OSError):
                raise BadInputError(f"cannot write to {place}: {error.strerror}") from None
            raise

    def keep(self, record: RunRecord, note: Note) -> None:
        """Write what a run that goes on is by now; a backup that knows nothing of it learns it.

        Raises:
            BadInputError: The folder cannot be written.
        """
        backup = self.keeping.backup
        try:
            _bring_up(self.folder, record, self.folder)
        except OSError as error:
            raise BadInputError(f"cannot write to {self.folder}: {error.strerror}") from None
        if backup is not None:
            try:
                _bring_up(backup, record, self.folder)
            except OSError as error:
                note(f"the backup does not know what the run is: {error.strerror}")

    def withdraw(self) -> None:
        """Take back what `begin` wrote: no step was done, and nothing is left of the run."""
        for place in reversed(self._places):
            for name in (*reversed(_PARTS), *(["metrics.jsonl"] if place == self.folder else [])):
                with suppress(OSError):
                    (place / name).unlink()
        for folder in self.checkpoints.places:
            shutil.rmtree(folder / "step-000000000", ignore_errors=True)
        remove_empty([self.checkpoints.folder])
        shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
        while self._made:
            remove_empty(self._made.pop())

    @property
    def _places(self) -> list[Path]:
        """The folder, and the backup where there is one."""
        backup = self.keeping.backup
        return [self.folder, *([backup] if backup is not None else [])]

    def check_free(self) -> None:
        """Refuse a place that a new run may not take.

        Raises:
            BadInputError: It is a file, or a folder with something in it.
        """
        if self.folder.is_file():
            raise BadInputError(f"{self.folder} is a file", next_step="give a folder with -o")
        taken = self.folder.is_dir() and any(self.folder.iterdir())
        if taken and not _cut_short(self.folder):
            if (self.folder / "run.json").exists():
                raise BadInputError(
                    f"{self.folder} holds a run",
                    next_step="go on with it by --resume, or give another folder with -o",
                )
            raise BadInputError(
                f"{self.folder} holds something that is no run",
                next_step="give another folder with -o",
            )
        if self.checkpoints.backup_taken:
            raise BadInputError(
                f"{self.keeping.backup} holds checkpoints of another run",
                next_step="give another folder with --backup",
            )
        if self.keeping.backup is not None:
            check_unused(self.keeping.backup, _PARTS)

    def read(self, *, go_on: bool = False) -> tuple[RunRecord, TrainPlan]:
        """What the run is; where its folder is lost, as the backup has it.

        Args:
            go_on: Whether more checkpoints are to follow: with a key if it was begun with one, and
                else without.

        Raises:
            BadInputError: There is no run, or there should be a key, or none.
        """
        backup = self.keeping.backup
        if backup is not None and not self.exists and (backup / "run.json").is_file():
            for name in _PARTS:
                text = (backup / name).read_text(encoding="utf-8")
                write_atomic(self.folder / name, text)
        if not (self.folder / "run.json").is_file():
            raise BadInputError(f"there is no run in {self.folder}", next_step="give it with -o")
        record = codec.read(RunRecord, self.folder / "run.json")
        if backup is not None:
            with suppress(ArtefactError):  # there is none, or a damaged one
                check_same_run(record, codec.read(RunRecord, backup / "run.json"), backup)
        if go_on and record.encrypted and self._cipher is None:
            raise BadInputError(
                f"the checkpoints of the run in {self.folder} are encrypted",
                next_step="give the key that it was begun with: --key FILE",
            )
        if go_on and self._cipher is not None and not record.encrypted:
            raise BadInputError(
                f"the run in {self.folder} was begun without a key, and its checkpoints are in "
                "clear",
                next_step="go on without --key; a new run may have one",
            )
        return record, codec.read(TrainPlan, self.folder / "plan.json").checked()

    def restore(self, loop: Loop, note: Note) -> int | None:
        """Bring a loop to the newest whole checkpoint.

        Returns:
            Its step; None where there is no checkpoint yet.

        Raises:
            ArtefactError: No checkpoint is whole, or it is of another model.
        """
        loaded = self.checkpoints.load()
        if loaded is None:
            if loop.stepper.replicas.first:
                _cut_metrics(self.folder / "metrics.jsonl", 0)
            return None
        for line in loaded.passed_over:
            note(f"checkpoint {line}; the one before it is used")
        try:
            if is_sharded(loaded.state["run"]):
                read_shards(loaded.folder, loop.stepper, loaded.state["run"])
                loop.restore_run(loaded.state["run"])
            else:
                loop.restore(loaded.state)
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtefactError(f"{loaded.folder.name} is of another model: {reason}") from None
        self.newest = loaded.folder
        if loop.stepper.replicas.first:
            _cut_metrics(self.folder / "metrics.jsonl", loaded.step)
        return loaded.step

    def follow(self, loop: Loop, note: Note) -> None:
        """Keep metrics at every report, and a checkpoint every so often.

        All processes call it. The first one writes, and of a sharded run each its share.

        Raises:
            NotSavableError: No checkpoint could hold the state; so may the first step.
        """
        self._check(loop)
        known = False

        def behind_step() -> None:
            nonlocal known
            if not known:  # an optimiser makes its state in the first step
                self._check(loop)
                known = True
            if loop.stepper.replicas.first or loop.stepper.sharded:
                self._maybe_save(loop, note)

        self._saved_at = _clock(loop)
        loop.on_step.append(behind_step)
        if not loop.stepper.replicas.first:
            return
        try:
            self._events = EventsFile(self.folder / "tensorboard")
        except OSError as error:
            note(f"no TensorBoard events: {error.strerror}")
        loop.on_report.append(lambda progress: self._metrics(progress, note))

    def save(self, loop: Loop, note: Note) -> None:
        """Write a checkpoint; a failure is told, and the run goes on with the older ones."""
        if self.newest is not None and self.newest.name == f"step-{loop.step:09d}":
            return
        if not _finite(loop):  # a run gone on with from there would be NaN from its first step
            note(f"no checkpoint at step {loop.step}: a weight is infinite or NaN")
            self._saved_at = _clock(loop)
            return
        try:
            self.newest = self._saved(loop)
            if self._failed:
                note(f"checkpoints are written again, from step {loop.step} on")
            self._failed = False
            self._say_copy(loop.step, note)
        except Exception as error:
            if loop.plan.sharded and not isinstance(error, OSError):
                raise  # the other processes may wait elsewhere
            if not self._failed:
                note(f"no checkpoint at step {loop.step}: {_why_not(error)}")
            self._failed = True
        self._saved_at = _clock(loop)

    def _check(self, loop: Loop) -> None:
        """Refuse a state that no checkpoint could hold, before it costs the steps of a run."""
        if loop.plan.sharded:  # torch's own optimisers and no average: there is nothing else in it
            return
        try:
            for part, value in loop.state().items():
                taken_apart(value, {}, part)
        except NotDataError as error:
            self._failed = True  # it is said here
            raise NotSavableError(_why_not(error), next_step=_SAVABLE) from None

    def _say_copy(self, step: int, note: Note) -> None:
        """Tell once that the backup takes no copies, until it does again."""
        reason = self.checkpoints.not_copied
        if reason and not self._uncopied:
            note(f"no copy of the checkpoint at step {step} in the backup: {reason}")
        self._uncopied = bool(reason)

    def _saved(self, loop: Loop) -> Path:
        """Write a checkpoint; with shares where the plan has them."""
        if not loop.plan.sharded:
            return self.checkpoints.save(loop.step, loop.state())
        stepper = loop.stepper
        target = self.checkpoints.folder / f"step-{loop.step:09d}"
        self._together(loop, lambda: self.checkpoints.begin(loop.step))
        write_shards(target, stepper)
        run = {**loop.run_state(), **facts_of(stepper)}
        self._together(loop, lambda: self.checkpoints.finish(target, {"run": run}))
        return target

    def _together(self, loop: Loop, act: Callable[[], object]) -> None:
        """The first process acts, the others wait; a failure there is one of all.

        Raises:
            OSError: It could not be written.
        """
        replicas, failed = loop.stepper.replicas, None
        if replicas.first:
            try:
                act()
            except OSError as error:
                failed = error
        if replicas.from_first(0.0 if failed is None else 1.0):
            raise failed or OSError(0, "the first process could not write")

    def close(self) -> None:
        """End the open files."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _maybe_save(self, loop: Loop, note: Note) -> None:
        if _clock(loop) - self._saved_at >= self.keeping.every_s:
            self.save(loop, note)

    def _metrics(self, progress: TrainProgress, note: Note) -> None:
        data = codec.to_json(progress)
        try:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(data) + "\n")
            if self._events is not None:
                known = {n: data[n] for n in _SCALARS if data[n] is not None}
                self._events.add(progress.step, known)
        except OSError as error:
            if not self._unkept:
                note(f"metrics are not kept: {error.strerror}")
            self._unkept = True


def _cut_short(folder: Path) -> list[Path]:
    """What a process left that was killed while it began a run; empty for any other folder."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    temporary = tuple(f".{name}." for name in _PARTS)
    ours = all(f.name in _PARTS[:2] or f.name.startswith(temporary) for f in found)
    first = any(f.name == _PARTS[0] or f.name.startswith(temporary[0]) for f in found)
    return found if ours and first else []


def _bring_up(place: Path, record: RunRecord, source: Path) -> None:
    """Let a place hold what a run is; the parts that do not change come from its folder."""
    for name in _PARTS[:2] if place != source else ():
        if not (place / name).is_file() and (source / name).is_file():
            write_atomic(place / name, (source / name).read_text(encoding="utf-8"))
    try:
        known = codec.read(RunRecord, place / _PARTS[2]) == record
    except ArtefactError:
        known = False
    if not known:
        write_atomic(place / _PARTS[2], codec.dumps(record))


def _finite(loop: Loop) -> bool:
    """Whether all parameters are finite.

    Of a sharded model each process sees its share alone, and all call it together.
    """
    stepper = loop.stepper
    with torch.no_grad():
        own = (p.to_local() if isinstance(p, DTensor) else p for p in stepper.model.parameters())
        finite = all(bool(p.isfinite().all()) for p in own)
    return not stepper.replicas.any(not finite) if stepper.sharded else finite


def _why_not(error: Exception) -> str:
    """Why a state is not kept, in one line."""
    if isinstance(error, NotDataError):
        return f"{error} cannot be saved"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return in_one_line(error)


def _clock(loop: Loop) -> float:
    """Seconds by which checkpoints are due; where all processes write, all read the same clock."""
    agreed = loop.stepper.agreed
    if not loop.stepper.sharded:
        return time.monotonic()
    return 0.0 if agreed is None else agreed.seconds


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a torn one is left out."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                data = json.loads(line)
            except ValueError:
                continue
            if isinstance(data, dict) and isinstance(data.get("step"), int):
                found.append(data)
    return found


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps that will come again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    if path.exists():
        try:
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        except OSError as error:
            raise SuanliError(
                f"cannot write {path}: {error.strerror}",
                next_step="make room; --resume goes on from the last checkpoint",
            ) from None
