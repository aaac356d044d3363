"""Torch's SGD, Adam and AdamW with the update of all parameters in one native pass.

The values, the groups and the state are torch's, so that checkpoints are the same. What the kernel
does not take (other types, tensors with gaps, steps that differ) goes through torch's own update.
"""

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suanli.training import sgd
from suanli.training.native.library import kernels

SOURCE = Path(__file__).with_name("update.c")
_ALONE = 1 << 14  # elements up to which a second thread takes longer to start
_Group = dict[str, Any]
_Tensors = Sequence[Tensor]
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class Update(ctypes.Structure):
    """The argument of `suanli_update`."""

    _fields_ = (
        *((name, _POINTER) for name in ("weights", "gradients", "averages", "squares", "counts")),
        *((name, _LONG) for name in ("tensors", "total")),
        *((name, _INT) for name in ("nesterov", "first", "threads")),
        *((name, _FLOAT) for name in ("rate", "momentum", "decay", "kept")),
        *((name, _FLOAT) for name in ("beta1", "beta2", "eps", "root")),
    )


class OnePass(torch.optim.Optimizer):
    """An optimiser of torch's whose update can be one pass.

    Raises:
        MissingBackendError: There is no C compiler.
        CompilerError: It cannot build the kernel.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _kernel()

    def update(self) -> None:
        """One step, as `step` has it, without hooks and without a closure."""
        groups = self.param_groups
        for group in groups:
            if self._in_one_pass(group):
                continue
            self.param_groups = [group]
            try:
                self.step()
            finally:
                self.param_groups = groups

    def _in_one_pass(self, group: _Group) -> bool:
        """Update a group; False, and nothing done, where the kernel does not take it."""
        trained = [p for p in group["params"] if p.grad is not None]
        if not trained:
            return True
        if group["maximize"] or isinstance(group["lr"], Tensor):
            return False
        if not self._updated(group, trained, [p.grad for p in trained]):
            return False
        torch.autograd.graph.increment_version(trained)
        return True

    def _updated(self, group: _Group, trained: _Tensors, gradients: _Tensors) -> bool:
        """Run the kernel on these parameters; False, and nothing done, where it does not fit."""
        raise NotImplementedError


class SGD(OnePass, sgd.SGD):
    """`torch.optim.SGD` in one pass."""

    def _updated(self, group: _Group, trained: _Tensors, gradients: _Tensors) -> bool:
        if group["dampening"]:
            return False
        buffers: list[Tensor] = []
        first = False
        if group["momentum"]:
            held = [self.state[p].get("momentum_buffer") for p in trained]
            first = all(buffer is None for buffer in held)
            if first:
                held = [torch.empty_like(p) for p in trained]
            buffers = [buffer for buffer in held if buffer is not None]
            if len(buffers) < len(trained):
                return False
        if not _fits(trained, gradients, buffers):
            return False
        record = _record(trained, gradients, (buffers, []))
        record.nesterov, record.first = bool(group["nesterov"]), first
        record.rate, record.momentum = float(group["lr"]), group["momentum"]
        record.decay, record.kept = group["weight_decay"], 1.0
        _run(record)
        if first:
            for parameter, buffer in zip(trained, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer
        return True


class Adam(OnePass, torch.optim.Adam):
    """`torch.optim.Adam`, or AdamW where `decoupled_weight_decay` is set, in one pass."""

    def _updated(self, group: _Group, trained: _Tensors, gradients: _Tensors) -> bool:
        if group["amsgrad"]:
            return False
        states = [self.state[p] for p in trained]
        if any("step" not in state for state in states):
            return False  # torch makes them
        averages = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        steps = [state["step"] for state in states]
        step = float(steps[0]) + 1.0
        if not _fits(trained, gradients, averages, squares):
            return False
        if any(float(other) + 1.0 != step for other in steps[1:]):
            return False
        torch._foreach_add_(steps, 1.0)
        beta1, beta2 = map(float, group["betas"])
        rate, decay = float(group["lr"]), float(group["weight_decay"])
        apart = bool(group.get("decoupled_weight_decay"))
        record = _record(trained, gradients, (averages, squares))
        record.rate = rate / (1.0 - beta1**step)
        record.root = (1.0 - beta2**step) ** -0.5
        record.decay, record.kept = 0.0 if apart else decay, 1.0 - rate * decay if apart else 1.0
        record.beta1, record.beta2, record.eps = beta1, beta2, group["eps"]
        _run(record)
        return True


def _fits(trained: Sequence[Tensor], *others: Sequence[Tensor]) -> bool:
    """Whether all are fp32 on the CPU, and lie in memory as their parameter does, without gaps.

    A state that was loaded may be of another shape: torch compares counts only.
    """
    for parameter, *rest in zip(trained, *filter(None, others), strict=True):
        dense = parameter.is_contiguous() or (
            parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
        )
        plain = type(parameter) in (Tensor, torch.nn.Parameter)  # a share of one is none
        if not (plain and dense and parameter.is_cpu and parameter.dtype == torch.float32):
            return False
        shape, stride = parameter.shape, parameter.stride()
        for tensor in rest:
            if tensor.dtype != torch.float32 or tensor.layout != torch.strided:
                return False
            if tensor.shape != shape or tensor.stride() != stride or not tensor.is_cpu:
                return False
    return True


def _record(
    trained: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> Update:
    """What the kernel is told of the tensors; the arrays live as long as the record."""
    count = len(trained)
    pointers, longs = _POINTER * count, _LONG * count
    sizes = [p.numel() for p in trained]
    total = sum(sizes)
    arrays = [
        pointers(*(tensor.data_ptr() for tensor in tensors)) if tensors else None
        for tensors in (trained, gradients, *states)
    ]
    counts = longs(*sizes)
    weights, slopes, averages, squares = (
        ctypes.cast(array, _POINTER) if array is not None else None for array in arrays
    )
    made = Update(
        weights=weights,
        gradients=slopes,
        averages=averages,
        squares=squares,
        counts=ctypes.cast(counts, _POINTER),
        tensors=count,
        total=total,
        threads=1 if total <= _ALONE else torch.get_num_threads(),
    )
    made.held = (arrays, counts)
    return made


def _run(record: Update) -> None:
    # a profile sees operators of torch's only
    seen = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    with torch.profiler.record_function("suanli::update") if seen else nullcontext():
        _kernel()(ctypes.byref(record))


@cache
def _kernel() -> Any:
    return kernels(SOURCE, {"suanli_update": (Update,)}).suanli_update
