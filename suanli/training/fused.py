"""The row "fused-cnn" of the table of kernels: a convolutional network with kernels of our own.

In every `nn.Sequential` of the model, runs of [max-pool 2x2] - batch norm - [ReLU, GELU or SiLU]
become one operator, other activations one each. Everywhere, convolutions of stride 1 become one
whose weight gradient is fp32, together with the pool and the activation behind them where there is
no norm in between, and batch norms on their own become one, together with the shortcut and the
activation that a residual block's `forward` puts behind them (see `fused_blocks`).
Everything else stays as it is, layers with hooks of their own among it. The parameters and buffers
stay the model's own.
"""

from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.activations import activation_kind, fused_activation
from suanli.training.fused_blocks import join_blocks
from suanli.training.native.library import BLOCK, KINDS, library
from suanli.training.twin import hooked, replace_children, twin_of
from suanli.workloads.record import Workload

_MONOTONE = ("identity", "relu")  # a largest value stays the largest


def fused_cnn(model: nn.Module, plan: TrainPlan) -> nn.Module:
    """A twin of the model that shares its parameters and buffers and computes with the kernels.

    Args:
        model: With sequences of layers in it; it is not changed.
        plan: On the CPU, in bf16, channels last, fp32 weights.

    Raises:
        BadInputError: The plan computes in another way, or nothing in the model fits.
        MissingBackendError: There is no C compiler.
        CompilerError: It cannot build the kernels.
    """
    if (plan.kind, plan.precision, plan.weights, plan.memory_layout) != (
        *("cpu", "bf16", "fp32", "channels_last"),
    ):
        raise BadInputError(
            "fused-cnn computes on the CPU in bf16, channels last, with fp32 weights"
        )
    library()
    twin = twin_of(model)
    count = sum(
        _fuse(module) if isinstance(module, nn.Sequential) else replace_children(module, _fused)
        for module in list(twin.modules())
    )
    twin = join_blocks(twin)
    if not count:
        raise BadInputError("fused-cnn finds no layer in this model that it could compute")
    return twin


def suits_fused_cnn(model: nn.Module, workload: Workload | None = None) -> bool:
    """Whether there is a batch norm or a convolution in the model that the kernels compute."""
    return any(
        _normalises(layer) or (_is_plain(layer) and layer.out_channels % BLOCK == 0)
        for layer in model.modules()
    )


class FusedConv2d(nn.Module):
    """Convolution - [2x2 max-pool] - [activation], of stride 1 in bf16 with fp32 weight gradients.

    Args:
        layer: What it takes the place of.
    """

    takes_shortcut = False

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.pool: nn.Module | None = None
        self.activation: nn.Module | None = None
        self._kind = "identity"

    def joins(self, layer: nn.Module) -> bool:
        """Take in a pool or an activation; a pool behind a ReLU is one before it."""
        if self.layer.out_channels % BLOCK:
            return False
        if _pools_by_two(layer) and self.pool is None and self._kind in _MONOTONE:
            self.pool = layer
        elif activation_kind(layer) not in ("", "identity") and self.activation is None:
            self.activation, self._kind = layer, activation_kind(layer)
        else:
            return False
        return True

    def forward(self, images: Tensor) -> Tensor:
        """[B, I, H, W] -> bf16 [B, O, H', W']."""
        from suanli.training.native.behind import bias_act
        from suanli.training.native.convolution import conv2d

        layer, pooled = self.layer, self.pool is not None
        padding = cast(tuple[int, int], layer.padding)[0]
        if not pooled and self.activation is None:
            return cast(Tensor, conv2d(images, layer.weight, layer.bias, padding))
        result = conv2d(images, layer.weight, None, padding)
        if pooled and min(result.shape[2:]) < 2:
            raise ValueError(f"a 2x2 max-pool of images of {tuple(result.shape[2:])}")
        return cast(Tensor, bias_act(result, layer.bias, pooled, KINDS[self._kind])[0])


class FusedNorm(nn.Module):
    """[2x2 max-pool] - batch norm - [+ shortcut] - [activation], with the batch's statistics.

    In evaluation mode, or on a tensor that the kernels do not take, the layers do it themselves.

    Args:
        pool: The max-pool before the norm, or None.
        norm: The batch norm; its running statistics are kept up as it would.
        activation: What comes behind, or None.
    """

    def __init__(
        self, pool: nn.MaxPool2d | None, norm: nn.BatchNorm2d, activation: nn.Module | None
    ) -> None:
        super().__init__()
        self.pool, self.norm, self.activation = pool, norm, activation
        self.takes_shortcut = pool is None and activation is None
        self._kind = KINDS[activation_kind(activation)]

    def joins(self, layer: nn.Module) -> bool:
        """Take in an activation, if there is none so far."""
        if self.activation is not None or activation_kind(layer) in ("", "identity"):
            return False
        self.activation, self._kind = layer, KINDS[activation_kind(layer)]
        return True

    def forward(self, images: Tensor, added: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> the same, or half the size with a pool.

        Args:
            images: What is normalised.
            added: A shortcut of the result's shape, added before the activation; not with a pool.
        """
        from suanli.training.native.operators import fits, norm_act

        norm = self.norm
        large_enough = self.pool is None or min(images.shape[2:]) >= 2
        like = added is None or (fits(added) and added.shape == images.shape)
        if not (norm.training and fits(images) and large_enough and like):
            return self._layers(images, added)
        result, mean, variance, *_ = norm_act(
            *(images, norm.weight, norm.bias, added),
            *(self.pool is not None, self._kind, norm.eps),
        )
        self._keep_up(mean, variance, result.numel() // result.shape[1])
        return cast(Tensor, result)

    def _layers(self, images: Tensor, added: Tensor | None) -> Tensor:
        if self.pool is not None:
            images = self.pool(images)
        result = cast(Tensor, self.norm(images))
        if added is not None:
            result = result + added
        return result if self.activation is None else cast(Tensor, self.activation(result))

    @torch.no_grad()
    def _keep_up(self, mean: Tensor, variance: Tensor, count: int) -> None:
        norm = self.norm
        if norm.running_mean is None or norm.running_var is None:
            return
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        share = norm.momentum
        if share is None:
            assert norm.num_batches_tracked is not None
            share = 1.0 / float(norm.num_batches_tracked)
        norm.running_mean.lerp_(mean, share)
        # what is kept is the unbiased estimate
        norm.running_var.lerp_(variance * (count / max(1, count - 1)), share)


def _fuse(sequence: nn.Sequential) -> int:
    """Put the kernels into a sequence; gives how many layers were fused."""
    layers = list(sequence)
    made: list[nn.Module] = []
    count = position = 0
    while position < len(layers):
        taken = layers[position : position + 3]
        pool = taken[0] if _pools_by_two(taken[0]) else None
        rest = taken[1:] if pool is not None else taken
        if rest and _normalises(rest[0]):
            norm = FusedNorm(cast(nn.MaxPool2d | None, pool), cast(nn.BatchNorm2d, rest[0]), None)
            norm.takes_shortcut = False
            after = len(rest) > 1 and norm.joins(rest[1])
            made.append(norm)
            position += 1 + (pool is not None) + after
            count += 1
            continue
        layer = layers[position]
        position += 1
        if _is_plain(layer):
            layer = FusedConv2d(layer)
            while position < len(layers) and not _normalised_next(layers, position):
                if not layer.joins(layers[position]):
                    break
                position += 1
            count += 1
        made.append(fused_activation(layer) or layer)
    if [id(layer) for layer in made] != [id(layer) for layer in layers]:
        for name in list(sequence._modules):  # a layer that is used twice has two names
            delattr(sequence, name)
        for position, layer in enumerate(made):
            sequence.add_module(str(position), layer)
    return count


def _fused(layer: nn.Module) -> nn.Module | None:
    """What takes the place of a layer on its own, if anything does."""
    if _is_plain(layer):
        return FusedConv2d(layer)
    return FusedNorm(None, cast(nn.BatchNorm2d, layer), None) if _normalises(layer) else None


def _pools_by_two(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.MaxPool2d) or layer.return_indices or layer.ceil_mode:
        return False
    if hooked(layer):
        return False
    return (
        layer.kernel_size in (2, (2, 2))
        and layer.stride in (2, (2, 2))
        and layer.padding in (0, (0, 0))
        and layer.dilation in (1, (1, 1))
    )


def _normalised_next(layers: list[nn.Module], position: int) -> bool:
    """Whether what comes next belongs to a norm: it, or a pool before it."""
    after = position + 1 if _pools_by_two(layers[position]) else position
    return after < len(layers) and _normalises(layers[after])


def _normalises(layer: nn.Module) -> bool:
    right = type(layer) is nn.BatchNorm2d and layer.num_features % BLOCK == 0
    return right and not hooked(layer)


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution of stride 1 with equal padding of zeros."""
    return (
        type(layer) is nn.Conv2d
        and layer.stride == (1, 1)
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and isinstance(layer.padding, tuple)
        and layer.padding[0] == layer.padding[1]
        and not hooked(layer)
    )
