"""The processor's clock, measured without a compiler.

A few bytes of machine code hold a chain of instructions of which each waits for the one before
and takes one clock: the bitwise NOT of a register (no processor is known to skip it). The length
of the chain over time is the clock. Where memory cannot be made executable, there is no answer;
nor on Arm, whose instruction caches would have to be told of the new code.
"""

import contextlib
import ctypes
import mmap
import platform
import struct
import sys
import time

_CHAIN = 1024
_ROUNDS = 2000


def clock_hz(seconds: float = 0.2) -> float | None:
    """Clocks per second of the core that this thread runs on, at its best; None where unknown."""
    code = _machine_code()
    if code is None or sys.platform == "win32":
        return None
    try:
        memory = mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except (OSError, ValueError):
        return None  # hardened systems and macOS forbid memory that is both written and run
    memory.write(code)
    anchor = ctypes.c_char.from_buffer(memory)
    try:
        chain = ctypes.CFUNCTYPE(None, ctypes.c_long)(ctypes.addressof(anchor))
        best = float("inf")
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            chain(_ROUNDS)
            best = min(best, time.perf_counter() - start)
    finally:
        del anchor
        with contextlib.suppress(BufferError):
            memory.close()
    return _CHAIN * _ROUNDS / best


def _machine_code() -> bytes | None:
    """A function of one argument (rounds) for the Unix calling convention."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        body = b"\x48\xf7\xd0" * _CHAIN  # not rax
        tail = b"\x48\xff\xcf"  # dec rdi
        # jnz to the start: opcode and distance take 6 bytes.
        tail += b"\x0f\x85" + struct.pack("<i", -(len(body) + len(tail) + 6))
        return body + tail + b"\xc3"
    return None
