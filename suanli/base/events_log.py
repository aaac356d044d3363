"""What long work tells, kept in a file beside its result while it goes on.

`NAME.events.jsonl` stands beside the engine or the run `NAME`: a line when the work begins, one per
event, and one at the end with the result. Lines are made and written by a thread of their own, so
that whoever tells something does not wait for a disk. A line that a killed process left half
written is passed over by the reader.
"""

import json
import os
import platform
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from suanli.base import codec
from suanli.base.errors import ArtefactError
from suanli.base.events import Event, Listener, ignore
from suanli.base.files import absent_folders, beside, remove_empty

SUFFIX = ".events.jsonl"
LIMIT_BYTES = 256 << 20  # of a file that is read: far more than any search writes


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What began.

    Attributes:
        pid: Of the process that does it.
        host: Machine that the process is on.
    """

    verb: str
    workload: str
    pid: int
    host: str


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How it ended.

    Attributes:
        state: "done", "stopped" (Ctrl-C) or "failed".
        error: One line where it failed.
        result: The verb's result as `--json` prints it; None where there is none.
    """

    state: Literal["done", "stopped", "failed"]
    error: str = ""
    result: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the file: exactly one of the three is there.

    Attributes:
        at: Seconds since 1970.
    """

    at: float
    begin: Beginning | None = None
    event: Event | None = None
    end: Ending | None = None


def path_of(result: Path) -> Path:
    """Where the events of what is made at `result` are kept."""
    return beside(result, SUFFIX)


class EventsLog:
    """A listener that hands every event on, and keeps it.

    The file is begun with the first event, so that what is refused before any work leaves an
    earlier file alone.

    Args:
        result: Folder that the work makes; None keeps nothing.
        verb: Such as "optimize".
        workload: Its name.
        listener: Told every event first.
        append: Go on with the file that is there, as a resumed run does.
        held: Write nothing before `release`; what is refused until then leaves no file.
    """

    def __init__(
        self,
        result: Path | None,
        *,
        verb: str,
        workload: str,
        listener: Listener = ignore,
        append: bool = False,
        held: bool = False,
    ) -> None:
        self._path = None if result is None else path_of(result)
        self._beginning = Beginning(
            verb=verb, workload=workload, pid=os.getpid(), host=platform.node()
        )
        self._listener, self._append, self._held = listener, append, held
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._result: Any = None
        self._lost = ""
        self._empty: list[Path] = []  # folders that were made for the file
        self._begun = False

    def __call__(self, event: Event) -> None:
        """Hand on one event, and keep it."""
        self._listener(event)
        if self._path is None:
            return
        if not self._begun:
            self._begun = True
            self._lines.put(Line(at=time.time(), begin=self._beginning))
        self._lines.put(Line(at=time.time(), event=event))
        if not self._held:
            self._start()

    def release(self) -> None:
        """Begin the file, where it was held."""
        self._held = False
        if self._begun:
            self._start()

    def discard(self) -> None:
        """Leave no file of what came to nothing; one that is gone on with stays."""
        self._held = True
        if self._writer is not None:
            self._lines.put(None)
            self._writer.join()
            self._writer = None
            if self._path is not None and not self._append:
                self._path.unlink(missing_ok=True)
                remove_empty(self._empty)

    def _start(self) -> None:
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, daemon=True)
            self._writer.start()

    def finish(self, result: Any) -> None:
        """Keep the record that the work gave; it is written at the end."""
        self._result = result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is None:
            return
        self._lines.put(Line(at=time.time(), end=self._ending(error)))
        self._lines.put(None)
        self._writer.join()
        if self._lost:
            self._listener(Event(kind="note", text=f"the events are not kept: {self._lost}"))

    def _ending(self, error: BaseException | None) -> Ending:
        result = None if self._result is None else codec.to_json(self._result)
        if isinstance(error, KeyboardInterrupt):
            return Ending(state="stopped", result=result)
        if error is not None:
            said = " ".join(str(error).split()) or type(error).__name__
            return Ending(state="failed", error=said, result=result)
        stopped = bool(getattr(self._result, "interrupted", False))
        return Ending(state="stopped" if stopped else "done", result=result)

    def _write(self) -> None:
        """Write lines until there is none any more; the disk's fault ends it quietly."""
        assert self._path is not None
        try:
            self._empty = absent_folders(self._path.parent)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            mode = "a" if self._append else "w"
            torn = self._append and _is_torn(self._path)
            with self._path.open(mode, encoding="utf-8", errors="replace") as file:
                file.write("\n" if torn else "")  # else the first line would be lost with it
                while (line := self._lines.get()) is not None:
                    file.write(json.dumps(codec.to_json(line), ensure_ascii=False) + "\n")
                    file.flush()
        except OSError as error:
            self._lost = error.strerror or str(error)


def _is_torn(path: Path) -> bool:
    """Whether the last line of a file has no end; OSError but for a file that is not there."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read(path: Path) -> list[Line]:
    """The lines of a file; what is no such line is left out.

    Raises:
        ArtefactError: It cannot be read, or is larger than any such file.
    """
    try:
        if path.stat().st_size > LIMIT_BYTES:
            raise ArtefactError(f"{path.name} is larger than {LIMIT_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ArtefactError(f"cannot read {path.name}: {error.strerror or error}") from None
    found = []
    for line in text.split("\n"):  # splitlines would also cut at U+2028, which JSON may hold
        try:
            found.append(codec.loads(Line, line))
        except ArtefactError:
            continue
    return found


def alive(beginning: Beginning) -> bool:
    """Whether the process that wrote this still runs, as far as it can be seen from here."""
    if beginning.host != platform.node():
        return False
    try:
        os.kill(beginning.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's process
    return True
