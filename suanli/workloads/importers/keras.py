"""Keras 3 models. On the torch backend a Keras model is a torch module."""

import json
import os
import zipfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from suanli.base.errors import BadInputError, CaptureError, MissingBackendError
from suanli.base.lazy import need
from suanli.workloads import reference
from suanli.workloads.examples import example_tensor
from suanli.workloads.importers.naming import with_inputs
from suanli.workloads.record import Inputs, Workload
from suanli.workloads.reference import Options
from suanli.workloads.seeding import INPUT_SEED

_INSTALL = "pip install 'suanli[keras]'"


def need_keras() -> ModuleType:
    """Keras on its torch backend.

    Raises:
        MissingBackendError: Keras is absent.
        BadInputError: This process already uses Keras with another backend.
    """
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = need("keras", _INSTALL)
    if not hasattr(keras, "config"):
        raise MissingBackendError("Keras 3", _INSTALL)
    if keras.config.backend() != "torch":
        raise BadInputError(
            f"Keras runs on {keras.config.backend()} in this process",
            next_step="set KERAS_BACKEND=torch before it is imported",
        )
    return keras


def from_keras(path: Path, options: Options) -> Workload:
    """A workload of a `.keras` file.

    Args:
        path: The file.
        options: Shapes without the batch, where the model leaves sizes free.

    Raises:
        BadInputError: The file is absent, damaged or holds code, or a size is not known.
        MissingBackendError: Keras is absent.
    """
    path = path.resolve()
    model: Any = _load(path).inner
    specs = model.inputs
    shapes = options.shapes or tuple(tuple(spec.shape[1:]) for spec in specs)
    if len(shapes) != len(specs) or any(size is None for shape in shapes for size in shape):
        raise BadInputError(
            f"{path.name} leaves sizes of its {len(specs)} inputs free",
            next_step="give them with --input-shape, such as 28x28x1",
        )
    kinds = tuple(options.dtype or str(spec.dtype) for spec in specs)
    return Workload(
        name=path.stem,
        ref=reference.write(str(path), options),
        make_model=partial(_load, path),
        make_inputs=partial(_make_inputs, shapes, kinds, _vocabulary(model)),
        untrained=False,
    )


class KerasModule(nn.Module):
    """A Keras model that takes its inputs one by one.

    Make it with `with_inputs`, which gives `forward` the model's own input names.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def run(self, *inputs: torch.Tensor) -> Any:
        """The model's output."""
        return self.inner(inputs[0] if len(inputs) == 1 else list(inputs))


def _load(path: Path) -> KerasModule:
    _refuse_code(path)
    keras = need_keras()
    try:
        with keras.device("cpu"):
            model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except (ValueError, TypeError, OSError, KeyError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInputError(f"{path.name} is no readable Keras model: {lines[0]}") from None
    if not isinstance(model, nn.Module) or not getattr(model, "inputs", None):
        raise BadInputError(f"{path.name} was saved before it was built: its inputs are not known")
    specs: Any = model.inputs
    names = [str(spec.name) for spec in specs]
    return with_inputs(KerasModule, names)(model).eval()


def _refuse_code(path: Path) -> None:
    """Look for layers that bring code of their own before Keras reads the file."""
    if not path.is_file():
        raise BadInputError(f"no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, RuntimeError) as error:
        raise BadInputError(f"{path.name} is no readable Keras file: {error}") from None
    pending: list[Any] = [config]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            _refuse_foreign(item, path)
            pending += item.values()
        elif isinstance(item, list):
            pending += item


def _refuse_foreign(item: dict[str, Any], path: Path) -> None:
    module, kind = item.get("module"), item.get("class_name")
    if kind in ("Lambda", "__lambda__", "TorchModuleWrapper"):
        raise CaptureError(
            f"{path.name} holds a {kind} layer, which is code, and is refused",
            operator=str(kind),
            next_step="build the model in a Python file and give file.py:name",
        )
    if isinstance(module, str) and module.split(".")[0] not in ("keras", "builtins"):
        raise CaptureError(
            f"{path.name} needs {module}.{kind}, which is not part of Keras",
            operator=str(kind),
            next_step="build the model in a Python file and give file.py:name",
        )


def _vocabulary(model: Any) -> int:
    sizes = [int(layer.input_dim) for layer in model.layers if type(layer).__name__ == "Embedding"]
    return min(sizes, default=2)


def _make_inputs(
    shapes: tuple[tuple[int, ...], ...], kinds: tuple[str, ...], vocabulary: int, batch: int
) -> Inputs:
    tensors = [
        example_tensor(batch, shape, kind, vocabulary=vocabulary, seed=INPUT_SEED + index)
        for index, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))
    ]
    return Inputs(args=tuple(tensors))
