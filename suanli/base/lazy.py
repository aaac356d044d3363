"""Optional packages: present or not, without importing them, and imported on use."""

from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType

from suanli.base.errors import MissingBackendError


def present(package: str) -> bool:
    """Whether `package` (an import name) could be imported; it is not imported."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def version(package: str) -> str | None:
    """Installed version of the distribution that holds the import name, or None."""
    for name in (package, *_distributions().get(package.partition(".")[0], [])):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def need(package: str, install: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingBackendError: It is absent, or it is there and does not import.
    """
    try:
        return import_module(package)
    except ImportError as error:
        if present(package):
            raise MissingBackendError(
                f"{package} (it is there but fails: {error})", install
            ) from None
        raise MissingBackendError(package, install) from None
