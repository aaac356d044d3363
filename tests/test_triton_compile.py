"""Machine code for GPUs that are not here."""

from pathlib import Path

import pytest

from suanli.base.errors import BadInputError
from suanli.base.lazy import present
from suanli.kernels import isolated
from suanli.kernels.isolated import CompileRequest, compile_isolated
from suanli.kernels.occupancy import occupancy
from suanli.kernels.shipped import shipped, shipped_kernel
from suanli.kernels.triton_compile import _usage

pytestmark = pytest.mark.skipif(not present("triton"), reason="pip install triton")
FAULTS = Path(__file__).with_name("triton_faults.py")


def _request(name: str, arch: str, dtype: str = "bf16") -> CompileRequest:
    return CompileRequest(sizes=shipped_kernel(name).bench_sizes[0], dtype=dtype, arch=arch)


def test_a_kernel_compiles_for_several_architectures(tmp_path: Path) -> None:
    requests = [_request("norm", arch) for arch in ("sm_80", "sm_90", "sm_100")]
    results = compile_isolated("norm", requests, keep=tmp_path)
    for result in results:
        assert result.reason == ""
        (function,) = result.functions
        assert function.arch == result.request.arch
        assert 16 <= function.registers <= 255
        assert function.blocks == 8192
        assert function.threads == 256
        assert Path(function.cubin).read_bytes()[:4] == b"\x7fELF"
    assert len({Path(r.functions[0].cubin).read_bytes() for r in results}) == 3


def test_matrix_products_use_tensor_cores_and_shared_memory(tmp_path: Path) -> None:
    (result,) = compile_isolated("int8_linear", [_request("int8_linear", "sm_90")], keep=tmp_path)
    (function,) = result.functions
    assert function.dynamic_shared_bytes > 1024


def test_one_call_may_launch_several_functions() -> None:
    (result,) = compile_isolated("batch_norm", [_request("batch_norm", "sm_80")])
    assert {f.name for f in result.functions} == {"statistics", "apply_pool"}


def test_what_does_not_compile_is_a_reason() -> None:
    request = CompileRequest(sizes={"n": 4096}, dtype="fp32", arch="sm_90")
    (result,) = compile_isolated(f"{FAULTS}:syntax", [request])
    assert result.functions == ()
    assert "no_such_function" in result.reason


def test_an_unknown_architecture_is_bad_input() -> None:
    with pytest.raises(BadInputError, match="sm_90"):
        compile_isolated("norm", [_request("norm", "sm_42")])


def test_a_compile_that_hangs_is_ended_and_the_next_one_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    original = isolated._OneWorker.call

    def call(self: isolated._OneWorker, method: str, timeout_s: float, arguments: dict) -> object:  # type: ignore[type-arg]
        calls.append(method)
        if len(calls) == 1:
            return original(self, "hang", 0.5, {})
        return original(self, method, 60.0, arguments)

    monkeypatch.setattr(isolated._OneWorker, "call", call)
    first, second = compile_isolated("norm", [_request("norm", "sm_80")] * 2)
    assert "0.5 s" in first.reason
    assert second.functions


def test_spills_are_read_from_the_assembler() -> None:
    log = (
        "ptxas info    : Function properties for f\n"
        "    48 bytes stack frame, 44 bytes spill stores, 40 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 2048 bytes smem\n"
    )
    assert _usage(log, b"") == {
        "registers": 255,
        "stack_bytes": 48,
        "spill_store_bytes": 44,
        "spill_load_bytes": 40,
        "static_shared_bytes": 2048,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list(shipped()))
def test_every_shipped_kernel_compiles(name: str) -> None:
    kernel = shipped_kernel(name)
    requests = [
        CompileRequest(sizes=kernel.bench_sizes[0], dtype=dtype, arch=arch)
        for dtype in ("bf16", "fp32")
        for arch in ("sm_80", "sm_90", "sm_100")
    ]
    for result in compile_isolated(name, requests, timeout_s=120):
        assert result.reason == "", (result.request.arch, result.request.dtype)
        for function in result.functions:
            assert function.spill_store_bytes == 0, function
            room = occupancy(
                function.arch,
                threads=function.threads,
                registers=function.registers,
                static_shared_bytes=function.static_shared_bytes,
                dynamic_shared_bytes=function.dynamic_shared_bytes,
            )
            assert room.blocks >= 1, function
