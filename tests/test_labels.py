"""Labels of the search part say which operators of an int8 plan go back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from suanli.base import codec
from suanli.base.plan import Plan, Quantization
from suanli.base.signature import Signature, TensorSpec
from suanli.engines.evaluate import Setting, build_call
from suanli.engines.host import TrialHost
from suanli.engines.labels import Labelled, label_judge
from suanli.engines.verification import write_inputs, write_samples
from suanli.workloads.record import Samples
from tests import small_programs as small

INT8 = Plan(
    backend="openvino",
    precision="int8",
    quantization=Quantization(scheme="int8-static"),
    options={"rest": "fp32"},
)


def labelled(folder: Path, inputs: torch.Tensor, eager: torch.Tensor) -> Labelled:
    """A part whose labels are eager's own answers."""
    part = Labelled(
        samples=folder / "samples.safetensors",
        reference=folder / "eager.safetensors",
        metric="accuracy",
    )
    write_samples(part.samples, Samples(inputs=(inputs,), labels=eager.argmax(1)))
    save_file({"0": eager.contiguous()}, part.reference)
    return part


def signature(*, dynamic: bool, max_batch: int) -> Signature:
    return Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(-1, 4)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(-1, 4)),),
        max_batch=max_batch,
        dynamic=dynamic,
        in_tree="",
        out_tree="",
        static_inputs={},
        static_outputs={},
    )


@pytest.mark.parametrize(("dynamic", "max_batch"), [(True, 64), (False, 7)])
def test_harm_counts_answers_and_values_only_break_ties(
    dynamic: bool, max_batch: int, tmp_path: Path
) -> None:
    logits = torch.eye(4).repeat(25, 1) + torch.arange(100)[:, None] * 1e-3
    part = labelled(tmp_path, logits, logits)
    judge = label_judge(part, signature(dynamic=dynamic, max_batch=max_batch), budget=0.04)
    sizes = set()

    def wrong(count: int, scale: float = 1.0) -> Any:
        def run(batch: list[np.ndarray]) -> list[np.ndarray]:
            sizes.add(len(batch[0]))
            answer = batch[0] * scale
            hurt = np.round(batch[0].min(1) * 1e3) < count  # the least column is the row's number
            answer[hurt] = np.roll(answer[hurt], 1, axis=1)  # another class, at little error
            return [answer]

        return run

    assert judge.harm(wrong(0)) == 0.0
    for count in (1, 2, 3):
        assert count / 100 <= judge.harm(wrong(count)) < (count + 1) / 100
        assert (judge.harm(wrong(count)) <= judge.wish) == (count <= 2), "half the budget is 2 %"
    assert 0 < judge.harm(wrong(0, scale=1.1)) < judge.harm(wrong(0, scale=1.2)) < 0.01
    assert dynamic or sizes == {max_batch}
    other = label_judge(part, signature(dynamic=dynamic, max_batch=max_batch), budget=0.05)
    assert other.key != judge.key


class TwoHeads(nn.Module):
    """Logits by a sound way, and a second output by one that int8 ruins."""

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

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.stem(x))
        logits = 4 * self.head(torch.relu(self.tail(x)).mean((2, 3)))
        return logits, torch.relu(self.sick(torch.relu(self.well(x)))).mean((2, 3))


class OneHead(TwoHeads):
    """The sick way leads to the logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = torch.relu(self.stem(x))
        x = torch.relu(self.sick(torch.relu(self.well(x))))
        return 40 * self.head(torch.relu(self.tail(x)).mean((2, 3)))


def built(model: nn.Module, folder: Path, *, by_labels: bool) -> tuple[Plan, dict[str, str]]:
    """Build through the host of a trial, as the search does."""
    program = small.program_of(model.eval(), folder / "program", small.images())
    (images,) = small.fresh_inputs(program, 96)
    with torch.no_grad():
        answer = model(images)
    eager = answer[0] if isinstance(answer, tuple) else answer
    assert len(eager.argmax(1).unique()) > 1, "a constant answer shows nothing"
    part = labelled(folder, images, eager)
    calibration = folder / "calibration.safetensors"
    write_samples(calibration, Samples(inputs=(images[:8],)))
    write_inputs(folder / "verification", [images[:8]])
    setting = Setting(
        program=program.folder,
        verification=folder / "verification",
        builds=folder / "builds",
        batch=1,
        other_batches=(),
        calibration=calibration,
        search=part if by_labels else None,
        budget=0.1,
    )
    host = TrialHost(
        str(program.folder), codec.to_json(INT8), str(folder / "built"), str(setting.verification)
    )
    note = host.build(**build_call(INT8, setting))
    return codec.from_json(Plan, note["plan"]), note["details"]


@pytest.mark.parametrize("by_labels", [False, True])
def test_what_costs_no_answer_stays_in_int8(by_labels: bool, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    plan, details = built(TwoHeads(), tmp_path, by_labels=by_labels)
    assert plan.quantization is not None
    if by_labels:
        assert plan.quantization.keep == ()
        assert "int8_harm" in details
    else:
        assert "sick" in plan.quantization.keep
        assert "int8_error" in details


def test_what_costs_answers_goes_back(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    plan, details = built(OneHead(), tmp_path, by_labels=True)
    assert plan.quantization is not None
    assert plan.quantization.keep[0] == "sick"
    assert float(details["int8_harm_kept"]) < float(details["int8_harm"])


def test_only_the_search_part_is_shown_and_only_to_quantised_plans(tmp_path: Path) -> None:
    part = labelled(tmp_path, torch.zeros(2, 3), torch.eye(2))
    setting = Setting(
        program=tmp_path,
        verification=tmp_path,
        builds=tmp_path,
        batch=1,
        other_batches=(),
        search=part,
        budget=0.01,
    )
    call = build_call(INT8, setting)
    assert Labelled.from_json(call["labelled"]) == part
    assert call["budget"] == 0.01
    assert build_call(Plan(backend="openvino"), setting)["labelled"] is None
