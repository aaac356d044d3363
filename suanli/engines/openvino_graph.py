"""A program as an OpenVINO graph: converted once, its operators named after the user's modules."""

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from suanli.base.errors import CaptureError, SuanliError
from suanli.base.lazy import need
from suanli.engines._quiet import quiet
from suanli.engines.onnx_export import program_onnx, publish

if TYPE_CHECKING:
    from suanli.base.signature import Signature
    from suanli.engines.program import Program

INSTALL = 'pip install "openvino>=2026.1"'
GRAPH = "model.xml"
WEIGHTS = "model.bin"

_SOURCE = "suanli_source"
_ORIGIN = "origin:"  # prefix of the marks that survive the fusions below
_PLAIN = frozenset({"Constant", "Parameter", "Result"})
# what a person calls "the operator" of a module; the rest is glue around it
_PRODUCTS = frozenset(
    (
        "Convolution",
        "GroupConvolution",
        "ConvolutionBackpropData",
        "GroupConvolutionBackpropData",
        "MatMul",
        "ScaledDotProductAttention",
        "LSTMSequence",
        "GRUSequence",
        "RNNSequence",
    )
)


def openvino() -> Any:
    """Import OpenVINO with its telemetry off.

    Importing it, or NNCF, would otherwise send an event over the network; without the telemetry
    package both fall back to sending nothing.

    Raises:
        MissingBackendError: It is absent.
    """
    if "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    return need("openvino", INSTALL)


def program_graph(program: "Program") -> Path:
    """The program as fp32 IR inside its folder, converted on first use.

    Several processes may ask at once; the first finished one wins (see `program_onnx`).

    Returns:
        Path of the .xml file; the weights stand beside it.

    Raises:
        MissingBackendError: OpenVINO is absent.
        CaptureError: The model has no exported program, or OpenVINO lacks one of its operators.
    """
    target = program.folder / "openvino"
    if not (target / GRAPH).is_file():
        fresh = Path(tempfile.mkdtemp(dir=program.folder, prefix=".openvino."))
        try:
            openvino().save_model(convert(program), fresh / GRAPH, compress_to_fp16=False)
            publish(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return target / GRAPH


def convert(program: "Program") -> Any:
    """Convert a program to an `ov.Model` with the signature's shapes and a free batch.

    From the exported program, which keeps attention as one operator; by way of ONNX where that
    fails.

    Raises:
        CaptureError: Neither way works; the message is that of the first.
    """
    program.exported  # noqa: B018 - a model without a graph fails here, with its own reason
    try:
        with quiet():
            model = _from_exported(program)
        model.set_rt_info("exported program", _SOURCE)
        return model
    except Exception as error:  # the frontend raises whatever its operators raise
        first = error
    try:
        with quiet():
            model = openvino().Core().read_model(program_onnx(program))
            _fold(model)
            _shape(model, program.signature)
        model.set_rt_info(f"onnx, because {_reason(first)}", _SOURCE)
        return model
    except Exception:
        raise CaptureError(
            f"OpenVINO cannot convert {program.meta.name}: {_reason(first)}"
        ) from first


def source_of(model: Any) -> str:
    """Which way a graph was converted: "exported program", or "onnx" with the reason."""
    return str(model.get_rt_info(_SOURCE).astype(str)) if model.has_rt_info(_SOURCE) else ""


def operator_names(model: Any) -> list[str]:
    """Names of the operators that compute, in execution order."""
    return [op.get_friendly_name() for op in model.get_ordered_ops() if _computes(op)]


def matching(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The names that `wanted` selects: the operator of that name, else all inside that module.

    Raises:
        SuanliError: An entry of `wanted` selects nothing.
    """
    chosen: list[str] = []
    for entry in wanted:
        inside = (f"{entry}.", f"{entry}/")
        found = [entry] if entry in names else [n for n in names if n.startswith(inside)]
        if not found:
            raise SuanliError(f"no operator is called {entry}")
        chosen += [name for name in found if name not in chosen]
    return chosen


def mark_float(xml: Path, names: Sequence[str]) -> None:
    """Mark layers of an IR file as ones that may not run below fp32.

    The mark is OpenVINO's own attribute for precision-sensitive operators ("precise"); it is
    written into the file because the Python interface has no call for it.
    """
    wanted = set(names)
    tree = ElementTree.parse(xml)  # noqa: S314 - a file that this process has just written
    for layer in tree.iterfind("./layers/layer"):
        if layer.get("name") in wanted:
            info = layer.find("rt_info")
            if info is None:
                info = ElementTree.Element("rt_info")
                data = layer.find("data")
                layer.insert(0 if data is None else 1, info)
            ElementTree.SubElement(info, "attribute", name="precise", version="0")
    tree.write(xml, encoding="utf-8", xml_declaration=True)


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = next((part for part in text.splitlines() if "No conversion" in part), text)
    return line.strip().splitlines()[0][:300]


def _from_exported(program: "Program") -> Any:
    openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    decoder = TorchFXPythonDecoder.from_exported_program(program.exported)
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    for op in model.get_ordered_ops():
        if _computes(op):
            # fusing renames operators but hands every mark on, so each one gets a mark of its own
            op.get_rt_info()[_ORIGIN + op.get_friendly_name()] = "1"
    # fold before the user's modules give their names: a convolution takes its batch norm in
    _fold(model)
    nodes = {str(node.name): node for node in decoder.pt_module.graph.nodes}
    _name_inputs(model, program.signature, [n for n in nodes.values() if n.op == "placeholder"])
    _shape(model, program.signature)
    _name_operators(model, lambda name: _module_path(nodes.get(name)))
    return model


def _fold(model: Any) -> None:
    """OpenVINO's own simplifications, those that its converter makes."""
    from openvino._offline_transformations import apply_moc_transformations

    apply_moc_transformations(model, cf=False, smart_reshape=False)


def _module_path(node: Any) -> str:
    stack = (node.meta.get("nn_module_stack") or {}) if node is not None else {}
    for path, _ in reversed(list(stack.values())):
        name = str(path).removeprefix("L['self'].").removeprefix("L['self']")
        return "" if name.startswith("_empty_") else name  # torch's mark for "no module"
    return ""


def _computes(op: Any) -> bool:
    return op.get_type_name() not in _PLAIN


def _name_operators(model: Any, path_of: Callable[[str], str]) -> None:
    """Name each operator by the module that made it, distinct and the same in every process."""
    operators = [op for op in model.get_ordered_ops() if _computes(op)]
    origins = [_origin(op) for op in operators]
    paths = [path_of(origin) or origin for origin in origins]
    products = Counter(
        path for op, path in zip(operators, paths, strict=True) if op.get_type_name() in _PRODUCTS
    )
    taken: Counter[str] = Counter()
    for op, origin, path in zip(operators, origins, paths, strict=True):
        name = path
        if op.get_type_name() not in _PRODUCTS or products[path] > 1:
            name = f"{path}/{origin}" if path != origin else origin
            name = f"{name}:{op.get_type_name()}" if name != op.get_type_name() else name
        taken[name] += 1
        op.set_friendly_name(name if taken[name] == 1 else f"{name}#{taken[name]}")
        for key in [key for key in op.get_rt_info() if key.startswith(_ORIGIN)]:
            del op.get_rt_info()[key]


def _origin(op: Any) -> str:
    """Name of the captured node that the operator stands for."""
    marks = sorted(k.removeprefix(_ORIGIN) for k in op.get_rt_info() if k.startswith(_ORIGIN))
    # a mark without a slash is no captured node: the converter numbers those by a global counter
    captured = [str(mark) for mark in marks if "/" in mark]
    kind = str(op.get_type_name())
    for mark in captured:
        if mark.rpartition("/")[2].partition("_")[0] == kind:
            return mark.partition("/")[0]
    return captured[0].partition("/")[0] if captured else kind


def _name_inputs(model: Any, signature: "Signature", placeholders: Sequence[Any]) -> None:
    """Give the signature's names to the parameters, told apart by the captured names."""
    if len(placeholders) != len(signature.inputs):
        raise SuanliError(
            f"the graph has {len(placeholders)} inputs, the model {len(signature.inputs)}"
        )
    renamed = {}
    for node, spec in zip(placeholders, signature.inputs, strict=True):
        # the frontend takes the one or the other, depending on torch
        renamed[str(node.name)] = renamed[str(node.target)] = spec.name
    for port in model.inputs:
        captured = next((name for name in port.get_names() if name in renamed), None)
        if captured is None:
            raise SuanliError(f"no input was captured as {', '.join(port.get_names())}")
        port.set_names({renamed[captured]})
        port.get_node().set_friendly_name(renamed[captured])


def _shape(model: Any, signature: "Signature") -> None:
    """Fix every size but the batch, and hold the outputs against the signature."""
    if len(model.outputs) != len(signature.outputs):
        raise SuanliError(
            f"the graph has {len(model.outputs)} outputs, the model {len(signature.outputs)}"
        )
    specs = {spec.name: spec for spec in signature.inputs}
    shapes = {}
    for port in model.inputs:
        name = next((name for name in port.get_names() if name in specs), None)
        if name is None:
            raise SuanliError(f"the graph has an input {port.get_any_name()} of its own")
        shape = list(specs[name].shape)
        if specs[name].batched and not signature.dynamic:
            shape[0] = signature.max_batch
        shapes[port] = shape
    model.reshape(shapes)
    for position, (port, spec) in enumerate(zip(model.outputs, signature.outputs, strict=True)):
        port.set_names({f"{spec.name}"})
        port.get_node().set_friendly_name(f"result{position}")
