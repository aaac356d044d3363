"""Quantised operators in an OpenVINO graph: found, and taken back to floating point for a trial."""

from typing import Any

import numpy as np

from suanli.engines.openvino_graph import openvino

# operators that hand a quantised value on as it is, so the quantiser may stand before them
_CARRIERS = frozenset(("Reshape", "Transpose", "MaxPool", "Squeeze", "Unsqueeze"))


def quantised_operators(model: Any) -> list[str]:
    """Names of the operators that take a quantised activation, in execution order."""
    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() not in {*_CARRIERS, "FakeQuantize", "Result"}
        and any(_quantiser(port) is not None for port in op.inputs())
    ]


def revert(op: Any, floats: dict[str, Any]) -> None:
    """Take the quantisers off an operator, for measuring what they do to the answer.

    Weights are replaced by the original ones unless they were rescaled against the activations
    (smoothing), and a bias that was shifted against the quantisation error gets its value back.

    Args:
        op: An operator of the quantised graph, changed in place.
        floats: The operators of the original graph by name.
    """
    source = floats.get(op.get_friendly_name())
    for index, port in enumerate(op.inputs()):
        quantiser = _quantiser(port)
        if quantiser is not None:
            _bypass(port, quantiser)
        elif source is not None and index < source.get_input_size():
            _original_constant(port, source.input_value(index), rescaled_stays=True)
    for target in op.output(0).get_target_inputs():
        follower = target.get_node()
        before = floats.get(follower.get_friendly_name())
        if follower.get_type_name() == "Add" and before is not None:
            for port, value in zip(follower.inputs(), before.input_values(), strict=True):
                _original_constant(port, value, rescaled_stays=False)


def _quantiser(port: Any) -> Any:
    """The quantiser that feeds an input port, also through operators that only carry; or None."""
    node = port.get_source_output().get_node()
    while node.get_type_name() in _CARRIERS:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "FakeQuantize" else None


def _bypass(port: Any, quantiser: Any) -> None:
    """Take a value from before its quantiser, through the operators that carry it."""
    node = port.get_source_output().get_node()
    while node.get_type_name() in _CARRIERS:
        port = node.input(0)
        node = port.get_source_output().get_node()
    port.replace_source_output(quantiser.input_value(0))


def _original_constant(port: Any, original: Any, *, rescaled_stays: bool) -> None:
    node = original.get_node()
    if node.get_type_name() != "Constant" or node.get_element_type().is_integral():
        return
    shape = port.get_partial_shape()
    if shape.is_dynamic or list(shape.to_shape()) != list(node.get_output_shape(0)):
        return
    ov = openvino()
    data = np.array(node.data)
    if rescaled_stays:
        now = _folded(port.get_source_output())
        size = float(np.linalg.norm(data))
        # int8 rounding moves weights by a percent or two, smoothing by its factors
        if now is None or not size or float(np.linalg.norm(now - data)) / size > 0.3:
            return
    constant = ov.opset13.constant(data)
    port.replace_source_output(constant.output(0))


def _folded(output: Any) -> np.ndarray | None:
    """Value of a weight that is stored as integers with a scale."""
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return np.asarray(node.data).astype(np.float64)
    if kind == "Convert":
        return _folded(node.input_value(0))
    if kind not in ("Multiply", "Subtract"):
        return None
    first, second = (_folded(value) for value in node.input_values())
    if first is None or second is None:
        return None
    return np.asarray(first * second if kind == "Multiply" else first - second)
