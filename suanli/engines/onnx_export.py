"""A program as plain ONNX: what ONNX Runtime and TensorRT read, and the way out of Suanli."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suanli.base.errors import CaptureError
from suanli.base.lazy import need
from suanli.engines._quiet import quiet

if TYPE_CHECKING:
    from suanli.base.signature import Signature
    from suanli.engines.program import Program

INSTALL = 'pip install "onnx>=1.18" "onnxscript>=0.5"'
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter writes a node's module path
_FILE = "model.onnx"
# protobuf refuses messages of 2 GiB; larger weights go into a file beside the graph
_SINGLE_FILE_BYTES = 1_500_000_000


def export_onnx(program: "Program", path: Path) -> Path:
    """Write a program as ONNX with the signature's names.

    The batch stays free where the signature is dynamic. Weights are inside the file, or beside it
    as `<name>.data` where the file would grow beyond what protobuf can hold.

    Args:
        program: The captured model.
        path: The file to write; its folder is made if absent.

    Returns:
        `path`.

    Raises:
        MissingBackendError: onnx or onnxscript is absent.
        CaptureError: The model has no exported program, or one of its operators has no ONNX form.
    """
    need("onnx", INSTALL)
    need("onnxscript", INSTALL)
    import torch

    exported = program.exported
    try:
        with quiet(), torch.no_grad():
            converted = torch.onnx.export(exported, dynamo=True, optimize=True, verbose=False)
    except Exception as error:  # the exporter raises whatever its passes raise
        raise CaptureError(
            f"{program.meta.name} cannot be written as ONNX: {_reason(error)}",
            operator=_operator(error),
        ) from error
    if converted is None:
        raise CaptureError(f"{program.meta.name} cannot be written as ONNX: nothing came back")
    _rename(converted.model.graph, program.signature)
    _strip(converted.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    large = sum(w.numel() * w.element_size() for w in program.weights.values()) > _SINGLE_FILE_BYTES
    with quiet():
        converted.save(str(path), external_data=large)
    return path


def program_onnx(program: "Program") -> Path:
    """The program's ONNX file inside its folder, written on first use.

    Several processes may ask at once: each writes into a folder of its own, the first rename wins
    and the others take the winner's file, so a reader never sees half a model.

    Raises:
        MissingBackendError: onnx or onnxscript is absent.
        CaptureError: See `export_onnx`.
    """
    target = program.folder / "onnx"
    if not (target / _FILE).is_file():
        fresh = Path(tempfile.mkdtemp(dir=program.folder, prefix=".onnx."))
        try:
            export_onnx(program, fresh / _FILE)
            publish(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return target / _FILE


def publish(fresh: Path, target: Path) -> None:
    """Rename a finished folder to its place unless another process was first.

    Raises:
        OSError: The rename failed and nothing stands at `target`.
    """
    fresh.chmod(0o755)
    try:
        fresh.rename(target)  # fails where the target is a folder with something in it
    except OSError:
        if not target.is_dir():
            raise


def _rename(graph: Any, signature: "Signature") -> None:
    """Give inputs, outputs and the free dimension the names a person knows."""
    import onnx_ir as ir

    if len(graph.inputs) != len(signature.inputs) or len(graph.outputs) != len(signature.outputs):
        raise CaptureError(
            f"the ONNX graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, "
            f"the model {len(signature.inputs)} and {len(signature.outputs)}"
        )
    outputs = {spec.name for spec in signature.outputs}
    taken = outputs | {spec.name for spec in signature.inputs}
    clash = [spec.name for spec in signature.inputs if spec.name in outputs]
    if clash:
        raise CaptureError(
            f"{clash[0]} is both an input and an output, which ONNX cannot say",
            next_step="rename the argument of forward",
        )
    ends = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for node in graph:
        for value in node.outputs:
            if id(value) not in ends and value.name in taken:
                value.name = f"{value.name}_inner"
    _own_outputs(graph, ir)
    for value, spec in zip(graph.inputs, signature.inputs, strict=True):
        value.name = spec.name
    for value, spec in zip(graph.outputs, signature.outputs, strict=True):
        value.name = spec.name
    _name_batch(graph, signature, ir)


def _own_outputs(graph: Any, ir: Any) -> None:
    """One value per output: an input that is passed on, or a value given twice, is copied."""
    seen = {id(value) for value in graph.inputs}
    for position, value in enumerate(list(graph.outputs)):
        if id(value) in seen or id(value) in {id(w) for w in graph.initializers.values()}:
            copy = ir.node("Identity", inputs=[value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            graph.append(copy)
            graph.outputs[position] = copy.outputs[0]
        seen.add(id(value))


def _name_batch(graph: Any, signature: "Signature", ir: Any) -> None:
    """Call the exporter's symbol for the free dimension "batch" wherever it stands alone."""
    symbols = {
        str(value.shape[0])
        for value, spec in zip(graph.inputs, signature.inputs, strict=True)
        if spec.batched and value.shape is not None and not isinstance(value.shape[0], int)
    }
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and str(size) in symbols:
                value.shape[axis] = ir.SymbolicDim("batch")


def _strip(model: Any) -> None:
    """Leave out the stack traces: they hold the paths and source lines of the user's machine."""
    for owner in (model, model.graph, *model.graph):
        for key in [key for key in owner.metadata_props if key != SCOPES]:
            del owner.metadata_props[key]


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:300]


def _operator(error: BaseException) -> str:
    import re

    found = re.search(r"\b(?:aten|prims|torchvision)[.:]+\w+", _reason(error))
    return found.group(0) if found else ""
