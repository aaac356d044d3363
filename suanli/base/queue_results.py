"""The queue of one machine: its jobs, and what `suanli queue` prints with `--json`."""

import shlex
from dataclasses import dataclass
from typing import Literal

from suanli.base.results import SchemaName

JobState = Literal["waiting", "running", "done", "failed"]
NeedSource = Literal["given", "measured", "predicted", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a job needs on one device.

    Attributes:
        memory_bytes: Of the device's memory; None where nothing is known.
        seconds: From start to end; None where nothing is known.
        source: Where both come from: the person, an earlier job, or the model of `suanli predict`.
    """

    device: str
    memory_bytes: int | None = None
    seconds: float | None = None
    source: NeedSource = "unknown"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command of the queue.

    Attributes:
        command: Words behind `suanli`.
        folder: Where it runs.
        out: The run's folder, for `train`; "" for other verbs.
        wanted: Device that was asked for, or "auto".
        needs: One entry per device that was here when the job was added.
        device: Where it runs or ran; "" before.
        starts: How often it was started.
        crashes: How many of these ended by a signal that nobody here sent.
        pid: Of its process while it runs.
        born: When that process began, in seconds since 1970: numbers are used again.
        started_s: Seconds since 1970 at its newest start.
        spent_s: Seconds of all its starts together.
        peak_bytes: The most memory that it was seen to hold.
        reason: Why it failed or waits again, in one line.
        log: File of what it printed.
    """

    id: int
    command: tuple[str, ...]
    folder: str
    state: JobState = "waiting"
    out: str = ""
    wanted: str = "auto"
    needs: tuple[Need, ...] = ()
    device: str = ""
    starts: int = 0
    crashes: int = 0
    pid: int | None = None
    born: float | None = None
    started_s: float | None = None
    spent_s: float = 0.0
    peak_bytes: int | None = None
    exit_code: int | None = None
    reason: str = ""
    log: str = ""

    @property
    def words(self) -> str:
        """The command on one line, as a shell takes it."""
        return shlex.join(self.command)

    def need_on(self, device: str) -> Need:
        """What it needs there; an empty entry where nothing is known."""
        return next((n for n in self.needs if n.device == device), Need(device=device))


@dataclass(frozen=True, kw_only=True)
class QueueResult:
    """The jobs that a call of `suanli queue` is about.

    Attributes:
        interrupted: Whether `run` was asked to stop before all was done.
    """

    schema: SchemaName
    verb: str
    jobs: tuple[Job, ...]
    interrupted: bool = False
