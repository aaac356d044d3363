"""Runs each named loop once and prints its name behind it. A program of its own.

It imports nothing of Suanli, so that it starts in a few milliseconds and can be run by path.
"""

import ctypes
import platform
import sys


def main(library: str, names: list[str]) -> None:
    """Run the loops in order; a refused instruction ends the process before the name is out."""
    if sys.platform.startswith("linux") and platform.machine() == "x86_64":
        # Tile registers are granted per process: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
        ctypes.CDLL(None).syscall(158, 0x1023, 18)
    loops = ctypes.CDLL(library)
    stamps = (ctypes.c_double * 2)()
    for name in names:
        loop = getattr(loops, f"suanli_{name}")
        loop.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_double, ctypes.c_void_p]
        loop(10, 1, 1.0, stamps)
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
