"""Trials that outlive the search, so that a second run goes on where the first one stopped.

One file of JSON lines per key; a key stands for everything that a trial depends on beside its plan.
A line is appended with a single write under a lock, so two searches can share a file, and a process
that dies leaves at most one torn line, which readers pass over. Only JSON is read, no pickle.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from suanli.base import codec
from suanli.base.errors import ArtefactError
from suanli.base.files import cache_dir
from suanli.base.hardware import DeviceInfo, Environment
from suanli.base.trial import Trial

_FORMAT = 2  # raised whenever trials are judged by other rules
_MAX_LINE_BYTES = 4 << 20
_RETRY_FACTOR = 1.5  # a plan that ran out of time is tried again with at least this much more
_LIMIT = "limit_s"
_FAILURE = "failure"


def store_key(
    *,
    workload: str,
    device: DeviceInfo,
    environment: Environment,
    batch: int,
    objective: str,
    conditions: Mapping[str, str | int | float | bool | None] | None = None,
) -> str:
    """Sixteen hexadecimal digits for what trials depend on beside the plan.

    Args:
        workload: Fingerprint of the program: graph, weights and data.
        device: The device; its fingerprint counts.
        environment: Libraries and driver count, the load does not.
        batch: Samples in the step that is timed.
        objective: "latency" or "throughput".
        conditions: What else decides about a trial, such as the largest drop of quality.
    """
    facts = codec.to_json(replace(environment, load_average=None))
    parts = {
        "format": _FORMAT,
        "workload": workload,
        "device": device.fingerprint,
        "environment": facts,
        "batch": batch,
        "objective": objective,
        "conditions": codec.to_json(dict(conditions or {})),
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def failure_kind(trial: Trial) -> str:
    """How a failed trial failed: "timeout", "memory", "crash", "error"; "" for any other trial."""
    if trial.status != "failed":
        return ""
    return trial.details.get(_FAILURE, "error")


def failed_within(trial: Trial, kind: str, limit_s: float) -> Trial:
    """A failed trial that says how it failed, and within how many seconds."""
    return replace(trial, details={**trial.details, _FAILURE: kind, _LIMIT: f"{limit_s:.3f}"})


class TrialStore:
    """The trials of one key, by plan.

    Attributes:
        ignored_lines: Lines of the file that were no trials.
        notice: What a person should know, such as a folder that cannot be written; "" if nothing.
    """

    def __init__(self, key: str, *, fresh: bool = False, folder: Path | None = None) -> None:
        """Open the store and read what is there.

        Args:
            key: From `store_key`.
            fresh: Whether to forget the earlier trials of this key.
            folder: Where the files lie; None for the user's cache.
        """
        self.path = (folder or cache_dir() / "trials") / f"{key}.jsonl"
        self.ignored_lines = 0
        self.notice = ""
        self._in_memory = False
        self._trials: dict[str, Trial] = {}
        if fresh:
            self._forget()
        else:
            self._read()

    def __len__(self) -> int:
        return len(self._trials)

    def all(self) -> tuple[Trial, ...]:
        """All stored trials, marked as resumed."""
        return tuple(replace(trial, resumed=True) for trial in self._trials.values())

    def get(self, key: str, *, limit_s: float | None = None) -> Trial | None:
        """The stored trial of the plan with this key, marked as resumed.

        Args:
            key: `Plan.key` of the plan as it was asked for.
            limit_s: Seconds that a new trial would get. A stored time-out is not given back if
                that is at least one and a half times what it had.
        """
        trial = self._trials.get(key)
        if trial is None:
            return None
        if limit_s is not None and failure_kind(trial) == "timeout":
            had = _seconds(trial.details.get(_LIMIT, ""))
            if limit_s >= _RETRY_FACTOR * had:
                return None
        return replace(trial, resumed=True)

    def put(self, trial: Trial, *, key: str | None = None) -> None:
        """Keep a trial. Skipped ones are not kept: they cost nothing to find out again.

        What was built is not kept, so `build_dir` is empty in what comes back. Where the file
        cannot be written the trial is kept in memory and `notice` says why.

        Args:
            trial: What was found.
            key: Key of the plan as it was asked for, where the built one differs from it.
        """
        if trial.status == "skipped":
            return
        asked = key or trial.plan.key
        kept = _storable(replace(trial, resumed=False, build_dir=""))
        self._trials[asked] = kept
        if self._in_memory:
            return
        record = {"key": asked, "trial": codec.to_json(kept)}
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            self._append(line)
        except OSError as error:
            self._go_on_in_memory(error)

    def _append(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(self.path, flags, 0o644)
        try:
            with _locked(handle):
                size = os.fstat(handle).st_size
                if size and _last_byte(handle, size) != b"\n":
                    line = b"\n" + line  # the last writer died in the middle of a line
                written = os.write(handle, line)
                if written != len(line):
                    raise OSError("the disk is full")
                os.fsync(handle)
        finally:
            os.close(handle)

    def _read(self) -> None:
        try:
            with self.path.open("rb") as file:
                while line := file.readline(_MAX_LINE_BYTES + 1):
                    self._take(line, file)
        except FileNotFoundError:
            return
        except OSError as error:
            self._go_on_in_memory(error)

    def _take(self, line: bytes, file: Any) -> None:
        """Take in one line, or count it as ignored."""
        if len(line) > _MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(_MAX_LINE_BYTES)
            self.ignored_lines += 1
            return
        if not line.strip():
            return
        try:
            record = json.loads(line)
            key, data = record["key"], record["trial"]
            if not isinstance(key, str):
                raise TypeError
            self._trials[key] = codec.from_json(Trial, data)
        except (ValueError, KeyError, TypeError, RecursionError, ArtefactError):
            self.ignored_lines += 1

    def _forget(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            self._go_on_in_memory(error)

    def _go_on_in_memory(self, error: OSError) -> None:
        self._in_memory = True
        why = error.strerror or str(error)
        self.notice = f"trials are not kept for the next run: {self.path.parent}: {why}"


@contextmanager
def _locked(handle: int) -> Iterator[None]:
    """Hold the file for this process; where the system has no such locks, appends must do."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)


def _storable(trial: Trial) -> Trial:
    """The trial as it can be read back: JSON has no infinities, so their checks are left out."""
    try:
        return codec.from_json(Trial, codec.to_json(trial))
    except ArtefactError:
        return replace(trial, values=None, quality=None)


def _last_byte(handle: int, size: int) -> bytes:
    os.lseek(handle, size - 1, os.SEEK_SET)
    return os.read(handle, 1)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
