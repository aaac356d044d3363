"""How many samples a plan is verified on: by the work, never by the clock."""

from pathlib import Path

import pytest
import torch
from torch import nn

from suanli.engines import session as sessions
from suanli.engines.session import Session, Wish
from suanli.engines.verification import ReferenceHost, VerificationSet, how_many, write_inputs
from suanli.workloads.record import Inputs, Workload
from tests import small_programs as small


@pytest.mark.parametrize(
    ("flops", "samples"),
    [(1.0, 128), (0.6e9, 128), (8.2e9, 58), (22e9, 32), (1e15, 32), (None, 32)],
)
def test_the_number_follows_from_the_work(
    flops: float | None, samples: int, tmp_path: Path
) -> None:
    program = small.program_of(nn.Linear(4, 4), tmp_path, torch.randn(2, 4))
    assert how_many(program, flops) == samples


def test_large_outputs_lower_it(tmp_path: Path) -> None:
    program = small.program_of(nn.Linear(4, 3_000_000), tmp_path, torch.randn(2, 4))
    assert how_many(program, 1.0) == 8


def test_a_slow_machine_verifies_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for milliseconds in (1e-3, 1e6):
        monkeypatch.setattr(sessions, "_quick_ms", lambda *_, ms=milliseconds: ms)
        scratch = tmp_path / str(milliseconds)
        scratch.mkdir()
        workload = Workload(
            name="net",
            make_model=small.conv_net,
            make_inputs=lambda batch: Inputs(args=(small.images(batch),)),
        )
        wish = Wish(batch=1, max_batch=4)
        session = Session(workload, workload.make_model().eval(), wish, scratch, lambda event: None)
        found.append(VerificationSet(scratch / "verification", session.program).inputs[0])
        session.close()
    assert torch.equal(*found)
    assert len(found[0]) == 128


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.complex(self.linear(x), x)


def test_complex_outputs_have_a_reference(tmp_path: Path) -> None:
    model, inputs = Rotated(), torch.randn(4, 8)
    program = small.program_of(model, tmp_path / "program", inputs[:2])
    folder = tmp_path / "verification"
    write_inputs(folder, [inputs])
    host = ReferenceHost(str(program.folder), str(folder))
    assert host.reference()["dtype"] == "float64"
    assert not host.eager("fp32")
    found = VerificationSet(folder, program)
    (reference,), (eager,) = found.reference(), found.eager("fp32")
    assert (reference.dtype, eager.dtype) == (torch.complex128, torch.complex64)
    with torch.no_grad():
        torch.testing.assert_close(eager, model(inputs))
    torch.testing.assert_close(reference.to(torch.complex64), eager)
