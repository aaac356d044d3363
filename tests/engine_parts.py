"""A small model, its program, and a backend that is quick to build: parts of engines in tests."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from suanli.base.plan import BackendSpec, Plan
from suanli.engines.assembly import BuiltVariant, write_engine
from suanli.engines.backend import BuildNote, LayerTime
from suanli.engines.manifest import Manifest
from suanli.engines.program import Program, capture
from suanli.workloads.record import Inputs

PLAN = Plan(backend="quick", precision="bf16")
OTHER = Plan(backend="quick", precision="fp32", memory_layout="channels_last")


class Net(nn.Module):
    """Two inputs, a result in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one = nn.Linear(6, 8)
        self.two = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.one(x)) + shift
        return {"logits": self.two(hidden), "hidden": hidden}


class QuickRunner:
    """Runs the exported program and notes how it was used."""

    def __init__(self, program: Program, plan: Plan, folder: Path) -> None:
        self.marker = (folder / "built.bin").read_text()
        self.program, self.module, self.plan = program, program.exported_module(), plan
        self.batches: list[int] = []
        self.inside = self.most_inside = 0
        self.closed = False
        self.guard = threading.Lock()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        assert not self.closed, "called after close"
        assert all(t.is_contiguous() and not t.requires_grad for t in inputs)
        with self.guard:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            self.batches.append(inputs[0].shape[0])
        time.sleep(0.002)
        result = self.program.call(self.module, inputs)
        with self.guard:
            self.inside -= 1
        return result

    def layer_times(self, inputs: Sequence[torch.Tensor]) -> list[LayerTime]:
        return [LayerTime(name="all", kind="net", time_ms=1.0)]

    def close(self) -> None:
        assert self.inside == 0, "closed under a call"
        self.closed = True


class QuickBackend:
    """Writes one file; loads with the packages it is told."""

    def __init__(self, packages: tuple[str, ...] = ()) -> None:
        self.spec = BackendSpec(name="quick", install="pip install quick", packages=packages)
        self.runners: list[QuickRunner] = []
        self.fails: Exception | None = None
        self.concurrent = False

    def build(
        self,
        program: Program,
        plan: Plan,
        folder: Path,
        calibration: Sequence[tuple[torch.Tensor, ...]] | None = None,
    ) -> BuildNote:
        (folder / "nested").mkdir()
        (folder / "built.bin").write_text(plan.title)
        (folder / "nested" / "more.bin").write_bytes(bytes(range(256)) * 8)
        return BuildNote(plan=plan)

    def load(self, program: Program, plan: Plan, folder: Path) -> QuickRunner:
        if self.fails is not None:
            raise self.fails
        runner = QuickRunner(program, plan, folder)
        if self.concurrent:
            runner.concurrent = True  # type: ignore[attr-defined]
        self.runners.append(runner)
        return runner


def example(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 6, generator=generator)
    return x, torch.randn(batch, 8, generator=generator)


def make_program(folder: Path, *, max_batch: int = 8, dynamic: bool = True) -> Program:
    return capture(
        Net(),
        Inputs(args=example(4)),
        folder=folder,
        name="net",
        max_batch=max_batch,
        dynamic=dynamic,
    )


def make_engine(
    target: Path,
    program: Program,
    scratch: Path,
    *,
    ranges: Sequence[tuple[Plan, int, int]] = ((PLAN, 1, 8),),
    **options: object,
) -> Manifest:
    built = []
    for index, (plan, low, high) in enumerate(ranges):
        folder = scratch / f"build-{len(list(scratch.glob('build-*')))}-{index}"
        folder.mkdir(parents=True)
        QuickBackend().build(program, plan, folder)
        built.append(BuiltVariant(plan=plan, folder=folder, min_batch=low, max_batch=high))
    return write_engine(target, program=program, variants=built, **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


NET = Net().eval()


def expected(batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        result: dict[str, torch.Tensor] = NET(*example(batch, seed))
    return result


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
