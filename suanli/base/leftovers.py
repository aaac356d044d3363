"""Temporary files and folders whose names say who made them, so that a later run can remove them.

A killed process cleans up nothing. What it left is known by its name: the process's number, its
start, and the machine. It is removed only where that very process is gone, and never soon.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

_OWNER = re.compile(r"(?P<pid>[0-9]{1,10})-(?P<start>[0-9]+)-(?P<place>[0-9a-f]{8})\.")
_OLD_S = 600.0


def owner() -> str:
    """This process in a name: number, start in clock ticks since boot, machine; ends with a dot.

    The start is 0 where the system does not tell it: a number that is in use again then counts as
    the owner's, and what it left stays.
    """
    return f"{os.getpid()}-{_start_of(os.getpid()) or 0}-{_place()}."


def temporary_folder(parent: Path | None, prefix: str) -> Path:
    """A fresh folder that `sweep` with the same prefix knows; what is left of dead ones goes.

    Raises:
        OSError: The parent cannot be written.
    """
    sweep(parent or Path(tempfile.gettempdir()), prefix)
    return Path(tempfile.mkdtemp(dir=parent, prefix=prefix + owner()))


def leftovers(parent: Path, prefix: str, *, older_than_s: float = _OLD_S) -> list[Path]:
    """What processes of this machine left in a folder that are gone now.

    Args:
        parent: The folder; it need not exist.
        prefix: What stands before the owner in the name.
        older_than_s: What changed within so many seconds is left out.
    """
    found = []
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            match = _OWNER.match(entry.name, len(prefix))
            if not entry.name.startswith(prefix) or match is None or match["place"] != _place():
                continue
            if _lives(int(match["pid"]), int(match["start"])):
                continue
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime >= older_than_s:
                    found.append(Path(entry.path))
    return found


def sweep(parent: Path, prefix: str, *, older_than_s: float = _OLD_S) -> None:
    """Remove what `leftovers` finds; what cannot be removed stays."""
    for path in leftovers(parent, prefix, older_than_s=older_than_s):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it; no link is followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _lives(pid: int, start: int) -> bool:
    """Whether the process is still there: that number, and started then where that is known."""
    import psutil

    if not psutil.pid_exists(pid):
        return False
    now = _start_of(pid)
    return start == 0 or now is None or now == start


def _start_of(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process: no change of the clock moves it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return int(text.rpartition(")")[2].split()[19])  # field 22 of proc_pid_stat(5)
    except (OSError, ValueError, IndexError):
        return None


@cache
def _place() -> str:
    """Where process numbers mean the same: the machine, and in containers the namespace."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]
