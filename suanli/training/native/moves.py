"""Moves and mirrors a set of images in one pass, natively where there is a compiler."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from suanli.base.compiler import CompilerError
from suanli.base.errors import MissingBackendError
from suanli.training.native.library import address, kernels, need

SOURCE = Path(__file__).with_name("moves.c")
_MOST_WIDTH = 4096  # as in moves.c
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class Moves(ctypes.Structure):
    """The argument of `suanli_move`."""

    _fields_ = (
        *((name, _POINTER) for name in ("images", "result", "down", "right", "mirror")),
        *((name, _LONG) for name in ("count", "height", "width", "pixel_bytes")),
        ("threads", _INT),
    )


def can_move(images: Tensor) -> bool:
    """Whether `moved` takes these images [N, C, H, W]."""
    return (
        images.device.type == "cpu"
        and images.dim() == 4
        and images.is_contiguous(memory_format=torch.channels_last)
        and images.shape[3] <= _MOST_WIDTH
        and _library() is not None
    )


def moved(images: Tensor, down: Tensor, right: Tensor, mirror: Tensor) -> Tensor:
    """Each image mirrored where asked, then moved, its edges filled with its reflection.

    Args:
        images: [N, C, H, W], channels last, for which `can_move` holds.
        down: int [N]; row y of the result is row y + down of the (mirrored) image. Less than H.
        right: int [N]; the same for columns. Less than W.
        mirror: bool [N].

    Returns:
        The same shape and layout.

    Raises:
        ValueError: A move is too long, or there is not one for each image.
    """
    need(can_move(images), f"images channels last on the CPU, {_MOST_WIDTH} columns at most")
    count, channels, height, width = images.shape
    for moves, side in ((down, height), (right, width)):
        fit = moves.shape == (count,) and (not count or int(moves.abs().max()) < side)
        need(fit, "a move for each image, shorter than its side")
    need(mirror.shape == (count,), "a flag for each image")
    result = torch.empty_like(images, memory_format=torch.channels_last)
    shifts = [part.to(torch.int32).contiguous() for part in (down, right)]
    flags = mirror.to(torch.uint8).contiguous()
    record = Moves(
        images=address(images),
        result=address(result),
        down=address(shifts[0]),
        right=address(shifts[1]),
        mirror=address(flags),
        count=count,
        height=height,
        width=width,
        pixel_bytes=channels * images.element_size(),
        threads=torch.get_num_threads(),
    )
    loaded = _library()
    assert loaded is not None
    loaded.suanli_move(ctypes.byref(record))
    return result


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return kernels(SOURCE, {"suanli_move": (Moves,)})
    except (MissingBackendError, CompilerError):
        return None
