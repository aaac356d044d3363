"""Triton functions: filters, a stencil, and random crops over planes of pixels [planes, H, W]."""

import triton
import triton.language as tl


@triton.jit
def _pixels(height, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """The plane, rows [BLOCK_H, 1], columns [1, BLOCK_W] and the mask of this program's tile.

    All tiles of all planes stand on the grid's first axis: the others end at 65,535.
    """
    across = tl.cdiv(width, BLOCK_W)
    tiles = across * tl.cdiv(height, BLOCK_H)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    y = (tile // across * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    x = (tile % across * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    return plane, y, x, (y < height) & (x < width)


@triton.jit
def _near(plane, y, x, height, width, inside):
    """The pixel at (y, x), or the nearest one of the image where that is outside."""
    y = tl.minimum(tl.maximum(y, 0), height - 1)
    x = tl.minimum(tl.maximum(x, 0), width - 1)
    return tl.load(plane + y * width + x, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def denoise(
    image_ptr, out_ptr, height, width, per_space, per_range,
    RADIUS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Bilateral filter: neighbours weigh exp(-distance**2 per_space - difference**2 per_range)."""
    plane, y, x, inside = _pixels(height, width, BLOCK_H, BLOCK_W)
    plane *= height * width
    centre = _near(image_ptr + plane, y, x, height, width, inside)
    total = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    weights = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    for i in tl.static_range(2 * RADIUS + 1):
        for j in tl.static_range(2 * RADIUS + 1):
            value = _near(
                image_ptr + plane, y + (i - RADIUS), x + (j - RADIUS), height, width, inside
            )
            far = (i - RADIUS) * (i - RADIUS) + (j - RADIUS) * (j - RADIUS)
            difference = value - centre
            weight = tl.exp(-far * per_space - difference * difference * per_range)
            total += weight * value
            weights += weight
    out = (total / weights).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + plane + y * width + x, out, mask=inside)


@triton.jit
def sharpen(
    image_ptr, out_ptr, height, width, amount, low, high,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Unsharp mask: x + amount * (x - blurred x), blurred by the 3x3 binomial, then clamped."""
    plane, y, x, inside = _pixels(height, width, BLOCK_H, BLOCK_W)
    plane *= height * width
    centre = _near(image_ptr + plane, y, x, height, width, inside)
    blurred = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            weight = (2 - (i - 1) * (i - 1)) * (2 - (j - 1) * (j - 1)) / 16.0
            blurred += weight * _near(
                image_ptr + plane, y + (i - 1), x + (j - 1), height, width, inside
            )
    value = centre + amount * (centre - blurred)
    value = tl.minimum(tl.maximum(value, low), high)
    out = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + plane + y * width + x, out, mask=inside)


@triton.jit
def plane_sums(image_ptr, part_ptr, pixels, parts, per_part, BLOCK: tl.constexpr):
    """The sum of one part of one image (all its channels), at [image, part]."""
    image = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    begin = part * per_part
    end = tl.minimum(begin + per_part, pixels)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(image_ptr + image * pixels + at, mask=at < end, other=0.0)
        total += value.to(tl.float32)
    tl.store(part_ptr + image * parts + part, tl.sum(total, axis=0))


@triton.jit
def contrast(
    image_ptr, part_ptr, out_ptr, pixels, parts, factor, low, high,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean + factor * (x - mean), clamped, with the mean of the whole image."""
    image = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    sums = tl.load(part_ptr + image * parts + part, mask=part < parts, other=0.0)
    mean = tl.sum(sums, axis=0) / pixels
    x = tl.load(image_ptr + image * pixels + at, mask=at < pixels, other=0.0).to(tl.float32)
    value = tl.minimum(tl.maximum(mean + factor * (x - mean), low), high)
    out = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + image * pixels + at, out, mask=at < pixels)


@triton.jit
def diffuse(grid_ptr, out_ptr, height, width, rate, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """One step of u + rate * (sum of four neighbours - 4 u); the border stays as it is."""
    plane, y, x, inside = _pixels(height, width, BLOCK_H, BLOCK_W)
    plane *= height * width
    at = grid_ptr + plane + y * width + x
    inner = inside & (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    u = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at - width, mask=inner, other=0.0).to(tl.float32)
    down = tl.load(at + width, mask=inner, other=0.0).to(tl.float32)
    left = tl.load(at - 1, mask=inner, other=0.0).to(tl.float32)
    right = tl.load(at + 1, mask=inner, other=0.0).to(tl.float32)
    new = tl.where(inner, u + rate * ((up + down) + (left + right) - 4.0 * u), u)
    out = new.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + plane + y * width + x, out, mask=inside)


@triton.jit
def crop_flip(
    image_ptr, offset_ptr, flip_ptr, out_ptr, channels, height, width, out_height, out_width,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A window of each image at its own offset (top, left), mirrored where flip is not 0.

    Offsets may be negative or reach over the border: what lies outside is 0.
    """
    plane, y, x, inside = _pixels(out_height, out_width, BLOCK_H, BLOCK_W)
    sample = plane // channels
    top = tl.load(offset_ptr + 2 * sample)
    left = tl.load(offset_ptr + 2 * sample + 1)
    flip = tl.load(flip_ptr + sample)
    from_y = y + top
    from_x = tl.where(flip != 0, out_width - 1 - x, x) + left
    there = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
    value = tl.load(
        image_ptr + plane * height * width + from_y * width + from_x, mask=inside & there, other=0
    )
    tl.store(out_ptr + plane * out_height * out_width + y * out_width + x, value, mask=inside)
