"""The demo: handwritten digits that ship inside scikit-learn, and a small residual network."""

from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from suanli.workloads.datasets.digits import digits_data
from suanli.workloads.models import resnet
from suanli.workloads.record import Data, Inputs, TrainingSettings, Workload
from suanli.workloads.seeding import pictures, random_weights

_SIDE = 32


def digits_resnet(_root: Path | None) -> Workload:
    """8x8 digits enlarged to 32x32, ten classes; 720 of 1,797 images are for acceptance."""
    return Workload(
        name="digits-resnet",
        make_model=_model,
        make_inputs=_inputs,
        data=_data,
        metric="accuracy",
        loss=partial(functional.cross_entropy, label_smoothing=0.1),
        target=0.98,
        training=TrainingSettings(
            optimizer="sgd",
            lr=0.1,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            batch=64,
            epochs=28,
            schedule="one_cycle",
            precision="bf16",
            augmentation=("shift2",),
        ),
        note="digits that ship inside scikit-learn, 8x8 enlarged to 32x32",
    )


def _model() -> nn.Module:
    return random_weights(resnet.digits_resnet, pictures(8, 1, _SIDE, seed=1))


def _data() -> Data:
    return digits_data(_SIDE)


def _inputs(batch: int) -> Inputs:
    known: torch.Tensor = _data().search.inputs[0]
    times = -(-batch // len(known))
    return Inputs(args=(known.repeat(times, 1, 1, 1)[:batch].contiguous(),))
