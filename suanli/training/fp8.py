"""Linear layers whose products run in 8-bit floats, forward and backward, scaled per tensor.

Inputs and weights become e4m3, gradients of outputs e5m2, which has the range that they need: the
recipe of Micikevicius et al., "FP8 formats for deep learning" (2022). The scale of each tensor is
that of its own largest value, found anew in every step. Sums are kept in fp32 by the hardware,
results are bf16, and weights stay fp32. The last linear layer, which makes the answer, is left out.

Unverified on a GPU; PyTorch's CPU build runs the same operator, without a gain.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.headless import last_linear
from suanli.training.twin import hooked, replace_module, twin_of

_FORWARD, _BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_MULTIPLE = 16  # of all sizes of a product: torch._scaled_mm on GPUs takes no others
_TINY = 1e-12


def fp8_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model that run in fp8, by name."""
    last = last_linear(model)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name
        and not hooked(module)
        and (last is None or name != last[0])
        and module.in_features % _MULTIPLE == 0
        and module.out_features % _MULTIPLE == 0
    }


def fp8_products(model: nn.Module) -> nn.Module:
    """A twin of the model whose linear layers multiply in fp8.

    Raises:
        BadInputError: It has none that could.
    """
    return _with_layers(model, Fp8Linear)


def emulated_products(model: nn.Module, plan: TrainPlan) -> nn.Module:
    """A twin that only rounds to fp8 and multiplies in fp32: what fp8 costs in accuracy.

    Raises:
        BadInputError: It has no layer that could run in fp8.
    """
    return _with_layers(model, EmulatedLinear)


def _with_layers(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    twin = twin_of(model)
    layers = fp8_layers(twin)
    if not layers:
        raise BadInputError(
            "no linear layer of this model can run in fp8: sizes must be multiples of 16, and the "
            "last layer is left out"
        )
    for name, layer in layers.items():
        replace_module(twin, name, make(layer))
    return twin


class _LowLinear(nn.Module):
    """A linear layer whose products are made in another way, in bf16.

    Args:
        layer: Whose weight and bias are used.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] -> bf16 […, out]; rows that are no multiple of 16 are left to the layer."""
        rows = x.flatten(0, -2)
        if len(rows) % _MULTIPLE:
            return self.layer(x)  # type: ignore[no-any-return]
        made = self._product(rows)
        if self.layer.bias is not None:
            made = made + self.layer.bias.to(made.dtype)
        return made.reshape(*x.shape[:-1], made.shape[-1])

    def _product(self, rows: Tensor) -> Tensor:
        """[rows, in] -> bf16 [rows, out]."""
        raise NotImplementedError


class Fp8Linear(_LowLinear):
    """A linear layer whose three products run in fp8."""

    def _product(self, rows: Tensor) -> Tensor:
        made: Tensor = _Products.apply(rows, self.layer.weight)  # type: ignore[no-untyped-call]
        return made


class _Products(torch.autograd.Function):
    """x [rows, in] times weight.T, weight [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (low_x, scale_x), (low_weight, scale_weight) = _low(x, _FORWARD), _low(weight, _FORWARD)
        ctx.save_for_backward(low_x, scale_x, low_weight, scale_weight)
        ctx.dtypes = x.dtype, weight.dtype
        return _multiply(low_x, low_weight.t(), scale_x, scale_weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        low_x, scale_x, low_weight, scale_weight = ctx.saved_tensors
        low, scale = _low(gradients[0], _BACKWARD)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _multiply(low, _by_columns(low_weight), scale, scale_weight).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            turned = low.t().contiguous()
            of_weight = _multiply(turned, _by_columns(low_x), scale, scale_x).to(ctx.dtypes[1])
        return of_x, of_weight


def _low(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix in fp8, row by row in memory, and the fp32 factor that brings it back."""
    highest = torch.finfo(dtype).max
    factor = tensor.detach().abs().amax().float().clamp_min(_TINY) / highest
    low = (tensor.float() / factor).clamp(-highest, highest).to(dtype)
    return low.contiguous(), factor


def _by_columns(low: Tensor) -> Tensor:
    """The same matrix, column by column in memory, as the second factor of a product must be."""
    return low.t().contiguous().t()


def _multiply(one: Tensor, other: Tensor, scale: Tensor, other_scale: Tensor) -> Tensor:
    made: Tensor = torch._scaled_mm(
        one, other, scale_a=scale, scale_b=other_scale, out_dtype=torch.bfloat16
    )
    return made


class EmulatedLinear(_LowLinear):
    """What `Fp8Linear` should compute, by rounding to fp8 and back in plain operators."""

    def _product(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            rounded = _Round.apply(rows.float(), _FORWARD)  # type: ignore[no-untyped-call]
            weight = _Round.apply(self.layer.weight, _FORWARD)  # type: ignore[no-untyped-call]
            made = functional.linear(rounded, weight)
            result: Tensor = _RoundGradient.apply(made).bfloat16()  # type: ignore[no-untyped-call]
            return result


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    factor = torch.finfo(dtype).max / tensor.abs().max().clamp_min(_TINY)
    rounded: Tensor = (tensor * factor).to(dtype).to(tensor.dtype) / factor
    return rounded


class _Round(torch.autograd.Function):
    """Rounds forward and lets gradients through."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return _rounded(tensor, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _RoundGradient(torch.autograd.Function):
    """Lets values through and rounds their gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _rounded(gradients[0], _BACKWARD)
