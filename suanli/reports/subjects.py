"""Results as they lie on disk, read back as records: files of `--json`, engines, runs, events."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suanli.base import codec, events_log
from suanli.base.errors import ArtefactError, BadInputError
from suanli.base.kernel_results import KernelCheckResult, KernelExplainResult, KernelTuneResult
from suanli.base.predict_results import ChooseResult, PredictResult
from suanli.base.profile_results import ProfileResult
from suanli.base.results import DoctorResult, OptimizeResult
from suanli.base.schema import VERSION
from suanli.base.train_results import TrainProgress, TrainResult

Record = (
    DoctorResult
    | OptimizeResult
    | TrainResult
    | ProfileResult
    | PredictResult
    | ChooseResult
    | KernelExplainResult
    | KernelCheckResult
    | KernelTuneResult
)

RECORDS: dict[str, type[Any]] = {
    "suanli.doctor": DoctorResult,
    "suanli.optimize": OptimizeResult,
    "suanli.train": TrainResult,
    "suanli.profile": ProfileResult,
    "suanli.predict": PredictResult,
    "suanli.choose": ChooseResult,
    "suanli.kernel-explain": KernelExplainResult,
    "suanli.kernel-check": KernelCheckResult,
    "suanli.kernel-tune": KernelTuneResult,
}
_LIMIT_BYTES = 256 << 20
_MANIFEST, _RUN, _RESULT, _METRICS = "manifest.json", "run.json", "result.json", "metrics.jsonl"
_NEXT = "give a file that --json wrote, an engine's folder, or a run's folder"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A result to be shown.

    Attributes:
        source: Name of the file or folder that it was read from.
        history: Course of a training run; empty where it is not at hand.
    """

    record: Record
    source: str
    history: tuple[TrainProgress, ...] = ()


def of_record(record: Record, source: str = "") -> Subject:
    """A result as it came from a verb, with what lies in its run's folder."""
    history: tuple[TrainProgress, ...] = ()
    if isinstance(record, TrainResult):
        history = read_history(Path(record.run_dir) / _METRICS)
    return Subject(record=record, source=source, history=history)


def read(path: Path) -> Subject:
    """What a path holds.

    Args:
        path: A file that `--json` wrote, an events file, an engine's folder or a run's folder.

    Raises:
        BadInputError: It is none of these, or of another version.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise BadInputError(f"there is no file or folder {path}", next_step=_NEXT)
    if path.name.endswith(events_log.SUFFIX):
        return _of_events(path, path.name)
    record = _record(_json(path), path.name)
    if isinstance(record, TrainResult) and path.name == _RESULT:
        return Subject(
            record=record, source=str(path), history=read_history(path.with_name(_METRICS))
        )
    return of_record(record, path.name)


def read_history(path: Path) -> tuple[TrainProgress, ...]:
    """The course of a run; lines that are torn or hold a loss that is no number are left out."""
    try:
        if not path.is_file() or path.stat().st_size > _LIMIT_BYTES:
            return ()
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ()
    found = []
    for line in lines:
        try:
            found.append(codec.loads(TrainProgress, line))
        except ArtefactError:
            continue
    return tuple(found)


def is_engine(folder: Path) -> bool:
    """Whether a folder is an engine's."""
    return (folder / _MANIFEST).is_file() and (folder / "signature.json").is_file()


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / _RUN).is_file() and (folder / "plan.json").is_file()


def schema_of(path: Path) -> str:
    """Name of the schema of a JSON file; "" where it is none of a verb's results.

    Only the file's first kilobytes are looked at, which is where `--json` writes it.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(2048)
    except OSError:
        return ""
    return next((known for known in RECORDS if f'"{known}"' in head), "")


def _folder(folder: Path) -> Subject:
    events = events_log.path_of(folder)
    if is_run(folder):
        if not (folder / _RESULT).is_file():
            raise BadInputError(
                f"the run in {folder} has no result yet",
                next_step=f"suanli ui {folder.parent} shows it while it goes on",
            )
        return read(folder / _RESULT)
    if is_engine(folder):
        if events.is_file():
            return _of_events(events, folder.name)
        from suanli.reports.engine_numbers import result_of_engine

        return Subject(record=result_of_engine(folder), source=folder.name)
    raise BadInputError(f"{folder} holds no engine and no run", next_step=_NEXT)


def _of_events(path: Path, source: str) -> Subject:
    ends = [line.end for line in events_log.read(path) if line.end is not None]
    if not ends or ends[-1].result is None:
        raise BadInputError(
            f"{path.name} holds no result yet",
            next_step=f"suanli ui {path.parent} shows it while it goes on",
        )
    return of_record(_record(ends[-1].result, path.name), source)


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise BadInputError(f"{path.name} is larger than {_LIMIT_BYTES >> 20} MiB")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise BadInputError(f"{path} is not JSON", next_step=_NEXT) from None


def _record(data: Any, source: str) -> Record:
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, dict) or not isinstance(schema.get("name"), str):
        raise BadInputError(f"{source} is no result of suanli", next_step=_NEXT)
    if schema["name"] == "suanli.error":
        raise BadInputError(f"{source} says that it failed: {str(data.get('error'))[:200]}")
    record_type = RECORDS.get(schema["name"])
    if record_type is None:
        known = ", ".join(sorted(n.removeprefix("suanli.") for n in RECORDS))
        verb = schema["name"].removeprefix("suanli.")
        raise BadInputError(
            f"{source} is a result of {verb!r}, which has no report",
            next_step=f"these have: {known}",
        )
    if schema.get("version") != VERSION:
        raise BadInputError(
            f"{source} is version {schema.get('version')} of its kind, not {VERSION}",
            next_step="make it again with this version",
        )
    if record_type is TrainResult and data.get("loss") is None:
        data = {**data, "loss": math.nan}  # JSON has no word for it
    try:
        record: Record = codec.from_json(record_type, data)
    except ArtefactError as error:
        raise BadInputError(
            f"{source}: {error}", next_step="make it again with this version"
        ) from None
    return record
