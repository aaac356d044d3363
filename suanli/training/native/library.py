"""Builds the C kernels on this machine, once, and finds the threads that they run in."""

import ctypes
import hashlib
import platform
import sys
from functools import cache
from pathlib import Path

import torch

from suanli.base.compiler import INSTALL, CompilerError, find_compiler
from suanli.base.errors import MissingBackendError
from suanli.training.threads import parallel_region

SOURCE = Path(__file__).with_name("norm.c")
HEADERS = tuple(Path(__file__).with_name(name) for name in ("vectors.h", "pools.h"))
BIAS_SOURCE = Path(__file__).with_name("bias.c")
MOVES_SOURCE = Path(__file__).with_name("moves.c")
WEIGHTS_SOURCE = Path(__file__).with_name("weights.c")
CHUNKS = 64  # as in norm.c
BLOCK = 32  # channels must be a multiple of it
KINDS = {"identity": 0, "relu": 1, "gelu": 2, "silu": 3}

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


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


class Biased(ctypes.Structure):
    """The argument of `suanli_bias_forward` and `suanli_bias_backward`."""

    _fields_ = (
        *((name, _LONG) for name in ("images", "height", "width", "channels")),
        *((name, _INT) for name in ("pooled", "kind", "threads")),
        *(
            (name, _POINTER)
            for name in (
                *("bias", "input", "values", "output", "masks"),
                *("kept", "output_gradient", "input_gradient", "bias_gradient"),
                *("partial", "lines"),
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


class Weights(ctypes.Structure):
    """The argument of `suanli_weights`."""

    _fields_ = (
        *((name, _LONG) for name in ("images", "height", "width", "inputs", "outputs")),
        *((name, _INT) for name in ("kernel", "threads")),
        ("inset", _LONG),
        *(
            (name, _POINTER)
            for name in ("x", "g", "result", "pairs", "turned", "sums", "places", "zeros")
        ),
        *((name, _LONG) for name in ("chunk_images", "splits")),
    )


class Moves(ctypes.Structure):
    """The argument of `suanli_move`."""

    _fields_ = (
        *((name, _POINTER) for name in ("images", "result", "down", "right", "mirror")),
        *((name, _LONG) for name in ("count", "height", "width", "pixel_bytes")),
        ("threads", _INT),
    )


class Library:
    """The built kernels.

    Attributes:
        path: The shared library.
        loop: The C function that shares a loop among the threads.
        shares_threads: Whether the kernels run in the thread pool that torch's operators run in.
            Two pools would spin against each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        self.loop = ctypes.cast(library.suanli_for_all, _POINTER)
        self.norm_forward = library.suanli_norm_forward
        self.norm_backward = library.suanli_norm_backward
        self.activation = library.suanli_activation
        for function, record in (
            (self.norm_forward, Norm),
            (self.norm_backward, Norm),
            (self.activation, Activation),
        ):
            function.argtypes, function.restype = [ctypes.POINTER(record)], None
        region = parallel_region()
        self.shares_threads = region is not None
        library.suanli_use_region.argtypes = [_POINTER]
        library.suanli_use_region.restype = None
        library.suanli_use_region(region)


class BiasLibrary:
    """The built kernels for bias and activation behind a convolution.

    Args:
        path: The shared library.
        loop: `Library.loop`.
    """

    def __init__(self, path: Path, loop: ctypes.c_void_p) -> None:
        library = ctypes.CDLL(str(path))
        library.suanli_use_loop.argtypes = [_POINTER]
        library.suanli_use_loop(loop)
        self.forward, self.backward = library.suanli_bias_forward, library.suanli_bias_backward
        for function in (self.forward, self.backward):
            function.argtypes, function.restype = [ctypes.POINTER(Biased)], None


class TileLibrary:
    """The built kernel for the gradient of convolution weights, on AMX tile registers.

    Args:
        path: The shared library.
        loop: `Library.loop`.
    """

    def __init__(self, path: Path, loop: ctypes.c_void_p) -> None:
        library = ctypes.CDLL(str(path))
        self.granted = bool(library.suanli_tiles())
        if self.granted:
            library.suanli_use_loop.argtypes = [_POINTER]
            library.suanli_use_loop(loop)
            self.sizes = library.suanli_weights_sizes
            self.sizes.argtypes = [ctypes.POINTER(Weights), ctypes.POINTER(_LONG)]
            self.weights = library.suanli_weights
            self.weights.argtypes = [ctypes.POINTER(Weights)]
            self.sizes.restype = self.weights.restype = None


def build(flags: tuple[str, ...] = ()) -> Library:
    """Compile the kernels of norm.c for this processor, or find those compiled before.

    Args:
        flags: More compiler flags, such as "-DSUANLI_PLAIN" for the code without AVX-512.

    Raises:
        MissingBackendError: There is no C compiler.
        CompilerError: It cannot build them.
    """
    path = built(SOURCE, flags)
    try:
        return Library(path)
    except OSError as error:
        raise CompilerError(f"what was built cannot be loaded: {error}") from None


@cache
def library() -> Library:
    """The kernels for this processor, built on the first call.

    Raises:
        MissingBackendError: There is no C compiler.
        CompilerError: It cannot build them.
    """
    return build()


@cache
def bias_library() -> BiasLibrary:
    """The kernels behind convolutions, built on the first call.

    Raises:
        MissingBackendError: There is no C compiler.
        CompilerError: It cannot build them.
    """
    path = built(BIAS_SOURCE, ())
    try:
        return BiasLibrary(path, library().loop)
    except OSError as error:
        raise CompilerError(f"what was built cannot be loaded: {error}") from None


def present() -> bool:
    """Whether the kernels can be had here; builds them on the first call."""
    try:
        library()
    except (MissingBackendError, CompilerError):
        return False
    return True


@cache
def tile_library() -> TileLibrary | None:
    """The tile kernel, or None where processor, system or compiler have no tile registers."""
    try:
        tiles = TileLibrary(built(WEIGHTS_SOURCE, ()), library().loop)
    except (MissingBackendError, CompilerError, OSError):
        return None
    return tiles if tiles.granted else None


def built(source: Path, flags: tuple[str, ...]) -> Path:
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


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's data starts; None stays None."""
    return None if tensor is None else tensor.data_ptr()
