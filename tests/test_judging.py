"""What may not be accepted: wrong precisions, wrong batch sizes, useless labels, moving answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from suanli.base import codec
from suanli.base.errors import BadInputError
from suanli.base.plan import Plan, Quantization
from suanli.base.trial import Quality, Trial, ValueCheck
from suanli.engines.confirm import Reopened
from suanli.engines.evaluate import Evaluator, Setting, TrialLimits
from suanli.engines.optimizer import Optimizer
from suanli.engines.session import Session, Wish
from suanli.engines.staging import why_not
from suanli.measure.quality import paired_quality
from suanli.measure.values import MOST_RELATIVE_RMS, compare
from suanli.workloads.record import Data, Inputs, Samples, Workload
from tests.test_labels import labelled

pytestmark = pytest.mark.usefixtures("in_process")
INT8 = Quantization(scheme="int8-static", calibration_samples=8)
LIMITS = TrialLimits(seconds=60)


def data_of(model: nn.Module, classes: int | None = None) -> Callable[[], Data]:
    """Labelled data whose labels are the model's own answers, or without meaning."""

    def part(count: int, seed: int) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(count, 16, generator=generator)
        with torch.no_grad():
            labels = model(inputs).argmax(1)
        if classes is not None:
            labels = torch.randint(classes, (count,), generator=generator)
        return Samples(inputs=(inputs,), labels=labels)

    return lambda: Data(train=part(8, 1), search=part(200, 2), acceptance=part(200, 3))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).eval()


def workload(model: nn.Module, **fields: Any) -> Workload:
    def make_inputs(batch: int) -> Inputs:
        x = torch.randn(batch, 16, generator=torch.Generator().manual_seed(4))
        return Inputs(args=(x,))

    return Workload(
        name="net",
        make_model=lambda: model,
        **{"make_inputs": make_inputs, "untrained": False, **fields},
    )


def session(of: Workload, folder: Path, **wish: Any) -> Session:
    asked = {"batch": 1, "max_batch": 4, **wish}
    folder.mkdir(exist_ok=True)
    return Session(of, of.make_model().eval(), Wish(**asked), folder, lambda event: None)


class Cancelling(nn.Module):
    """A sum that bf16 cannot hold: eager bf16 itself is far off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(16, 64), nn.Linear(64, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two((self.one(x) + 300.0) - 300.0)


def test_a_precision_at_which_eager_is_wrong_is_refused(tmp_path: Path) -> None:
    here = session(workload(Cancelling()), tmp_path / "here")
    try:
        here.reference()
        evaluate = Evaluator(here.setting, allowance=here.allowance)
        baseline = evaluate(
            Plan(backend="eager", precision="bf16", options={"source": True}), LIMITS
        )
        other = evaluate(Plan(backend="eager", precision="bf16"), LIMITS)
        sound = evaluate(Plan(backend="eager"), LIMITS)
    finally:
        here.close()
    for trial in (baseline, other):
        assert trial.status == "rejected"
        assert "eager bf16 itself is" in trial.reason
    assert baseline.step_ms is not None, "the baseline is timed all the same"
    assert baseline.values is not None
    assert (baseline.values.relative_rms or 0) > MOST_RELATIVE_RMS
    assert sound.status == "verified", sound.reason
    assert sound.values is not None
    assert 0 < (sound.values.relative_rms or 0) < 1e-3


def test_zeros_do_not_pass_for_an_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(64, 4, dtype=torch.float64, generator=generator)
    eager = 1.55 * reference
    found = compare([torch.zeros(64, 4)], [reference], [eager.float()], precision="bf16")
    assert not found.ok
    assert "eager bf16 itself is 0.5" in found.reason


def quantised(name: str, folder: Path, **fields: Any) -> Trial:
    """The trial of a planted int8 plan, beside labels unless a tolerance is among the fields."""
    model = fields.pop("model", net())
    tolerance = fields.pop("tolerance", None)
    labels = {} if tolerance else {"data": data_of(model), "metric": "accuracy"}
    modules = (f"tests.planted:{name.upper()}",)
    here = session(
        workload(model, **labels, **fields), folder, tolerance=tolerance, backend_modules=modules
    )
    try:
        here.reference()
        evaluate = Evaluator(here.setting, allowance=here.allowance)
        plan = Plan(backend=f"planted-{name}", precision="int8", quantization=INT8)
        return evaluate(plan, LIMITS)
    finally:
        here.close()


@pytest.mark.parametrize(("name", "words"), [("reversed", "batch 4"), ("infinite", "not finite")])
def test_int8_that_is_wrong_at_another_batch_is_refused_in_the_search(
    name: str, words: str, tmp_path: Path
) -> None:
    trial = quantised(name, tmp_path / "here")
    assert trial.quality is not None
    assert trial.quality.harmed == 0, "at the asked batch the labels see nothing"
    assert trial.status == "rejected"
    assert words in trial.reason


class Mean(nn.Module):
    """One number for a whole call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).mean()


def test_a_tolerance_holds_for_what_is_one_for_a_whole_call(tmp_path: Path) -> None:
    trial = quantised("far", tmp_path / "here", model=Mean(), tolerance=0.05)
    assert trial.status == "rejected"
    assert "relative error" in trial.reason


class WithMean(nn.Module):
    """An answer per sample, and one number for the call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.net(x)
        return y, y.mean(0)


def test_what_is_one_for_a_whole_call_is_held_to_that_call(tmp_path: Path) -> None:
    modules = ("tests.planted:OLD_STATE",)
    here = session(workload(WithMean()), tmp_path / "here", backend_modules=modules)
    try:
        here.reference()
        evaluate = Evaluator(here.setting, allowance=here.allowance)
        sound = evaluate(Plan(backend="eager"), LIMITS)
        stale = evaluate(Plan(backend="planted-old_state"), LIMITS)
    finally:
        here.close()
    assert sound.status == "verified", sound.reason
    assert stale.status == "rejected"
    assert "output1" in stale.reason


class LabelWorker:
    """A trial whose values are right, and which answers wrongly on some labelled samples."""

    def __init__(self, wrong: set[int], eager: torch.Tensor) -> None:
        self._wrong, self._eager = wrong, eager
        self.asked: list[Any] = []

    def call(self, name: str, **arguments: Any) -> Any:
        if name == "check_values":
            return codec.to_json(ValueCheck(ok=True, k=2.0))
        self.asked.append((arguments["batch"], arguments["most"]))
        answer = self._eager[: arguments["most"]].clone()
        for row in self._wrong & set(range(len(answer))):
            answer[row] = answer[row].roll(1)
        Path(arguments["out"]).parent.mkdir(exist_ok=True)
        save_file({"0": answer}, arguments["out"])
        return None


@pytest.mark.parametrize(
    ("wrong", "status", "asked"),
    [
        (set(), "verified", [(8, 512)]),
        ({1, 2, 3, 700}, "verified", [(8, 512), (8, None)]),  # 0.59 points, then 0.4
        ({1, 2, 3, 700, 800, 900}, "rejected", [(8, 512), (8, None)]),
    ],
)
def test_labels_look_at_float_plans_too(
    wrong: set[int], status: str, asked: list[Any], tmp_path: Path
) -> None:
    eager = torch.eye(4).repeat(250, 1)
    part = labelled(tmp_path, torch.zeros(1000, 2), eager)
    setting = Setting(
        program=tmp_path,
        verification=tmp_path,
        builds=tmp_path / "builds",
        batch=1,
        other_batches=(8,),
        budget=0.005,
        search=part,
    )
    worker: Any = LabelWorker(wrong, eager)
    evaluate = Evaluator(setting, allowance=lambda precision: "")
    trial = Trial(plan=Plan(backend="x"), status="verified", build_dir="x")
    judged = evaluate._judge(trial, worker, lambda: 1.0)
    assert (judged.status, worker.asked) == (status, asked)
    assert ("0.60 points on the search samples" in judged.reason) == (status == "rejected")


def test_a_tolerance_is_judged_on_samples_that_did_not_calibrate(tmp_path: Path) -> None:
    from suanli.engines.verification import VerificationSet, read_samples

    fixed = torch.randn(3, 16)
    repeated = workload(
        net(), make_inputs=lambda batch: Inputs(args=(fixed[torch.arange(batch) % 3],))
    )
    here = session(repeated, tmp_path / "here", tolerance=0.05)
    judged = VerificationSet(here.setting.verification, here.program).inputs[0]
    assert here.setting.calibration is not None
    calibrated = read_samples(here.setting.calibration).inputs[0]
    here.close()
    assert here.calibration_samples == len(calibrated) > 32
    rows = {tuple(row.tolist()) for row in judged}
    assert len(rows) == len(judged)
    assert not rows & {tuple(row.tolist()) for row in calibrated}
    assert tuple(fixed[0].tolist()) in rows
    assert tuple(fixed[1].tolist()) not in rows


def flags(wrong: int, n: int = 100) -> list[bool]:
    return [i >= wrong for i in range(n)]


@pytest.mark.parametrize(
    ("right", "labels", "certifies"),
    [(100, [0, 1] * 50, True), (55, [0, 1] * 50, False), (92, [0] * 90 + [1] * 10, False)],
)
def test_labels_certify_only_beside_a_reference_that_knows_them(
    right: int, labels: list[int], certifies: bool
) -> None:
    same = flags(100 - right)
    found = paired_quality(same, same, budget=0.05, labels=labels)
    assert found.accepted == certifies
    assert ("most frequent class" in found.reason) != certifies
    assert found.needed is None, "more samples would not help"


class FakeProcess:
    """A fresh process that finds what it is told."""

    def __init__(self, reopened: Reopened) -> None:
        self._reopened = reopened
        self.asked: list[int] = []

    def verify(self, *_: Any, **__: Any) -> Reopened:
        return self._reopened

    def predict(self, samples: Path, out: Path, batch: int, *, timeout_s: float) -> None:
        self.asked.append(batch)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(str(batch))


class FakeLabelled:
    """Harmed samples by batch size."""

    samples = Path("none")

    def __init__(self, harmed: dict[int, int]) -> None:
        self._harmed = harmed

    def quality(self, outputs: Path, budget: float) -> Quality:
        now = flags(self._harmed[int(outputs.read_text())], 1000)
        return paired_quality([True] * 1000, now, budget=budget, labels=[0, 1] * 500)


class FakeSession:
    """What `_held` needs of a session."""

    class setting:
        search: ClassVar[object] = object()

    class wish:
        tolerance: ClassVar[float | None] = None

    def __init__(self, scratch: Path, harmed: dict[int, int]) -> None:
        self.scratch, self._labelled = scratch, FakeLabelled(harmed)

    def acceptance(self) -> FakeLabelled:
        return self._labelled


def held(
    tmp_path: Path, harmed: dict[int, int], plans: list[Plan], variant_of: dict[int, int]
) -> tuple[Any, list[int]]:
    from suanli.engines.request import Request

    optimizer = Optimizer.__new__(Optimizer)
    optimizer._request = Request(
        objective="latency",
        batch=1,
        max_batch=32,
        budget=0.01,
        tolerance=None,
        budget_s=1,
        out=None,
        device="cpu",
    )
    optimizer._say = lambda text: None  # type: ignore[method-assign]
    reopened = Reopened(
        values=None, quantised=True, relative_error=0.01, portable=False, differences=()
    )
    process = FakeProcess(reopened)
    winner = Trial(plan=plans[0], status="verified")
    here: Any = FakeSession(tmp_path, harmed)
    return optimizer._held(here, process, winner, plans, variant_of), process.asked  # type: ignore[arg-type]


QUANTISED = Plan(backend="x", precision="int8", quantization=INT8)


def test_acceptance_judges_a_quantised_plan_at_every_batch(tmp_path: Path) -> None:
    batches = {8: 0, 1: 0, 32: 0}
    (_, quality), asked = held(tmp_path, {8: 0, 1: 2, 32: 1}, [QUANTISED], batches)
    assert asked == [8, 1, 32]
    assert quality.accepted
    assert (quality.batch, quality.harmed) == (1, 2), "the worst is reported"
    refused, _ = held(tmp_path, {8: 0, 1: 0, 32: 500}, [QUANTISED], batches)
    assert isinstance(refused, Trial)
    assert refused.status == "rejected"
    assert "at batch 32" in refused.reason


def test_acceptance_looks_at_a_float_plan_once_and_at_its_estimate(tmp_path: Path) -> None:
    plans, variant_of = [QUANTISED, Plan(backend="y")], {8: 0, 1: 1, 32: 1}
    _, asked = held(tmp_path, {8: 0, 1: 9, 32: 900}, plans, variant_of)
    assert asked == [8, 1]
    refused, _ = held(tmp_path, {8: 0, 1: 11, 32: 0}, plans, variant_of)
    assert isinstance(refused, Trial)
    assert "loses 1.10 points on the acceptance samples" in refused.reason


def test_what_is_not_finite_after_reopening_never_ships(tmp_path: Path) -> None:
    here: Any = FakeSession(tmp_path, {})
    nothing = Reopened(
        values=None, quantised=True, relative_error=None, portable=False, differences=()
    )
    assert "not finite" in why_not(nothing, here)
    mixed = Reopened(
        values=ValueCheck(ok=True, k=2.0),
        quantised=True,
        relative_error=None,
        portable=False,
        differences=(),
    )
    assert "not finite" in why_not(mixed, here)
    floats = Reopened(
        values=ValueCheck(ok=True, k=2.0),
        quantised=False,
        relative_error=None,
        portable=False,
        differences=(),
    )
    assert why_not(floats, here) == ""


class Dropping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class Centred(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class SlightlyMixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.003 * x.mean()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Dropping(), "changes from call to call"),
        (Centred(), "depends on the other samples of its batch"),
        (SlightlyMixed(), "depends on the other samples of its batch"),
    ],
)
def test_answers_that_move_are_refused_in_one_line(
    model: nn.Module, words: str, tmp_path: Path
) -> None:
    here = session(workload(model), tmp_path / "here")
    try:
        with pytest.raises(BadInputError, match=words) as caught:
            here.reference()
    finally:
        here.close()
    assert "\n" not in str(caught.value)


def test_a_batch_that_is_mixed_is_served_at_one_size(tmp_path: Path) -> None:
    fixed = workload(Centred(), dynamic_batch=False)
    here = session(fixed, tmp_path / "here", batch=4)
    try:
        here.reference()
        evaluate = Evaluator(here.setting, allowance=here.allowance)
        trial = evaluate(Plan(backend="eager"), LIMITS)
    finally:
        here.close()
    assert trial.status == "verified", trial.reason
