"""What happens on a GPU, against stand-ins: faults that break a context, sums in another order."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from suanli.base.errors import SuanliError, TrialFailedError
from suanli.devices import find_sheet
from suanli.kernels import _gpu_worker, benches, checking, gpu_check
from suanli.kernels.benches import GpuBench
from suanli.kernels.checking import check_here
from suanli.kernels.cuda.declared import declaration
from suanli.kernels.declaration import Config, Inputs, Outputs
from suanli.kernels.launching import empty
from tests.kernel_parts import ref, simple

KERNEL = declaration(simple(""))


def here(monkeypatch: pytest.MonkeyPatch, run: Callable[[Inputs, Config], Outputs]) -> Any:
    """One case as on "cuda:0", with the CPU's memory."""
    memory = checking.GuardedMemory
    monkeypatch.setattr(checking, "GuardedMemory", lambda _, pattern: memory("cpu", pattern))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    kernel = replace(KERNEL, run=run, inputs=lambda s, t, d, n: KERNEL.inputs(s, t, "cpu", n))
    return check_here(kernel, {"n": 64}, "fp32", device="cuda:0")


def test_sums_in_another_order_are_right_where_both_are(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter((1.0, 1.0 + 2**-24, 1.0, 1.0 + 1e-3))

    def last_bit(inputs: Inputs, config: Config) -> Outputs:
        return (inputs["x"] * next(runs),)

    assert here(monkeypatch, last_bit).reason == ""
    wrong = here(monkeypatch, last_bit)
    assert wrong.status == "rejected" and "times the bound" in wrong.reason


def test_a_poisoned_value_is_still_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(inputs: Inputs, config: Config) -> Outputs:
        made = empty((64,), torch.float32, torch.device("cpu"))
        made[:63] = inputs["x"][:63]
        return (made,)

    assert "NaN or not written" in here(monkeypatch, forgetful).reason


class Broken:
    """A worker whose first call faults on the GPU and breaks all later ones."""

    made: ClassVar[list["Broken"]] = []

    def __init__(self, *_: Any, **__: Any) -> None:
        self.alive, self.calls = True, 0
        self.faults = not Broken.made
        Broken.made.append(self)

    def call(self, method: str, *, timeout_s: float, **arguments: Any) -> Any:
        self.calls += 1
        if method == "healthy":
            return not self.faults
        if self.faults:
            if method == "check":
                return case("failed", "an illegal memory access", arguments["sizes"])
            raise TrialFailedError("an illegal memory access", kind="error")
        return case("verified", "", arguments["sizes"]) if method == "check" else ""

    def close(self) -> None:
        self.alive = False


def case(status: str, reason: str, sizes: dict[str, int]) -> dict[str, Any]:
    made = {"kernel": "kernel", "sizes": sizes, "dtype": "fp32", "config": {}, "where": "cuda:0"}
    return {**made, "status": status, "reason": reason}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[Broken]:
    Broken.made = []
    monkeypatch.setattr(gpu_check, "Worker", Broken)
    monkeypatch.setattr(benches, "Worker", Broken)
    return Broken.made


def test_the_case_after_a_fault_gets_a_fresh_process(broken: list[Broken]) -> None:
    kernel = replace(KERNEL, check_sizes=({"n": 1}, {"n": 2}, {"n": 3}))
    cases = gpu_check.check_on_gpu("kernel.py", kernel, "cuda:0")
    assert [c.status for c in cases] == ["failed", "verified", "verified"]
    assert len(broken) == 2 and not broken[0].alive


def test_the_configuration_after_a_fault_gets_a_fresh_process(
    broken: list[Broken], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(info=SimpleNamespace(fingerprint="card"))
    monkeypatch.setattr(benches, "open_device", lambda _: card)
    monkeypatch.setattr(benches, "present", lambda _: True)
    monkeypatch.setattr(benches, "Compilation", lambda *_, **__: None)
    sheet = find_sheet("h200-sxm-141gb")
    bench = GpuBench("kernel.py", KERNEL, {"n": 64}, "fp32", sheet, device="cuda:0")
    assert bench.verify({}) == "an illegal memory access"
    assert not broken[0].alive
    assert bench.verify({}) == ""
    assert len(broken) == 2


@pytest.mark.parametrize("status", ["verified", "rejected", "failed"])
def test_a_crash_is_told_from_a_wrong_answer(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(status=status, reason="it is off")
    monkeypatch.setattr(_gpu_worker, "check_here", lambda *_, **__: found)
    worker = _gpu_worker.GpuWorker(ref("vector_add"), {"n": 64}, "fp32", "cpu")
    monkeypatch.setattr(worker, "_fits", lambda: False)
    assert worker.healthy()
    if status == "failed":
        with pytest.raises(SuanliError, match="it is off"):
            worker.verify({"BLOCK": 256})
    else:
        said = worker.verify({"BLOCK": 256})
        assert said == "" if status == "verified" else said.startswith("it is off")


def test_a_context_that_broke_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _gpu_worker.GpuWorker(ref("vector_add"), {"n": 64}, "fp32", "cpu")

    def faulted(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(_gpu_worker.torch, "zeros", faulted)
    assert not worker.healthy()
