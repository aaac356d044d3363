"""The recipes that ship, on small sets made here; their records need the real ones."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from suanli.base.compiler import find_compiler
from suanli.base.train_plan import TrainPlan
from suanli.training import kernels
from suanli.training.fit import default_plan
from suanli.training.judging import judge
from suanli.training.loop import Limits, Loop
from suanli.training.muon import Muon
from suanli.training.recipe import Recipe
from suanli.training.recipes import RECIPES, resolve_recipe
from suanli.training.start import starting_point
from suanli.training.step import Stepper

SAMPLES = 320


def blobs(side: int, channels: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright square whose place is the class."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, count)
    pixels = random.integers(0, 60, (count, channels, side, side)).astype(np.uint8)
    step = side // 5
    for image, label in zip(pixels, labels, strict=True):
        y, x = (label // 5) * 2 * step, (label % 5) * step
        image[:, y : y + step, x : x + step] += 150
    return pixels, labels.astype(np.uint8)


def cifar10_files(root: Path) -> None:
    (root / "cifar10").mkdir()
    for name, seed in (("data_batch_1", 1), ("test_batch", 2)):
        pixels, labels = blobs(32, 3, SAMPLES, seed)
        records = np.concatenate([labels[:, None], pixels.reshape(SAMPLES, -1)], 1)
        records.tofile(root / "cifar10" / f"{name}.bin")


def mnist_files(root: Path) -> None:
    (root / "mnist").mkdir()
    for part, seed in (("train", 1), ("t10k", 2)):
        pixels, labels = blobs(28, 1, SAMPLES, seed)
        head = struct.pack(">IIII", 0x803, SAMPLES, 28, 28)
        (root / "mnist" / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = struct.pack(">II", 0x801, SAMPLES)
        (root / "mnist" / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    cifar10_files(folder)
    mnist_files(folder)
    return folder


def trained(recipe: Recipe, plan: TrainPlan, epochs: int) -> tuple[float, list[float], nn.Module]:
    """Accuracy on unseen samples, the epochs' losses, and the model."""
    recipe = replace(recipe, settings=replace(recipe.settings, batch=64, epochs=epochs))
    assert recipe.workload.data is not None
    data = recipe.workload.data()
    model = starting_point(recipe, data.train, 0)
    loop = Loop(Stepper(model, recipe, plan), data.train, seed=0, limits=Limits(epochs=epochs))
    loop.run()
    return judge(model, data.acceptance, predict=recipe.predict), loop.epoch_losses, model


@pytest.mark.parametrize(("name", "epochs"), [("cifar10-fast", 3), ("mnist-fast", 6)])
@pytest.mark.parametrize("kernels_used", [True, False])
def test_a_recipe_learns(root: Path, name: str, epochs: int, kernels_used: bool) -> None:
    recipe = resolve_recipe(name, data=root)
    plan = default_plan(recipe, "cpu", recipe.workload.load().train)
    if not kernels_used:
        plan = plan.with_(kernels=())
    elif name == "cifar10-fast" and find_compiler() is not None:
        assert plan.kernels == ("fused-cnn",)
    accuracy, losses, _ = trained(recipe, plan, epochs)
    assert losses[-1] < 0.8 * losses[0]
    assert accuracy > 0.5  # chance is 0.1


def test_cifar10_fast_starts_as_it_says(root: Path) -> None:
    recipe = resolve_recipe("cifar10-fast", data=root)
    assert recipe.workload.data is not None
    train = recipe.workload.data().train
    model = starting_point(recipe, train, 3)
    names = {name for name, p in model.named_parameters() if not p.requires_grad}
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert names == {"0.weight", "0.bias", *(f"{norm}.weight" for norm in norms)}
    assert recipe.optimizer is not None
    optimizer = recipe.optimizer(model, recipe.settings, TrainPlan())
    assert isinstance(optimizer, Muon)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    again = starting_point(recipe, train, 3)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_epoch_depends_on_its_number_and_the_generator_alone(root: Path) -> None:
    recipe = resolve_recipe("cifar10-fast", data=root)
    images = (torch.randn(40, 3, 32, 32),)
    assert recipe.arrange is not None
    sets = [
        recipe.arrange(images, epoch, torch.Generator().manual_seed(seed))[0]
        for epoch, seed in ((0, 1), (0, 1), (1, 1), (0, 2))
    ]
    assert torch.equal(sets[0], sets[1])
    assert not torch.equal(sets[0], sets[2])
    assert not torch.equal(sets[0], sets[3])


def test_each_image_of_an_epoch_has_a_hole(root: Path) -> None:
    recipe = resolve_recipe("cifar10-fast", data=root)
    images = torch.randn(40, 3, 32, 32)
    assert recipe.arrange is not None
    (arranged,) = recipe.arrange((images,), 0, torch.Generator().manual_seed(1))
    holes = (arranged == 0).all(1).sum((1, 2))
    assert holes.max() == 64
    assert holes.min() >= 16  # of a square whose centre is the image's corner a quarter is left
    assert (images != 0).all()


@pytest.mark.parametrize("name", list(RECIPES))
def test_plans_are_possible_here_and_on_a_gpu(root: Path, name: str) -> None:
    recipe = resolve_recipe(name, data=root)
    assert default_plan(recipe, "cpu", recipe.workload.load().train).checked()
    elsewhere = default_plan(recipe, "cuda:0", recipe.workload.load().train).checked()
    assert elsewhere.kernels == ()


def test_kernels_that_cannot_be_built_are_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "present", lambda: False)
    recipe = resolve_recipe("cifar10-fast", data=root)
    assert default_plan(recipe, "cpu", recipe.workload.load().train).kernels == ()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_mnist_fast_reaches_what_it_claims(data_root: Path, seed: int) -> None:
    recipe = resolve_recipe("mnist-fast", data=data_root)
    assert recipe.workload.data is not None
    data = recipe.workload.data()
    model = starting_point(recipe, data.train, seed)
    plan = default_plan(recipe, "cpu", recipe.workload.load().train)
    epochs = recipe.settings.epochs
    Loop(Stepper(model, recipe, plan), data.train, seed=seed, limits=Limits(epochs=epochs)).run()
    assert judge(model, data.acceptance) > 0.989
