"""Softmax of rows, one block a row: largest value, sum of exponentials, division."""

import torch

from suanli.kernels.declaration import KernelWork, Source
from suanli.kernels.spec import CudaKernel, Launch

SOURCE = r"""
__device__ float over_block(float value, bool largest) {
    __shared__ float partial[32];
    for (int step = 16; step > 0; step /= 2) {
        float other = __shfl_xor_sync(0xffffffff, value, step);
        value = largest ? fmaxf(value, other) : value + other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = partial[0];
    for (int i = 1; i < BLOCK / 32; i++)
        value = largest ? fmaxf(value, partial[i]) : value + partial[i];
    return value;
}

extern "C" __global__ void softmax(const float *x, float *y, int columns) {
    const float *row = x + (size_t)blockIdx.x * columns;
    float most = -INFINITY;
    for (int i = threadIdx.x; i < columns; i += BLOCK) most = fmaxf(most, row[i]);
    most = over_block(most, true);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < columns; i += BLOCK) sum += expf(row[i] - most);
    sum = over_block(sum, false);
    for (int i = threadIdx.x; i < columns; i += BLOCK)
        y[(size_t)blockIdx.x * columns + i] = expf(row[i] - most) / sum;
}
"""


def inputs(sizes, dtype, device, seed):
    return {"x": Source(device, seed).normal(sizes["rows"], sizes["columns"], dtype=dtype, scale=4)}


kernel = CudaKernel(
    name="softmax",
    title="softmax of rows",
    source=SOURCE,
    inputs=inputs,
    outputs=lambda sizes, dtype: {"y": ((sizes["rows"], sizes["columns"]), dtype)},
    arguments=("x", "y", "columns"),
    launch=lambda sizes, config: Launch(grid=(sizes["rows"],), block=(config["BLOCK"],)),
    tunables={"BLOCK": (256, 128, 512)},
    reference=lambda given: (torch.softmax(given["x"], -1),),
    depth=lambda sizes: sizes["columns"],
    work=lambda sizes, size: KernelWork(
        flops=5 * sizes["rows"] * sizes["columns"],
        bytes_read=size * sizes["rows"] * sizes["columns"],
        bytes_written=size * sizes["rows"] * sizes["columns"],
    ),
    check_sizes=({"rows": 1, "columns": 1}, {"rows": 3, "columns": 700}),
    bench_sizes=({"rows": 4096, "columns": 1024},),
)
