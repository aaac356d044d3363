"""Memory of a step on the CPU: the prediction comes within a tenth of what was measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from suanli.base.plan import Plan
from suanli.base.profile_results import MemoryProfile
from suanli.base.train_plan import TrainPlan
from suanli.profiling import subjects, training_subjects
from suanli.profiling.memory import memory_profile
from suanli.profiling.subjects import Subject, work_of
from suanli.training.recipe import Recipe
from suanli.workloads.module import of_module
from suanli.workloads.record import Data, Inputs, Samples, TrainingSettings, Workload

BF16 = Plan(backend="eager", precision="bf16")
FP32 = Plan(backend="eager", precision="fp32")
needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 here"
)


def followed(subject: Subject) -> MemoryProfile:
    try:
        with subject.conditions():
            work = work_of(subject)
            for _ in range(2):
                subject.run()
            found = memory_profile(subject, work)
    finally:
        subject.close()
    assert found is not None
    return found


def near(found: MemoryProfile) -> None:
    assert found.predicted is not None
    assert found.predicted.total_bytes == pytest.approx(found.total_bytes, rel=0.10), found


class Reader(nn.Module):
    """Words, an LSTM, words; its two tables may be one."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(2000, 96)
        self.lstm = nn.LSTM(96, 96, batch_first=True)
        self.out = nn.Linear(96, 2000, bias=False)
        if tied:
            self.out.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.words(x))[0][:, -1])


class Both(nn.Module):
    """A bidirectional LSTM whose inputs are wider than its states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(256, 64, 2, bidirectional=True)
        self.out = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x.transpose(0, 1))[0][-1])


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2)


def images() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def sounds() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(16, 64, 9, padding=4), nn.GELU(), nn.ConvTranspose1d(64, 32, 4, 2, 1)),
        *(nn.Tanh(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def layers(width: int = 1024) -> nn.Module:
    inner = [nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*inner, nn.Linear(width, 10))


def words(count: int) -> torch.Tensor:
    return torch.randint(0, 2000, (count, 48))


@pytest.mark.parametrize(
    ("make", "inputs", "plan"),
    [
        pytest.param(Reader, words(32), FP32, id="lstm"),
        pytest.param(Both, torch.randn(16, 40, 256), FP32, id="wide-lstm"),
        pytest.param(encoder, torch.randn(16, 128, 64), FP32, id="encoder"),
        pytest.param(encoder, {"src": torch.randn(16, 256, 64)}, FP32, id="encoder-by-name"),
        pytest.param(sounds, torch.randn(32, 16, 256), FP32, id="conv1d"),
        pytest.param(images, torch.randn(1, 3, 32, 32), FP32, id="one-small-image"),
        pytest.param(sounds, torch.randn(1, 16, 96), FP32, id="one-short-sound"),
        pytest.param(Reader, words(32), BF16, id="lstm-bf16", marks=needs_bf16),
        pytest.param(images, torch.randn(16, 3, 32, 32), BF16, id="bf16", marks=needs_bf16),
        pytest.param(
            images,
            torch.randn(16, 3, 32, 32),
            BF16.with_(memory_layout="channels_last"),
            id="bf16-nhwc",
            marks=needs_bf16,
        ),
        pytest.param(
            images,
            torch.randn(16, 3, 32, 32),
            BF16.with_(options={"autocast": True}),
            id="autocast",
            marks=needs_bf16,
        ),
        pytest.param(
            layers,
            torch.randn(1, 256),
            BF16.with_(options={"autocast": True}),
            id="autocast-weights",
            marks=needs_bf16,
        ),
    ],
)
def test_inference(make: Callable[[], nn.Module], inputs: Any, plan: Plan, tmp_path: Path) -> None:
    workload = of_module(make().eval(), inputs)
    leaf = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
    near(followed(subjects.inference(workload, plan, leaf.shape[0], tmp_path)))


def recipe(
    make: Callable[[], nn.Module], inputs: torch.Tensor, classes: int = 10, **settings: Any
) -> Recipe:
    samples = Samples(inputs=(inputs,), labels=torch.arange(len(inputs)) % classes)
    workload = Workload(
        name="odd",
        make_model=make,
        make_inputs=lambda batch: Inputs(args=(inputs[:batch],)),
        data=lambda: Data(train=samples, search=samples, acceptance=samples),
        loss=nn.functional.cross_entropy,
    )
    chosen = {"batch": 32, "lr": 1e-3, "optimizer": "adam"} | settings
    return Recipe(workload=workload, settings=TrainingSettings(**chosen))


@pytest.mark.parametrize(
    ("make", "inputs", "plan", "settings"),
    [
        pytest.param(Reader, words(64), TrainPlan(), {}, id="lstm"),
        pytest.param(lambda: Reader(tied=True), words(64), TrainPlan(), {}, id="tied"),
        pytest.param(Both, torch.randn(32, 40, 256), TrainPlan(), {}, id="wide-lstm"),
        pytest.param(
            layers, torch.randn(8, 256), TrainPlan(optimizer_kernel="loop"), {"batch": 1}, id="loop"
        ),
        pytest.param(
            images, torch.randn(64, 3, 32, 32), TrainPlan(micro_batch=8), {}, id="micro-batches"
        ),
        pytest.param(
            images,
            torch.randn(64, 3, 32, 32),
            TrainPlan(precision="bf16", memory_layout="channels_last"),
            {"optimizer": "sgd", "momentum": 0.9},
            id="bf16-nhwc",
            marks=needs_bf16,
        ),
        pytest.param(
            layers,
            torch.randn(8, 256),
            TrainPlan(precision="bf16", weights="bf16", optimizer_kernel="fused"),
            {"batch": 1},
            id="bf16-weights",
            marks=needs_bf16,
        ),
    ],
)
def test_training(
    make: Callable[[], nn.Module], inputs: torch.Tensor, plan: TrainPlan, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    near(followed(training_subjects.training(recipe(make, inputs, **settings), plan, device="cpu")))


@pytest.mark.parametrize("kind", ["RMSprop", "Adagrad", "Adam", "SGD"])
def test_an_optimizer_of_ones_own(kind: str) -> None:
    model = layers()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
    batches = [(torch.randn(8, 256), torch.arange(8) % 10)] * 2
    subject = training_subjects.of_loader(
        model, batches, nn.functional.cross_entropy, optimizer=optimizer, plan=TrainPlan()
    )
    near(followed(subject))


def test_checkpointing_keeps_what_passes_between_blocks() -> None:
    made = recipe(Classifier, torch.randn(32, 128, 64))
    plan = TrainPlan(checkpointing=True)
    near(followed(training_subjects.training(made, plan, device="cpu")))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))
