"""Where a model was built: the line that made each module, and the path that its user knows.

Layers of torch called by a sequence of torch run no line of the user's, so that the line which
built the layer stands for it; and the line that asks for an optimiser by its settings stands for
the update where ours is the line that makes it. Notes lie in the object's own dictionary, so that
deep copies of a module keep them: a plan puts copies and fused twins in the place of what was
built.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from suanli.base.work import Operator
from suanli.measure.capturing.places import Place, building_line
from suanli.workloads.record import TrainingSettings

_LINE, _PATH = "_suanli_line", "_suanli_path"


@contextmanager
def lines_noted() -> Iterator[None]:
    """Note the user's line at every module, and all settings of training, made in the block.

    What this package makes, such as fused kernels and changed settings, gets none.
    """
    kinds: tuple[Any, ...] = (nn.Module, TrainingSettings)
    plain = [kind.__init__ for kind in kinds]
    for kind in kinds:
        kind.__init__ = _noting(kind.__init__)
    try:
        yield
    finally:
        for kind, init in zip(kinds, plain, strict=True):
            kind.__init__ = init


def _noting(plain: Callable[..., None]) -> Callable[..., None]:
    def noted(self: object, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        line = building_line()
        if line:
            self.__dict__[_LINE] = line

    return noted


def settings_line(*settings: TrainingSettings | None) -> str:
    """The user's line that made the first of these that has one; "" where none has."""
    return next((s.__dict__[_LINE] for s in settings if s is not None and _LINE in vars(s)), "")


def with_line_of(given: TrainingSettings, asked: TrainingSettings) -> TrainingSettings:
    """The settings, as asked for by the line that made others of which they are a change."""
    line = settings_line(asked)
    if line:
        given.__dict__[_LINE] = line
    return given


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
