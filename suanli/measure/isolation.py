"""Work in a process of its own, with a deadline, a memory limit and a one-line reason on failure.

A `Worker` starts a fresh interpreter (never a fork of this process), builds one object there and
calls its methods. Arguments and answers are JSON. Whatever the far side does (crash, hang, eat
memory, print, fork, exit, write garbage) becomes a `TrialFailedError`; nothing that it started
outlives it, nor this process. The processes are described in `suanli.measure.worker_main`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Self

import psutil

from suanli.base import errors, leftovers, units
from suanli.base.errors import SuanliError, TrialFailedError
from suanli.measure._pipes import DeadlineError, EndedError, Pipes, ProtocolError

_MAIN = Path(__file__).with_name("worker_main.py")
_GRACE_S = 3.0  # for an idle worker to end by itself
_END_S = 10.0  # for the guardian to kill and reap what is left
_STOP_S = 1.0  # for all threads to take in a stop
_TAIL_BYTES = 8192
_REASON_LENGTH = 300
_LOG = "suanli-worker-"

Progress = Callable[[dict[str, Any]], None]

# Set inside a worker only.
_progress_sink: Progress | None = None


def report_progress(**data: Any) -> None:
    """Send `data` (JSON) to the caller's `on_progress`; outside a worker it does nothing."""
    if _progress_sink is not None:
        _progress_sink(data)


class Worker:
    """An object that lives in a process of its own.

    The process has the parent's `sys.path`, its own session (Ctrl-C does not reach it), and dies
    with the parent, however the parent dies. Use it from one thread at a time, as a context manager
    or with `close`.

    Args:
        target: "module:Class"; the class is built there as `Class(**setup)`.
        setup: Keyword arguments of the class, as JSON.
        env: Environment variables to add to this process's own.
        memory_bytes: Resident size of all its processes together at which it is killed.
        log: File that its standard output and error are appended to; by default a temporary one.
        start_timeout_s: Seconds for the interpreter, the imports and the building.

    Raises:
        TrialFailedError: It could not be built; `kind` is "crash", "timeout", "memory" or "error".
        SuanliError: What building raised, as the same class.
    """

    def __init__(
        self,
        target: str,
        setup: dict[str, Any],
        *,
        env: dict[str, str] | None = None,
        memory_bytes: int | None = None,
        log: Path | None = None,
        start_timeout_s: float = 180.0,
    ) -> None:
        self._failure: TrialFailedError | None = None
        self._reported_peak = 0
        self._paused = False
        self._temporary_log = log is None
        self._log = log or _new_log()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._pipes = Pipes()
        self._guardian = _spawn(self._pipes, self._log, {**os.environ, **(env or {})})
        self._pipes.close_far_ends()
        assert self._guardian.stdout is not None
        self._pipes.status_fd = self._guardian.stdout.fileno()
        self._watch = _MemoryWatch(self._guardian.pid, memory_bytes)
        request = {"path": sys.path, "target": target, "setup": setup}
        try:
            self._exchange(request, start_timeout_s, None, "while starting")
        except BaseException:
            self.close()
            raise

    def call(
        self,
        method: str,
        *,
        timeout_s: float,
        on_progress: Progress | None = None,
        **args: Any,
    ) -> Any:
        """Call a public method of the object and return its answer.

        After an exception in the method the worker can be called again; after a crash, a time-out
        or too much memory it has ended, and further calls raise the same failure. A paused worker
        is resumed.

        Args:
            method: Its name.
            timeout_s: Seconds until the worker is killed.
            on_progress: Gets each message of `report_progress`, on this thread.
            **args: Keyword arguments as JSON.

        Raises:
            TrialFailedError: With `kind` "crash", "timeout", "memory" or "error".
            SuanliError: What the method raised, as the same class.
            TypeError: The arguments are not JSON.
        """
        if self._failure is not None:
            raise TrialFailedError(str(self._failure), kind=self._failure.kind)
        self.resume()
        return self._exchange(
            {"method": method, "args": args}, timeout_s, on_progress, f"in {method}"
        )

    def pause(self) -> None:
        """Stop every thread of every process of the worker (SIGSTOP), until `resume` or `call`.

        Work that a GPU has already been given goes on.
        """
        self._paused = True
        self._signal_all(signal.SIGSTOP)
        # The signal is taken in when a thread next comes round; what runs beside must not meet it.
        deadline = time.monotonic() + _STOP_S
        for process in self._watch.processes():
            while _runs(process) and time.monotonic() < deadline:
                time.sleep(0.0005)

    def resume(self) -> None:
        """Let a paused worker run again."""
        if self._paused:
            self._signal_all(signal.SIGCONT)
            self._paused = False

    def close(self) -> None:
        """End the worker and all that it started; safe to call twice."""
        if self._pipes.closed:
            return
        if self._failure is None:
            self._failure = TrialFailedError("the worker is closed", kind="error")
            self.resume()
            self._pipes.close_requests()
            self._pipes.wait_for_end(_GRACE_S)
        self._end()

    @property
    def alive(self) -> bool:
        """Whether it can be called."""
        return self._failure is None

    @property
    def pid(self) -> int:
        """Process id of the worker itself; 0 before it is known."""
        return self._pipes.worker_pid

    @property
    def peak_bytes(self) -> int:
        """Largest resident size seen so far, over all its processes together."""
        return max(self._reported_peak, self._watch.peak_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(
        self, request: dict[str, Any], timeout_s: float, on_progress: Progress | None, where: str
    ) -> Any:
        """Send one request and wait for its answer. Anything else leaves the worker ended."""
        payload = json.dumps(request).encode() + b"\n"
        try:
            reply = self._answer(payload, time.monotonic() + timeout_s, on_progress)
        except DeadlineError:
            raise self._fail(f"no answer within {timeout_s:.3g} s {where}", "timeout") from None
        except ProtocolError as error:
            raise self._fail(f"{error} {where}", "error") from None
        except EndedError:
            raise self._fail(*self._why_ended(where)) from None
        except BaseException as error:  # Ctrl-C, or on_progress raised: the answer is still due
            self._fail(f"interrupted by {type(error).__name__} {where}", "error")
            raise
        if "error" in reply:
            raise _rebuilt(reply["error"])
        return reply["result"]

    def _answer(self, payload: bytes, deadline: float, on_progress: Progress | None) -> Any:
        self._pipes.send(payload)
        while True:
            reply = self._pipes.receive(deadline)
            if not isinstance(reply, dict) or not reply.keys() & {"progress", "result", "error"}:
                raise ProtocolError("a message that makes no sense came")
            if "progress" not in reply:
                self._reported_peak = max(self._reported_peak, reply["peak_bytes"])
                return reply
            if on_progress is not None:
                on_progress(reply["progress"])
            if time.monotonic() >= deadline:  # a talkative worker is late like any other
                raise DeadlineError

    def _why_ended(self, where: str) -> tuple[str, str]:
        """Reason and kind, when the worker ended without an answer."""
        if self._watch.over_bytes:
            used, limit = units.size(self._watch.over_bytes), units.size(self._watch.limit or 0)
            return f"used {used}, above the limit of {limit}, {where}", "memory"
        code = self._pipes.exit_code
        if code is None:
            how = "its guardian was killed"
        elif code < 0:
            how = f"killed by {_signal_name(-code)}"
            if code == -signal.SIGKILL:
                how += " (the system may be out of memory)"
        else:
            how = f"exited with code {code} without an answer"
        words = _last_words(self._log, self._log_start)
        return f"{how} {where}{': ' if words else ''}{words}", "crash"

    def _fail(self, reason: str, kind: str) -> TrialFailedError:
        self._failure = TrialFailedError(_one_line(reason), kind=kind)
        self._end()
        return self._failure

    def _end(self) -> None:
        """Have everything killed, and wait until it is."""
        self._watch.stop()
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        try:
            self._guardian.wait(_END_S)
        except subprocess.TimeoutExpired:
            _kill_group(self.pid, signal.SIGKILL)
            self._guardian.kill()
            self._guardian.wait()
        if self._guardian.returncode != 0:  # it was killed itself, and could not clean up
            _kill_group(self.pid, signal.SIGKILL)
        self._pipes.close()
        assert self._guardian.stdout is not None
        self._guardian.stdout.close()
        if self._temporary_log:
            self._log.unlink(missing_ok=True)

    def _signal_all(self, number: int) -> None:
        """Signal the worker's group, and its descendants that left the group."""
        if self._pipes.closed or not self.pid:
            return
        _kill_group(self.pid, number)
        for process in self._watch.processes(refresh=number == signal.SIGSTOP):
            try:
                process.send_signal(number)
            except psutil.Error:
                continue


def call_isolated(
    target: str,
    setup: dict[str, Any],
    method: str,
    *,
    timeout_s: float,
    memory_bytes: int | None = None,
    env: dict[str, str] | None = None,
    **args: Any,
) -> Any:
    """Build `target` in a process of its own, call one method, return its answer, end the process.

    Args:
        target: "module:Class".
        setup: Keyword arguments of the class, as JSON.
        method: Name of the method.
        timeout_s: Seconds for starting and calling together.
        memory_bytes: See `Worker`.
        env: See `Worker`.
        **args: Keyword arguments of the method as JSON.

    Raises:
        TrialFailedError: It crashed, hung, outgrew its memory or raised.
        SuanliError: What the far side raised, as the same class.
    """
    deadline = time.monotonic() + timeout_s
    worker = Worker(target, setup, env=env, memory_bytes=memory_bytes, start_timeout_s=timeout_s)
    with worker:
        return worker.call(method, timeout_s=max(0.0, deadline - time.monotonic()), **args)


class _MemoryWatch:
    """Follows the resident size of the guardian's descendants, and kills them over the limit.

    Looking for new processes reads all of /proc, so that is done once a second; the size of the
    known ones is read every `_TICK_S`, which costs some ten microseconds.
    """

    _TICK_S = 0.05
    _REFRESH_S = 1.0

    def __init__(self, guardian_pid: int, limit: int | None) -> None:
        self.limit = limit
        self.peak_bytes = 0
        self.over_bytes = 0
        self._guardian = psutil.Process(guardian_pid)
        self._known: list[psutil.Process] = []
        self._refreshed = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="suanli-memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watching."""
        self._stopped.set()
        self._thread.join()

    def processes(self, *, refresh: bool = False) -> list[psutil.Process]:
        """The guardian's descendants."""
        now = time.monotonic()
        if refresh or not self._known or now - self._refreshed > self._REFRESH_S:
            try:
                self._known = self._guardian.children(recursive=True)
            except psutil.NoSuchProcess:  # nobody closed the worker; it has ended all the same
                self._known = []
                self._stopped.set()
            self._refreshed = now
        return self._known

    def _run(self) -> None:
        while not self._stopped.wait(self._TICK_S):
            processes = self.processes()
            used = sum(_resident_bytes(process) for process in processes)
            self.peak_bytes = max(self.peak_bytes, used)
            if self.limit is not None and used > self.limit and not self.over_bytes:
                self._judge(processes, used)

    def _judge(self, processes: list[psutil.Process], used: int) -> None:
        """Kill, unless several processes only look large because they share pages."""
        if len(processes) > 1:
            used = sum(_proportional_bytes(process) for process in processes)
        if self.limit is not None and used > self.limit:
            self.over_bytes = used
            for process in processes:
                try:
                    process.kill()
                except psutil.Error:
                    continue


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _proportional_bytes(process: psutil.Process) -> int:
    """Resident size with shared pages divided among their users, where the system tells it."""
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return _resident_bytes(process)
    return int(getattr(memory, "pss", memory.rss))


def _spawn(pipes: Pipes, log: Path, env: dict[str, str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", str(_MAIN), *map(str, pipes.far_ends)]
    with log.open("ab") as log_file:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                pass_fds=pipes.far_ends,
                start_new_session=True,
                env=env,
                bufsize=0,
            )
        except BaseException:
            pipes.close()
            raise


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _new_log() -> Path:
    _sweep_logs()
    handle, name = tempfile.mkstemp(prefix=_LOG + leftovers.owner(), suffix=".log")
    os.close(handle)
    return Path(name)


@cache
def _sweep_logs() -> None:
    """Remove the logs of killed processes, once: a search starts hundreds of workers."""
    leftovers.sweep(Path(tempfile.gettempdir()), _LOG)


def _kill_group(group: int, number: int) -> None:
    if group:
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            return


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _REASON_LENGTH else line[: _REASON_LENGTH - 3] + "..."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_words(log: Path, start: int) -> str:
    """The last line that the worker itself wrote, before the interpreter's dump of its stacks."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _TAIL_BYTES))
            tail = file.read().decode(errors="replace")
    except OSError:
        return ""
    said, dump, stacks = tail.partition("Fatal Python error:")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if lines:
        return lines[-1]
    return (
        next((line.strip() for line in stacks.splitlines() if "File " in line), "") if dump else ""
    )


_MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc")


def _rebuilt(error: dict[str, Any]) -> SuanliError:
    """The far side's exception: Suanli's own as the same class, any other as a failed trial."""
    for name in error["known"]:
        found = getattr(errors, name, None)
        if isinstance(found, type) and issubclass(found, SuanliError):
            rebuilt = found.__new__(found)
            next_step = error["fields"].get("next_step", "")
            SuanliError.__init__(rebuilt, error["message"], next_step=next_step)
            vars(rebuilt).update(error["fields"])
            return rebuilt
    text = _one_line(f"{error['type']}: {error['text']}" if error["text"] else error["type"])
    memory = error["type"] in ("MemoryError", "OutOfMemoryError") or any(
        words in error["text"] for words in _MEMORY_WORDS
    )
    return TrialFailedError(text, kind="memory" if memory else "error")
