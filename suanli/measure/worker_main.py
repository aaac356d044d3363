"""The far side of an isolated worker: a guardian process, and the worker that it forks.

Run as a script by `suanli.measure.isolation`, never imported by it. Before the fork only the
standard library is loaded, so no thread and no CUDA context is ever copied.

The guardian leads a session of its own and does three things: it notices that the parent is gone
(end of file on its standard input), it tells the parent how the worker ended (a line on its
standard output), and then it kills every process that descends from it, including those that left
the worker's process group. The worker serves method calls as JSON lines on two pipes of its own;
what libraries print on standard output goes to the log with standard error.

Usage: `python -P worker_main.py REQUESTS_FD REPLIES_FD`.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import select
import signal
import sys
import threading
import traceback
from typing import Any, NoReturn

# From <linux/prctl.h>; other systems lack these calls and go without.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# The kernel's out-of-memory killer should take the worker and not the person's session.
_OOM_SCORE = 500

_KILL_ROUNDS = 100


def main(requests_fd: int, replies_fd: int) -> NoReturn:
    """Fork the worker and guard it, or be the worker."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake_fd, wake_write_fd = os.pipe()
    os.set_blocking(wake_write_fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write_fd, warn_on_full_buffer=False)
    guardian = os.getpid()
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(wake_fd)
        os.close(wake_write_fd)
        _be_worker(guardian, requests_fd, replies_fd)
    os.close(requests_fd)
    os.close(replies_fd)
    _guard(worker, wake_fd)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        zero = ctypes.c_ulong(0)
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), zero, zero, zero)


# --- the guardian ---------------------------------------------------------------------------------


def _guard(worker: int, wake_fd: int) -> NoReturn:
    """Wait for the parent's end or the worker's, then leave no descendant behind."""
    _own_group(worker)
    _tell(f"worker {worker}\n")
    while True:
        readable, _, _ = select.select([0, wake_fd], [], [])
        if 0 in readable and not os.read(0, 1):
            break
        if wake_fd in readable:
            os.read(wake_fd, 4096)
            status = _reap(worker)
            if status is not None:
                _tell(f"exit {status}\n")
                break
    _kill_descendants(worker)
    os._exit(0)


def _own_group(pid: int) -> None:
    """Make `pid` lead a process group; done on both sides of the fork, so that neither waits."""
    # The other side may have been faster, or the worker may have ended already.
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)


def _tell(line: str) -> None:
    # Where the parent is gone, standard input says so too.
    with contextlib.suppress(OSError):
        os.write(1, line.encode())


def _reap(worker: int) -> int | None:
    """Collect ended children; the worker's exit code (negative: a signal) if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == worker:
            found = os.waitstatus_to_exitcode(status)


def _kill_descendants(worker: int) -> None:
    """Kill until nothing is left: orphans come back to this process because it is a subreaper."""
    with contextlib.suppress(OSError):
        os.killpg(worker, signal.SIGKILL)
    try:
        import psutil
    except ImportError:  # the group was all that can be found
        return
    me = psutil.Process()
    for _ in range(_KILL_ROUNDS):
        children = me.children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        _reap(worker)
        if not children:
            return
        select.select([], [], [], 0.01)


# --- the worker -----------------------------------------------------------------------------------


class _Replies:
    """Writes whole JSON lines, from any thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Write one message; a person's NaN travels as Python's JSON writes it."""
        view = memoryview(json.dumps(message).encode() + b"\n")
        with self._lock:
            while view:
                view = view[os.write(self._fd, view) :]


def _be_worker(guardian: int, requests_fd: int, replies_fd: int) -> NoReturn:
    _own_group(os.getpid())
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guardian:
        os._exit(1)
    _set_up_streams(requests_fd, replies_fd)
    _set_up_limits()
    try:
        _serve(requests_fd, _Replies(replies_fd))
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    _leave()


def _leave() -> NoReturn:
    """End as a process does, but for taking all modules apart: with torch that takes seconds."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _set_up_streams(requests_fd: int, replies_fd: int) -> None:
    """Keep the pipes from grandchildren; give libraries the log as standard output."""
    os.set_inheritable(requests_fd, False)
    os.set_inheritable(replies_fd, False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    faulthandler.enable()


def _set_up_limits() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    if sys.platform == "linux":
        try:
            with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123 (no pathlib here)
                file.write(str(_OOM_SCORE))
        except OSError:
            pass


def _serve(requests_fd: int, replies: _Replies) -> None:
    """Build the target, then answer calls until the parent closes the pipe."""
    target: object | None = None
    with os.fdopen(requests_fd, "rb") as requests:
        for line in requests:
            try:
                request = json.loads(line)
                if target is None:
                    target = _build(request, replies)
                    result = None
                else:
                    result = _method(target, request["method"])(**request["args"])
                replies.send({"result": result, "peak_bytes": _peak_bytes()})
            except Exception as error:
                traceback.print_exc()
                replies.send({"error": _describe(error), "peak_bytes": _peak_bytes()})
                if target is None:
                    return


def _build(request: dict[str, Any], replies: _Replies) -> object:
    sys.path[:] = request["path"]
    # Only now can suanli be found where the parent found it.
    from suanli.measure import isolation

    isolation._progress_sink = lambda data: replies.send({"progress": data})
    module, _, name = request["target"].partition(":")
    built: object = getattr(importlib.import_module(module), name)(**request["setup"])
    return built


def _method(target: object, name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"{name!r} is not a public method")
    return getattr(target, name)


def _peak_bytes() -> int:
    """Largest resident size of this process so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _describe(error: Exception) -> dict[str, Any]:
    """What the parent needs to raise the same error: class names first to last, text, fields."""
    classes = type(error).__mro__
    fields = {k: v for k, v in vars(error).items() if isinstance(v, str)}
    return {
        "type": classes[0].__name__,
        "known": [c.__name__ for c in classes if c.__module__ == "suanli.base.errors"],
        "message": str(error.args[0]) if error.args else "",
        "text": str(error),
        "fields": fields,
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
