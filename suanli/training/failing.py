"""An error in a person's own code, such as their model's forward: where it was, in one line."""

import os
import sysconfig
import traceback
from pathlib import Path

import torch

import suanli

_NOT_OWN = (
    *(str(Path(str(package.__file__)).parent) + os.sep for package in (suanli, torch)),
    "<",  # what was generated
)
_OURS = _NOT_OWN[0]
_LIBRARY = sysconfig.get_paths()["stdlib"]
_INSTALLED = ("site-packages", "dist-packages")
_LONGEST = 200


def in_one_line(error: BaseException) -> str:
    """What went wrong, and in which line of the person's own code, as far as it was there.

    Of what this package called, that is the innermost place outside of it and of torch.
    """
    text = " ".join(str(error).split())[:_LONGEST]
    words = f"{type(error).__name__}: {text}".rstrip(": ")
    place = _place_of(error)
    return f"{words}, at {place}" if place else words


def in_own_code(error: BaseException) -> bool:
    """Whether the error came through code that is neither this package's nor torch's alone."""
    return bool(_place_of(error))


def _place_of(error: BaseException) -> str:
    """FILE:LINE of the innermost own line; of an installed package where there is no other."""
    own = installed = ""
    called = False
    for frame in traceback.extract_tb(error.__traceback__):
        name = frame.filename
        called = called or name.startswith(_OURS)
        if not called or name.startswith(_NOT_OWN):
            continue
        place = f"{Path(name).name}:{frame.lineno}"
        if any(part in name for part in _INSTALLED):
            installed = place
        elif not name.startswith(_LIBRARY):
            own = place
    return own or installed
