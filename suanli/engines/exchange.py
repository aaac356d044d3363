"""Into an engine from files, and out of one into formats that others read."""

import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from suanli.base import codec, leftovers
from suanli.base.errors import BadInputError
from suanli.base.files import replaced_folder
from suanli.base.signature import Signature
from suanli.engines._folder import write_error
from suanli.engines.manifest import PROGRAM, check
from suanli.engines.program import Program

if TYPE_CHECKING:
    from suanli.engines.engine import Engine

_NPY, _ZIP = b"\x93NUMPY", b"PK"  # how the files begin
_WEIGHTS, _PLAN = "weights.safetensors", "plan.json"


def run_file(engine: "Engine", paths: Sequence[Path]) -> dict[str, np.ndarray[Any, Any]]:
    """Call an engine on arrays in files.

    Args:
        engine: An open engine.
        paths: One `.npz` whose arrays bear the inputs' names, or one `.npy` per input in the
            signature's order.

    Returns:
        The outputs by name. NumPy has no bfloat16, so such inputs and outputs are float32.

    Raises:
        BadInputError: A file cannot be read as plain arrays, or they do not fit the engine.
    """
    arrays = _arrays(engine.signature, [Path(path) for path in paths])
    tensors = []
    for spec, array in zip(engine.signature.inputs, arrays, strict=True):
        wanted = "float32" if spec.dtype == "bfloat16" else spec.dtype
        if array.dtype.name != wanted:
            raise BadInputError(
                f"{spec.name} must be {wanted}, the file holds {array.dtype.name}",
                next_step=f'save it as array.astype("{wanted}")',
            )
        native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        tensors.append(torch.from_numpy(native).to(getattr(torch, spec.dtype)))
    outputs = engine.call_flat(tensors)
    return {
        spec.name: (out.float() if out.dtype == torch.bfloat16 else out).cpu().numpy()
        for spec, out in zip(engine.signature.outputs, outputs, strict=True)
    }


def export(folder: Path, out: Path, *, kind: str = "onnx", trust: bool = False) -> Path:
    """Give an engine out in a format that needs no Suanli.

    Args:
        folder: The engine.
        out: For "onnx" the file, with its weights beside it where they are too large for one
            file. For "safetensors" a folder for the weights and `plan.json`.
        kind: "onnx" (fp32) or "safetensors".
        trust: Open the engine although no trusted key vouches for it.

    Returns:
        `out`.

    Raises:
        BadInputError: The kind is unknown, or `out` cannot be written or holds other things.
        ArtefactError: The engine is damaged or untrusted.
        CaptureError: There is no exported program to make ONNX from.
    """
    if kind not in ("onnx", "safetensors"):
        raise BadInputError(f"unknown kind {kind!r}", next_step='use "onnx" or "safetensors"')
    manifest = check(folder, trust=trust)
    program = Program(folder / PROGRAM)
    out = Path(out).resolve()
    try:
        if kind == "onnx":
            _export_onnx(program, out)
        else:
            _refuse_to_overwrite(out)
            with replaced_folder(out) as fresh:
                save_file({k: t.detach() for k, t in program.weights.items()}, fresh / _WEIGHTS)
                plans = {
                    "name": manifest.name,
                    "signature": manifest.signature,
                    "variants": manifest.variants,
                    "numbers": manifest.numbers,
                }
                (fresh / _PLAN).write_text(codec.dumps(plans), encoding="utf-8")
    except OSError as error:
        raise write_error(error, out) from error
    return out


def _export_onnx(program: Program, out: Path) -> None:
    from suanli.engines.onnx_export import export_onnx

    if out.is_dir():
        raise BadInputError(f"{out} is a folder", next_step="name a file, such as model.onnx")
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}."
    leftovers.sweep(out.parent, prefix)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=prefix + leftovers.owner()) as scratch:
        export_onnx(program, Path(scratch) / out.name)
        made = sorted(Path(scratch).iterdir(), key=lambda path: path.name == out.name)
        for path in made:  # the model last: until then an older one is whole
            path.replace(out.parent / path.name)


def _refuse_to_overwrite(out: Path) -> None:
    if out.is_file():
        raise BadInputError(f"{out} is a file", next_step="name a folder")
    if out.is_dir():
        foreign = sorted({path.name for path in out.iterdir()} - {_WEIGHTS, _PLAN})
        if foreign:
            raise BadInputError(
                f"{out} holds {foreign[0]!r}, which would be lost",
                next_step="name an empty or a new folder",
            )


def _arrays(signature: Signature, paths: Sequence[Path]) -> list[np.ndarray[Any, Any]]:
    names = [spec.name for spec in signature.inputs]
    if len(paths) == 1:
        loaded = _load(paths[0])
        if isinstance(loaded, np.ndarray):
            return _counted([loaded], names)
        missing = sorted(set(names) - loaded.keys())
        unknown = sorted(loaded.keys() - set(names))
        if missing and len(loaded) == len(names) == 1:
            return list(loaded.values())  # one array for one input needs no name
        if missing or unknown:
            odd = f"lacks {missing[0]}" if missing else f"holds the unknown {unknown[0]}"
            raise BadInputError(
                f"{paths[0].name} {odd}", next_step=f"the inputs are {', '.join(names)}"
            )
        return [loaded[name] for name in names]
    arrays = []
    for path in paths:
        array = _load(path)
        if not isinstance(array, np.ndarray):
            raise BadInputError(f"{path.name} holds several arrays: give it alone")
        arrays.append(array)
    return _counted(arrays, names)


def _counted(arrays: list[np.ndarray[Any, Any]], names: list[str]) -> list[np.ndarray[Any, Any]]:
    if len(arrays) != len(names):
        raise BadInputError(
            f"{len(names)} inputs are needed ({', '.join(names)}), {len(arrays)} were given"
        )
    return arrays


def _load(path: Path) -> np.ndarray[Any, Any] | Mapping[str, np.ndarray[Any, Any]]:
    """Plain arrays only; an object array would be a pickle, which may run code."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            with loaded as archive:
                return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise BadInputError(f"there is no file {path}") from None
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, KeyError) as error:
        raise BadInputError(
            f"{path.name} {_why_unreadable(path, error)}",
            next_step="write it with numpy.save or numpy.savez",
        ) from None


def _why_unreadable(path: Path, error: Exception) -> str:
    """In own words: NumPy's advice is to allow pickles, which nobody should follow."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, MemoryError):
        return "says that it holds more than fits into memory"
    with path.open("rb") as file:
        start = file.read(len(_NPY))
    if start.startswith(_ZIP):
        return "is a damaged .npz, or holds Python objects, which are not read"
    if start != _NPY:
        return "is no .npy or .npz file"
    if "allow_pickle" in str(error):
        return "holds Python objects, which are not read"
    return "is a damaged .npy file"
