"""Every operator of a profile has a module and a line of its user's."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import suanli
from suanli.base.compiler import find_compiler
from suanli.base.lazy import present
from suanli.base.plan import Plan
from suanli.base.profile_results import ProfileResult
from suanli.base.train_plan import TrainPlan
from suanli.measure.capturing.built import lines_noted, note_paths, places_of
from suanli.training.recipe import Recipe
from suanli.training.recipes.cifar10_fast import recipe as cifar10_fast
from suanli.workloads.builtins import digits
from suanli.workloads.record import Data, Samples, TrainingSettings
from tests.profile_parts import ceilings

HERE = "test_profile_places.py"
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def planted_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ceilings()
    monkeypatch.setattr("suanli.measure.ceilings.ceilings", lambda *_, **__: found)
    monkeypatch.setattr("suanli.profiling.measuring._WARM_SECONDS", 0.05)


def unplaced(found: ProfileResult) -> list[tuple[str, str, str]]:
    """Rows above one per cent that lack a module or a line; an update belongs to all modules."""
    return [
        (row.name, row.module, row.source)
        for row in found.operators
        if row.share > 0.01
        and not (row.source and (row.module or row.phase == "optimizer" or _at_the_top(row.name)))
    ]


def _at_the_top(name: str) -> bool:
    """A loss stands in no module; the root's own operators have its path, which is empty."""
    return any(word in name for word in ("loss", "log_softmax", "nll", "mean", "sum", "flatten"))


def test_a_bare_sequence_of_a_file_has_the_lines_that_built_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom torch import nn\nfrom suanli.workloads.record import Inputs, Workload\n"
        "\n\ndef make():\n    return nn.Sequential(\n        nn.Conv2d(3, 16, 3),\n"
        "        nn.Flatten(),\n        nn.Linear(16 * 900, 4),\n    ).eval()\n\n\n"
        "def net():\n    return Workload(name='mine', make_model=make,\n"
        "        make_inputs=lambda b: Inputs(args=(torch.zeros(b, 3, 32, 32),)))\n"
    )
    found = suanli.profile(f"{file}:net", steps=3, batch=4, device="cpu")
    rows = {row.name: (row.module, row.source) for row in found.operators}
    assert rows["convolution"] == ("0", "mine.py:8")
    assert rows["addmm"] == ("2", "mine.py:10")
    assert not unplaced(found)


def test_a_bare_sequence_of_a_program_has_the_line_that_hands_it_over() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    found = suanli.profile(model, torch.randn(32, 64), steps=3, batch=32, device="cpu")
    assert {row.module for row in found.operators if row.flops} <= {"0", "1"}
    assert all(row.source.startswith(f"{HERE}:") for row in found.operators)
    assert not any("_suanli_line" in vars(m) for m in model.modules()), "the model is untouched"


def test_what_a_plan_puts_in_a_modules_place_keeps_its_path_and_line() -> None:
    before = nn.Module.__init__  # other libraries may have put their own there
    with lines_noted():
        model = nn.Sequential(nn.Conv2d(4, 16, 3, bias=False), nn.BatchNorm2d(16), nn.GELU())
    note_paths(model)

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.activation = model[1], model[2]

    class Rewritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Fused()

    twin = nn.Sequential(model[0], Fused(), Rewritten())
    places = places_of([twin])
    line = places["0"].source
    assert line.startswith(f"{HERE}:")
    assert (places["1"].module, places["1"].source) == ("1+2", line)
    assert places["2"].module == "2", "a block that was rewritten keeps its own path"
    assert places["2"].source == line
    assert nn.Module.__init__ is before
    assert not hasattr(nn.ReLU(), "_suanli_line"), "nothing is noted outside"


def _small(made: Recipe) -> Recipe:
    """The recipe on a few random images."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(256, 3, 32, 32, generator=draw)
    labels = torch.randint(0, 10, (256,), generator=draw)
    samples = Samples(inputs=(images,), labels=labels)
    data = Data(train=samples, search=samples, acceptance=samples)
    workload = replace(made.workload, data=lambda: data)
    return replace(made, workload=workload, settings=replace(made.settings, batch=64))


@needs_compiler
def test_cifar10_fast_under_its_own_plan() -> None:
    made = _small(cifar10_fast(None))
    assert made.plan is not None
    assert made.plan.kernels == ("fused-cnn",)
    found = suanli.profile(made, plan=made.plan, steps=3, device="cpu")
    assert not unplaced(found)
    norm = next(row for row in found.operators if row.name == "norm_act")
    assert norm.module.count("+") in {1, 2}, "pool, norm and activation ran as one"
    assert norm.source.startswith("fast.py:")
    back = [row for row in found.operators if row.phase == "backward" and "conv" in row.name]
    assert back
    assert all(row.module and row.source.startswith("fast.py:") for row in back)
    (update,) = [row for row in found.operators if row.phase == "optimizer"]
    assert update.source.startswith("cifar10_fast.py:")


def test_digits_resnet() -> None:
    assert not unplaced(suanli.profile("digits-resnet", steps=3, batch=8, device="cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "bert-base"])
def test_large_workloads(name: str) -> None:
    assert not unplaced(suanli.profile(name, steps=3, device="cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "inductor"])
def test_what_backends_fused(backend: str) -> None:
    if backend != "inductor" and not present(backend):
        pytest.skip(f"{backend} is not installed")
    plan = Plan(backend=backend)
    found = suanli.profile("digits-resnet", steps=3, batch=8, plan=plan, device="cpu")
    assert not [row for row in unplaced(found) if "Reorder" not in row[0]]


def test_an_update_has_the_line_that_asks_for_it_by_settings() -> None:
    found = suanli.profile("digits-resnet", train=True, steps=3, batch=8, device="cpu")
    assert not unplaced(found)
    (update,) = [row for row in found.operators if row.phase == "optimizer"]
    lines = Path(digits.__file__).read_text().splitlines()
    at = next(i for i, line in enumerate(lines, 1) if "TrainingSettings(" in line)
    assert update.source == f"digits.py:{at}"
    assert not vars(TrainingSettings()).keys() - {f.name for f in fields(TrainingSettings)}


def test_an_own_step_has_the_line_of_its_update() -> None:
    model = nn.Linear(64, 64).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(32, 64)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    found = suanli.profile(step, model=model, steps=3, device="cpu")
    (update,) = [row for row in found.operators if row.phase == "optimizer"]
    line = step.__code__.co_firstlineno + 3
    assert update.source == f"{HERE}:{line}"


def test_a_model_that_is_trained_synthetically_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    before = [p.clone() for p in model.parameters()]
    suanli.profile(model, torch.randn(4, 8), train=True, steps=3, plan=TrainPlan(), device="cpu")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_lines_of_workloads_that_ship_are_noted() -> None:
    with lines_noted():
        model = cifar10_fast(None).workload.make_model()
    places = places_of([model])
    assert places["2"].source.startswith("fast.py:")
    assert places["2"].source != places["4"].source
