"""Running sum of rows, one block a row: scan within warps, then over the warps' totals."""

import torch

from suanli.kernels.declaration import KernelWork, Source
from suanli.kernels.spec import CudaKernel, Launch

SOURCE = r"""
extern "C" __global__ void scan(const float *x, float *y, int columns) {
    __shared__ float totals[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float before = 0.0f;
    for (int begin = 0; begin < columns; begin += blockDim.x) {
        int i = begin + threadIdx.x;
        float value = i < columns ? x[(size_t)blockIdx.x * columns + i] : 0.0f;
        for (int step = 1; step < 32; step *= 2) {
            float other = __shfl_up_sync(0xffffffff, value, step);
            if (lane >= step) value += other;
        }
        if (lane == 31) totals[warp] = value;
        __syncthreads();
        float offset = before;
        for (int w = 0; w < warp; w++) offset += totals[w];
        if (i < columns) y[(size_t)blockIdx.x * columns + i] = value + offset;
        for (int w = 0; w < blockDim.x / 32; w++) before += totals[w];
        __syncthreads();
    }
}
"""


def inputs(sizes, dtype, device, seed):
    return {"x": Source(device, seed).normal(sizes["rows"], sizes["columns"], dtype=dtype)}


kernel = CudaKernel(
    name="scan",
    title="running sum of rows",
    source=SOURCE,
    inputs=inputs,
    outputs=lambda sizes, dtype: {"y": ((sizes["rows"], sizes["columns"]), dtype)},
    arguments=("x", "y", "columns"),
    launch=lambda sizes, config: Launch(grid=(sizes["rows"],), block=(config["BLOCK"],)),
    tunables={"BLOCK": (256, 128, 512)},
    reference=lambda given: (torch.cumsum(given["x"], -1),),
    magnitude=lambda given: (torch.cumsum(given["x"].abs(), -1),),
    depth=lambda sizes: sizes["columns"],
    work=lambda sizes, size: KernelWork(
        flops=sizes["rows"] * sizes["columns"],
        bytes_read=size * sizes["rows"] * sizes["columns"],
        bytes_written=size * sizes["rows"] * sizes["columns"],
    ),
    check_sizes=({"rows": 1, "columns": 1}, {"rows": 2, "columns": 600}),
    bench_sizes=({"rows": 4096, "columns": 1024},),
)
