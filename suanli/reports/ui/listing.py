"""What lies in a folder: results, and work that still goes on."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from suanli.base import events_log
from suanli.base.events_log import Line
from suanli.reports import subjects

State = Literal["live", "done", "stopped", "failed", "broken off"]

_DEEPEST = 3  # folders below the one that is served
_MOST = 500  # entries
_IGNORED = {"checkpoints", "tensorboard", "program", "variants", "node_modules", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A result, or work that will give one.

    Attributes:
        ident: Names it in an address. It is a hash and no path, so that no address can lead
            anywhere but to what was found by looking.
        name: Its path below the served folder.
        path: Result file, engine's or run's folder; None where there are events only.
        events: File of its events; None where none were kept.
        changed: Seconds since 1970.
    """

    ident: str
    name: str
    path: Path | None
    events: Path | None
    changed: float

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that change when there is something new."""
        found = [self.events] if self.events else []
        if self.path is not None:
            inner = [self.path / "result.json", self.path / "metrics.jsonl"]
            found += [self.path] if self.path.is_file() else inner
        return tuple(found)


def entries(folder: Path) -> list[Entry]:
    """What is there, the newest first. Links are not followed."""
    found: dict[str, Entry] = {}
    for path in _walk(folder, 0):
        name = str(path.relative_to(folder))
        if path.name.endswith(events_log.SUFFIX):
            name = name.removesuffix(events_log.SUFFIX)
            entry = found.get(name) or _entry(name, None)
            found[name] = replace(entry, events=path)
        else:
            entry = found.get(name) or _entry(name, path)
            found[name] = replace(entry, path=path)
        if len(found) >= _MOST:
            break
    dated = [replace(entry, changed=_changed(entry)) for entry in found.values()]
    return sorted(dated, key=lambda entry: (-entry.changed, entry.name))


def state_of(lines: list[Line]) -> State:
    """Where the work stands, by its events."""
    last = max((i for i, line in enumerate(lines) if line.begin is not None), default=-1)
    ends = [line.end for line in lines[last + 1 :] if line.end is not None]
    if ends:
        return ends[-1].state
    begin = lines[last].begin if last >= 0 else None
    return "live" if begin is not None and events_log.alive(begin) else "broken off"


def _entry(name: str, path: Path | None) -> Entry:
    ident = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return Entry(ident=ident, name=name, path=path, events=None, changed=0.0)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Results below a folder; a result's own folder is not looked into."""
    try:
        inner = sorted(os.scandir(folder), key=lambda item: item.name)
    except OSError:
        return
    for item in inner:
        path = Path(item.path)
        if item.is_symlink() or item.name.startswith(".") or item.name in _IGNORED:
            continue
        if item.is_dir(follow_symlinks=False):
            if subjects.is_run(path) or subjects.is_engine(path):
                yield path
            elif depth < _DEEPEST:
                yield from _walk(path, depth + 1)
        elif not item.is_file(follow_symlinks=False):
            continue  # to open a pipe would wait for whoever writes to it
        elif item.name.endswith(events_log.SUFFIX) or _is_result(path):
            yield path


def _is_result(path: Path) -> bool:
    return path.suffix == ".json" and subjects.schema_of(path) != ""


def _changed(entry: Entry) -> float:
    times = []
    for path in (entry.path, *entry.files):
        try:
            times.append(path.stat().st_mtime if path else 0.0)
        except OSError:
            continue
    return max(times, default=0.0)
