"""What a person's model and example inputs must be, said before anything is measured for them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from suanli.base.errors import BadInputError, CaptureError
from suanli.workloads.record import Inputs, Workload

_WRAPPERS = ("_orig_mod", "module")  # of torch.compile, and of torch's data parallel ones


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside what `torch.compile`, `DataParallel` and the like put around it.

    The wrapper hides the batch from capture, and a baseline that is compiled is no eager one.
    """
    dynamo = getattr(torch, "_dynamo", None)
    kinds: tuple[type, ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if dynamo is not None and hasattr(dynamo, "OptimizedModule"):
        kinds += (dynamo.OptimizedModule,)
    while isinstance(model, kinds):
        model = next(model._modules[name] for name in _WRAPPERS if name in model._modules)  # type: ignore[assignment]
    return model


def admitted(workload: Workload, batch: int) -> nn.Module:
    """The workload's model, once it is clear that it can be computed and compared here.

    A prediction needs less: there the model may be without values, and of any type.

    Args:
        workload: What is to be optimised.
        batch: The one that is asked for, which may be the only one that it takes.

    Raises:
        CaptureError: It is TorchScript.
        BadInputError: The model or its inputs have no values, or it is not in fp32.
    """
    model = unwrapped(workload.make_model())
    _check_model(model, workload.name)
    inputs = workload.make_inputs(2 if workload.dynamic_batch else batch)
    check_inputs(inputs)
    if any(tensor.is_meta for tensor in tensors_in(inputs)):
        raise BadInputError(
            "the example inputs are on the meta device and have no values",
            next_step="give tensors on the CPU",
        )
    kind = other_precision(model, inputs)
    if kind is not None:
        raise BadInputError(
            f"{workload.name} is in {_short(kind)}; Suanli takes it in float32, which all is "
            "measured against, and chooses the precision itself",
            next_step="give model.float() and inputs in float32",
        )
    return model


def _check_model(model: nn.Module, name: str) -> None:
    """Refuse a module that nothing can be found out about.

    Raises:
        CaptureError: It is TorchScript, which has no Python code to capture.
        BadInputError: Its weights have no values.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{name} is TorchScript, which cannot be captured",
            next_step="give the nn.Module that it was made of, or its ONNX",
        )
    without = [key for key, weight in _weights(model) if weight.is_meta]
    if without:
        raise BadInputError(
            f"{name} has no values: {without[0]} is on the meta device",
            next_step="make it on the CPU, or model.to_empty(device='cpu') and load its weights",
        )


def check_inputs(inputs: Inputs, origin: str = "the example inputs") -> None:
    """Refuse example inputs that no plan can be run on.

    Raises:
        BadInputError: One holds no sample, or is sparse.
    """
    for tensor in tensors_in(inputs):
        shape = list(tensor.shape)
        if tensor.layout is not torch.strided:
            raise BadInputError(
                f"{origin} hold a tensor of layout {_short(tensor.layout)} {shape}; engines take "
                "dense ones",
                next_step="give x.to_dense(), and make it sparse in forward",
            )
        if tensor.dim() and tensor.shape[0] == 0:
            raise BadInputError(
                f"{origin} hold no sample: a tensor is {shape}",
                next_step="give at least one sample; the first dimension is the batch",
            )


def other_precision(model: nn.Module, inputs: Inputs) -> torch.dtype | None:
    """The floating-point type that a model works in where it is not fp32; None where it is.

    That of its parameters; without any, that of its inputs.
    """
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    own = own or {t.dtype for t in tensors_in(inputs) if t.is_floating_point()}
    return min(own - {torch.float32}, key=str, default=None)


def in_fp32(
    make_inputs: Callable[[int], Inputs], precision: torch.dtype
) -> Callable[[int], Inputs]:
    """The same inputs for a model that was cast to fp32: what had its precision has fp32 too."""

    def cast(leaf: Any) -> Any:
        own = isinstance(leaf, torch.Tensor) and leaf.dtype == precision
        return leaf.float() if own else leaf

    def make(batch: int) -> Inputs:
        made = make_inputs(batch)
        args, kwargs = pytree.tree_map(cast, (tuple(made.args), dict(made.kwargs)))
        return Inputs(args=args, kwargs=kwargs)

    return make


def tensors_in(inputs: Inputs) -> list[torch.Tensor]:
    """The tensors of a call, in flat order."""
    leaves = pytree.tree_leaves((tuple(inputs.args), dict(inputs.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _weights(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
