"""Sum of a vector: shuffles within warps, shared memory between them, one atomic a block."""

import torch

from suanli.kernels.declaration import KernelWork, Source
from suanli.kernels.spec import CudaKernel, Launch

SOURCE = r"""
extern "C" __global__ void reduction(const float *x, float *total, int n) {
    __shared__ float partial[32];
    float sum = 0.0f;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        sum += x[i];
    for (int step = 16; step > 0; step /= 2)
        sum += __shfl_down_sync(0xffffffff, sum, step);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
        for (int step = 16; step > 0; step /= 2)
            sum += __shfl_down_sync(0xffffffff, sum, step);
        if (threadIdx.x == 0) atomicAdd(total, sum);
    }
}
"""


def inputs(sizes, dtype, device, seed):
    source = Source(device, seed)
    total = torch.zeros(1, dtype=dtype, device=device)
    return {"x": source.normal(sizes["n"], dtype=dtype), "total": total}


def blocks(sizes, config):
    return min(1024, -(-sizes["n"] // (4 * config["BLOCK"])))


kernel = CudaKernel(
    name="reduction",
    title="sum of a vector",
    source=SOURCE,
    inputs=inputs,
    outputs=lambda sizes, dtype: {},
    writes=("total",),
    arguments=("x", "total", "n"),
    launch=lambda sizes, config: Launch(grid=(blocks(sizes, config),), block=(config["BLOCK"],)),
    tunables={"BLOCK": (256, 128, 512)},
    reference=lambda given: (given["total"] + given["x"].sum(),),
    magnitude=lambda given: (given["x"].abs().sum().reshape(1),),
    work=lambda sizes, size: KernelWork(
        flops=sizes["n"], bytes_read=size * sizes["n"], bytes_written=size
    ),
    check_sizes=({"n": 1}, {"n": 777}, {"n": 5000}),
    bench_sizes=({"n": 1 << 22},),
)
