"""What becomes of a process: it takes a while on a busy machine."""

import time

import psutil

_WAIT_S = 30.0


def gone(pid: int) -> bool:
    """Whether a process has ended, or ends soon."""
    return _comes_to(pid, psutil.STATUS_ZOMBIE, None)


def stopped(pid: int) -> bool:
    """Whether a process is stopped, or will be soon."""
    return _comes_to(pid, psutil.STATUS_STOPPED)


def _comes_to(pid: int, *wanted: str | None) -> bool:
    deadline = time.monotonic() + _WAIT_S
    while _status(pid) not in wanted:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _status(pid: int) -> str | None:
    """Of a process; None where there is none."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return None
