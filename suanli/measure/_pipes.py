"""The parent's ends of a worker's pipes: JSON lines out and in, and the guardian's word."""

import json
import os
import selectors
import time
from typing import Any

_CHUNK_BYTES = 1 << 20
_LONGEST_BYTES = 1 << 30


class ProtocolError(Exception):
    """Something came that is no message."""


class DeadlineError(Exception):
    """Nothing came in time."""


class EndedError(Exception):
    """The worker or its guardian ended."""


class Pipes:
    """Non-blocking pipes to one worker.

    `status_fd` is the guardian's standard output, set once it is started. `worker_pid` and
    `exit_code` (negative: a signal) are what the guardian said so far.
    """

    def __init__(self) -> None:
        far_requests, self._requests = os.pipe()
        self._replies, far_replies = os.pipe()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        self.far_ends: tuple[int, ...] = (far_requests, far_replies)
        self.status_fd = -1
        self.worker_pid = 0
        self.exit_code: int | None = None
        self.closed = False
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()
        self._scanned = 0
        self._status_text = b""
        self._ended = False
        self._replies_ended = False

    def close_far_ends(self) -> None:
        """Close what the child has copies of, so that its end shows here."""
        for fd in self.far_ends:
            os.close(fd)
        self.far_ends = ()

    def close_requests(self) -> None:
        """Tell the worker that no more calls come."""
        if self._requests >= 0:
            os.close(self._requests)
            self._requests = -1

    def close(self) -> None:
        """Close all ends here but `status_fd`, which belongs to the process object."""
        if not self.closed:
            self.close_requests()
            self.close_far_ends()
            os.close(self._replies)
            self.closed = True

    def send(self, payload: bytes) -> None:
        """Queue bytes; they travel during `receive`, so that a deaf worker cannot block."""
        self._outgoing = memoryview(payload)

    def receive(self, deadline: float) -> Any:
        """The next message.

        Raises:
            DeadlineError: `deadline` (of `time.monotonic`) passed.
            EndedError: The worker or its guardian ended, and no message is left.
            ProtocolError: A line came that is not JSON.
        """
        while True:
            line = self._take_line() if self.worker_pid else None
            if line is not None:
                return _parsed(line)
            if self._ended and not self._read():
                raise EndedError
            if not self._ended:
                self._move(deadline)

    def wait_for_end(self, seconds: float) -> None:
        """Wait until the guardian says that the worker ended; what else comes is dropped."""
        deadline = time.monotonic() + seconds
        try:
            while not self._ended:
                self._move(deadline)
                self._incoming.clear()
                self._scanned = 0
        except DeadlineError:
            return

    def _move(self, deadline: float) -> None:
        """Wait for any pipe to be ready, and carry bytes."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineError
        with selectors.DefaultSelector() as selector:
            selector.register(self.status_fd, selectors.EVENT_READ)
            if not self._replies_ended:
                selector.register(self._replies, selectors.EVENT_READ)
            if self._outgoing and self._requests >= 0:
                selector.register(self._requests, selectors.EVENT_WRITE)
            ready = {key.fd for key, _ in selector.select(remaining)}
        if self._requests in ready:
            self._write()
        if self._replies in ready:
            self._read()
        if self.status_fd in ready:
            self._hear()

    def _write(self) -> None:
        try:
            sent = os.write(self._requests, self._outgoing[:_CHUNK_BYTES])
        except BlockingIOError:
            return
        except BrokenPipeError:  # it ended: the guardian will say how
            self._outgoing = memoryview(b"")
            return
        self._outgoing = self._outgoing[sent:]

    def _read(self) -> int:
        """Take in what has come; the number of bytes."""
        if self._replies_ended:
            return 0
        try:
            chunk = os.read(self._replies, _CHUNK_BYTES)
        except BlockingIOError:
            return 0
        self._replies_ended = not chunk
        self._incoming += chunk
        if len(self._incoming) > _LONGEST_BYTES:
            raise ProtocolError("a message without end came")
        return len(chunk)

    def _hear(self) -> None:
        """Read the guardian's lines."""
        chunk = os.read(self.status_fd, 4096)
        self._status_text += chunk
        *lines, self._status_text = self._status_text.split(b"\n")
        for line in lines:
            word, _, number = line.partition(b" ")
            if word == b"worker":
                self.worker_pid = int(number)
            elif word == b"exit":
                self.exit_code = int(number)
        self._ended = not chunk or self.exit_code is not None

    def _take_line(self) -> bytes | None:
        end = self._incoming.find(b"\n", self._scanned)
        if end < 0:
            self._scanned = len(self._incoming)
            return None
        line = bytes(self._incoming[:end])
        del self._incoming[: end + 1]
        self._scanned = 0
        return line


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        shown = line[:60].decode(errors="replace")
        raise ProtocolError(f"a line that is no message came ({shown!r})") from None
