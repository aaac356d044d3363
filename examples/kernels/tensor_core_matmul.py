"""C = A B in fp16 on tensor cores: a warp computes one 16 x 16 tile with wmma, sums in fp32."""

import torch

from suanli.kernels.declaration import KernelWork, Source, wide
from suanli.kernels.spec import CudaKernel, Launch

SOURCE = r"""
#include <mma.h>
using namespace nvcuda;

extern "C" __global__ void tensor_core_matmul(const __half *a, const __half *b, float *c, int m,
                                              int n, int k) {
    int row = blockIdx.y * 16, column = (blockIdx.x * WARPS + threadIdx.x / 32) * 16;
    if (column >= n) return;
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> fa;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> fb;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    wmma::fill_fragment(sum, 0.0f);
    for (int i = 0; i < k; i += 16) {
        wmma::load_matrix_sync(fa, a + row * k + i, k);
        wmma::load_matrix_sync(fb, b + i * n + column, n);
        wmma::mma_sync(sum, fa, fb, sum);
    }
    wmma::store_matrix_sync(c + row * n + column, sum, n, wmma::mem_row_major);
}
"""


def inputs(sizes, dtype, device, seed):
    source = Source(device, seed)
    a = source.normal(sizes["m"], sizes["k"], dtype=dtype)
    b = source.normal(sizes["k"], sizes["n"], dtype=dtype)
    return {"a": a, "b": b}


def outputs(sizes, dtype):
    return {"c": ((sizes["m"], sizes["n"]), torch.float32)}


def launch(sizes, config):
    columns = -(-sizes["n"] // (16 * config["WARPS"]))
    return Launch(grid=(columns, sizes["m"] // 16), block=(32 * config["WARPS"],))


def reference(given):
    exact = wide(given["a"].dtype)
    return (given["a"].to(exact) @ given["b"].to(exact),)


def work(sizes, size):
    m, n, k = sizes["m"], sizes["n"], sizes["k"]
    read = size * (m * k + k * n)
    return KernelWork(flops=2 * m * n * k, bytes_read=read, bytes_written=4 * m * n, matmul=True)


kernel = CudaKernel(
    name="tensor_core_matmul",
    title="matrix product on tensor cores",
    source=SOURCE,
    inputs=inputs,
    outputs=outputs,
    arguments=("a", "b", "c", "m", "n", "k"),
    launch=launch,
    tunables={"WARPS": (4, 1, 2, 8)},
    dtypes=("fp16",),
    reference=reference,
    depth=lambda sizes: sizes["k"],
    work=work,
    check_sizes=({"m": 16, "n": 16, "k": 16}, {"m": 32, "n": 80, "k": 48}),
    bench_sizes=({"m": 1024, "n": 1024, "k": 1024},),
)
