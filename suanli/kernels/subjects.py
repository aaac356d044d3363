"""From a name to a kernel: one that ships, or one in a person's own Python file."""

import importlib.util
import sys
import traceback
from pathlib import Path

from suanli.base.errors import BadInputError, SuanliError
from suanli.kernels.declaration import Declaration
from suanli.kernels.shipped import shipped, shipped_kernel


def find_kernel(ref: str) -> Declaration:
    """The kernel behind a reference.

    Args:
        ref: The name of one that ships, "file.py:name", or "file.py" with one `Declaration` in it.

    Raises:
        BadInputError: There is no such file or name, or the file fails; its own line is named.
    """
    file, _, name = ref.rpartition(":") if ".py:" in ref else (ref, "", "")
    if not file.endswith(".py"):
        return shipped_kernel(ref)
    path = Path(file).resolve()
    if not path.is_file():
        raise BadInputError(f"no file {path}", next_step=f"or one of {', '.join(shipped())}")
    found = {k: v for k, v in vars(_loaded(path)).items() if isinstance(v, Declaration)}
    if name and name in found:
        return found[name]
    if not name and len(found) == 1:
        return next(iter(found.values()))
    what = f"no kernel {name!r} in {path.name}" if name else f"{path.name} has {len(found)} kernels"
    raise BadInputError(what, next_step=f"it has {', '.join(found) or 'no Declaration'}")


def _loaded(path: Path) -> object:
    """The file as a module; Triton reads functions from their file, so it must be a real one."""
    name = f"_suanli_kernel_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadInputError(f"{path.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SuanliError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == path]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        reason = (str(error).strip().splitlines() or [""])[0]
        raise BadInputError(f"{path.name}:{line}: {type(error).__name__}: {reason}") from error
    return module
