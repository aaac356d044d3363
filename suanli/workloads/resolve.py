"""From what a person types, or another process sends, to a workload."""

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from suanli.base.errors import BadInputError
from suanli.workloads import reference
from suanli.workloads.builtins import builtin, builtin_names
from suanli.workloads.record import Workload
from suanli.workloads.reference import Options, Shapes
from suanli.workloads.weights import kept_weights, load_weights

_FILE = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)")
_UNSAFE = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".h5", ".hdf5", ".pb", ".tflite")


def names() -> list[str]:
    """Names of the built-in workloads."""
    return builtin_names()


def resolve(
    ref: str,
    *,
    data: Path | None = None,
    weights: Path | str | None = None,
    input_shapes: Shapes | None = None,
    input_dtype: str = "",
) -> Workload:
    """Make the workload that a reference names.

    Args:
        ref: A built-in name, `file.py:name`, `model.onnx`, `model.keras`, `hf:CONFIG`, or the `ref`
            of a workload, which makes the same one in another process, weights included.
        data: Folder of labelled data: for built-ins the root with `mnist/` and `cifar10/`
            (`SUANLI_DATA` stands in), for imported picture models a data set's own folder.
        weights: safetensors file for a built-in or a model from a Python file. "none" asks for
            random ones; without it a built-in takes those that were trained and kept here before.
        input_shapes: One shape per model input, without the batch, where nothing else says it.
        input_dtype: torch's name of the inputs' element type, such as "int64".

    Raises:
        BadInputError: Nothing has that name, a file is absent or broken, or example inputs are
            not known.
        CaptureError: An ONNX file uses an operator that is not known.
        MissingBackendError: An optional package is needed for it.
    """
    own_inputs = ref.startswith("hf:") or reference.parse(ref)[0] in builtin_names()
    if own_inputs and (input_shapes or input_dtype):
        option = "--input-shape" if input_shapes else "--input-dtype"
        raise BadInputError(
            f"{ref} has example inputs of its own, so {option} would change nothing",
            next_step=f"leave {option} out",
        )
    if ref.startswith("hf:"):
        from suanli.workloads.importers.transformers import from_config

        return from_config(ref)
    base, options = reference.parse(ref)
    options = replace(
        options,
        weights=_weights(weights) or options.weights,
        data=str(data.resolve()) if data else options.data,
        shapes=input_shapes or options.shapes,
        dtype=input_dtype or options.dtype,
    )
    if base in builtin_names():
        return _builtin(base, options)
    match = _FILE.fullmatch(base)
    if match:
        from suanli.workloads.userfile import from_file

        workload = from_file(Path(match["path"]), match["name"], options)
        return _with_data(_with_weights(workload, options), options)
    return _with_data(_imported(base, options), options)


def _builtin(name: str, options: Options) -> Workload:
    if not options.data and os.environ.get("SUANLI_DATA"):
        options = replace(options, data=str(Path(os.environ["SUANLI_DATA"]).resolve()))
    workload = builtin(name, options.root)
    if workload.data is None or builtin(name, None).data is not None:
        options = replace(options, data="")  # it has no use for the folder
    if workload.training is not None and not options.weights:
        kept = kept_weights(name, workload.training)
        options = replace(options, weights=str(kept.resolve()) if kept.is_file() else "none")
    return _with_weights(replace(workload, ref=reference.write(name, options)), options)


def _imported(base: str, options: Options) -> Workload:
    path = Path(base)
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        if options.dtype:
            raise BadInputError(
                f"{path.name} says what types it takes, so --input-dtype would change nothing",
                next_step="leave --input-dtype out",
            )
        from suanli.workloads.importers.onnx import from_onnx

        return from_onnx(path, options)
    if suffix == ".keras":
        from suanli.workloads.importers.keras import from_keras

        return from_keras(path, options)
    if suffix == ".py":
        raise BadInputError(
            f"{base} names a file but nothing in it", next_step=f"write {base}:NAME"
        )
    if suffix in _UNSAFE:
        raise BadInputError(
            f"{path.name}: {suffix} files hold no safe description of a model",
            next_step="write a Python file that makes the model and give file.py:name",
        )
    raise BadInputError(f"unknown workload {base!r}", next_step=_near(base))


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, builtin_names(), n=3, cutoff=0.5)
    known = "`suanli workloads` lists the built-in ones; or file.py:name, model.onnx, hf:CONFIG"
    return f"near names: {', '.join(near)}; {known}" if near else known


def _weights(given: Path | str | None) -> str:
    if given is None or given == "none":
        return given or ""
    return str(Path(given).resolve())


def _with_weights(workload: Workload, options: Options) -> Workload:
    if options.weights in ("", "none"):
        return workload
    path = Path(options.weights)
    if not path.is_file():
        raise BadInputError(f"no weights at {path}")
    filled = _Filled(workload.make_model, path)
    note = "; ".join(part for part in (workload.note, f"weights from {path.name}") if part)
    return replace(workload, make_model=filled, untrained=False, note=note)


def _with_data(workload: Workload, options: Options) -> Workload:
    if options.root is None or workload.data is not None:
        return workload
    from suanli.workloads.labelled import with_labelled_data

    return with_labelled_data(workload, options.root)


class _Filled:
    """Builds a model and fills it from a file."""

    def __init__(self, make_model: Callable[[], nn.Module], path: Path) -> None:
        self.make_model, self.path = make_model, path

    def __call__(self) -> nn.Module:
        model = self.make_model()
        load_weights(model, self.path)
        return model
