"""Known vision networks. Random weights, except where a file of weights is given."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn
from torch.nn import functional

from suanli.workloads.builtins.sources import NEEDS_DATA, cifar10
from suanli.workloads.datasets import Scaling
from suanli.workloads.models import mobilenet, resnet, vit
from suanli.workloads.models import unet as unet_model
from suanli.workloads.record import Inputs, TrainingSettings, Workload
from suanli.workloads.seeding import pictures, random_weights

_UNTRAINED = "random weights: speed and rounding are real, answers mean nothing"
# mean and deviation of CIFAR-10's training pixels, per channel
_CIFAR10_SCALING = Scaling(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))


def resnet18(_root: Path | None) -> Workload:
    """ResNet-18 at 224x224."""
    return _untrained("resnet18", resnet.resnet18, 224, max_batch=256)


def resnet50(_root: Path | None) -> Workload:
    """ResNet-50 at 224x224."""
    return _untrained("resnet50", resnet.resnet50, 224, max_batch=128)


def mobilenetv2(_root: Path | None) -> Workload:
    """MobileNetV2 at 224x224."""
    return _untrained("mobilenetv2", mobilenet.MobileNetV2, 224, max_batch=256)


def vit_small(_root: Path | None) -> Workload:
    """Vision transformer, small, patches of 16, at 224x224."""
    return _untrained("vit-small", vit.VisionTransformer, 224, max_batch=128)


def unet(_root: Path | None) -> Workload:
    """U-Net for segmentation of 128x128 pictures in two classes."""
    return _untrained("unet", unet_model.UNet, 128, max_batch=64)


def resnet18_cifar(root: Path | None) -> Workload:
    """ResNet-18 with a 3x3 stem for CIFAR-10."""
    return Workload(
        name="resnet18-cifar",
        make_model=partial(_model, resnet.resnet18_cifar, 32),
        make_inputs=partial(_inputs, 32),
        data=cifar10(root, _CIFAR10_SCALING),
        metric="accuracy",
        loss=partial(functional.cross_entropy, label_smoothing=0.1),
        target=0.85,
        max_batch=512,
        training=TrainingSettings(
            optimizer="sgd",
            lr=0.2,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            batch=256,
            epochs=6,
            schedule="one_cycle",
            precision="bf16",
            augmentation=("shift2", "flip"),
        ),
        note="" if root else NEEDS_DATA,
    )


def _untrained(name: str, build: Callable[[], nn.Module], side: int, *, max_batch: int) -> Workload:
    return Workload(
        name=name,
        make_model=partial(_model, build, side),
        make_inputs=partial(_inputs, side),
        max_batch=max_batch,
        note=_UNTRAINED,
    )


def _model(build: Callable[[], nn.Module], side: int) -> nn.Module:
    # statistics of batch norm hardly depend on the size of the picture; 96 is fast
    side = side if build is vit.VisionTransformer else min(side, 96)
    return random_weights(build, pictures(8, 3, side, seed=1))


def _inputs(side: int, batch: int) -> Inputs:
    return Inputs(args=(pictures(batch, 3, side),))
