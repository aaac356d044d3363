"""The row "narrow-cnn" of the kernel table: convolutions of few channels with our own kernels."""

from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.native.library import library
from suanli.training.twin import hooked, replace_children, twin_of
from suanli.workloads.record import Workload

_FEW = 16  # output channels, from where a library's blocks are full


def narrow_cnn(model: nn.Module, plan: TrainPlan) -> nn.Module:
    """A twin of the model that shares its parameters and buffers and convolves with the kernels.

    Args:
        model: With convolutions of few channels in it; it is not changed.
        plan: On the CPU, in fp32, contiguous.

    Raises:
        BadInputError: The plan computes in another way, or nothing in the model fits.
        MissingBackendError: There is no C compiler.
        CompilerError: It cannot build the kernels.
    """
    if (plan.kind, plan.precision, plan.memory_layout) != ("cpu", "fp32", "contiguous"):
        raise BadInputError("narrow-cnn computes on the CPU in fp32, contiguous")
    library()
    twin = twin_of(model)
    if not sum(replace_children(module, _narrow) for module in list(twin.modules())):
        raise BadInputError("narrow-cnn finds no convolution of few channels in this model")
    return twin


def suits_narrow_cnn(model: nn.Module, workload: Workload | None = None) -> bool:
    """Whether there is a convolution in the model that the kernels compute."""
    return any(map(_is_narrow, model.modules()))


class NarrowConv2d(nn.Module):
    """A convolution of few channels; what is not fp32 goes to the layer itself.

    Args:
        layer: What it takes the place of.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        """[B, I, H, W] -> fp32 [B, O, H', W']."""
        from suanli.training.native.narrow import narrow_conv2d

        layer = self.layer
        padding = cast(tuple[int, int], layer.padding)[0]
        small = min(images.shape[-2:]) + 2 * padding < layer.kernel_size[0]
        both = images.dtype is layer.weight.dtype is torch.float32
        if not both or images.dim() != 4 or small or not len(images):
            return cast(Tensor, layer(images))
        return cast(Tensor, narrow_conv2d(images, layer.weight, layer.bias, padding))


def _narrow(layer: nn.Module) -> NarrowConv2d | None:
    return NarrowConv2d(layer) if _is_narrow(layer) else None


def _is_narrow(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution of stride 1, a small square kernel and few outputs, no hooks."""
    from suanli.training.native.narrow import MOST_COLUMNS

    return (
        type(layer) is nn.Conv2d
        and layer.out_channels <= _FEW
        and layer.kernel_size[0] == layer.kernel_size[1] <= MOST_COLUMNS
        and layer.stride == (1, 1)
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and isinstance(layer.padding, tuple)
        and layer.padding[0] == layer.padding[1] < layer.kernel_size[0]
        and not hooked(layer)
    )
