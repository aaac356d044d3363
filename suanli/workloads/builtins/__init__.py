"""The built-in workloads: one module per family, one row each.

To add one: write the network in `models/`, a function `(root) -> Workload` in a family's module,
and its row here. `root` is the folder of the data sets, or None.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from suanli.workloads.record import Workload

_TABLE = {
    "digits-resnet": "digits:digits_resnet",
    "mnist-cnn": "articles:mnist_cnn",
    "mnist-cnn-small": "articles:mnist_cnn_small",
    "mnist-mlp": "articles:mnist_mlp",
    "cifar10-cnn": "articles:cifar10_cnn",
    "cifar10-lenet": "articles:cifar10_lenet",
    "resnet18-cifar": "vision:resnet18_cifar",
    "resnet18": "vision:resnet18",
    "resnet50": "vision:resnet50",
    "mobilenetv2": "vision:mobilenetv2",
    "vit-small": "vision:vit_small",
    "unet": "vision:unet",
    "bert-base": "text:bert_base",
    "gpt2-small": "text:gpt2_small",
    "minilm": "text:minilm",
    "gpt-mini": "text:gpt_mini",
    "worked-2-3-1": "worked:net_2_3_1",
    "worked-3-2-2": "worked:net_3_2_2",
    "worked-784-128-10": "worked:net_784_128_10",
    "worked-cnn-1000": "worked:cnn_1000",
    "worked-rnn-5x256": "worked:rnn_5x256",
}


def builtin_names() -> list[str]:
    """Names of all built-in workloads."""
    return list(_TABLE)


def builtin(name: str, root: Path | None) -> Workload:
    """Make a built-in workload, untrained where it has no weights of its own.

    Args:
        name: A name of `builtin_names`.
        root: Folder of the data sets (`mnist/`, `cifar10/`), or None.

    Raises:
        KeyError: No such name.
        MissingBackendError: It needs a package that is absent.
    """
    module, _, function = _TABLE[name].partition(":")
    make: Callable[[Path | None], Workload]
    make = getattr(import_module(f"suanli.workloads.builtins.{module}"), function)
    return make(root)
