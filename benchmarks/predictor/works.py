"""Captured works of the models, kept between runs because capturing takes seconds."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from suanli.base import codec
from suanli.base.work import Work

_VERSION = "1"


def captured(name: str, build: Callable[[], dict[str, Any]]) -> Work:
    """The work of this name, captured once and then read.

    Args:
        name: Says everything that the work depends on.
        build: Gives the arguments of `suanli.measure.capture.capture`, `model` among them.
    """
    key = hashlib.sha256(f"{_VERSION} {name}".encode()).hexdigest()[:16]
    file = _folder() / f"{key}.json"
    if file.exists():
        return codec.read(Work, file)
    from suanli.measure.capture import capture

    arguments = build()
    work = capture(arguments.pop("model"), **arguments)
    file.write_text(codec.dumps(work), encoding="utf-8")
    return work


def _folder() -> Path:
    chosen = os.environ.get("SUANLI_CACHE")
    folder = Path(chosen or tempfile.gettempdir()) / "predictor-works"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
