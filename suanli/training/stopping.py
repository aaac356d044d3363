"""Being asked to stop: the step in hand is finished, and the state saved, before anything ends."""

import signal
import threading
import time
from types import FrameType
from typing import Self


class StopRequests:
    """Inside the block SIGINT and SIGTERM only ask; a second Ctrl-C interrupts as usual.

    Outside the main thread signals cannot be caught, and `ask` is the only way.

    Attributes:
        asked: Name of the signal that asked, or "" so far.
    """

    def __init__(self) -> None:
        self.asked = ""
        self._since = 0.0
        self._before: dict[int, object] = {}

    def ask(self, name: str = "the caller") -> None:
        """Ask for the end."""
        if not self.asked:
            self.asked, self._since = name, time.monotonic()

    def waited(self, seconds: float) -> bool:
        """Whether somebody asked, and at least so many seconds ago."""
        return bool(self.asked) and time.monotonic() - self._since >= seconds

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: it was not set from Python, and cannot be set again from there
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)
