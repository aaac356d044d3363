"""Builds the loops on this machine and proves in another process that they run here."""

import ctypes
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from suanli.base.compiler import CompilerError, find_compiler

_SOURCE = Path(__file__).with_name("loops.c")
_STAMPS = ctypes.POINTER(ctypes.c_double)
_MOST_BLOCKS = 50_000  # a run ends here even if its time is not over


class NativeLoops:
    """The built library.

    Attributes:
        path: The shared library.
        runnable: Names of the arithmetic loops that ran to their end in a process of their own,
            so that an instruction which this machine refuses can never end this process.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        built = [name for name in names if hasattr(self._library, f"suanli_{name}")]
        self.runnable = frozenset(_survivors(path, built))
        for name in self.runnable:
            operations = getattr(self._library, f"suanli_{name}_operations")
            operations.argtypes, operations.restype = [], ctypes.c_double
            loop = getattr(self._library, f"suanli_{name}")
            loop.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_double, _STAMPS]
            loop.restype = ctypes.c_long
        for name in ("suanli_read", "suanli_copy"):
            function = getattr(self._library, name)
            function.argtypes = [
                *(ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_double),
                _STAMPS,
            ]
            function.restype = ctypes.c_long

    def operations(self, name: str) -> float:
        """Operations of one iteration of an arithmetic loop."""
        return float(getattr(self._library, f"suanli_{name}_operations")())

    def arithmetic(self, name: str, iterations: int, seconds: float) -> list[float]:
        """Run a loop in this thread for that long; the time after each block, in seconds.

        Args:
            name: One of `runnable`.
            iterations: Iterations of a block.
            seconds: When to stop, at the end of a block.
        """
        stamps = (ctypes.c_double * (_MOST_BLOCKS + 1))()
        loop = getattr(self._library, f"suanli_{name}")
        done = loop(iterations, _MOST_BLOCKS, seconds, stamps)
        return stamps[: done + 1]

    def traffic(
        self, kind: str, address: int, n_bytes: int, chunk: int, seconds: float
    ) -> list[float]:
        """Read ("read") `n_bytes` at an address, or copy ("copy") them behind themselves.

        Args:
            kind: "read" or "copy".
            address: Start of the data, aligned to 64 bytes; a copy needs twice `n_bytes` there.
            n_bytes: A multiple of 1024.
            chunk: Bytes of a block: a multiple of `n_bytes`, or a part of it of whole KiB.
            seconds: When to stop, at the end of a block.
        """
        stamps = (ctypes.c_double * (_MOST_BLOCKS + 1))()
        function = getattr(self._library, f"suanli_{kind}")
        done = function(address, n_bytes, chunk, _MOST_BLOCKS, seconds, stamps)
        return stamps[: done + 1]


def native_loops(names: Iterable[str]) -> tuple[NativeLoops | None, str]:
    """Build the loops and find those that run here.

    Args:
        names: Loops that the processor's features allow.

    Returns:
        The library, or None and the reason in one line.
    """
    compiler = find_compiler()
    if compiler is None:
        return None, "no C compiler"
    flags = ["-O3", "-march=native", "-ffp-contract=fast"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        # Compilers prefer 256 bits on processors with 512, for the sake of mixed code.
        flags.append("-mprefer-vector-width=512")
    try:
        path = compiler.build_shared(_SOURCE, flags)
        return NativeLoops(path, names), ""
    except (CompilerError, OSError) as error:
        return None, str(error).splitlines()[0]


def _survivors(path: Path, names: list[str]) -> list[str]:
    """Names whose loop ends well in a child process; one that kills it is left out."""
    survivors: list[str] = []
    waiting = list(names)
    while waiting:
        command = [sys.executable, "-S", str(Path(__file__).with_name("probe.py")), str(path)]
        try:
            done = subprocess.run(
                [*command, *waiting], capture_output=True, text=True, timeout=20, check=False
            )
            lived = done.stdout.split()
        except subprocess.TimeoutExpired:
            return survivors
        except OSError:
            return survivors
        survivors += lived
        waiting = waiting[len(lived) + 1 :]
    return survivors
