"""The articles' Keras programs as Keras models, to compare with the torch ones."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from suanli.base.errors import BadInputError
from suanli.workloads.importers.keras import need_keras

# filters and whether a max-pool follows, units of the hidden layer, activation of the last
_PROGRAMS: dict[str, tuple[tuple[int, int, int], tuple[tuple[int, bool], ...], int, str | None]] = {
    "mnist-cnn": ((28, 28, 1), ((32, True), (64, True), (64, False)), 64, "softmax"),
    "mnist-cnn-small": ((28, 28, 1), ((32, True),), 128, None),
    "cifar10-cnn": ((32, 32, 3), ((32, True), (64, True), (64, False)), 64, None),
}


def keras_names() -> list[str]:
    """Names of the built-in workloads that were written in Keras."""
    return list(_PROGRAMS)


def keras_model(name: str) -> Any:
    """Build one of them as a `keras.Sequential`: [B, H, W, C] -> [B, 10].

    Raises:
        BadInputError: That one was not written in Keras.
        MissingBackendError: Keras 3 is absent.
    """
    if name not in _PROGRAMS:
        raise BadInputError(f"{name} is no Keras program", next_step=", ".join(_PROGRAMS))
    keras = need_keras()
    shape, convolutions, hidden, last = _PROGRAMS[name]
    layers: list[Any] = [keras.Input(shape)]
    for filters, pooled in convolutions:
        layers.append(keras.layers.Conv2D(filters, 3, activation="relu"))
        if pooled:
            layers.append(keras.layers.MaxPooling2D(2))
    layers.append(keras.layers.Flatten())
    layers.append(keras.layers.Dense(hidden, activation="relu"))
    layers.append(keras.layers.Dense(10, activation=last))
    return keras.Sequential(layers, name=name.replace("-", "_"))


def copy_to_keras(model: nn.Module, target: Any) -> None:
    """Give a Keras program the weights of the torch network of the same name.

    Keras keeps channels last: kernels are [H, W, in, out], and the features that a dense layer sees
    behind a flattening come in another order.

    Raises:
        ValueError: The two are not the same network.
    """
    sources = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    targets = [layer for layer in target.layers if layer.weights]
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} layers with weights beside {len(targets)}")
    channels = 0
    for source, layer in zip(sources, targets, strict=True):
        bias = _array(source.bias)
        if isinstance(source, nn.Conv2d):
            layer.set_weights([_array(source.weight).transpose(2, 3, 1, 0), bias])
            channels = source.out_channels
        else:
            layer.set_weights([_dense(_array(source.weight), channels), bias])
            channels = 0  # only the first one stands behind pictures


def _dense(weight: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    if not channels:
        return weight.T
    outputs, features = weight.shape
    side = round((features // channels) ** 0.5)
    planes = weight.reshape(outputs, channels, side, side)
    return planes.transpose(2, 3, 1, 0).reshape(features, outputs)


def _array(tensor: torch.Tensor | None) -> NDArray[np.float32]:
    if tensor is None:
        raise ValueError("a layer without bias")
    array: NDArray[np.float32] = tensor.detach().numpy()
    return array
