"""The folder of a run, and the lock that keeps a second process out of it.

The lock is a file `.NAME.lock` beside the folder, under flock(2): the system takes it back when its
owner is gone, however that ended. Where there are no such locks (Windows, some network file
systems, a parent that cannot be written) nobody is stopped.

A file of that name that holds something else is locked all the same, and left as it is; a link is
not followed, and nothing but a file can be a lock.
"""

import os
import platform
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from suanli.base.errors import BadInputError
from suanli.base.files import absent_folders, remove_empty
from suanli.base.processes import rank, world

_ATTEMPTS, _PAUSE_S = 5, 0.05  # somebody who only looks has it for a moment
_HELD: set[int] = set()  # handles of the locks of this process
_CONTENT = re.compile(rb"(?:[0-9]{1,20} [^\s]*\n?)?")  # of a lock: its owner's number and machine
_MOST_CONTENT = 400  # bytes


class FolderLock:
    """The right to train in a folder, for one process at a time."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is taken yet."""
        self._path = _path_of(folder)
        self._handle: int | None = None
        self._own = False  # whether the file is nothing but a lock
        self._made: list[Path] = []

    def take(self) -> bool:
        """Try to get it; False where another process has it.

        Raises:
            BadInputError: Something that is no file has the lock's name.
        """
        self._made = absent_folders(self._path.parent)
        try:
            for attempt in range(_ATTEMPTS):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # its last owner has just removed the folder
                    if self._tried():
                        return True
                time.sleep(_PAUSE_S * (attempt < _ATTEMPTS - 1))
        except (OSError, ImportError):
            return True  # there are no locks here
        remove_empty(self._made)
        return False

    def _tried(self) -> bool:
        import fcntl

        handle = _opened(self._path)
        self._own = _is_lock(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # its last owner may have removed the file meanwhile: that lock keeps nobody out
            mine = _is_at(handle, self._path)
        except BlockingIOError:
            mine = False
        except OSError:
            os.close(handle)
            self._remove()
            raise
        if not mine:
            os.close(handle)
            return False
        if self._own:
            with suppress(OSError):  # on a full disk nobody learns who has it
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()} {platform.node()}\n".encode(), 0)
        self._handle = handle
        _HELD.add(handle)
        return True

    def release(self) -> None:
        """Give it back; the file goes, and so do folders that were made for it and are empty."""
        if self._handle is not None:
            self._remove()
            _HELD.discard(self._handle)
            os.close(self._handle)
            self._handle = None
        remove_empty(self._made)

    def _remove(self) -> None:
        if self._own:
            with suppress(OSError):
                self._path.unlink()


def holder(folder: Path) -> int | None:
    """Number of the process of this machine that trains in a folder; None where none is seen."""
    try:
        import fcntl

        handle = os.open(_path_of(folder), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ImportError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        number, _, place = (
            os.read(handle, _MOST_CONTENT).decode(errors="replace").strip().partition(" ")
        )
        return int(number) if number.isdecimal() and place == platform.node() else None
    except OSError:
        return None
    finally:
        os.close(handle)
    return None


@contextmanager
def own_folder(out: Path | None, name: str, *, resume: bool) -> Iterator[Path]:
    """Give the folder of a run, and keep other processes out of it until the block ends.

    Args:
        out: As it was asked for; None for a new one under `runs/`, or to resume the newest there.
        name: Of what is trained.
        resume: Whether a run that is there goes on.

    Raises:
        BadInputError: Another process trains there, or there is no run to go on with.
    """
    if out is None and world() > 1:
        raise BadInputError("several processes need one folder", next_step="give it with -o")
    if out is not None and rank() > 0:
        yield out  # of several processes the first one has the lock
        return
    folder, lock = _locked(out, name, resume=resume)
    try:
        yield folder
    finally:
        lock.release()


def _locked(out: Path | None, name: str, *, resume: bool) -> tuple[Path, FolderLock]:
    if out is None and not resume:
        return _new(name)
    folder = out if out is not None else _newest(name)
    lock = FolderLock(folder)
    if not lock.take():
        number = holder(folder)
        who = f" (pid {number})" if number is not None else ""
        raise BadInputError(
            f"another process trains in {folder}{who}",
            next_step="wait for its end" if resume else "give another folder with -o",
        )
    return folder, lock


def _new(name: str) -> tuple[Path, FolderLock]:
    """The first folder behind all that are there that no other process is about to make."""
    number = max(_numbers(name), default=0) + 1
    while True:
        folder = _numbered(name, number)
        lock = FolderLock(folder)
        if lock.take():
            if not folder.exists():
                return folder, lock
            lock.release()  # it was made meanwhile
        number += 1


def _newest(name: str) -> Path:
    found = _numbers(name)
    if not found:
        plain = _numbered(name, 1)
        raise BadInputError(f"there is no run in {plain}", next_step="give its folder with -o")
    return _numbered(name, max(found))


def _numbered(name: str, number: int) -> Path:
    plain = name.replace(":", "-").replace("/", "-")
    return Path("runs") / (plain if number == 1 else f"{plain}-{number}")


def _numbers(name: str) -> list[int]:
    """Numbers of what is there under `runs/`; the first one has none in its name."""
    plain = _numbered(name, 1)
    pattern = re.compile(rf"{re.escape(plain.name)}(?:-([1-9][0-9]{{0,8}}))?")
    names = [path.name for path in plain.parent.iterdir()] if plain.parent.is_dir() else []
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    return [int(match[1] or 1) for match in matches]


def _path_of(folder: Path) -> Path:
    whole = folder.resolve()
    return whole.parent / f".{whole.name}.lock"


def _opened(path: Path) -> int:
    """The file of a lock, made where it is not there; another user's is read only.

    Raises:
        BadInputError: It is a link, a folder, or nothing that can be a lock.
        OSError: It cannot be opened.
    """
    aside = os.O_NOFOLLOW | os.O_NONBLOCK  # no link leads elsewhere, and no pipe keeps us waiting
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BadInputError(
                f"{path} is no file, so it cannot be the lock of a run",
                next_step="remove it, or give another folder with -o",
            )
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | aside, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | aside)


def _is_lock(handle: int) -> bool:
    """Whether a file is a lock and nothing else, so that it may be written and removed."""
    if os.fstat(handle).st_nlink > 1:  # somebody's file under a second name
        return False
    return _CONTENT.fullmatch(os.pread(handle, _MOST_CONTENT, 0)) is not None


def _is_at(handle: int, path: Path) -> bool:
    """Whether a path still names the file that was opened."""
    mine = os.fstat(handle)
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _let_go() -> None:
    """In a forked child: the lock is the parent's alone, and ends with it."""
    while _HELD:
        os.close(_HELD.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
