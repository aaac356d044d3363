"""Triton functions: batch normalisation, activation and max-pool on [N, H, W, C] memory."""

import triton
import triton.language as tl


@triton.jit
def _act(z, ACT: tl.constexpr):
    """The activation at z. ACT: "none", "relu" or "silu"."""
    if ACT == "relu":
        z = tl.maximum(z, 0.0)
    elif ACT == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def _slope(z, ACT: tl.constexpr):
    """The activation's derivative at z."""
    if ACT == "relu":
        slope = tl.where(z > 0.0, 1.0, 0.0)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
    else:
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope


@triton.jit
def statistics(
    x_ptr, mean_ptr, square_ptr, n_rows, channels, rows_per_program,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of a run of rows, at [program, channel].

    Tiles are joined by Chan, Golub and LeVeque's update, which does not lose digits where the mean
    is large against the deviation.
    """
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, n_rows)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        inside = (row < end)[:, None] & (channel < channels)[None, :]
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(end - first, BLOCK_R).to(tl.float32)
        tile_mean = tl.sum(x, axis=0) / count
        deviation = tl.where(inside, x - tile_mean[None, :], 0.0)
        before = (first - begin).to(tl.float32)
        delta = tile_mean - mean
        part = count / (before + count)
        mean += delta * part
        square += tl.sum(deviation * deviation, axis=0) + delta * delta * before * part
    out = tl.cast(program, tl.int64) * channels + channel
    tl.store(mean_ptr + out, mean, mask=channel < channels)
    tl.store(square_ptr + out, square, mask=channel < channels)


@triton.jit
def apply(
    x_ptr, scale_ptr, shift_ptr, out_ptr, n_rows, channels,
    ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """act(x * scale + shift) on a tile."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < n_rows)[:, None] & (channel < channels)[None, :]
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    scale = tl.load(scale_ptr + channel, mask=channel < channels, other=0.0)
    shift = tl.load(shift_ptr + channel, mask=channel < channels, other=0.0)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = _act(x * scale[None, :] + shift[None, :], ACT)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def apply_pool(
    x_ptr, scale_ptr, shift_ptr, out_ptr, tap_ptr, n_out, height, width, out_height, out_width,
    channels,
    ACT: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The largest act(x * scale + shift) of each window, and which tap it came from (uint8)."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = (row < n_out)[:, None] & (channel < channels)[None, :]
    scale = tl.load(scale_ptr + channel, mask=channel < channels, other=0.0)
    shift = tl.load(shift_ptr + channel, mask=channel < channels, other=0.0)
    image = row // (out_height * out_width)
    top = (row // out_width) % out_height * STRIDE - PADDING
    left = row % out_width * STRIDE - PADDING
    best = tl.full((BLOCK_R, BLOCK_C), float("-inf"), tl.float32)
    tap = tl.zeros((BLOCK_R, BLOCK_C), tl.int32)
    for i in tl.static_range(SIZE):
        for j in tl.static_range(SIZE):
            y, x = top + i, left + j
            here = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            pixel = (image.to(tl.int64) * height + y) * width + x
            inside = known & here[:, None]
            at = pixel[:, None] * channels + channel[None, :]
            value = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            value = _act(value * scale[None, :] + shift[None, :], ACT)
            # the first of equal values wins, as in torch; NaN is passed on
            better = inside & ((value > best) | (value != value))
            best = tl.where(better, value, best)
            tap = tl.where(better, i * SIZE + j, tap)
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out_ptr + at, best.to(out_ptr.dtype.element_ty), mask=known)
    tl.store(tap_ptr + at, tap.to(tl.uint8), mask=known)


@triton.jit
def _upstream(
    grad_ptr, tap_ptr, row, channel, known, height, width, out_height, out_width, channels,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """The gradient that reaches a pixel: of all windows whose largest value it was.

    SIZE 0 says that there is no pool.
    """
    if SIZE == 0:
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        total = tl.load(grad_ptr + at, mask=known, other=0.0).to(tl.float32)
    else:
        total = tl.zeros(known.shape, tl.float32)
        image = row // (height * width)
        y = (row // width) % height + PADDING
        x = row % width + PADDING
        for i in tl.static_range(SIZE):
            for j in tl.static_range(SIZE):
                down, right = y - i, x - j
                window = (down >= 0) & (right >= 0)
                window &= (down % STRIDE == 0) & (right % STRIDE == 0)
                down, right = down // STRIDE, right // STRIDE
                window &= (down < out_height) & (right < out_width)
                place = (image.to(tl.int64) * out_height + down) * out_width + right
                at = place[:, None] * channels + channel[None, :]
                inside = known & window[:, None]
                tap = tl.load(tap_ptr + at, mask=inside, other=255).to(tl.int32)
                chosen = inside & (tap == i * SIZE + j)
                total += tl.load(grad_ptr + at, mask=chosen, other=0.0).to(tl.float32)
    return total


@triton.jit
def gradient_sums(
    x_ptr, grad_ptr, tap_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sum_ptr, product_ptr,
    n_rows, rows_per_program, height, width, out_height, out_width, channels,
    ACT: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over a run of rows of dz and of dz * normalised x, at [program, channel]."""
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    mean = tl.load(mean_ptr + channel, mask=valid, other=0.0)
    rstd = tl.load(rstd_ptr + channel, mask=valid, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    products = tl.zeros((BLOCK_C,), tl.float32)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, n_rows)
    for first in range(begin, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        known = (row < end)[:, None] & valid[None, :]
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + at, mask=known, other=0.0).to(tl.float32)
        normal = (x - mean[None, :]) * rstd[None, :]
        z = normal * weight[None, :] + bias[None, :]
        dz = _slope(z, ACT) * _upstream(
            grad_ptr, tap_ptr, row, channel, known, height, width, out_height, out_width,
            channels, SIZE, STRIDE, PADDING,
        )  # fmt: skip
        dz = tl.where(known, dz, 0.0)
        sums += tl.sum(dz, axis=0)
        products += tl.sum(dz * normal, axis=0)
    out = tl.cast(program, tl.int64) * channels + channel
    tl.store(sum_ptr + out, sums, mask=valid)
    tl.store(product_ptr + out, products, mask=valid)


@triton.jit
def gradient_input(
    x_ptr, grad_ptr, tap_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sum_ptr, product_ptr,
    grad_x_ptr, n_rows, height, width, out_height, out_width, channels,
    ACT: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Weight * rstd * (dz - mean(dz) - normalised x * mean(dz * normalised x)) on a tile."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    known = (row < n_rows)[:, None] & valid[None, :]
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    mean = tl.load(mean_ptr + channel, mask=valid, other=0.0)
    rstd = tl.load(rstd_ptr + channel, mask=valid, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    mean_dz = tl.load(sum_ptr + channel, mask=valid, other=0.0) / n_rows
    mean_product = tl.load(product_ptr + channel, mask=valid, other=0.0) / n_rows
    x = tl.load(x_ptr + at, mask=known, other=0.0).to(tl.float32)
    normal = (x - mean[None, :]) * rstd[None, :]
    z = normal * weight[None, :] + bias[None, :]
    dz = _slope(z, ACT) * _upstream(
        grad_ptr, tap_ptr, row, channel, known, height, width, out_height, out_width, channels,
        SIZE, STRIDE, PADDING,
    )  # fmt: skip
    grad = (weight * rstd)[None, :] * (dz - mean_dz[None, :] - normal * mean_product[None, :])
    tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=known)
