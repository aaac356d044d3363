"""The benchmark's networks in Keras, layer by layer as they stand in torch."""

from typing import Any

from suanli.training.recipe import Recipe


def network(name: str) -> Any:
    """A Keras model of the network; all but mnist-cnn end in logits.

    Raises:
        KeyError: It is not written down here.
    """
    makers = {
        "mnist-cnn": _mnist_cnn,
        "mnist-cnn-small": _mnist_cnn_small,
        "mnist-mlp": _mnist_mlp,
        "cifar10-cnn": _cifar10_cnn,
        "cifar10-lenet": _cifar10_lenet,
        "cifar10-fast": _cifar10_fast,
        "resnet18": _resnet18,
        "gpt-mini": _gpt_mini,
    }
    return makers[name]()


def optimizer(recipe: Recipe) -> Any:
    """Keras's own of the recipe's name; SGD for Muon, which costs less."""
    import keras

    s = recipe.settings
    clip = {"global_clipnorm": s.clip_norm} if s.clip_norm else {}
    if s.optimizer == "adam":
        return keras.optimizers.Adam(s.lr, **clip)
    if s.optimizer == "adamw":
        return keras.optimizers.AdamW(
            s.lr, weight_decay=s.weight_decay, beta_1=s.betas[0], beta_2=s.betas[1], **clip
        )
    rate = 1e-3 if s.optimizer == "muon" else s.lr
    return keras.optimizers.SGD(rate, momentum=s.momentum, nesterov=s.nesterov, **clip)


def _sequence(shape: tuple[int, ...], *layers: Any) -> Any:
    import keras

    return keras.Sequential([keras.layers.Input(shape), *layers])


def _mnist_cnn() -> Any:
    from keras import layers as k

    return _sequence(
        (28, 28, 1),
        *(k.Conv2D(32, 3, activation="relu"), k.MaxPooling2D(2)),
        *(k.Conv2D(64, 3, activation="relu"), k.MaxPooling2D(2)),
        *(k.Conv2D(64, 3, activation="relu"), k.Flatten()),
        *(k.Dense(64, activation="relu"), k.Dense(10), k.Softmax(dtype="float32")),
    )


def _mnist_cnn_small() -> Any:
    from keras import layers as k

    return _sequence(
        (28, 28, 1),
        *(k.Conv2D(32, 3, activation="relu"), k.MaxPooling2D(2), k.Flatten()),
        *(k.Dense(128, activation="relu"), k.Dense(10)),
    )


def _mnist_mlp() -> Any:
    from keras import layers as k

    dense = [k.Dense(256, activation="relu"), k.Dense(128, activation="relu"), k.Dense(10)]
    return _sequence((28, 28, 1), k.Flatten(), *dense)


def _cifar10_cnn() -> Any:
    from keras import layers as k

    return _sequence(
        (32, 32, 3),
        *(k.Conv2D(32, 3, activation="relu"), k.MaxPooling2D(2)),
        *(k.Conv2D(64, 3, activation="relu"), k.MaxPooling2D(2)),
        *(k.Conv2D(64, 3, activation="relu"), k.Flatten()),
        *(k.Dense(64, activation="relu"), k.Dense(10)),
    )


def _cifar10_lenet() -> Any:
    from keras import layers as k

    return _sequence(
        (32, 32, 3),
        *(k.Conv2D(6, 5, activation="relu"), k.MaxPooling2D(2)),
        *(k.Conv2D(16, 5, activation="relu"), k.MaxPooling2D(2), k.Flatten()),
        *(k.Dense(120, activation="relu"), k.Dense(84, activation="relu"), k.Dense(10)),
    )


def _cifar10_fast() -> Any:
    from keras import layers as k

    parts: list[Any] = [k.Conv2D(24, 2, trainable=False), k.Activation("gelu")]
    for width, convolutions in ((64, 2), (256, 2), (256, 3)):
        for place in range(convolutions):
            parts.append(k.Conv2D(width, 3, padding="same", use_bias=False))
            if place == 0:
                parts.append(k.MaxPooling2D(2))
            norm = k.BatchNormalization(momentum=0.6, epsilon=1e-12, scale=False)
            parts += [norm, k.Activation("gelu")]
    parts += [k.MaxPooling2D(3), k.Flatten(), k.Dense(10, use_bias=False)]
    return _sequence((32, 32, 3), *parts, k.Rescaling(1 / 256))


def _resnet18() -> Any:
    import keras
    from keras import layers as k

    def convolved(x: Any, width: int, size: int, stride: int) -> Any:
        x = k.Conv2D(width, size, stride, padding="same", use_bias=False)(x)
        return k.BatchNormalization(momentum=0.9)(x)

    images = k.Input((224, 224, 3))
    x = k.ReLU()(convolved(images, 64, 7, 2))
    x = k.MaxPooling2D(3, 2, padding="same")(x)
    for width in (64, 128, 256, 512):
        for number in range(2):
            stride = 2 if width > 64 and number == 0 else 1
            y = k.ReLU()(convolved(x, width, 3, stride))
            y = convolved(y, width, 3, 1)
            x = k.ReLU()(k.Add()([y, convolved(x, width, 1, stride) if stride > 1 else x]))
    logits = k.Dense(1000, dtype="float32")(k.GlobalAveragePooling2D()(x))
    return keras.Model(images, logits)


def _gpt_mini(width: int = 384, heads: int = 6, context: int = 256) -> Any:
    import keras
    from keras import layers as k
    from keras import ops

    from suanli.workloads.datasets.characters import VOCABULARY

    tokens = k.Input((context,), dtype="int32")
    # of the tokens' shape, so that the layer is a part of the model
    places = k.Embedding(context, width)(
        ops.zeros_like(tokens) + ops.arange(context, dtype="int32")
    )
    x = k.Embedding(VOCABULARY, width)(tokens) + places
    for _ in range(6):
        y = k.LayerNormalization(epsilon=1e-6)(x)
        x = x + k.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
        y = k.LayerNormalization(epsilon=1e-6)(x)
        y = k.Dense(width)(k.Dense(4 * width, activation="gelu")(y))
        x = x + y
    logits = k.Dense(VOCABULARY, use_bias=False, dtype="float32")(
        k.LayerNormalization(epsilon=1e-6)(x)
    )
    return keras.Model(tokens, logits)
