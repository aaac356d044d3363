"""Operators that reduce over axes, and those that search along one."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch

from suanli.workloads.importers.onnx_value import Call, Operator, Result, Table, Value, host_array

Reduction = Callable[[torch.Tensor, list[int], bool], torch.Tensor]


def _reduction(function: Reduction) -> Operator:
    def run(call: Call) -> Result:
        x, axes = call.tensor(0), call.axes(1)
        if not axes:
            if call.attribute("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.dim()))
        return function(x, axes, bool(call.attribute("keepdims", 1)))

    return run


def _product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keep)
    return x


def _arg(function: Callable[..., torch.Tensor]) -> Operator:
    def run(call: Call) -> Result:
        if call.attribute("select_last_index", 0):
            raise call.error("asks for the last of equal ones, which is not supported")
        keep = bool(call.attribute("keepdims", 1))
        return function(call.tensor(0), call.attribute("axis", 0), keep)

    return run


def _top_k(call: Call) -> Result:
    values, indices = torch.topk(
        call.tensor(0),
        call.numbers(1)[0],
        dim=call.attribute("axis", -1),
        largest=bool(call.attribute("largest", 1)),
        sorted=bool(call.attribute("sorted", 1)),
    )
    return [values, indices]


def _cumulative(call: Call) -> Result:
    if call.attribute("exclusive", 0) or call.attribute("reverse", 0):
        raise call.error("is exclusive or reversed, which is not supported")
    return torch.cumsum(call.tensor(0), int(call.numbers(1)[0]))


REDUCTIONS: Table = {
    "ReduceMean": _reduction(torch.mean),
    "ReduceSum": _reduction(torch.sum),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMin": _reduction(torch.amin),
    "ReduceProd": _reduction(_product),
    "ReduceL1": _reduction(lambda x, axes, keep: torch.sum(torch.abs(x), axes, keep)),
    "ReduceL2": _reduction(lambda x, axes, keep: torch.sqrt(torch.sum(x * x, axes, keep))),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: torch.sum(x * x, axes, keep)),
    "ReduceLogSumExp": _reduction(torch.logsumexp),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "TopK": _top_k,
    "CumSum": _cumulative,
}


def _host_fold(function: Callable[[Any, Any], Any]) -> Operator:
    def run(call: Call) -> Result:
        value = call.value(0)
        assert value.host is not None
        if value.host.ndim > 1 or value.host.size == 0:
            raise call.error("reduces a shape of more than one dimension, which is not supported")
        folded = functools.reduce(function, value.host.ravel())
        shape = (1,) * value.host.ndim if call.attribute("keepdims", 1) else ()
        return Value(host=host_array([folded], shape), dtype=value.dtype)

    return run


HOST_REDUCTIONS: Table = {
    "ReduceProd": _host_fold(operator.mul),
    "ReduceSum": _host_fold(operator.add),
    "ReduceMax": _host_fold(torch.sym_max),
    "ReduceMin": _host_fold(torch.sym_min),
}
