"""Checkpoints that are whole or do not count.

Each one is a fresh folder, `step-000001200/`, with safetensors and JSON. The last file written is
`complete.json`, which holds the size and SHA-256 of every other one; a folder without it, or with a
file that does not agree with it, is passed over. So whatever ends a write (kill -9, a full disk, a
cut file), the last complete one loads.

With a key each file is encrypted (AES-256-GCM in pieces) for its place in this very checkpoint; the
hashes are those of what is on disk, and the marker has a tag made with the key. Then only what was
made with the key loads: nothing in clear, no marker that was rewritten, no file of another step.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from suanli.base.errors import ArtefactError
from suanli.training import _tree
from suanli.training.encryption import Cipher

_MARKER = "complete.json"
_NAME = re.compile(r"step-(\d{9})")
_FORMAT = 2
_AT_ONCE = 1 << 26  # bytes of one write


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint that was read.

    Attributes:
        state: As it was saved, tensors on the CPU.
        passed_over: Newer ones that are not whole, each with the reason.
    """

    step: int
    folder: Path
    state: dict[str, Any]
    passed_over: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        not_copied: Why the newest one is not in the backup; "" where it is, or none was asked for.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        backup: Path | None = None,
        cipher: Cipher | None = None,
    ) -> None:
        """Name the places.

        Args:
            folder: Where they lie; made on the first save.
            keep: How many complete ones stay; older ones are removed.
            backup: A second folder that gets a copy of each, complete ones only.
            cipher: Encrypts the files; what was not made with its key counts as damaged.
        """
        self.folder, self._keep, self._backup, self._cipher = folder, max(1, keep), backup, cipher
        self.not_copied = ""

    def save(self, step: int, state: dict[str, dict[str, Any]]) -> Path:
        """Write a checkpoint, then the copy, then remove old ones.

        Args:
            step: Its number.
            state: Part -> nested state; each part becomes one safetensors and one JSON file.

        Returns:
            Its folder.

        Raises:
            OSError: It could not be written, and what was begun is removed; older ones are whole.
        """
        target = self.begin(step)
        return self.finish(target, state)

    def begin(self, step: int) -> Path:
        """An empty folder for a checkpoint; what is written there before `finish` belongs to it.

        Raises:
            OSError: It cannot be made.
        """
        target = self.folder / f"step-{step:09d}"
        if target.exists():
            shutil.rmtree(target)  # of a run that ended while writing it, or was resumed before it
        target.mkdir(parents=True)
        return target

    def finish(self, target: Path, state: dict[str, dict[str, Any]]) -> Path:
        """Write the state into a folder that `begin` made, and the marker; see `save`."""
        self._write(target, state)
        _retain(target, self._keep)
        self.not_copied = ""
        if self._backup is not None:
            try:
                _copied(target, self._backup / target.name)
                _retain(self._backup / target.name, self._keep)
            except OSError as error:
                self.not_copied = error.strerror or str(error)
        return target

    def load(self) -> Loaded | None:
        """The newest one that is whole, here or in the backup; None where there is none.

        Raises:
            ArtefactError: It is encrypted and there is no key, or there are some and none is whole.
        """
        found = sorted(
            (f for place in self.places for f in _folders(place)), key=_step, reverse=True
        )
        passed_over = []
        for folder in found:
            reason = why_not_whole(folder, self._cipher)
            if reason:
                passed_over.append(f"{folder.name}: {reason}")
                continue
            state = self._read(folder)
            return Loaded(
                step=_step(folder), folder=folder, state=state, passed_over=tuple(passed_over)
            )
        if passed_over:
            raise ArtefactError(f"no checkpoint is whole; {'; '.join(passed_over)}")
        return None

    @property
    def places(self) -> list[Path]:
        """The folder, and the one for copies where there is one."""
        return [self.folder, *([self._backup] if self._backup is not None else [])]

    @property
    def backup_taken(self) -> bool:
        """Whether the folder for copies holds checkpoints already."""
        return self._backup is not None and any(True for _ in _folders(self._backup))

    @property
    def any_whole(self) -> bool:
        """Whether there is one to go on with, here or in the backup."""
        return any(newest_whole(place, self._cipher) is not None for place in self.places)

    def _write(self, target: Path, state: dict[str, dict[str, Any]]) -> None:
        try:
            sums = {}
            for name, part in state.items():
                data, tensors = _apart(name, part)
                for file, content in (
                    (f"{name}.safetensors", save_tensors(tensors)),
                    (f"{name}.json", json.dumps(data).encode()),
                ):
                    cipher = self._cipher
                    place = f"{target.name}/{file}"
                    payload = content if cipher is None else cipher.encrypted(content, place)
                    _durable(target / file, payload)
                    sums[file] = {"bytes": len(payload), "sha256": _sha256(payload)}
            others = [file for file in target.iterdir() if file.name not in sums]
            for written in others:
                payload = written.read_bytes()
                sums[written.name] = {"bytes": len(payload), "sha256": _sha256(payload)}
            marker = {
                "format": _FORMAT,
                "step": _step(target),
                "encrypted": self._cipher is not None,
                "files": sums,
            }
            if self._cipher is not None:
                marker["tag"] = self._cipher.tag(_signed(marker))
            _sync_folder(target)
            _durable(target / _MARKER, json.dumps(marker, indent=1).encode())
            _sync_folder(target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise

    def _read(self, folder: Path) -> dict[str, Any]:
        marker = json.loads((folder / _MARKER).read_bytes())
        if marker["encrypted"] and self._cipher is None:
            raise ArtefactError(f"{folder.name} is encrypted", next_step="give its key: --key FILE")
        state = {}
        for file in sorted(name for name in marker["files"] if name.endswith(".json")):
            stem = file.removesuffix(".json")
            payloads = []
            for name in (file, f"{stem}.safetensors"):
                if name not in marker["files"]:
                    raise ArtefactError(f"{folder.name}/{name} is absent")
                payload = (folder / name).read_bytes()
                if self._cipher is not None:
                    payload = self._cipher.decrypted(payload, f"{folder.name}/{name}")
                payloads.append(payload)
            try:
                tensors = load_tensors(payloads[1])
                state[stem] = _tree.put_together(json.loads(payloads[0]), tensors)
            except (SafetensorError, ValueError, TypeError, RecursionError) as error:
                raise ArtefactError(f"{folder.name}/{stem}: {error}") from None
        return state


def _apart(name: str, part: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A part of a state as plain data and tensors on the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        data = _tree.taken_apart(part, tensors)
    except _tree.NotDataError as error:
        raise _tree.NotDataError(f"{name}/{error}") from None
    # copies: two names may share their memory
    return data, {key: t.cpu().contiguous().clone() for key, t in tensors.items()}


def why_not_whole(folder: Path, cipher: Cipher | None = None) -> str:
    """What is wrong with a checkpoint's folder, in one line; "" if it is whole.

    Args:
        folder: Of the checkpoint.
        cipher: With it, whatever was not made with its key is wrong.
    """
    try:
        marker = json.loads((folder / _MARKER).read_bytes())
        sums = {n: (facts["bytes"], facts["sha256"]) for n, facts in marker["files"].items()}
        known = marker["format"] == _FORMAT and isinstance(marker["encrypted"], bool)
        signed = _signed(marker)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "it was not finished"
    if not known:
        return "it is of another version"
    if cipher is not None and not marker["encrypted"]:
        return "it is not encrypted, so it was not made with this key"
    if cipher is not None and not cipher.tagged(signed, str(marker.get("tag"))):
        return "it was made with another key, or changed since"
    if marker.get("step") != _step(folder):
        return "it is of another step than its folder says"
    return next(filter(None, (_why_damaged(folder, *one) for one in sums.items())), "")


def _why_damaged(folder: Path, name: str, facts: tuple[Any, Any]) -> str:
    """What is wrong with a file that should have so many bytes and that SHA-256."""
    if Path(name).name != name or not name.isprintable():
        return f"{name!r} is no name of a file in the folder"
    try:
        payload = (folder / name).read_bytes()
    except OSError as error:
        return f"{name}: {error.strerror}"
    return "" if (len(payload), _sha256(payload)) == facts else f"{name} is damaged"


def newest_whole(folder: Path, cipher: Cipher | None = None) -> Path | None:
    """The newest complete checkpoint in a run's checkpoint folder, or None."""
    found = sorted(_folders(folder), key=_step, reverse=True)
    return next((one for one in found if not why_not_whole(one, cipher)), None)


def _signed(marker: dict[str, Any]) -> bytes:
    """What the tag of a marker is made of: all the rest of it, however it is written."""
    return json.dumps({k: v for k, v in marker.items() if k != "tag"}, sort_keys=True).encode()


def _folders(place: Path) -> Iterator[Path]:
    if place.is_dir():
        yield from (f for f in place.iterdir() if f.is_dir() and _NAME.fullmatch(f.name))


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _retain(written: Path, keep: int) -> None:
    """Remove what is older than the last `keep` complete ones up to the one just written.

    Newer ones are what a run that goes on has passed over: they do not count as kept.
    """
    found = [f for f in _folders(written.parent) if _step(f) <= _step(written)]
    complete = sorted((_step(f) for f in found if (f / _MARKER).is_file()), reverse=True)[:keep]
    for folder in found:
        if _step(folder) < complete[-1]:
            # the marker first: a removal that is cut short leaves nothing that looks complete
            (folder / _MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _copied(source: Path, target: Path) -> None:
    """Copy a complete checkpoint, the marker last."""
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    try:
        for file in sorted(source.iterdir(), key=lambda f: f.name == _MARKER):
            _durable(target / file.name, file.read_bytes())
        _sync_folder(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _durable(path: Path, payload: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        view = memoryview(payload)
        while view:
            view = view[os.write(handle, view[:_AT_ONCE]) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
