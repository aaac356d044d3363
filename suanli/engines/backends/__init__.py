"""The table of backends: a name and a file each. Nothing heavy loads until a row is used."""

from collections.abc import Sequence
from functools import cache
from importlib import import_module, metadata
from typing import cast

from suanli.base.errors import BadInputError
from suanli.base.hardware import BackendStatus
from suanli.base.lazy import present, version
from suanli.base.plan import BackendSpec
from suanli.engines.backend import Backend

ENTRY_POINTS = "suanli.backends"

_ROWS = (
    "eager",
    "inductor",
    "aotinductor",
    "torchao",
    "onnxruntime",
    "openvino",
    "tensorrt",
)


def backends(extra: Sequence[str] = ()) -> dict[str, Backend]:
    """All backends by name, present or not; see `status` for which can be used here.

    Args:
        extra: More rows, each "module:ATTRIBUTE" of an object that is a `Backend`.

    Raises:
        BadInputError: A row of `extra` or of another package cannot be loaded, or takes a name
            that is already there.
    """
    table = dict(_own())
    for where in (*_installed(), *extra):
        row = _load(where)
        name = row.spec.name
        if name in table and table[name] is not row:
            raise BadInputError(f"{where} would replace the backend {name}")
        table[name] = row
    return table


def status(backend: Backend) -> BackendStatus:
    """Whether a backend's packages are here, without importing them."""
    spec = backend.spec
    missing = [package for package in spec.packages if not present(package)]
    reason = f"{' and '.join(missing)} not installed" if missing else ""
    main = spec.packages[0] if spec.packages else "torch"
    return BackendStatus(
        name=spec.name,
        present=not missing,
        version=None if missing else version(main),
        install=spec.install,
        reason=reason,
    )


@cache
def _own() -> dict[str, Backend]:
    rows = {}
    for name in _ROWS:
        row = cast(Backend, import_module(f"{__name__}.{name}").BACKEND)
        rows[row.spec.name] = row
    return rows


@cache
def _installed() -> tuple[str, ...]:
    return tuple(sorted(entry.value for entry in metadata.entry_points(group=ENTRY_POINTS)))


def _load(where: str) -> Backend:
    module, _, attribute = where.partition(":")
    try:
        row = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadInputError(f"cannot load the backend {where}: {error}") from None
    if not isinstance(getattr(row, "spec", None), BackendSpec):
        raise BadInputError(f"{where} is no backend: it has no spec")
    return cast(Backend, row)
