"""int8 by NNCF: right enough, repaired where it is not, and rebuilt from its plan."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from suanli.base.errors import SuanliError
from suanli.base.plan import Plan, Quantization
from suanli.engines.backend import Judge, Run
from suanli.engines.backends.openvino import BACKEND
from suanli.engines.program import Program
from suanli.engines.quantize import build_int8, relative_error
from suanli.engines.sensitivity import put_back
from tests import small_programs as small

INT8 = Plan(
    backend="openvino",
    precision="int8",
    quantization=Quantization(scheme="int8-static"),
    options={"rest": "fp32"},
)


@pytest.fixture(autouse=True, scope="module")
def _libraries() -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")


# -- finding what to put back -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_bad_operators_are_found_among_many(seed: int) -> None:
    source = random.Random(seed)
    names = [f"op{i}" for i in range(source.randint(3, 90))]
    bad = dict.fromkeys(source.sample(names, 3), 1.0)
    harms = {name: bad.get(name, source.random() * 0.003) for name in names}
    asked = []

    def harm(kept: frozenset[str]) -> float:
        asked.append(kept)
        return math.sqrt(sum(h * h for name, h in harms.items() if name not in kept))

    found = put_back(names, harm, wish=0.1, seconds=60)
    assert set(found.keep) == set(bad)
    assert found.enough
    assert found.after <= 0.1 < found.before
    assert len(asked) == found.measured <= 3 * (2 * math.ceil(math.log2(len(names))) + 2)


def test_nothing_is_put_back_where_nothing_is_wrong() -> None:
    found = put_back(["a", "b"], lambda kept: 0.01, wish=0.1, seconds=60)
    assert (found.keep, found.measured, found.enough) == ((), 1, True)


def test_time_is_kept_and_not_a_number_is_the_worst() -> None:
    now = [0.0]

    def harm(kept: frozenset[str]) -> float:
        now[0] += 1.0
        return math.nan

    found = put_back([f"op{i}" for i in range(64)], harm, wish=0.1, seconds=5, clock=lambda: now[0])
    assert found.measured <= 7
    assert not found.enough
    assert found.before == math.inf


def test_no_more_than_allowed_is_put_back() -> None:
    names = [f"op{i}" for i in range(8)]
    found = put_back(names, lambda kept: float(8 - len(kept)), wish=0.0, seconds=60, most=3)
    assert len(found.keep) == 3
    assert not found.enough


def test_relative_error() -> None:
    reference = np.array([[1.0, -1.0], [1.0, -1.0]])
    assert relative_error([reference + 0.1], [reference]) == pytest.approx(0.1)
    assert relative_error([reference * math.nan], [reference]) == math.inf
    whole = np.array([1, 2])
    assert relative_error([whole + 5, reference], [whole, reference]) == 0.0
    constant = np.full(4, 2.0)
    assert relative_error([constant * 1.5], [constant]) == pytest.approx(0.5)


# -- building -----------------------------------------------------------------------------------


class Outliers(nn.Module):
    """A network in which one channel before `sick` is a thousand times larger than the others.

    Nothing depends on it: `sick` divides it away. A quantiser that covers it leaves no steps for
    the others, so int8 at that place loses nearly all of the answer.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.well = nn.Conv2d(16, 16, 3, padding=1)
        self.sick = nn.Conv2d(16, 16, 3, padding=1)
        self.tail = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            self.well.weight[0] *= 3000
            self.sick.weight[:, 0] /= 3000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.well(x))
        x = torch.relu(self.sick(x))
        x = torch.relu(self.tail(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = tmp_path_factory.mktemp("outliers")
    return small.program_of(Outliers().eval(), folder, small.images())


def calibration(program: Program, count: int = 8) -> list[tuple[torch.Tensor, ...]]:
    flat = small.fresh_inputs(program, count)
    return [tuple(tensor[i : i + 1] for tensor in flat) for i in range(count)]


def error_of(program: Program, plan: Plan, folder: Path) -> float:
    flat = small.fresh_inputs(program, small.MAX_BATCH)
    values, wanted = BACKEND.load(program, plan, folder)(flat), small.eager(program, flat)
    return relative_error([v.numpy() for v in values], [w.numpy() for w in wanted])


@pytest.mark.parametrize("kind", ["conv", "bert", "resnet"])
def test_a_healthy_model_is_quantised_whole(kind: str, tmp_path: Path) -> None:
    program = small.build(kind, tmp_path / "program")
    note = BACKEND.build(program, INT8, tmp_path, calibration(program))
    assert note.plan.quantization is not None
    assert note.plan.quantization.keep == ()
    runner = BACKEND.load(program, note.plan, tmp_path)
    layers = runner.layer_times(program.inputs(3))
    products = [la for la in layers if la.kind in ("Convolution", "FullyConnected")]
    low = [la for la in products if la.precision == "int8"]
    assert len(low) >= 0.7 * len(products), [(la.name, la.precision) for la in products]
    for batch in (1, 3, small.MAX_BATCH):
        flat = small.fresh_inputs(program, batch)
        error = small.worst_error(runner(flat), small.eager(program, flat))
        assert 1e-4 < error < 0.2


def test_a_sick_operator_is_found_named_and_mended(outliers: Program, tmp_path: Path) -> None:
    sick, mended, again = (tmp_path / name for name in ("sick", "mended", "again"))
    for folder in (sick, mended, again):
        folder.mkdir()
    tolerant = INT8.with_(options={**INT8.options, "max_error": 1000.0})
    data = calibration(outliers)
    broken = error_of(outliers, BACKEND.build(outliers, tolerant, sick, data).plan, sick)
    assert broken > 1.0, "the planted operator does no harm, so the test shows nothing"

    note = BACKEND.build(outliers, INT8, mended, data)
    assert note.plan.quantization is not None
    keep = note.plan.quantization.keep
    assert keep[0] == "sick"
    assert len(keep) == 1
    assert "sick" in note.details["kept"]
    assert float(note.details["int8_error_kept"]) < 0.1 < float(note.details["int8_error"])
    assert error_of(outliers, note.plan, mended) < 0.3
    precision = {
        name: layer.precision
        for layer in BACKEND.load(outliers, note.plan, mended).layer_times(outliers.inputs(3))
        for name in layer.origin
    }
    assert precision["sick"] == "fp32"
    assert precision["stem"] == precision["well"] == "int8"

    streams = note.plan.with_(streams=2, threads=1, quantization=INT8.quantization)
    stamps = [p.stat().st_mtime_ns for p in sorted(outliers.folder.rglob("int8-*/*"))]
    shared = BACKEND.build(outliers, streams, again, data)
    assert shared.plan.quantization == note.plan.quantization
    assert [p.stat().st_mtime_ns for p in sorted(outliers.folder.rglob("int8-*/*"))] == stamps, (
        "a plan that differs in streams only is quantised again"
    )

    rebuilt = BACKEND.build(outliers, note.plan, again, data)
    assert rebuilt.plan == note.plan
    assert "int8_variants" not in rebuilt.details, "a plan that names what to keep is not searched"
    flat = small.fresh_inputs(outliers, 3)
    first, second = (BACKEND.load(outliers, note.plan, f)(flat) for f in (mended, again))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_judge_with_labels_decides(outliers: Program, tmp_path: Path) -> None:
    """Harm is the share of samples whose class changes; the wish is none."""
    flat = small.fresh_inputs(outliers, 6)
    before = small.eager(outliers, flat)[0].argmax(1).numpy()
    seen = []

    def harm(run: Run) -> float:
        (logits,) = run([tensor.numpy() for tensor in flat])
        seen.append(float((logits.argmax(1) != before).mean()))
        return seen[-1]

    judge = Judge(harm=harm, wish=0.0)
    note = build_int8(outliers, INT8, tmp_path, calibration(outliers), judge)
    if seen[0] > 0:
        assert note.plan.quantization is not None
        assert note.plan.quantization.keep
    assert seen[-1] == 0.0


def test_one_batch_size_only(tmp_path: Path) -> None:
    program = small.program_of(
        small.conv_net(), tmp_path / "program", small.images(4), dynamic=False
    )
    flat = program.inputs(4)
    data = [tuple(t[i : i + 1] for t in flat) for i in range(4)]
    note = BACKEND.build(program, INT8, tmp_path, data[:3])  # fewer than one batch
    runner = BACKEND.load(program, note.plan, tmp_path)
    assert small.worst_error(runner(flat), small.eager(program, flat)) < 0.2


def test_what_cannot_be_quantised_is_said(tmp_path: Path) -> None:
    program = small.program_of(nn.Softmax(-1), tmp_path / "program", torch.randn(3, 4))
    with pytest.raises(SuanliError, match="nothing in small can be quantised"):
        BACKEND.build(program, INT8, tmp_path, calibration(program))
    for data, plan, reason in (
        (None, INT8, "needs calibration data"),
        (
            calibration(program),
            INT8.with_(quantization=Quantization(scheme="int8-static", keep=("conv9",))),
            "no operator is called conv9",
        ),
    ):
        with pytest.raises(SuanliError, match=reason):
            BACKEND.build(program, plan, tmp_path, data)
    assert not (tmp_path / "model.xml").exists()
    assert not [p.name for p in program.folder.iterdir() if "int8" in p.name]
