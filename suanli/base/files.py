"""Where Suanli keeps things, and writing that is whole or not at all."""

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from suanli.base import leftovers

_OLD = ".old"  # ends the name of the folder that waits beside until the new one is in place


def cache_dir() -> Path:
    """Folder for what can be measured again: ceilings, trials (`SUANLI_CACHE` overrides)."""
    override = os.environ.get("SUANLI_CACHE")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "suanli"


def config_dir() -> Path:
    """Folder for what is the user's own: keys (`SUANLI_CONFIG` overrides)."""
    override = os.environ.get("SUANLI_CONFIG")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "suanli"


def write_atomic(path: Path, data: str | bytes, *, mode: int = 0o644) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part.

    What killed processes left of an earlier try beside it is removed.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = data.encode() if isinstance(data, str) else data
    prefix = f".{path.name}."
    leftovers.sweep(path.parent, prefix)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix + leftovers.owner())
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def beside(path: Path, ending: str) -> Path:
    """The path of the same name with an ending, also where the name is elsewhere, as of `.`."""
    named = path.resolve() if path.name in ("", "..") else path
    return named.parent / (named.name + ending)


def absent_folders(folder: Path) -> list[Path]:
    """The folder and those above it that are not there yet, the innermost first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, in this order, up to the first that cannot be, as it is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Give a fresh folder beside `target` that takes its place when the block ends well.

    An older folder at `target` survives any failure inside the block. The fresh folder is removed
    on failure, so nothing half-written remains. On Linux the two change places in one step, so
    that even a killed process leaves one of them whole at `target`. What killed processes left
    beside it is removed, but for an older folder that never came back: it takes its place again.

    Raises:
        OSError: The parent cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}."
    for left in leftovers.leftovers(target.parent, prefix):
        if left.name.endswith(_OLD) and not target.exists():
            left.replace(target)
        else:
            leftovers.remove(left)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix + leftovers.owner()))
    old = fresh.with_name(fresh.name + _OLD)
    try:
        yield fresh
        fresh.chmod(0o755)
        if _exchanged(fresh, target):
            return
        if target.exists():
            target.replace(old)
        try:
            fresh.replace(target)
        except BaseException:
            if old.exists():
                old.replace(target)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two existing paths change places atomically; False where that cannot be done."""
    if sys.platform != "linux" or not other.exists():
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
