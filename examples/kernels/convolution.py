"""3 x 3 convolution of many channels, one thread an output, every operand loaded when used."""

import torch

from suanli.kernels.declaration import KernelWork, Source
from suanli.kernels.spec import CudaKernel, Launch

SOURCE = r"""
extern "C" __global__ void convolution(const float *x, const float *filter, float *y, int channels,
                                       int filters, int height, int width) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    int row = blockIdx.y * blockDim.y + threadIdx.y;
    int out = blockIdx.z;
    if (row >= height || column >= width) return;
    float sum = 0.0f;
    for (int c = 0; c < channels; c++)
        for (int dy = -1; dy <= 1; dy++)
            for (int dx = -1; dx <= 1; dx++) {
                int r = row + dy, s = column + dx;
                if (r < 0 || r >= height || s < 0 || s >= width) continue;
                sum += x[(c * height + r) * width + s] *
                       filter[((out * channels + c) * 3 + dy + 1) * 3 + dx + 1];
            }
    y[(out * height + row) * width + column] = sum;
}
"""


def inputs(sizes, dtype, device, seed):
    source = Source(device, seed)
    x = source.normal(sizes["channels"], sizes["height"], sizes["width"], dtype=dtype)
    filters = source.normal(sizes["filters"], sizes["channels"], 3, 3, dtype=dtype)
    return {"x": x, "filter": filters}


def launch(sizes, config):
    across, down = config["ACROSS"], config["DOWN"]
    grid = (-(-sizes["width"] // across), -(-sizes["height"] // down), sizes["filters"])
    return Launch(grid=grid, block=(across, down))


def work(sizes, size):
    pixels = sizes["height"] * sizes["width"]
    channels, filters = sizes["channels"], sizes["filters"]
    return KernelWork(
        flops=2 * 9 * channels * filters * pixels,
        bytes_read=size * (channels * pixels + 9 * channels * filters),
        bytes_written=size * filters * pixels,
    )


def convolve(given):
    return (torch.conv2d(given["x"][None], given["filter"], padding=1)[0],)


kernel = CudaKernel(
    name="convolution",
    title="3 x 3 convolution",
    source=SOURCE,
    inputs=inputs,
    outputs=lambda sizes, dtype: {
        "y": ((sizes["filters"], sizes["height"], sizes["width"]), dtype)
    },
    arguments=("x", "filter", "y", "channels", "filters", "height", "width"),
    launch=launch,
    tunables={"ACROSS": (32, 16), "DOWN": (4, 8)},
    reference=convolve,
    magnitude=lambda given: convolve({"x": given["x"].abs(), "filter": given["filter"].abs()}),
    depth=lambda sizes: 9 * sizes["channels"],
    work=work,
    check_sizes=(
        {"channels": 1, "filters": 1, "height": 1, "width": 1},
        {"channels": 3, "filters": 2, "height": 13, "width": 37},
    ),
    bench_sizes=({"channels": 64, "filters": 64, "height": 128, "width": 128},),
)
