"""Launching through the CUDA driver, against a stand-in for its library."""

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from suanli.base.errors import BadInputError, SuanliError
from suanli.kernels.compiled import CompiledKernel
from suanli.kernels.cuda import driver as driving
from suanli.kernels.cuda.compile import CudaCode
from suanli.kernels.cuda.declared import declaration
from suanli.kernels.cuda.driver import Driver
from suanli.kernels.spec import Launch
from tests.kernel_parts import simple

CPU = torch.device("cpu")


class FakeCuda:
    """Does on the CPU what the driver would: copies x to y, and keeps what it was told."""

    def __init__(self, *, launch_code: int = 0) -> None:
        self.launch_code = launch_code
        self.loaded: list[bytes] = []
        self.launches: list[tuple[int, ...]] = []
        self.attributes: list[tuple[int, int]] = []

    def cuModuleLoadData(self, module: Any, code: bytes) -> int:
        self.loaded.append(code)
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        assert name == b"kernel"
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: Any, value: Any) -> int:
        self.attributes.append((attribute.value, value.value))
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        self.launches.append(tuple(item.value for item in rest[:7]))
        if self.launch_code:
            return self.launch_code
        pointers = rest[8]
        x, y = (ctypes.cast(pointers[i], ctypes.POINTER(ctypes.c_void_p))[0] for i in (0, 1))
        n = ctypes.cast(pointers[2], ctypes.POINTER(ctypes.c_int))[0]
        ctypes.memmove(y, x, 4 * n)
        return 0

    def cuGetErrorString(self, code: Any, text: Any) -> int:
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"an illegal memory access"
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """No compiler and no GPU: only what stands between them."""
    asked: list[str] = []

    def compile_cuda(kernel: Any, arch: str, **_: Any) -> CudaCode:
        asked.append(arch)
        record = CompiledKernel(name="kernel", arch=arch, compiler="none", registers=8)
        return CudaCode(record=record, code=b"cubin")

    monkeypatch.setattr(driving, "compile_cuda", compile_cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    yield asked


def test_launches_with_the_grid_and_the_arguments(compiled: list[str]) -> None:
    cuda = FakeCuda()
    kernel = simple("", blocks=2)
    x, y = torch.arange(128.0), torch.zeros(128)
    values = {"x": x, "y": y, "sizes": {"n": 128}}
    driver = Driver(cuda)
    for _ in range(2):
        driver.launch(kernel, values, {}, "fp32", CPU)
    assert torch.equal(x, y)
    assert cuda.launches == [(2, 1, 1, 64, 1, 1, 0)] * 2
    assert compiled == ["sm_90"] and cuda.loaded == [b"cubin"]  # once for both launches
    assert cuda.attributes == []


def test_much_shared_memory_is_asked_for(compiled: list[str]) -> None:
    cuda = FakeCuda()
    kernel = simple(
        "", launch=lambda sizes, config: Launch(grid=(1,), block=(64,), shared_bytes=100_000)
    )
    values = {"x": torch.zeros(64), "y": torch.zeros(64), "sizes": {"n": 64}}
    Driver(cuda).launch(kernel, values, {}, "fp32", CPU)
    assert cuda.attributes == [(8, 100_000)]
    assert cuda.launches[0][6] == 100_000


@pytest.mark.parametrize(("code", "error"), [(701, BadInputError), (700, SuanliError)])
def test_what_the_driver_says_is_said(
    compiled: list[str], code: int, error: type[Exception]
) -> None:
    values = {"x": torch.zeros(64), "y": torch.zeros(64), "sizes": {"n": 64}}
    with pytest.raises(error, match="launching kernel: an illegal memory access"):
        Driver(FakeCuda(launch_code=code)).launch(simple(""), values, {}, "fp32", CPU)


def test_runs_as_a_declaration(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Driver(FakeCuda())
    monkeypatch.setattr(Driver, "here", staticmethod(lambda: cuda))
    stated = declaration(simple(""))
    inputs = stated.inputs({"n": 64}, torch.float32, "cpu", 3)
    (made,) = stated.run(inputs, {})
    assert torch.equal(made, inputs["x"])
    assert stated.sizes(inputs) == {"n": 64}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vector_add", "matmul", "tensor_core_matmul", "histogram"])
def test_examples_on_the_gpu(name: str) -> None:
    from suanli.kernels.gpu_check import check_on_gpu
    from suanli.kernels.spec import CudaKernel, load
    from tests.kernel_parts import ref

    kernel = load(ref(name))
    assert isinstance(kernel, CudaKernel)
    cases = check_on_gpu(ref(name), declaration(kernel), "cuda:0")
    assert [case.reason for case in cases if case.status != "verified"] == []
