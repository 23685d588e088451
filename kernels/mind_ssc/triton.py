"""`mind_ssc` as Triton kernels.

Shapes: N batch, D H W voxels. The image (N, 1, D, H, W) and the result (N, 12, D, H, W) are contiguous.

Two launches, both over the image: the first takes the mean of the variance over the volume, by which the second holds it. The
second computes the distances again: to write and read them would move two to four times the bytes of the result's one store.

A program walks down the planes of a column of 4 × 64 voxels, a voxel a thread. Of each plane it adds the squared differences of
all pairs over the box along y and x, 6 loads and 12 differences for each of its voxels, and keeps what the next two planes need
(for boxes of three voxels; for others it adds every plane of the box anew). Loads go to clamped addresses, as the definition
says, and need no mask; the caches serve all but the first of a voxel. With four voxels a thread the sums that are kept would not
fit the registers, so loads and stores are of 32 bits, whole lines for a warp.

The first launch has PARTS programs a sample at most, which take columns in turn: what they find is added in order by each program
of the second, so that a call gives the same bits every time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..gpu import INTERPRETED, MISSING, on_device_of
from .reference import FLOOR

try:
    import triton
    import triton.language as tl
except ImportError:  # the other backends do without
    triton = None

COLUMN = (16, 4, 64)  # voxels along z, y, x; not tuned: from registers and lines, as said above, not from timings on a GPU
WARPS = 8
PARTS = 512  # partial sums of a sample
MOST_VOXELS = 2**31 - 2**17  # of a sample, whose offsets have 32 bits
MOST_SAMPLES = 2**15  # the second axis of a grid holds twice as many
WIDEST = 3  # voxels of the radius: the loop over a row of the box is unrolled
FURTHEST = 64  # voxels of the dilation


def refuses(image: Tensor, radius: int, dilation: int) -> str:
    """Why this backend cannot take a call, or ""."""
    if MISSING:
        return MISSING
    if not image.is_cuda and not INTERPRETED:
        return f"it runs on a GPU (or with TRITON_INTERPRET=1), and the image is on {image.device}"
    if image.dtype == torch.float64:
        return "it computes in float32, and the image is float64"
    if radius > WIDEST or dilation > FURTHEST:
        return f"it looks up to radius {WIDEST} and dilation {FURTHEST}, and they are {radius} and {dilation}"
    if image.shape[0] > MOST_SAMPLES:
        return f"it takes {MOST_SAMPLES} samples, and the image has {image.shape[0]}"
    if math.prod(image.shape[2:]) > MOST_VOXELS:
        return f"it counts the voxels of a sample in 32 bits, and the image has {tuple(image.shape[2:])}"
    return ""


def mind_ssc(image: Tensor, out: Tensor, *, radius: int, dilation: int) -> None:
    """Write `out` (N, 12, D, H, W); both contiguous. See the public `mind_ssc`."""
    n, _, *size = image.shape
    columns = [triton.cdiv(length, edge) for length, edge in zip(size, COLUMN, strict=True)]
    parts = min(PARTS, triton.next_power_of_2(math.prod(columns)))
    sums = torch.empty((n, parts), dtype=torch.float64, device=image.device)
    settings = {"RADIUS": radius, "DILATION": dilation, "PARTS": parts, "DEEP": COLUMN[0], "HIGH": COLUMN[1], "WIDE": COLUMN[2],
                "num_warps": WARPS}
    with on_device_of(image):
        _variance[(parts, n)](image, sums, *size, *columns, **settings)
        _describe[(math.prod(columns), n)](image, sums, out, *size, *columns, FLOOR=FLOOR, **settings)


if triton is not None:

    @triton.jit
    def _clamp(i, n):
        return tl.minimum(tl.maximum(i, 0), n - 1)

    @triton.jit
    def _squared(a, b):
        return (a - b) * (a - b)

    @triton.jit
    def _plane(image, p, y, x, D, H, W, RADIUS: tl.constexpr, DILATION: tl.constexpr):
        """Of plane p, clamped, the squared differences of each pair, in the order of PAIRS, over the box along y and x."""
        z = _clamp(p, D)
        here, below, above = image + z * H * W, image + _clamp(z - DILATION, D) * H * W, image + _clamp(z + DILATION, D) * H * W
        zero = (y + x).to(tl.float32) * 0.0
        s = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
        for j in range(-RADIUS, RADIUS + 1):
            q = _clamp(y + j, H)
            row, low, high = q * W, _clamp(q - DILATION, H) * W, _clamp(q + DILATION, H) * W
            for i in tl.static_range(2 * RADIUS + 1):
                r = _clamp(x + i - RADIUS, W)
                z0 = tl.load(below + row + r).to(tl.float32)
                z1 = tl.load(above + row + r).to(tl.float32)
                y0 = tl.load(here + low + r).to(tl.float32)
                y1 = tl.load(here + high + r).to(tl.float32)
                x0 = tl.load(here + row + _clamp(r - DILATION, W)).to(tl.float32)
                x1 = tl.load(here + row + _clamp(r + DILATION, W)).to(tl.float32)
                s = (s[0] + _squared(z0, y0), s[1] + _squared(z0, y1), s[2] + _squared(z0, x0), s[3] + _squared(z0, x1),
                     s[4] + _squared(z1, y0), s[5] + _squared(z1, y1), s[6] + _squared(z1, x0), s[7] + _squared(z1, x1),
                     s[8] + _squared(y0, x0), s[9] + _squared(y0, x1), s[10] + _squared(y1, x0), s[11] + _squared(y1, x1))
        return s

    @triton.jit
    def _add(a, b):
        return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5],
                a[6] + b[6], a[7] + b[7], a[8] + b[8], a[9] + b[9], a[10] + b[10], a[11] + b[11])

    @triton.jit
    def _box(image, z, y, x, D, H, W, RADIUS: tl.constexpr, DILATION: tl.constexpr):
        """The distances of a plane, sums over the box."""
        s = _plane(image, z - RADIUS, y, x, D, H, W, RADIUS, DILATION)
        for i in range(1 - RADIUS, RADIUS + 1):
            s = _add(s, _plane(image, _clamp(z + i, D), y, x, D, H, W, RADIUS, DILATION))
        return s

    @triton.jit
    def _least(s):
        a = tl.minimum(tl.minimum(s[0], s[1]), tl.minimum(s[2], s[3]))
        b = tl.minimum(tl.minimum(s[4], s[5]), tl.minimum(s[6], s[7]))
        c = tl.minimum(tl.minimum(s[8], s[9]), tl.minimum(s[10], s[11]))
        return tl.minimum(tl.minimum(a, b), c)

    @triton.jit
    def _variance_of(s, least):
        """Of distances: their mean, less the least of them. It is not below 0 for rounding."""
        a = ((s[0] - least) + (s[1] - least)) + ((s[2] - least) + (s[3] - least))
        b = ((s[4] - least) + (s[5] - least)) + ((s[6] - least) + (s[7] - least))
        c = ((s[8] - least) + (s[9] - least)) + ((s[10] - least) + (s[11] - least))
        return ((a + b) + c) * (1.0 / 12.0)

    @triton.jit
    def _place(column, columns_y, columns_x, DEEP: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr):
        """Of a column its first plane, and y and x of its voxels."""
        z = column // (columns_y * columns_x) * DEEP
        y = column // columns_x % columns_y * HIGH + tl.arange(0, HIGH)[:, None]
        x = column % columns_x * WIDE + tl.arange(0, WIDE)[None, :]
        return z, y, x

    @triton.jit
    def _variance(image, sums, D, H, W, columns_z, columns_y, columns_x, RADIUS: tl.constexpr, DILATION: tl.constexpr,
                  PARTS: tl.constexpr, DEEP: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr):
        """sums (N, PARTS): of the variance, in sums over the box. Grid (PARTS, N)."""
        part, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
        image += n * D * H * W
        total = tl.zeros([HIGH, WIDE], tl.float64)
        for column in range(part, columns_z * columns_y * columns_x, PARTS):
            z, y, x = _place(column, columns_y, columns_x, DEEP, HIGH, WIDE)
            found = tl.zeros([HIGH, WIDE], tl.float32)
            if RADIUS == 1:
                last = _plane(image, z, y, x, D, H, W, RADIUS, DILATION)
                two = _add(_plane(image, z - 1, y, x, D, H, W, RADIUS, DILATION), last)
                for p in range(z, tl.minimum(z + DEEP, D)):
                    following = _plane(image, p + 1, y, x, D, H, W, RADIUS, DILATION)
                    s = _add(two, following)
                    found += _variance_of(s, _least(s))
                    two = _add(last, following)
                    last = following
            else:
                for p in range(z, tl.minimum(z + DEEP, D)):
                    s = _box(image, p, y, x, D, H, W, RADIUS, DILATION)
                    found += _variance_of(s, _least(s))
            total += tl.where((y < H) & (x < W), found, 0.0).to(tl.float64)
        tl.store(sums + n * PARTS + part, tl.sum(tl.sum(total, 1), 0))

    @triton.jit
    def _store(out, at, V, inside, s, lower, upper, floor):
        """The descriptors of a plane's voxels `at`."""
        least = _least(s)
        variance = _variance_of(s, least)
        variance = tl.where(variance > lower, variance, lower)  # a limit that is no number stays in either
        variance = tl.where(variance < upper, variance, upper)
        rate = -1.0 / (variance + floor)
        for k in tl.static_range(12):
            tl.store(out + k * V + at, tl.exp((s[k] - least) * rate).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _describe(image, sums, out, D, H, W, columns_z, columns_y, columns_x, FLOOR: tl.constexpr, RADIUS: tl.constexpr,
                  DILATION: tl.constexpr, PARTS: tl.constexpr, DEEP: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr):
        """out (N, 12, D, H, W). Grid (columns, N)."""
        column, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
        V = tl.full([], 1, tl.int64) * D * H * W
        image += n * V
        out += n * 12 * V
        usual = tl.sum(tl.load(sums + n * PARTS + tl.arange(0, PARTS)), 0) / V.to(tl.float64)
        lower, upper = (usual * 1e-3).to(tl.float32), (usual * 1e3).to(tl.float32)
        floor: tl.constexpr = FLOOR * (2 * RADIUS + 1) * (2 * RADIUS + 1) * (2 * RADIUS + 1)
        z, y, x = _place(column, columns_y, columns_x, DEEP, HIGH, WIDE)
        inside = (y < H) & (x < W)
        if RADIUS == 1:
            last = _plane(image, z, y, x, D, H, W, RADIUS, DILATION)
            two = _add(_plane(image, z - 1, y, x, D, H, W, RADIUS, DILATION), last)
            for p in range(z, tl.minimum(z + DEEP, D)):
                following = _plane(image, p + 1, y, x, D, H, W, RADIUS, DILATION)
                _store(out, (p * H + y) * W + x, V, inside, _add(two, following), lower, upper, floor)
                two = _add(last, following)
                last = following
        else:
            for p in range(z, tl.minimum(z + DEEP, D)):
                s = _box(image, p, y, x, D, H, W, RADIUS, DILATION)
                _store(out, (p * H + y) * W + x, V, inside, s, lower, upper, floor)
