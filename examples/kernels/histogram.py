"""Histogram of bytes: every block counts in shared memory with atomics, then adds to the result.

The data has few different values, as pictures have, so many lanes of a warp meet on one counter.
"""

import torch

from suanli.kernels.declaration import KernelWork, Source
from suanli.kernels.spec import CudaKernel, Launch

SOURCE = r"""
extern "C" __global__ void histogram(const int *values, int *counts, int n) {
    __shared__ int local[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        atomicAdd(&local[values[i] & 255], 1);
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x)
        if (local[i]) atomicAdd(&counts[i], local[i]);
}
"""


def inputs(sizes, dtype, device, seed):
    values = Source(device, seed).integers(sizes["n"], low=0, high=4, dtype=torch.int32)
    return {"values": values, "counts": torch.zeros(256, dtype=torch.int32, device=device)}


def count(given):
    found = torch.bincount(given["values"].long(), minlength=256)
    return (given["counts"] + found.to(torch.int32),)


def blocks(sizes, config):
    return min(512, -(-sizes["n"] // (8 * config["BLOCK"])))


kernel = CudaKernel(
    name="histogram",
    title="histogram of bytes",
    source=SOURCE,
    inputs=inputs,
    outputs=lambda sizes, dtype: {},
    writes=("counts",),
    arguments=("values", "counts", "n"),
    launch=lambda sizes, config: Launch(grid=(blocks(sizes, config),), block=(config["BLOCK"],)),
    tunables={"BLOCK": (256, 512)},
    dtypes=("int32",),
    reference=count,
    work=lambda sizes, size: KernelWork(
        flops=sizes["n"], bytes_read=size * sizes["n"], bytes_written=size * 256
    ),
    check_sizes=({"n": 1}, {"n": 3001}),
    bench_sizes=({"n": 1 << 22},),
)
