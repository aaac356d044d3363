"""Where a model was built: the line that made each module, and the path that its user knows.

Layers of torch called by a sequence of torch run no line of the user's, so that the line which
built the layer stands for it. Notes lie in the module's own dictionary, so that deep copies keep
them: a plan puts copies and fused twins in the place of what was built.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from suanli.base.work import Operator
from suanli.measure.capturing.places import Place, building_line

_LINE, _PATH = "_suanli_line", "_suanli_path"


@contextmanager
def lines_noted() -> Iterator[None]:
    """Note the user's line at every module that is built in the block.

    Modules that this package builds, such as fused kernels, get none.
    """
    plain: Any = nn.Module.__init__

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        line = building_line()
        if line:
            self.__dict__[_LINE] = line

    nn.Module.__init__ = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__init__ = plain  # type: ignore[method-assign]


def note_paths(model: nn.Module) -> None:
    """Note each module's path in it, before a plan changes which modules there are."""
    for path, module in model.named_modules():
        module.__dict__[_PATH] = path


def places_of(models: Sequence[nn.Module]) -> dict[str, Place]:
    """Path as operators carry it -> path as the user knows it, and the line that built it.

    A module that stands for several, as a fused kernel does, has their paths with `+` between. One
    without a line has that of what is in it, else that of what it is in.

    Args:
        models: Those whose modules are followed.
    """
    found: dict[str, Place] = {}
    for model in models:
        for path, module in model.named_modules():
            outer = found.get(path.rpartition(".")[0]) if path else None
            line = _line(module) or (outer.source if outer is not None else "")
            found.setdefault(path, Place(module=_users_path(module, path), source=line))
    return found


def placed(
    operators: Sequence[Operator], places: dict[str, Place], otherwise: str
) -> list[Operator]:
    """The operators under the user's paths, those that ran no line of the user's with one too.

    Args:
        operators: As counted.
        places: As `places_of` gives them.
        otherwise: The line of those whose module has none.
    """
    found = []
    for op in operators:
        place = places.get(op.module) or Place(module=op.module)
        source = op.source or place.source or otherwise
        found.append(replace(op, module=place.module, source=source))
    return found


def _line(module: nn.Module) -> str:
    """Its own line, or the first one in it."""
    return next((m.__dict__[_LINE] for m in module.modules() if _LINE in m.__dict__), "")


def _users_path(module: nn.Module, path: str) -> str:
    own = module.__dict__.get(_PATH)
    if own is not None:
        return str(own)
    parts = list(module.children())
    if any(_PATH not in part.__dict__ and any(part.children()) for part in parts):
        return path  # it holds what was put in itself, as a rewritten block does
    names = [str(part.__dict__[_PATH]) for part in parts if _PATH in part.__dict__]
    return "+".join(names) or path
