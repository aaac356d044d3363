"""C = A B in fp32: square tiles in shared memory, each value read TILE times less often."""

from suanli.kernels.declaration import KernelWork, Source
from suanli.kernels.spec import CudaKernel, Launch

SOURCE = r"""
extern "C" __global__ void matmul(const float *a, const float *b, float *c, int m, int n, int k) {
    __shared__ float as[TILE][TILE], bs[TILE][TILE];
    int row = blockIdx.y * TILE + threadIdx.y, column = blockIdx.x * TILE + threadIdx.x;
    float sum = 0.0f;
    for (int begin = 0; begin < k; begin += TILE) {
        int ak = begin + threadIdx.x, bk = begin + threadIdx.y;
        as[threadIdx.y][threadIdx.x] = row < m && ak < k ? a[row * k + ak] : 0.0f;
        bs[threadIdx.y][threadIdx.x] = bk < k && column < n ? b[bk * n + column] : 0.0f;
        __syncthreads();
        for (int i = 0; i < TILE; i++) sum += as[threadIdx.y][i] * bs[i][threadIdx.x];
        __syncthreads();
    }
    if (row < m && column < n) c[row * n + column] = sum;
}
"""


def inputs(sizes, dtype, device, seed):
    source = Source(device, seed)
    a = source.normal(sizes["m"], sizes["k"], dtype=dtype)
    b = source.normal(sizes["k"], sizes["n"], dtype=dtype)
    return {"a": a, "b": b}


def launch(sizes, config):
    tile = config["TILE"]
    return Launch(grid=(-(-sizes["n"] // tile), -(-sizes["m"] // tile)), block=(tile, tile))


def work(sizes, size):
    m, n, k = sizes["m"], sizes["n"], sizes["k"]
    return KernelWork(
        flops=2 * m * n * k, bytes_read=size * (m * k + k * n), bytes_written=size * m * n
    )


kernel = CudaKernel(
    name="matmul",
    title="matrix product through shared memory",
    source=SOURCE,
    inputs=inputs,
    outputs=lambda sizes, dtype: {"c": ((sizes["m"], sizes["n"]), dtype)},
    arguments=("a", "b", "c", "m", "n", "k"),
    launch=launch,
    tunables={"TILE": (32, 16)},
    reference=lambda given: (given["a"] @ given["b"],),
    magnitude=lambda given: (given["a"].abs() @ given["b"].abs(),),
    depth=lambda sizes: sizes["k"],
    work=work,
    check_sizes=({"m": 1, "n": 1, "k": 1}, {"m": 33, "n": 50, "k": 41}),
    bench_sizes=({"m": 1024, "n": 1024, "k": 1024},),
)
