"""c = a + b: one thread an element, the last block partly idle. Bound by memory bandwidth."""

import torch

from suanli.kernels.declaration import KernelWork, Source
from suanli.kernels.spec import CudaKernel, Launch

SOURCE = r"""
extern "C" __global__ void vector_add(const float *a, const float *b, float *c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = a[i] + b[i];
}
"""


def inputs(sizes, dtype, device, seed):
    source = Source(device, seed)
    return {name: source.normal(sizes["n"], dtype=dtype) for name in ("a", "b")}


kernel = CudaKernel(
    name="vector_add",
    title="element-wise sum of two vectors",
    source=SOURCE,
    inputs=inputs,
    outputs=lambda sizes, dtype: {"c": ((sizes["n"],), dtype)},
    arguments=("a", "b", "c", "n"),
    launch=lambda sizes, config: Launch(
        grid=(-(-sizes["n"] // config["BLOCK"]),), block=(config["BLOCK"],)
    ),
    tunables={"BLOCK": (256, 128, 512, 1024)},
    reference=lambda given: (torch.add(given["a"], given["b"]),),
    work=lambda sizes, size: KernelWork(
        flops=sizes["n"], bytes_read=2 * size * sizes["n"], bytes_written=size * sizes["n"]
    ),
    check_sizes=({"n": 1}, {"n": 1000}, {"n": 4096}),
    bench_sizes=({"n": 1 << 22},),
)
