"""Builds the C kernels on this machine, once, and finds the threads that they run in."""

import ctypes
import hashlib
import platform
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from suanli.base.compiler import INSTALL, CompilerError, find_compiler
from suanli.base.errors import MissingBackendError
from suanli.training.threads import parallel_region

SOURCE = Path(__file__).with_name("norm.c")
HEADERS = tuple(Path(__file__).with_name(name) for name in ("vectors.h", "pools.h", "loop.h"))
CHUNKS = 64  # as in norm.c
BLOCK = 32  # channels must be a multiple of it
KINDS = {"identity": 0, "relu": 1, "gelu": 2, "silu": 3}

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
Functions = Mapping[str, tuple[type, ...]]
"""Functions of a C file, with what their arguments point to."""


class Norm(ctypes.Structure):
    """The argument of `suanli_norm_forward` and `suanli_norm_backward`, field by field as in C."""

    _fields_ = (
        *((name, _LONG) for name in ("images", "height", "width", "channels")),
        *((name, _INT) for name in ("pooled", "kind", "threads")),
        ("eps", ctypes.c_float),
        *(
            (name, _POINTER)
            for name in (
                *("input", "values", "output", "masks", "weight", "bias"),
                *("mean", "variance", "inverse", "partial"),
                *("output_gradient", "input_gradient", "weight_gradient", "bias_gradient"),
                *("means", "lines", "added", "added_gradient"),
            )
        ),
    )


class Activation(ctypes.Structure):
    """The argument of `suanli_activation`."""

    _fields_ = (
        *((name, _POINTER) for name in ("input", "output_gradient", "result")),
        ("count", _LONG),
        *((name, _INT) for name in ("kind", "threads")),
    )


class Library:
    """The kernels of norm.c.

    Attributes:
        loop: The C function that shares a loop among the threads.
        shares_threads: Whether the kernels run in the thread pool that torch's operators run in.
            Two pools would spin against each other.
    """

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self.loop = ctypes.cast(loaded.suanli_for_all, _POINTER)
        self.norm_forward = loaded.suanli_norm_forward
        self.norm_backward = loaded.suanli_norm_backward
        self.activation = loaded.suanli_activation
        region = parallel_region()
        self.shares_threads = region is not None
        loaded.suanli_use_region.argtypes = [_POINTER]
        loaded.suanli_use_region.restype = None
        loaded.suanli_use_region(region)


def build(flags: tuple[str, ...] = ()) -> Library:
    """Compile the kernels of norm.c for this processor, or find those compiled before.

    Args:
        flags: More compiler flags, such as "-DSUANLI_PLAIN" for the code without AVX-512.

    Raises:
        MissingBackendError: There is no C compiler.
        CompilerError: It cannot build them.
    """
    functions: Functions = {
        "suanli_norm_forward": (Norm,),
        "suanli_norm_backward": (Norm,),
        "suanli_activation": (Activation,),
    }
    return Library(_loaded(SOURCE, functions, flags))


@cache
def library() -> Library:
    """The kernels for this processor, built on the first call.

    Raises:
        MissingBackendError: There is no C compiler.
        CompilerError: It cannot build them.
    """
    return build()


def kernels(source: Path, functions: Functions) -> ctypes.CDLL:
    """The kernels of a C file that includes loop.h; their loops run in the threads of `library`.

    Raises:
        MissingBackendError: There is no C compiler.
        CompilerError: It cannot build them, or the file has no such function on this processor.
    """
    made = _loaded(source, functions)
    made.suanli_use_loop.argtypes, made.suanli_use_loop.restype = [_POINTER], None
    made.suanli_use_loop(library().loop)
    return made


def present() -> bool:
    """Whether the kernels can be had here; builds them on the first call."""
    try:
        library()
    except (MissingBackendError, CompilerError):
        return False
    return True


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's data starts; None stays None."""
    return None if tensor is None else tensor.data_ptr()


def vector(tensor: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """A weight or a bias as the kernels read it: fp32 without gaps, itself where it is so already.

    Raises:
        ValueError: It has another length.
    """
    if tensor is None:
        return None
    if tensor.shape != (length,):
        raise ValueError(f"{list(tensor.shape)} values where {length} channels need one each")
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor  # as nearly always
    return tensor.to(torch.float32).contiguous()


def need(right: bool, what: str) -> None:
    """Refuse what a kernel would read or write beyond its end.

    Raises:
        ValueError: It is not right; the message says what the kernel takes.
    """
    if not right:
        raise ValueError(f"the kernel takes {what}")


def _built(source: Path, flags: tuple[str, ...]) -> Path:
    """The shared library of one C file, for this processor.

    Raises:
        MissingBackendError: There is no C compiler.
        CompilerError: It cannot build it.
    """
    compiler = find_compiler()
    if sys.platform == "win32" or compiler is None:
        raise MissingBackendError("a C compiler for the fused training kernels", INSTALL)
    # What is built is known by the source alone, so what it includes must show in the flags.
    header = hashlib.sha256(b"".join(one.read_bytes() for one in HEADERS)).hexdigest()[:16]
    every = [f"-I{source.parent}", f"-DSUANLI_HEADER_{header}"]
    every += ["-O3", "-march=native", "-ffp-contract=fast", "-Wno-psabi", "-pthread", "-lm"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        every.append("-mprefer-vector-width=512")
    return compiler.build_shared(source, [*every, *flags])


def _loaded(source: Path, functions: Functions, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    try:
        made = ctypes.CDLL(str(_built(source, flags)))
        for name, kinds in functions.items():
            function = getattr(made, name)
            function.argtypes, function.restype = [ctypes.POINTER(kind) for kind in kinds], None
    except (OSError, AttributeError) as error:
        raise CompilerError(f"what was built cannot be loaded: {error}") from None
    return made
