"""Who gets into an engine: callers until it is closed, and nobody in a forked process.

The threads that an engine computes with are not in a fork, and a call would wait for them for ever.
The hook runs once per fork, so a call pays nothing for it.
"""

import os
import threading
import weakref
from typing import Protocol

from suanli.base.errors import SuanliError


class Gate:
    """Lets calls in until it is closed; closing waits for those inside."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._inside = 0
        self._closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def __enter__(self) -> None:
        with self._lock:
            if self._closed:
                raise SuanliError(f"the engine {self._name} is closed")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._closed:  # only then can anybody wait
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._inside == 0)


class ForkedGate:
    """The gate of an engine in a forked process: nobody gets in."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        raise SuanliError(
            f"the engine {self._name} does not survive a fork: the threads that it computes with "
            "are not in this process",
            next_step='open it in the child with suanli.load, and start the child with "spawn"',
        )

    def __exit__(self, *_: object) -> None:
        """Nobody was inside."""

    def close(self) -> None:
        """There is nothing to wait for."""


class Forked(Protocol):
    """What is told, in the child, that it was forked."""

    def forked(self) -> None:
        """Refuse every call from now on; leave what belongs to the parent alone."""


_open: "weakref.WeakSet[Forked]" = weakref.WeakSet()


def watch_forks(engine: Forked) -> None:
    """Tell `engine` in every child that this process forks while it exists."""
    _open.add(engine)


def _in_child() -> None:
    for engine in list(_open):
        engine.forked()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_in_child)
