"""Transpose of a matrix in three ways.

Straight through global memory, through shared memory with bank conflicts, and with one column of
padding, which takes the conflicts away.
"""

from suanli.kernels.declaration import KernelWork, Source
from suanli.kernels.spec import CudaKernel, Launch

NAIVE = r"""
extern "C" __global__ void transpose_naive(const float *in, float *out, int rows, int columns) {
    int column = blockIdx.x * 32 + threadIdx.x;
    for (int k = 0; k < 32; k += 8) {
        int row = blockIdx.y * 32 + threadIdx.y + k;
        if (row < rows && column < columns) out[column * rows + row] = in[row * columns + column];
    }
}
"""

TILED = r"""
extern "C" __global__ void transpose_tiled(const float *in, float *out, int rows, int columns) {
    __shared__ float tile[32][32 + PADDING];
    int column = blockIdx.x * 32 + threadIdx.x;
    for (int k = 0; k < 32; k += 8) {
        int row = blockIdx.y * 32 + threadIdx.y + k;
        if (row < rows && column < columns)
            tile[threadIdx.y + k][threadIdx.x] = in[row * columns + column];
    }
    __syncthreads();
    int row = blockIdx.y * 32 + threadIdx.x;
    for (int k = 0; k < 32; k += 8) {
        int other = blockIdx.x * 32 + threadIdx.y + k;
        if (row < rows && other < columns)
            out[other * rows + row] = tile[threadIdx.x][threadIdx.y + k];
    }
}
"""


def inputs(sizes, dtype, device, seed):
    return {"in": Source(device, seed).normal(sizes["rows"], sizes["columns"], dtype=dtype)}


def launch(sizes, config):
    return Launch(grid=(-(-sizes["columns"] // 32), -(-sizes["rows"] // 32)), block=(32, 8))


def transpose(name, source, entry, padding=0):
    return CudaKernel(
        name=name,
        title="transpose of a matrix",
        source=source,
        entry=entry,
        constants=lambda sizes, config: {"PADDING": padding},
        inputs=inputs,
        outputs=lambda sizes, dtype: {"out": ((sizes["columns"], sizes["rows"]), dtype)},
        arguments=("in", "out", "rows", "columns"),
        launch=launch,
        reference=lambda given: (given["in"].T.contiguous(),),
        work=lambda sizes, size: KernelWork(
            flops=0,
            bytes_read=size * sizes["rows"] * sizes["columns"],
            bytes_written=size * sizes["rows"] * sizes["columns"],
        ),
        check_sizes=({"rows": 1, "columns": 1}, {"rows": 45, "columns": 70}),
        bench_sizes=({"rows": 2048, "columns": 2048},),
    )


naive = transpose("transpose_naive", NAIVE, "transpose_naive")
conflicts = transpose("transpose_conflicts", TILED, "transpose_tiled")
padded = transpose("transpose_padded", TILED, "transpose_tiled", padding=1)
