"""Operators that work element by element."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from suanli.workloads.importers.onnx_types import torch_type
from suanli.workloads.importers.onnx_value import (
    Call,
    Operator,
    Result,
    Table,
    Value,
    on_host,
    square_root,
    symbolic_float,
    symbolic_int,
)


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Operator:
    return lambda call: function(call.tensor(0))


def _binary(function: Callable[[Any, Any], torch.Tensor]) -> Operator:
    def run(call: Call) -> Result:
        left, right = call.scalar_or_tensor(0), call.scalar_or_tensor(1)
        if not isinstance(left, torch.Tensor) and not isinstance(right, torch.Tensor):
            left = call.tensor(0)
        return _typed(function(left, right), call)

    return run


def _logical(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Operator:
    return lambda call: function(call.tensor(0), call.tensor(1))


def _typed(result: torch.Tensor, call: Call) -> torch.Tensor:
    # a Python number beside an integer tensor must not change its type
    kind = call.value(0).dtype
    return result if result.dtype in (torch.bool, kind) else result.to(kind)


def _folded(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Operator:
    return lambda call: functools.reduce(
        function, [call.tensor(index) for index in range(len(call.inputs))]
    )


def _divide(left: Any, right: Any) -> torch.Tensor:
    # ONNX divides integers without remainder, towards zero
    known = left if isinstance(left, torch.Tensor) else right
    rounding = None if known.is_floating_point() else "trunc"
    return torch.div(torch.as_tensor(left), right, rounding_mode=rounding)


def _modulo(call: Call) -> Result:
    function = torch.fmod if call.attribute("fmod", 0) else torch.remainder
    return function(call.tensor(0), call.tensor(1))


def _mean(call: Call) -> Result:
    total = _folded(torch.add)(call)
    assert isinstance(total, torch.Tensor)
    return total / len(call.inputs)


def _clip(call: Call) -> Result:
    bounds = []
    for index, name in ((1, "min"), (2, "max")):
        given = call.scalar_or_tensor(index) if call.has(index) else call.attribute(name)
        bounds.append(given)
    x, (low, high) = call.tensor(0), bounds
    if all(isinstance(bound, torch.Tensor) for bound in bounds if bound is not None):
        return torch.clamp(x, low, high)
    return torch.clamp(x, *(b.item() if isinstance(b, torch.Tensor) else b for b in bounds))


def _cast(call: Call) -> Result:
    return call.tensor(0).to(torch_type(call.attribute("to"), call))


def _cast_like(call: Call) -> Result:
    return call.tensor(0).to(call.value(1).dtype)


def _gelu(call: Call) -> Result:
    return functional.gelu(call.tensor(0), approximate=call.attribute("approximate", "none"))


def _prelu(call: Call) -> Result:
    x, slope = call.tensor(0), call.tensor(1)
    return torch.where(x < 0, x * slope, x)


def _hard_sigmoid(call: Call) -> Result:
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    return torch.clamp(call.tensor(0) * alpha + beta, 0.0, 1.0)


def _softmax(function: Callable[..., torch.Tensor]) -> Operator:
    def run(call: Call) -> Result:
        x = call.tensor(0)
        if call.node.version >= 13:
            return function(x, dim=call.attribute("axis", -1))
        # before version 13 everything from the axis on is one dimension
        axis = call.attribute("axis", 1) % x.dim()
        return function(x.flatten(axis), dim=-1).reshape(x.shape)

    return run


def _quantize(call: Call) -> Result:
    x, scale, zero = _quantization(call)
    kind = call.value(2).dtype if call.has(2) else torch.uint8
    limits = torch.iinfo(kind)
    return torch.clamp(torch.round(x / scale) + zero, limits.min, limits.max).to(kind)


def _dequantize(call: Call) -> Result:
    x, scale, zero = _quantization(call)
    return (x.to(scale.dtype) - zero) * scale


def _quantization(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, scale = call.tensor(0), call.tensor(1)
    if scale.dim() > 1 or call.attribute("block_size", 0):
        raise call.error("quantises in blocks, which is not supported")
    zero = call.tensor(2).to(scale.dtype) if call.has(2) else torch.zeros_like(scale)
    if scale.dim() == 1 and scale.shape[0] > 1:
        shape = [1] * x.dim()
        shape[call.attribute("axis", 1)] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return x, scale, zero


def _where(call: Call) -> Result:
    return torch.where(call.tensor(0), call.tensor(1), call.tensor(2))


ELEMENTWISE: Table = {
    **{
        name: _unary(getattr(torch, name.lower()))
        for name in (
            *("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "IsNaN", "Log", "Neg", "Reciprocal"),
            *("Relu", "Round", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Tan", "Tanh", "Atan"),
        )
    },
    "Not": _unary(torch.logical_not),
    "Identity": lambda call: call.value(0),
    "Dropout": lambda call: [call.value(0), *[None] * (call.node.results - 1)],
    "Softplus": _unary(functional.softplus),
    "Softsign": _unary(functional.softsign),
    "HardSwish": _unary(functional.hardswish),
    "Mish": _unary(functional.mish),
    "Swish": lambda call: (
        call.tensor(0) * torch.sigmoid(call.tensor(0) * call.attribute("alpha", 1.0))
    ),
    "Elu": lambda call: functional.elu(call.tensor(0), call.attribute("alpha", 1.0)),
    "Celu": lambda call: functional.celu(call.tensor(0), call.attribute("alpha", 1.0)),
    "Selu": _unary(functional.selu),
    "LeakyRelu": lambda call: functional.leaky_relu(call.tensor(0), call.attribute("alpha", 0.01)),
    "HardSigmoid": _hard_sigmoid,
    "PRelu": _prelu,
    "Gelu": _gelu,
    "Clip": _clip,
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Add": _binary(operator.add),
    "Sub": _binary(operator.sub),
    "Mul": _binary(operator.mul),
    "Div": _binary(_divide),
    "Pow": _binary(operator.pow),
    "Mod": _modulo,
    "Sum": _folded(torch.add),
    "Mean": _mean,
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "And": _logical(torch.logical_and),
    "Or": _logical(torch.logical_or),
    "Xor": _logical(torch.logical_xor),
    "Equal": _binary(operator.eq),
    "Greater": _binary(operator.gt),
    "GreaterOrEqual": _binary(operator.ge),
    "Less": _binary(operator.lt),
    "LessOrEqual": _binary(operator.le),
    "Where": _where,
    "Cast": _cast,
    "CastLike": _cast_like,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
}


def _host_cast(call: Call) -> Value:
    kind = torch_type(call.attribute("to"), call)
    source = call.value(0).dtype
    if kind == torch.bool:
        convert: Callable[[Any], Any] = bool
    elif kind.is_floating_point:
        convert = symbolic_float
    elif source.is_floating_point:
        convert = _truncated
    else:
        convert = symbolic_int
    return on_host(convert, kind)(call)  # type: ignore[return-value]


def _truncated(value: Any) -> Any:
    return symbolic_int(value) if isinstance(value, torch.SymFloat) else math.trunc(value)


def _host_divide(call: Call) -> Result:
    # ONNX truncates; sizes are never negative, so this is the floor
    whole = not call.value(0).dtype.is_floating_point
    return on_host(operator.floordiv if whole else operator.truediv)(call)


def _host_where(condition: Any, left: Any, right: Any) -> Any:
    return left if bool(condition) else right


def _choose(call: Call) -> Result:
    return on_host(_host_where, call.value(1).dtype)(call)


HOST_ELEMENTWISE: Table = {
    "Add": on_host(operator.add),
    "Sub": on_host(operator.sub),
    "Mul": on_host(operator.mul),
    "Div": _host_divide,
    "Mod": on_host(operator.mod),
    "Neg": on_host(operator.neg),
    "Abs": on_host(abs),
    "Sqrt": on_host(square_root),
    "Floor": on_host(math.floor),
    "Ceil": on_host(math.ceil),
    "Min": on_host(torch.sym_min),
    "Max": on_host(torch.sym_max),
    "Equal": on_host(operator.eq, torch.bool),
    "Greater": on_host(operator.gt, torch.bool),
    "GreaterOrEqual": on_host(operator.ge, torch.bool),
    "Less": on_host(operator.lt, torch.bool),
    "LessOrEqual": on_host(operator.le, torch.bool),
    "Not": on_host(lambda item: not bool(item), torch.bool),
    "And": on_host(lambda left, right: bool(left) and bool(right), torch.bool),
    "Or": on_host(lambda left, right: bool(left) or bool(right), torch.bool),
    "Where": _choose,
    "Cast": _host_cast,
}
