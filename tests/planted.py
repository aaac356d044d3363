"""Backends with planted faults, for tests that the search catches each of them."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from suanli.base.plan import BackendSpec, Plan, Precision
from suanli.engines.backend import BuildNote, LayerTime
from suanli.engines.program import Program


class _Runner:
    def __init__(self, program: Program, precision: str) -> None:
        self._program = program
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._module = program.exported_module().to(self._dtype)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():
            cast = [t.to(self._dtype) if t.is_floating_point() else t for t in inputs]
            return [t.float() for t in self._program.call(self._module, cast)]

    def layer_times(self, inputs: Sequence[torch.Tensor]) -> list[LayerTime]:
        return []

    def close(self) -> None:
        return None


class WrongRunner(_Runner):
    """Adds 1 % to the logits of class 3."""

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outputs = super().__call__(inputs)
        outputs[0][:, 3] *= 1.01
        return outputs


class SlowRunner(_Runner):
    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        time.sleep(0.08)  # more than two threads that share a core with others take
        return super().__call__(inputs)


class CrashingRunner(_Runner):
    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        os.kill(os.getpid(), signal.SIGSEGV)
        return []


class HangingRunner(_Runner):
    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        while True:
            time.sleep(3600)


class GreedyRunner(_Runner):
    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        hoard = []
        for _ in range(400):
            hoard.append(torch.ones(2**24))  # 64 MiB a piece, touched
            time.sleep(0.01)
        return super().__call__(inputs)


class UnwrittenRunner(_Runner):
    """Computes the first answer of each batch size, then hands out the same buffer unwritten."""

    def __init__(self, program: Program, precision: str) -> None:
        super().__init__(program, precision)
        self._kept: dict[int, list[torch.Tensor]] = {}

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        size = int(inputs[0].shape[0])
        if size not in self._kept:
            self._kept[size] = super().__call__(inputs)
        return self._kept[size]


class NanRunner(_Runner):
    """One NaN in one answer of many."""

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outputs = super().__call__(inputs)
        if outputs[0].shape[0] > 1:
            outputs[0][1, 1] = float("nan")
        return outputs


class Planted:
    """A backend around one of the runners."""

    def __init__(self, name: str, runner: Any, precision: Precision = "bf16") -> None:
        self._runner = runner
        self.spec = BackendSpec(
            name=name,
            install="part of the tests",
            packages=("torch",),
            precisions={"cpu": (precision,)},
            build_s=0.1,
            promise={precision: 0.01},
        )

    def build(
        self, program: Program, plan: Plan, folder: Path, calibration: Any = None
    ) -> BuildNote:
        (folder / "built.txt").write_text("built")
        return BuildNote(plan=plan)

    def load(self, program: Program, plan: Plan, folder: Path) -> Any:
        return self._runner(program, plan.precision)


WRONG = Planted("planted-wrong", WrongRunner)
SLOW = Planted("planted-slow", SlowRunner)
CRASHING = Planted("planted-crashing", CrashingRunner)
HANGING = Planted("planted-hanging", HangingRunner)
GREEDY = Planted("planted-greedy", GreedyRunner)
UNWRITTEN = Planted("planted-unwritten", UnwrittenRunner)
NAN = Planted("planted-nan", NanRunner)


class BatchRunner(_Runner):
    """Right for single samples; for more the classes are reversed, or not finite."""

    def __init__(self, program: Program, fill: float | None) -> None:
        super().__init__(program, "fp32")
        self._fill = fill

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outputs = super().__call__(inputs)
        if len(outputs[0]) == 1:
            return outputs
        return [outputs[0].flip(-1) if self._fill is None else outputs[0].fill_(self._fill)]


class FarRunner(_Runner):
    """Answers far from the model's."""

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [output * 5 + 3 for output in super().__call__(inputs)]


class OldStateRunner(_Runner):
    """Its second output is that of the first call of each batch size."""

    def __init__(self, program: Program, precision: str) -> None:
        super().__init__(program, precision)
        self._kept: dict[int, torch.Tensor] = {}

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        first, second = super().__call__(inputs)
        return [first, self._kept.setdefault(len(first), second).clone()]


class PlantedInt8(Planted):
    """The same as a quantised plan, which labels or a tolerance have to judge."""

    def __init__(self, name: str, runner: Any) -> None:
        super().__init__(name, runner)
        self.spec = BackendSpec(
            name=name,
            install="part of the tests",
            packages=("torch",),
            quantizations={"cpu": ("int8-static",)},
            build_s=0.1,
            promise={"int8-static": 0.001},
        )


REVERSED = PlantedInt8("planted-reversed", lambda program, _: BatchRunner(program, None))
INFINITE = PlantedInt8("planted-infinite", lambda program, _: BatchRunner(program, float("inf")))
FAR = PlantedInt8("planted-far", FarRunner)
OLD_STATE = Planted("planted-old_state", OldStateRunner, "fp32")
