"""The pool of threads that torch's operators run in on a CPU."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_TINY = 1e-40  # a denormal number of fp32


def parallel_region() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP library that torch has loaded, or None."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    try:
        loaded = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Numbers too small for a normal exponent count as zero, in all threads of the pool.

    An optimiser's averages decay towards zero where gradients are zero, and in fp32 they stay for
    ever at a few of the smallest denormals, since 0.9 times these rounds to themselves. Processors
    handle each such number apart, at some hundred cycles.

    Where torch runs on another OpenMP than libgomp this holds in the calling thread, and in threads
    that it starts from then on.
    """
    if _flushing():
        yield
        return
    _in_every_thread(_flush)
    try:
        yield
    finally:
        _in_every_thread(_keep)


def _flushing() -> bool:
    return float(torch.tensor(_TINY) * 1.0) == 0.0


def _flush() -> None:
    torch.set_flush_denormal(True)


def _keep() -> None:
    torch.set_flush_denormal(False)


def _in_every_thread(action: Callable[[], None]) -> None:
    """Call it in this thread and in those that help it; a thread that starts later inherits."""
    address = parallel_region()
    if address is not None:
        body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        enter = ctypes.CFUNCTYPE(None, body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        enter(address)(body(lambda _: action()), None, torch.get_num_threads(), 0)
    action()
