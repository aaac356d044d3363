"""TensorBoard event files of scalars, written without TensorBoard.

The format is TFRecord framing (length, masked CRC-32C of it, payload, masked CRC-32C of that)
around `tensorflow.Event` protocol buffers; field numbers are those of event.proto and
summary.proto: wall_time 1, step 2, file_version 3, summary 5; value 1, tag 1, simple_value 2.
"""

import socket
import struct
import time
from functools import cache
from pathlib import Path
from typing import Self

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected
_MASK_DELTA = 0xA282EAD8  # TFRecord's mask


class EventsFile:
    """Appends scalars to a new event file in a folder."""

    def __init__(self, folder: Path) -> None:
        """Begin a file; one of an earlier part of the run stays beside it.

        Raises:
            OSError: It cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self.path = folder / name
        self._file = self.path.open("ab")
        self._write(_double(1, time.time()) + _text(3, b"brain.Event:2"))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Append the scalars of one step."""
        values = b"".join(
            _text(1, _text(1, tag.encode()) + _float(2, value)) for tag, value in scalars.items()
        )
        self._write(_double(1, time.time()) + _number(2, step) + _text(5, values))

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked(length) + event + _masked(event))
        self._file.flush()


def crc32c(data: bytes) -> int:
    """CRC-32C of some bytes."""
    value = 0xFFFFFFFF
    table = _table()
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    value = crc32c(data)
    rotated = ((value >> 15) | (value << 17)) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + _MASK_DELTA) & 0xFFFFFFFF)


@cache
def _table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        return value

    return tuple(entry(byte) for byte in range(256))


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _text(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
