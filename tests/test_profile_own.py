"""A step of one's own as it is: its memory, its precision, its wrappers, its company."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import suanli
from suanli.base.errors import BadInputError
from suanli.base.plan import Plan
from suanli.base.train_plan import TrainPlan
from suanli.profiling import processes, subjects, training_subjects
from suanli.profiling.joining import join
from suanli.profiling.recording import KernelRun, Recording
from suanli.profiling.verdict import step_times
from suanli.profiling.wrappers import taken_out
from tests import train_parts
from tests.profile_parts import ceilings, node, product, recording

LOSS = nn.functional.cross_entropy


@pytest.fixture(autouse=True)
def planted_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ceilings()
    monkeypatch.setattr("suanli.measure.ceilings.ceilings", lambda *_, **__: found)
    monkeypatch.setattr("suanli.profiling.measuring._WARM_SECONDS", 0.05)


class Own:
    """A loop's step, in the ways that loops differ."""

    def __init__(self, *, set_to_none: bool = True, autocast: bool = False, **fields: Any) -> None:
        self.model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, **fields)
        self.x = torch.randn(16, 256)
        self.set_to_none, self.autocast = set_to_none, autocast
        self.bytes = sum(p.nbytes for p in self.model.parameters())

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            out = self.model(self.x)
        out.float().square().mean().backward()
        self.optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_memory_of_an_own_step_is_told_by_kind(set_to_none: bool, named: bool) -> None:
    own = Own(set_to_none=set_to_none)
    model = own.model if named else None
    found = suanli.profile(own, model=model, batch=16, steps=3, device="cpu")
    memory = found.memory
    assert memory is not None
    assert memory.weights_bytes == pytest.approx(own.bytes, rel=0.01)
    assert memory.optimizer_bytes == pytest.approx(2 * own.bytes, rel=0.01)
    assert memory.gradients_bytes == pytest.approx(own.bytes, rel=0.01)
    # what passes between operators, and two of Adam's own tensors of the largest weight's size
    assert memory.activations_bytes < 1.1 * own.bytes
    assert all(p.grad is not None for p in own.model.parameters()), "the loop's own are left"


def test_the_precision_of_an_own_step_is_that_of_its_products() -> None:
    own = Own(autocast=True, fused=True)
    found = suanli.profile(own, model=own.model, batch=16, steps=3, device="cpu")
    assert isinstance(found.plan, TrainPlan)
    assert (found.plan.precision, found.plan.weights) == ("bf16", "fp32")
    assert found.plan.optimizer_kernel == "fused"
    plain = Own()
    found = suanli.profile(plain, model=plain.model, batch=16, steps=3, device="cpu")
    assert isinstance(found.plan, TrainPlan)
    assert (found.plan.precision, found.plan.optimizer_kernel) == ("fp32", "loop")


def test_an_own_step_of_inference_in_bf16() -> None:
    model, x = nn.Linear(64, 64).eval().bfloat16(), torch.randn(8, 64).bfloat16()
    found = suanli.profile(lambda: model(x), model=model, steps=3, device="cpu")
    assert found.plan == Plan(backend="eager", precision="bf16")


# -- wrappers -------------------------------------------------------------------------------------


def test_wrappers_are_known() -> None:
    plain = nn.Linear(4, 4)
    assert taken_out(plain).module is plain
    assert not taken_out(plain).compiled
    both = torch.compile(nn.DataParallel(plain))
    found = taken_out(both)  # type: ignore[arg-type]
    assert (found.module, found.compiled, found.parallel) == (plain, True, "DataParallel")
    assert "DataParallel" in found.notes[0]
    plain.compile()
    assert taken_out(plain).compiled


def test_a_compiled_module_is_profiled_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def inference(workload: Any, plan: Plan, batch: int, scratch: Path) -> Any:
        asked.append(plan.backend)
        raise BadInputError("enough")

    def of_loader(model: nn.Module, *_: Any, plan: TrainPlan, **__: Any) -> Any:
        asked.append((type(model).__name__, plan.compile))
        raise BadInputError("enough")

    monkeypatch.setattr(subjects, "inference", inference)
    monkeypatch.setattr("suanli.profiling.training_subjects.of_loader", of_loader)
    model: Any = torch.compile(nn.Linear(4, 4))
    with pytest.raises(BadInputError, match="enough"):
        suanli.profile(model, torch.randn(2, 4), device="cpu")
    with pytest.raises(BadInputError, match="enough"):
        suanli.profile(model, [], LOSS, device="cpu")
    assert asked == ["inductor", ("Linear", "default")]


def test_data_parallel_is_taken_off_and_said() -> None:
    model = nn.DataParallel(nn.Sequential(nn.Linear(16, 4)))
    batches = [(torch.randn(8, 16), torch.arange(8) % 4)]
    found = suanli.profile(model, batches, LOSS, steps=3, device="cpu")
    assert any("taken out of DataParallel" in note for note in found.notes)
    assert "0" in {row.module for row in found.operators}
    x = torch.randn(8, 16)
    own = suanli.profile(lambda: model(x), model=model, steps=3, device="cpu")
    assert "0" in {row.module for row in own.operators}, "paths are those of the module inside"


@pytest.mark.slow
def test_a_compiled_module_in_an_own_step() -> None:
    own = Own()
    compiled: Any = torch.compile(own.model)
    own.model = compiled
    found = suanli.profile(own, model=compiled, batch=16, steps=3, device="cpu")
    assert isinstance(found.plan, TrainPlan)
    assert found.plan.compile == "default"
    assert found.categories.backward_ms > 0
    assert found.categories.total_ms == pytest.approx(found.step_ms.p50, rel=0.05)


# -- several processes ----------------------------------------------------------------------------


def _sent(start: float, end: float) -> KernelRun:
    return KernelRun(name="gloo:all_reduce", start_ms=start, end_ms=end)


def test_waiting_is_an_exchange_while_nothing_is_computed() -> None:
    calls = [
        node("aten::addmm", 0, 4),
        node("aten::mm", 4, 10, part="backward"),
        node("aten::add_", 18, 20, part="optimizer"),
    ]
    plain = recording(*calls, ms=20)
    operators = [product(), product(name="mm", phase="backward")]
    step = Recording(
        ms=20, parts=plain.parts, roots=plain.roots, exchanges=(_sent(7, 15), _sent(12, 17))
    )
    joined = join(step, operators)
    assert processes.waited_ms(step, joined) == pytest.approx(7.0), "7 to 10 is hidden"
    assert processes.waited_ms(plain, joined) == 0
    assert processes.takes_part(step)
    assert not processes.takes_part(plain)
    called = recording(
        node("DistributedDataParallel.forward", 0, 1, node("c10d::broadcast_", 0, 1))
    )
    assert processes.takes_part(called)


def test_on_a_device_kernels_hide_what_is_exchanged() -> None:
    runs = [
        KernelRun(name="gemm", start_ms=0, end_ms=6),
        KernelRun(name="ncclDevKernel_AllReduce_Sum_f32", start_ms=4, end_ms=9, stream=1),
    ]
    step = recording(node("aten::addmm", 0, 0.1, device_ms=6.0), ms=10, device=runs)
    assert processes.waited_ms(step, join(step, [product()])) == pytest.approx(3.0)


def test_waiting_is_a_part_of_the_step() -> None:
    parts = {"data": 0.0, "forward": 10.0, "backward": 20.0, "optimizer": 0.0}
    times = step_times(parts, {"forward": 10.0, "backward": 10.0}, waited_ms=7.0)
    assert (times.communication_ms, times.idle_ms) == (7.0, 3.0)
    assert times.total_ms == pytest.approx(30.0)
    times = step_times(parts, {"forward": 10.0, "backward": 18.0}, waited_ms=7.0)
    assert (times.communication_ms, times.idle_ms) == (2.0, 0.0)


def test_a_loader_under_torchrun_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInputError, match="torchrun started 2"):
        suanli.profile(nn.Linear(2, 2), [], LOSS, steps=3, device="cpu")


PROGRAM = """
import json, sys, time
import torch, torch.distributed as dist
from torch import nn
import suanli

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
inner = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
model = nn.parallel.DistributedDataParallel(inner)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.randn(32, 256)

def step():
    optimizer.zero_grad()
    if rank == 1:
        time.sleep(0.05)
    model(x).square().mean().backward()
    optimizer.step()

found = suanli.profile(step, model=model, batch=32, steps=5, device="cpu")
times = found.categories
print("FOUND" + json.dumps({
    "rank": rank, "waits": times.communication_ms, "sum": times.total_ms,
    "step": found.step_ms.p50, "modules": sorted({r.module for r in found.operators}),
    "steps": found.stability.steps, "notes": found.notes,
}), flush=True)
dist.destroy_process_group()
"""


def by_torchrun(*arguments: str) -> str:
    """Standard output of a program that two processes run."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    root = str(Path(__file__).parent.parent)
    ended = subprocess.run(
        [*launcher, "--nproc-per-node", "2", *arguments],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.slow
def test_training_that_several_processes_share() -> None:
    ref = f"{Path(train_parts.__file__)}:still_recipe"
    said = by_torchrun(
        *("-m", "suanli.cli", "profile", ref, "--train", "--batch", "64", "--steps", "4"),
        *("--device", "cpu", "--json", "--check", "1"),
    )
    found = json.loads(said)  # one object: the first process alone speaks
    assert found["categories"]["communication_ms"] > 0
    assert sum(found["categories"].values()) == pytest.approx(found["step_ms"]["p50"], rel=0.05)
    (conv,) = [row for row in found["operators"] if row["name"] == "convolution"]
    assert conv["flops"] == 2 * 32 * 8 * 8 * 8 * 9, "of its own half of the batch"
    assert any("of 2 processes" in note for note in found["notes"])
    assert any("nothing was tried" in note for note in found["notes"])


@pytest.mark.slow
def test_two_processes_of_which_one_waits_for_the_other(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    said = by_torchrun(str(program))
    lines = [line for line in said.splitlines() if "FOUND" in line]
    first, second = sorted(
        (json.loads(line.partition("FOUND")[2]) for line in lines), key=lambda f: f["rank"]
    )
    assert first["waits"] > 25, "half of what the other one sleeps, at the least"
    assert first["waits"] > second["waits"]
    for found in (first, second):
        assert found["sum"] == pytest.approx(found["step"], rel=0.05)
        assert {"0", "2"} <= set(found["modules"])
        assert found["steps"] == 5
        assert any("of 2 processes" in note for note in found["notes"])


def test_steps_that_no_time_was_left_for_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suanli.profiling.measuring._TIME_SECONDS", 0.0)
    found = suanli.profile(nn.Linear(8, 8), torch.randn(2, 8), steps=6, device="cpu")
    assert found.stability.steps == 3
    assert any("3 of 6 steps were timed" in note for note in found.notes)


@pytest.mark.parametrize(
    ("kind", "counted"),
    [
        (torch.optim.Adam, "adam"),
        (torch.optim.SGD, "sgd"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), "sgd-momentum"),
        (torch.optim.Adadelta, "sgd-momentum"),  # there is no formula for it
    ],
)
def test_the_update_of_an_own_optimizer_is_counted_as_what_it_is(kind: Any, counted: str) -> None:
    model = nn.Linear(8, 4)
    batches = [(torch.randn(4, 8), torch.zeros(4, dtype=torch.int64))]
    optimizer = kind(model.parameters())
    subject = training_subjects.of_loader(
        model, batches, LOSS, optimizer=optimizer, plan=TrainPlan()
    )
    assert subject.example is not None
    assert subject.example.optimizer == counted
    subject.close()
