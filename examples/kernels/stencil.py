"""One step of heat in two dimensions: each point becomes the mean of its four neighbours."""

import torch

from suanli.kernels.declaration import KernelWork, Source
from suanli.kernels.spec import CudaKernel, Launch

SOURCE = r"""
extern "C" __global__ void stencil(const float *in, float *out, int height, int width) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    int row = blockIdx.y * blockDim.y + threadIdx.y;
    if (row >= height || column >= width) return;
    int i = row * width + column;
    if (row == 0 || column == 0 || row == height - 1 || column == width - 1)
        out[i] = in[i];
    else
        out[i] = 0.25f * (in[i - 1] + in[i + 1] + in[i - width] + in[i + width]);
}
"""


def inputs(sizes, dtype, device, seed):
    return {"in": Source(device, seed).normal(sizes["height"], sizes["width"], dtype=dtype)}


def step(given):
    x = given["in"]
    made = x.clone()
    inner = 0.25 * (x[1:-1, :-2] + x[1:-1, 2:] + x[:-2, 1:-1] + x[2:, 1:-1])
    made[1:-1, 1:-1] = inner
    return (made,)


def launch(sizes, config):
    across, down = config["ACROSS"], config["DOWN"]
    return Launch(
        grid=(-(-sizes["width"] // across), -(-sizes["height"] // down)), block=(across, down)
    )


kernel = CudaKernel(
    name="stencil",
    title="5-point stencil",
    source=SOURCE,
    inputs=inputs,
    outputs=lambda sizes, dtype: {"out": ((sizes["height"], sizes["width"]), dtype)},
    arguments=("in", "out", "height", "width"),
    launch=launch,
    tunables={"ACROSS": (32, 64), "DOWN": (8, 4)},
    reference=step,
    magnitude=lambda given: (torch.full_like(given["in"], float(given["in"].abs().max())),),
    depth=lambda sizes: 4,
    work=lambda sizes, size: KernelWork(
        flops=4 * sizes["height"] * sizes["width"],
        bytes_read=size * sizes["height"] * sizes["width"],
        bytes_written=size * sizes["height"] * sizes["width"],
    ),
    check_sizes=({"height": 1, "width": 1}, {"height": 19, "width": 45}),
    bench_sizes=({"height": 2048, "width": 2048},),
)
