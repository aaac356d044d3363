"""CIFAR-10 in minutes on two cores: airbench94's network, Muon, and kernels that keep up with it.

What is taken from airbench94 (Keller Jordan, arXiv 2404.00498, and its later variant with Muon):
the network, the whitening layer, Dirac starts, alternating flips, shifts by 2 pixels, label
smoothing and six views of each test image. Other than there: a whitening layer without a trained
bias (so no gradient has to pass the first and largest activation), a third convolution in the last
block, a hole in each image, and the number of epochs.
"""

from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from suanli.base.train_plan import TrainPlan
from suanli.training.augment import cut_out, whole_epoch
from suanli.training.initialise import dirac, whiten
from suanli.training.muon import Muon, matrix_parameters
from suanli.training.recipe import Recipe, Tensors
from suanli.training.views import called_in, mirrored_and_shifted
from suanli.workloads.builtins.sources import cifar10
from suanli.workloads.datasets import Scaling
from suanli.workloads.models.fast import cifar10_fast
from suanli.workloads.record import Inputs, Samples, TrainingSettings, Workload
from suanli.workloads.seeding import pictures, random_weights

_SCALING = Scaling(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
_BATCH = 2000
_WHITENED_IMAGES = 5000
_MOVED, _HOLE = 2, 8  # pixels: the largest shift, and a side of the square that is cut out
_MUON_LR = 0.24
# Found for a loss that is summed over the batch; here it is the mean.
_HEAD_LR, _SHIFT_LR = 0.67 * _BATCH, 0.053 * _BATCH
_DECAY = 2e-6 * _BATCH  # of a step at the peak rate: a group's weight decay is this over its rate


def recipe(root: Path | None) -> Recipe:
    """The recipe on the CIFAR-10 under `root`."""
    workload = Workload(
        name="cifar10-fast",
        make_model=partial(random_weights, cifar10_fast),
        make_inputs=_inputs,
        data=cifar10(root, _SCALING),
        metric="accuracy",
        loss=partial(functional.cross_entropy, label_smoothing=0.2),
        target=0.9083,
        max_batch=4096,
    )
    return Recipe(
        workload=workload,
        settings=TrainingSettings(optimizer="muon", lr=_MUON_LR, batch=_BATCH, epochs=12),
        plan=TrainPlan(
            precision="bf16",
            memory_layout="channels_last",
            data="resident",
            keep_memory=True,
            kernels=("fused-cnn",),
        ),
        changes="airbench94 with Muon; judged by six views of each image",
        start=_start,
        optimizer=_optimizer,
        rate=_rate,
        arrange=_arrange,
        predict=_predict,
    )


def _inputs(batch: int) -> Inputs:
    return Inputs(args=(pictures(batch, 3, 32),))


def _start(model: nn.Module, train: Samples, generator: torch.Generator) -> None:
    layers = list(model.modules())
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    whiten(convolutions[0], train.inputs[0][:_WHITENED_IMAGES])
    assert convolutions[0].bias is not None
    nn.init.zeros_(convolutions[0].bias).requires_grad_(False)
    for layer in convolutions[1:]:
        dirac(layer)
    for part in layers:
        if isinstance(part, nn.BatchNorm2d):
            part.weight.requires_grad_(False)  # stays 1
        elif isinstance(part, nn.Linear):
            # unit weights before logits of 1/256: the head's rate is made for them
            nn.init.normal_(part.weight, generator=generator)
            with torch.no_grad():
                part.weight.div_(part.weight.std())


def _optimizer(model: nn.Module, settings: TrainingSettings, plan: TrainPlan) -> Muon:
    filters = matrix_parameters(model)
    shifts = [layer.bias for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    heads = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    sgd = {"momentum": 0.85}
    return Muon(
        [
            {"name": "filters", "params": filters, "lr": settings.lr, "muon": True},
            {
                "name": "shifts",
                "params": shifts,
                "lr": _SHIFT_LR,
                "weight_decay": _DECAY / _SHIFT_LR,
                **sgd,
            },
            {
                "name": "head",
                "params": heads,
                "lr": _HEAD_LR,
                "weight_decay": _DECAY / _HEAD_LR,
                **sgd,
            },
        ],
        momentum=0.6,
    )


def _rate(done: float, group: str) -> float:
    return 1.0 - done


def _arrange(inputs: Tensors, epoch: int, generator: torch.Generator) -> Tensors:
    images = inputs[0].to(torch.bfloat16)  # what the first layer computes with
    return (cut_out(whole_epoch(images, epoch, generator, most=_MOVED), _HOLE, generator),)


def _predict(model: nn.Module, inputs: Tensors) -> torch.Tensor:
    return mirrored_and_shifted(called_in(model, bf16=True), inputs[0])
