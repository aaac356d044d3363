"""Walking, reading and hashing a folder of unknown origin, without following anything out of it."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from suanli.base.errors import ArtefactError, BadInputError, SuanliError

_DEEPEST = 16
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


def walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Relative path (with "/") and size in bytes of every file below `folder`.

    Raises:
        ArtefactError: There is a link or a special file, or the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = prefix + entry.name
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    if prefix.count("/") >= _DEEPEST:
                        raise ArtefactError(f"{path[:200]!r} is nested too deep")
                    yield from walk(Path(entry.path), path + "/")
                elif stat.S_ISREG(info.st_mode):
                    yield path, info.st_size
                else:
                    raise ArtefactError(f"{path[:200]!r} is a link or a special file")
    except OSError as error:
        raise ArtefactError(f"cannot read {prefix or folder}: {_reason(error)}") from None


def remove_empty_folders(folder: Path) -> None:
    """Remove the folders below `folder` that hold no file."""
    for path, _, _ in os.walk(folder, topdown=False):
        if Path(path) != folder and not any(Path(path).iterdir()):
            Path(path).rmdir()


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal.

    Raises:
        ArtefactError: It cannot be read, or is a link.
    """
    try:
        with _open_plain(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtefactError(f"cannot read {path.name}: {_reason(error)}") from None


def read_limited(folder: Path, name: str, limit: int) -> bytes:
    """The bytes of a small file.

    Raises:
        ArtefactError: It is absent, no plain file, or larger than `limit` bytes.
    """
    try:
        with _open_plain(folder / name) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ArtefactError(f"{name} in {folder} is no file")
            payload = file.read(limit + 1)
    except FileNotFoundError:
        raise ArtefactError(f"{name} is missing from {folder}") from None
    except OSError as error:
        raise ArtefactError(f"cannot read {name} in {folder}: {_reason(error)}") from None
    if len(payload) > limit:
        raise ArtefactError(f"{name} in {folder} is larger than {limit} bytes")
    return payload


def place(source: Path, target: Path, *, link: bool) -> None:
    """Put every file below `source` at the same path below `target`.

    Args:
        source: Holds plain files and folders only.
        target: Made if absent.
        link: Use hard links where the file system can, so that large weights cost nothing; the
            files at `source` must then not be written to any more.

    Raises:
        ArtefactError: `source` holds a link or a special file.
        OSError: `target` cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path, _ in sorted(walk(source)):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        place_file(source / path, target / path, link=link)


def place_file(source: Path, target: Path, *, link: bool) -> None:
    """Put one file at `target`, see `place`."""
    if link:
        try:
            target.hardlink_to(source)
            return
        except OSError as error:
            if error.errno in _FULL:
                raise
    shutil.copyfile(source, target)


def write_error(error: OSError, target: Path) -> SuanliError:
    """What a person is told when `target` could not be written."""
    if error.errno in _FULL:
        return SuanliError(
            f"no space left to write {target}; nothing was changed",
            next_step="free some space there or choose another folder",
        )
    if error.errno in _CLOSED:
        return BadInputError(
            f"{target} cannot be written: {_reason(error)}", next_step="choose another folder"
        )
    return SuanliError(f"writing {target} failed: {_reason(error)}")


def _open_plain(path: Path) -> BufferedReader:
    # neither follow a link at the end of the path nor wait for the writer of a pipe
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    return os.fdopen(os.open(path, flags), "rb")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
