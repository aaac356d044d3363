"""What a model and its example inputs must be: said before anything is measured."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import suanli
from suanli import api
from suanli.base.errors import BadInputError, CaptureError
from suanli.engines import optimizer
from suanli.engines.program import input_names
from suanli.workloads.admission import admitted, unwrapped
from suanli.workloads.module import of_module
from suanli.workloads.record import Inputs, Workload
from suanli.workloads.resolve import resolve


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("it was found out too late")

    monkeypatch.setattr(optimizer.Optimizer, "run", too_late)


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\nfrom torch import nn\n"
        "print('on import')\n"
        "def half():\n"
        "    print('in the factory')\n"
        "    return nn.Linear(4, 2).bfloat16()\n"
        "def example_inputs(batch):\n"
        "    print('in the inputs')\n"
        "    return torch.randn(batch, 4).bfloat16()\n"
        "wrapped = nn.DataParallel(nn.Linear(4, 2)), torch.randn(3, 4)\n"
        "doubles = nn.Softmax(-1), torch.randn(3, 4).double()\n"
        "none = nn.Linear(4, 2), torch.randn(0, 4)\n"
        "network = nn.Sequential(nn.Linear(4, 2))\n"
    )
    return path


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        module: nn.Module = torch.jit.script(nn.Linear(4, 2))
    return module


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (nn.Linear(4, 2).bfloat16(), torch.zeros(2, 4).bfloat16(), "is in bfloat16"),
        (nn.Linear(4, 2).half(), torch.zeros(2, 4).half(), r"give model\.float\(\)"),
        (nn.Linear(4, 2).double(), torch.zeros(2, 4).double(), "is in float64"),
        (nn.Softmax(-1), torch.zeros(2, 4).double(), "is in float64"),
        (nn.Linear(4, 2, device="meta"), torch.zeros(2, 4), "weight is on the meta device"),
        (nn.Linear(4, 2), torch.zeros(2, 4, device="meta"), "inputs are on the meta device"),
        (nn.Linear(4, 2), torch.eye(4).to_sparse(), r"layout sparse_coo \[4, 4\]"),
        (nn.Linear(4, 2), torch.zeros(0, 4), r"no sample: a tensor is \[0, 4\]"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    model: nn.Module, inputs: torch.Tensor, words: str
) -> None:
    with pytest.raises(BadInputError, match=words) as caught:
        suanli.optimize(model, inputs)
    assert "--batch" not in str(caught.value)


def test_torchscript_cannot_be_captured() -> None:
    with pytest.raises(CaptureError, match="is TorchScript"):
        suanli.optimize(scripted(), torch.zeros(2, 4))


def test_a_forward_without_a_signature_cannot_be_captured() -> None:
    model = nn.Identity()
    model.forward = max
    with pytest.raises(CaptureError, match="Python function"):
        input_names(model, Inputs(args=(torch.zeros(2, 4),)))


def test_mixed_types_that_compute_in_fp32_pass() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    model.register_buffer("table", torch.zeros(3, dtype=torch.float64))
    assert admitted(of_module(model, torch.zeros(2, 3, dtype=torch.int64)), 1) is model


def test_wrappers_are_taken_off() -> None:
    model = nn.Linear(4, 2)
    for wrapped in (
        torch.compile(model),
        nn.DataParallel(model),
        nn.DataParallel(torch.compile(model)),
    ):
        workload = of_module(wrapped, torch.zeros(2, 4))
        assert unwrapped(wrapped) is admitted(workload, 1) is model
        assert workload.name == "Linear"


def test_a_fixed_batch_is_the_only_one_asked_for() -> None:
    def only_four(batch: int) -> Inputs:
        assert batch == 4
        return Inputs(args=(torch.zeros(4, 4),))

    workload = Workload(
        name="net", make_model=nn.Identity, make_inputs=only_four, dynamic_batch=False
    )
    admitted(workload, 4)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x).relu()


def test_a_part_that_is_called_module_is_no_wrapper() -> None:
    model = Holder()
    assert unwrapped(model) is model


@pytest.mark.parametrize("name", ["half", "doubles"])
def test_a_model_of_a_file_is_cast_with_its_inputs(own_file: Path, name: str) -> None:
    workload = resolve(f"{own_file}:{name}")
    inputs = workload.make_inputs(3).args[0]
    assert inputs.dtype == torch.float32
    assert admitted(workload, 1)(inputs).dtype == torch.float32


def test_a_wrapped_model_of_a_file_is_its_module(own_file: Path) -> None:
    workload = resolve(f"{own_file}:wrapped")
    assert type(workload.make_model()) is nn.Linear
    assert workload.make_inputs(5).args[0].shape == (5, 4)


def test_no_sample_and_near_names(own_file: Path) -> None:
    with pytest.raises(BadInputError, match=r"mine\.py:none: the example inputs hold no sample"):
        resolve(f"{own_file}:none")
    with pytest.raises(BadInputError, match="it has network"):
        resolve(f"{own_file}:netwrk")


def test_what_a_file_prints_is_no_part_of_the_answer(
    own_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(f"{own_file}:half").make_model()
    said = capsys.readouterr()
    assert not said.out
    for words in ("on import", "in the factory", "in the inputs"):
        assert words in said.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "throughput", "max_batch": 16}, "16 is less than the batch of 32"),
        ({"batch": 8, "max_batch": 4}, "less than the batch of 8"),
    ],
)
def test_the_largest_batch_holds_the_one_that_decides(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        api.OptimizeOptions(**options).checked()


def test_a_smaller_largest_batch_is_fine_where_the_batch_is_smaller() -> None:
    assert api.OptimizeOptions(objective="throughput", batch=8, max_batch=16).checked()
