"""Small CUDA kernels for tests, and what is needed to check them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from suanli.base.kernel_results import KernelCase
from suanli.kernels.cuda.checking import check_cuda
from suanli.kernels.declaration import KernelWork, Source
from suanli.kernels.spec import CudaKernel, Launch

EXAMPLES = Path(__file__).parent.parent / "examples" / "kernels"
REFS = {
    "vector_add": "vector_add.py",
    "reduction": "reduction.py",
    "transpose_naive": "transpose.py:naive",
    "transpose_conflicts": "transpose.py:conflicts",
    "transpose_padded": "transpose.py:padded",
    "matmul": "matmul.py",
    "tensor_core_matmul": "tensor_core_matmul.py",
    "convolution": "convolution.py",
    "softmax": "softmax.py",
    "histogram": "histogram.py",
    "stencil": "stencil.py",
    "scan": "scan.py",
}


def ref(name: str) -> str:
    return str(EXAMPLES / REFS[name])


def simple(body: str, **changes: Any) -> CudaKernel:
    """A kernel x -> y of n floats; by default one block of 64 threads for 64 elements."""
    threads = changes.pop("threads", 64)
    blocks = changes.pop("blocks", 1)
    shared = changes.pop("shared", 0)
    head = changes.pop("head", "")
    source = (
        f"{head}\n"
        'extern "C" __global__ void kernel(const float *x, float *y, int n) {\n'
        "    int i = blockIdx.x * blockDim.x + threadIdx.x;\n"
        f"{body}\n"
        "}\n"
    )
    given: dict[str, Any] = {
        "name": "kernel",
        "source": source,
        "inputs": lambda sizes, dtype, device, seed: {
            "x": Source(device, seed).normal(sizes["n"], dtype=dtype)
        },
        "outputs": lambda sizes, dtype: {"y": ((sizes["n"],), dtype)},
        "arguments": ("x", "y", "n"),
        "launch": lambda sizes, config: Launch(
            grid=(blocks,), block=(threads,), shared_bytes=shared
        ),
        "reference": lambda inputs: (inputs["x"].clone(),),
        "work": lambda sizes, size: KernelWork(
            flops=0, bytes_read=size * sizes["n"], bytes_written=size * sizes["n"]
        ),
        "check_sizes": ({"n": threads * blocks},),
        "bench_sizes": ({"n": threads * blocks},),
    }
    return CudaKernel(**{**given, **changes})


def only_case(kernel: CudaKernel, **options: Any) -> KernelCase:
    (case,) = check_cuda(kernel, **options)
    return case


def is_named(body: str, kind: str, text: str) -> None:
    """The kernel with this body is rejected, with a finding of this kind that says so."""
    case = only_case(simple(body))
    assert case.status == "rejected"
    assert kind in kinds(case), case.findings
    assert any(text in f.text for f in case.findings if f.kind == kind), case.findings


def kinds(case: KernelCase) -> set[str]:
    return {finding.kind for finding in case.findings if finding.severity == "error"}


def swapped(inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Reference of kernels that turn the vector around."""
    return (inputs["x"].flip(0),)
