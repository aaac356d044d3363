"""Where in the user's model an operator comes from: module path and source line."""

import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

_TORCH = str(Path(torch.__file__).parent) + "/"
_HERE = str(Path(__file__).parent) + "/"
_STANDARD = sysconfig.get_paths()["stdlib"] + "/"
# Where the count begins: what calls these is not what is counted.
_STARTS = tuple(
    str(Path(__file__).parent.parent / name) for name in ("capture.py", "step_record.py")
)
_PACKAGE = Path(__file__).parent.parent.parent
# Of this package only the models and recipes that ship are somebody's source: what the loops and
# kernels around a person's model call is not.
_SHIPPED = tuple(f"{_PACKAGE / folder}/" for folder in ("workloads", "training/recipes"))
_OURS = f"{_PACKAGE}/"
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass(frozen=True, kw_only=True)
class Place:
    """Module path and "file.py:line"; "" where unknown."""

    module: str = ""
    source: str = ""


class Places:
    """Follows a model as it runs.

    Attributes:
        fixed: The place of the graph node that runs; None while modules run.
    """

    def __init__(self) -> None:
        self.fixed: Place | None = None
        self._stack: list[str] = []

    @property
    def inside(self) -> bool:
        """Whether a module's forward is running."""
        return bool(self._stack)

    @property
    def module(self) -> str:
        """Path of the innermost module that is running; "" outside of all."""
        return self._stack[-1] if self._stack else ""

    def here(self) -> Place:
        """Place of the operator that is running."""
        if self.fixed is not None:
            return self.fixed
        return Place(module=self.module, source=_source_line())

    @contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        """Follow `module` and everything in it while the block runs."""
        handles: list[Any] = []
        for path, child in module.named_modules():
            handles.append(child.register_forward_pre_hook(_Enter(self._stack, path)))
            handles.append(child.register_forward_hook(_Leave(self._stack), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()


class _Enter:
    def __init__(self, stack: list[str], path: str) -> None:
        self._stack, self._path = stack, path

    def __call__(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._path)


class _Leave:
    def __init__(self, stack: list[str]) -> None:
        self._stack = stack

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._stack:
            self._stack.pop()


def _is_users(filename: str) -> bool:
    return not (_is_neutral(filename) or _is_ours(filename))


def _is_neutral(filename: str) -> bool:
    """Whether it is torch's or Python's own, or made as the program runs."""
    if filename.startswith((_TORCH, "<")):
        return True
    return filename.startswith(_STANDARD) and "-packages/" not in filename


def _is_ours(filename: str) -> bool:
    return filename.startswith(_OURS) and not filename.startswith(_SHIPPED)


def _source_line() -> str:
    """The innermost line that is not torch's, Python's or ours, up to where the count begins."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if filename in _STARTS:
            return ""
        if _is_users(filename):
            return line_at(frame)
        frame = frame.f_back
    return ""


def building_line() -> str:
    """The line that builds the module whose `__init__` runs; "" where this package builds it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not (_is_neutral(filename) or filename.startswith(_HERE)):
            return "" if _is_ours(filename) else line_at(frame)
        frame = frame.f_back
    return ""


def line_at(frame: FrameType | None) -> str:
    """Gives "file.py:line" of a frame of the user's, and "" for another one."""
    if frame is None or not _is_users(frame.f_code.co_filename):
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def defining_line(function: Any) -> str:
    """Where a function of the user's is defined; "" for another one."""
    code = getattr(getattr(function, "func", function), "__code__", None)
    if code is None or not _is_users(code.co_filename):
        return ""
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}"


def line_of(traceback: TracebackType | None) -> str:
    """The innermost line of a traceback that is not torch's nor ours; "" where there is none."""
    found = ""
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if _is_users(filename) and filename not in _STARTS:
            found = f"{Path(filename).name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


def place_of_node(meta: dict[str, Any]) -> Place:
    """Place of a node of an exported graph, from the stack and the modules it was traced under."""
    source = ""
    for filename, line in _FRAME.findall(meta.get("stack_trace") or ""):
        if _is_users(filename):
            source = f"{Path(filename).name}:{line}"
    stack = meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return Place(module=re.sub(r"^L\['self'\]\.?", "", path), source=source)
