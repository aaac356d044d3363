"""ONNX operators as torch calls: one table per family, put together here.

An operator is a function from a `Call` to a tensor, a `Value`, or a list of them. The meaning of
each is that of the ONNX operator reference (https://onnx.ai/onnx/operators/), for operator sets 9
and later.
"""

from suanli.workloads.importers.onnx_operators.elementwise import ELEMENTWISE, HOST_ELEMENTWISE
from suanli.workloads.importers.onnx_operators.layers import LAYERS
from suanli.workloads.importers.onnx_operators.recurrent import RECURRENT
from suanli.workloads.importers.onnx_operators.reductions import HOST_REDUCTIONS, REDUCTIONS
from suanli.workloads.importers.onnx_operators.shapes import HOST_SHAPES, SHAPES
from suanli.workloads.importers.onnx_value import Call, Operator, Result, Table

OPERATORS: Table = {**ELEMENTWISE, **LAYERS, **RECURRENT, **REDUCTIONS, **SHAPES}
# used where every input is known to the host
HOST_OPERATORS: Table = {**HOST_ELEMENTWISE, **HOST_REDUCTIONS, **HOST_SHAPES}


def apply(call: Call) -> Result:
    """Run one operator, on the host where that is possible.

    Raises:
        CaptureError: The operator is unknown, or used in a way that is not.
    """
    name = call.node.operator
    chosen: Operator | None = OPERATORS.get(name)
    if name in HOST_OPERATORS and call.all_on_host:
        chosen = HOST_OPERATORS[name]
    if chosen is None:
        raise call.error("is not known to the importer")
    return chosen(call)
