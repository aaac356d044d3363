"""The shipped kernels through Triton's interpreter, and planted faults that it has to see."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from suanli.base.errors import BadInputError, MissingBackendError
from suanli.base.lazy import present
from suanli.kernels import isolated
from suanli.kernels.checking import check_here
from suanli.kernels.guarded import GuardedMemory
from suanli.kernels.isolated import CheckRequest, check_isolated, check_kernel
from suanli.kernels.shipped import shipped, shipped_kernel
from suanli.kernels.subjects import find_kernel

FAULTS = Path(__file__).with_name("triton_faults.py")
needs_triton = pytest.mark.skipif(not present("triton"), reason="pip install triton")

NAMED = {
    "no_mask": "bytes written behind its memory",
    "tail": "NaN or not written",
    "shifted": "NaN",
    "changes_input": "input x was changed",
    "slightly_wrong": "times the bound",
    "overflow": "of 100 values are",
}
# One process checks them all: starting one costs more than checking.
_ALL = """
import json, sys
from suanli.base import codec
from suanli.kernels.checking import check_here
from suanli.kernels.shipped import shipped
from suanli.kernels.subjects import find_kernel

def check(kernel, sizes, dtype, seed=0):
    print(json.dumps(codec.to_json(check_here(kernel, sizes, dtype, seed=seed))))

for ref in sys.argv[1:]:
    check(find_kernel(ref), {"n": 100}, "fp32")
for kernel in shipped().values():
    for seed, sizes in enumerate(kernel.check_sizes):
        for dtype in kernel.dtypes:
            check(kernel, sizes, dtype, seed)
"""


@pytest.fixture(scope="module")
def checked() -> list[dict[str, Any]]:
    """The cases of all named faults, then those of all shipped kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        done = subprocess.run(
            [sys.executable, "-c", _ALL, *(f"{FAULTS}:{name}" for name in NAMED)],
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
def test_every_shipped_kernel_is_right(checked: list[dict[str, Any]]) -> None:
    cases = checked[len(NAMED) :]
    wrong = [c for c in cases if c["status"] != ("refused" if c["dtype"] == "bf16" else "verified")]
    assert not wrong
    judged = {(c["kernel"], c["dtype"]) for c in cases if c["status"] == "verified"}
    assert judged == {(name, dtype) for name in shipped() for dtype in ("fp32", "fp16")}
    assert all(0 <= c["error_share"] <= 1 for c in cases if c["status"] == "verified")


@needs_triton
@pytest.mark.parametrize("name", NAMED)
def test_planted_faults_are_seen(name: str, checked: list[dict[str, Any]]) -> None:
    case = checked[list(NAMED).index(name)]
    assert case["status"] == "rejected"
    assert NAMED[name] in case["reason"]


@needs_triton
@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [("right", "verified", ""), ("syntax", "failed", "no_such_function")],
)
def test_a_file_of_ones_own_is_checked_in_another_process(
    name: str, status: str, reason: str
) -> None:
    ref = f"{FAULTS}:{name}"
    (case,) = check_isolated(ref, find_kernel(ref), [CheckRequest(sizes={"n": 100}, dtype="fp32")])
    assert case.status == status
    assert reason in case.reason


@needs_triton
def test_bf16_is_refused_and_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "Worker", None)
    kernel = shipped_kernel("norm")
    requests = [CheckRequest(sizes=kernel.check_sizes[0], dtype="bf16")]
    (case,) = check_isolated("norm", kernel, requests)
    assert case.status == "refused"
    assert "bf16" in case.reason


def test_absent_triton_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "present", lambda name: False)
    with pytest.raises(MissingBackendError, match="pip install triton"):
        check_kernel("norm", shipped_kernel("norm"))


def test_unknown_names_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="linear_cross_entropy"):
        find_kernel("nonesuch")
    with pytest.raises(BadInputError, match="fp8"):
        check_here(shipped_kernel("norm"), {"rows": 1}, "fp8")
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\ny = undefined\n")
    with pytest.raises(BadInputError, match=r"broken.py:2: NameError"):
        find_kernel(f"{broken}:k")


def test_guards_see_one_byte_on_either_side() -> None:
    for offset in (-1, 12):
        memory = GuardedMemory("cpu")
        tensor = memory.empty((3,), torch.float32, torch.device("cpu"))
        assert tensor.isnan().all()
        raw = torch.empty(0, dtype=torch.uint8).set_(
            tensor.untyped_storage(), 0, (tensor.untyped_storage().nbytes(),)
        )
        place = tensor.storage_offset() * 4 + offset
        raw[place] = 7 if int(raw[place]) != 7 else 8
        (seen,) = memory.violations()
        assert ("before" if offset < 0 else "behind") in seen


def test_writing_inside_is_no_violation() -> None:
    memory = GuardedMemory("cpu")
    source = torch.arange(12.0).reshape(3, 4).t()
    copy = memory.copy("x", source)
    assert copy.stride() == source.stride()
    assert torch.equal(copy, source)
    copy.zero_()
    memory.empty((0,), torch.int8, torch.device("cpu"))
    assert memory.violations() == []
