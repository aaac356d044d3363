"""ResNet-18 at 224x224 on random pictures, as a recipe file: only its speed means anything."""

from dataclasses import replace

import torch
from torch.nn import functional

from suanli.training.recipe import Recipe
from suanli.workloads.record import Data, Samples, TrainingSettings
from suanli.workloads.resolve import resolve

_IMAGES, _CLASSES, _BATCH = 512, 1000, 32


def recipe() -> Recipe:
    """SGD with momentum, batch 32, as torchvision's reference script has it for one GPU."""
    settings = TrainingSettings(lr=0.1, momentum=0.9, weight_decay=1e-4, batch=_BATCH, epochs=1)
    workload = replace(
        resolve("resnet18"), data=_pictures, loss=functional.cross_entropy, training=settings
    )
    return Recipe(workload=workload, settings=settings)


def _pictures() -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, 3, 224, 224, generator=generator)
    labels = torch.randint(0, _CLASSES, (_IMAGES,), generator=generator)
    part = Samples(inputs=(images[:8],), labels=labels[:8])
    return Data(train=Samples(inputs=(images,), labels=labels), search=part, acceptance=part)
