"""`warp` as a Triton kernel.

Shapes: N batch, C image channels, L labels, D H W voxels, d h w coarse voxels. All tensors are contiguous.

    out[n, c, o] = Σ over 8 voxels of weight · image[n, c, voxel],   label_out[n, l, o] = label[n, l, floor(s + 1/2)],
    s = A·(o + u(o)) + t

One launch, of one program for each box of output voxels of a sample. A program computes the sources of its box once, for all
channels and the label. A box is 4 × 8 × 16 voxels: 16 along x fill whole sectors of 32 bytes when they are stored, four voxels a
thread (128 bits of float32, 64 of 16-bit types); and a body that is short along every axis reads, whichever way the map turns
it, voxels that lie close together, most of which several of its voxels read. A long run along x that is turned by 45° would
fetch a sector for each of its voxels. The gathers are scalar loads, which the caches serve.

Each axis reads two voxels, always inside, at the weights of the tent max(0, 1 - |s - voxel|): what is outside has no weight, and
voxels that have none at all are not read.

Coordinates are counted from a whole voxel near the source of the box's first voxel. That source is found in pairs of float32
(products by fused multiply-add, sums after Knuth 1969), for which contraction by the compiler is off.

A displacement on a coarser grid is interpolated by the program, from the eight coarse voxels around: a coarse grid is small and
stays in the caches. On rows as long as the image's (w = W) it takes four, in vectors. Where they lie and what they weigh is
found in integers. Nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..gpu import INTERPRETED, MISSING, on_device_of, sent

try:
    import triton
    import triton.language as tl
except ImportError:  # the other backends do without
    triton = None

BOX = (4, 8, 16)  # not tuned: chosen as said above, from registers and sectors, not from timings on a GPU
WARPS = 4  # four voxels of each thread: twice as many, for whole vectors of 16-bit types, would double its registers
COPIED, MOVED, DISPLACED = 0, 1, 2  # what a sample needs
LONGEST_AXIS = 2**15  # (2 i + 1) · coarse stays below 2³¹
MOST_VOXELS = 2**31 - 2**17  # of a channel, whose offsets have 32 bits
MOST_SAMPLES = 2**15  # the second axis of a grid holds twice as many


def refuses(image: Tensor) -> str:
    """Why this backend cannot take a call with this image, or ""."""
    if MISSING:
        return MISSING
    if not image.is_cuda and not INTERPRETED:
        return f"it runs on a GPU (or with TRITON_INTERPRET=1), and the image is on {image.device}"
    if image.shape[0] > MOST_SAMPLES:
        return f"it takes {MOST_SAMPLES} samples, and the image has {image.shape[0]}"
    if math.prod(image.shape[2:]) > MOST_VOXELS or max(image.shape[2:]) > LONGEST_AXIS:
        return f"it counts the voxels of a channel in 32 bits, and the image has {tuple(image.shape[2:])}"
    return ""


def warp(
    image: Tensor, label: Tensor | None, matrix: Tensor, displacement: Tensor | None, *, border: bool,
) -> tuple[Tensor, Tensor | None]:
    """See the public `warp`."""
    image = image.contiguous()
    label = label.contiguous() if label is not None else None
    n, channels, *size = image.shape
    kinds = _kinds(matrix, displacement)
    grid = list(displacement.shape[2:]) if displacement is not None else [1, 1, 1]
    boxes = [triton.cdiv(length, edge) for length, edge in zip(size, BOX, strict=True)]
    out = torch.empty(image.shape, dtype=image.dtype, device=image.device)
    label_out = torch.empty(label.shape, dtype=label.dtype, device=label.device) if label is not None else None
    with on_device_of(image):
        # The kind of a sample goes with its matrix, so that both reach the device in one transfer.
        maps = sent(torch.cat([matrix.flatten(1), kinds], 1), image.device)
        field = sent(displacement.contiguous(), image.device) if displacement is not None else maps
        _warp[(math.prod(boxes), n)](
            image, label if label is not None else image, maps, field, out, label_out if label_out is not None else out,
            channels, label.shape[1] if label is not None else 0, *size, *grid, *boxes[1:],
            HAS_LABEL=label is not None, HAS_DISPLACEMENT=displacement is not None, WHOLE_ROWS=grid[2] == size[2],
            BORDER=border, VECTOR=math.gcd(BOX[2], size[2]), BOX_Z=BOX[0], BOX_Y=BOX[1], BOX_X=BOX[2],
            num_warps=WARPS, enable_fp_fusion=False)
    return out, label_out


def _kinds(matrix: Tensor, displacement: Tensor | None) -> Tensor:
    """What each sample needs: (N, 1) float32 beside the matrix. What is not on the CPU is not looked at: the host would wait."""
    n, device = matrix.shape[0], matrix.device
    displaced = torch.full((n,), displacement is not None, dtype=torch.bool, device=device)
    still = torch.zeros(n, dtype=torch.bool, device=device)
    if device.type == "cpu":
        if displacement is not None and displacement.device.type == "cpu":
            displaced = displacement.flatten(1).ne(0).any(1)
        still = (matrix == torch.eye(3, 4, dtype=matrix.dtype, device=device)).flatten(1).all(1)
    return torch.where(displaced, DISPLACED, torch.where(still, COPIED, MOVED)).to(torch.float32)[:, None]


if triton is not None:

    @triton.jit
    def _exact(m, z, y, x):
        """(hi, lo) with hi + lo = m[0] z + m[1] y + m[2] x + m[3] to about twice the digits of float32."""
        hi = tl.load(m + 3)
        lo = hi * 0.0
        for i in tl.static_range(3):
            a = tl.load(m + i)
            o = z if i == 0 else (y if i == 1 else x)
            product = a * o
            lo += tl.fma(a, o, -product)
            total = hi + product
            part = total - hi
            lo += (hi - (total - part)) + (product - part)
            hi = total
        return hi, lo

    @triton.jit
    def _source(m, z0, y0, x0, z, y, x):
        """(whole, s): sources are voxel `whole` + s, for the box at (z0, y0, x0) and its voxels (z, y, x)."""
        hi, lo = _exact(m, z0.to(tl.float32), y0.to(tl.float32), x0.to(tl.float32))
        origin = tl.floor(tl.minimum(tl.maximum(hi, -1048576.0), 1048576.0))
        s = (hi - origin) + lo
        s = tl.fma(tl.load(m), z, tl.fma(tl.load(m + 1), y, tl.fma(tl.load(m + 2), x, s)))
        return origin.to(tl.int32), s

    @triton.jit
    def _tap(i, size, coarse):
        """(lower voxel, upper voxel, weight of the upper): half-pixel centres, clamped edges, exact in integers."""
        numerator = tl.maximum((2 * i + 1) * coarse - size, 0)  # source · 2 · size
        lo = numerator // (2 * size)
        rest = numerator - lo * (2 * size)
        hi = tl.where(rest > 0, tl.minimum(lo + 1, coarse - 1), lo)  # what has no weight is not read
        return lo, hi, rest.to(tl.float32) / (2.0 * size)

    @triton.jit
    def _between(u, row, low_x, high_x, weight_x, mask, WHOLE_ROWS: tl.constexpr):
        """A row of the displacement, `row` elements from u, at the box's columns. Sums of 32 bits first: fewer registers."""
        value = tl.load(u + (row + low_x), mask=mask, other=0.0)
        if not WHOLE_ROWS:
            value = tl.fma(weight_x, tl.load(u + (row + high_x), mask=mask, other=0.0) - value, value)
        return value

    @triton.jit
    def _mix(u, low_z, high_z, weight_z, low_y, high_y, weight_y, low_x, high_x, weight_x, h, w, mask, WHOLE_ROWS: tl.constexpr):
        """One component of the displacement from the four rows around."""
        a = _between(u, (low_z * h + low_y) * w, low_x, high_x, weight_x, mask, WHOLE_ROWS)
        b = _between(u, (low_z * h + high_y) * w, low_x, high_x, weight_x, mask, WHOLE_ROWS)
        c = _between(u, (high_z * h + low_y) * w, low_x, high_x, weight_x, mask, WHOLE_ROWS)
        e = _between(u, (high_z * h + high_y) * w, low_x, high_x, weight_x, mask, WHOLE_ROWS)
        below = tl.fma(weight_y, b - a, a)
        above = tl.fma(weight_y, e - c, c)
        return tl.fma(weight_z, above - below, below)

    @triton.jit
    def _axis(whole, s, size, BORDER: tl.constexpr):
        """(lower voxel, its weight, the upper's weight, nearest voxel, whether that is inside) along one axis."""
        beyond: tl.constexpr = 0 if BORDER else 2
        first = (-beyond - whole).to(tl.float32)
        last = (size - 1 + beyond - whole).to(tl.float32)
        s = tl.minimum(tl.maximum(s, first), last)  # NaN becomes the first
        below = tl.floor(s)
        nearest = tl.where(s - below >= 0.5, below + 1.0, below).to(tl.int32) + whole
        inside = (nearest >= 0) & (nearest < size)
        low = tl.minimum(tl.maximum(below.to(tl.int32) + whole, 0), tl.maximum(size - 2, 0))
        q = s - (low - whole).to(tl.float32)
        lower = tl.maximum(1.0 - tl.abs(q), 0.0)
        upper = tl.where(size > 1, tl.maximum(1.0 - tl.abs(q - 1.0), 0.0), 0.0)
        return low, lower, upper, tl.minimum(tl.maximum(nearest, 0), size - 1), inside

    @triton.jit
    def _row(image, next_x, first, lower, upper, mask):
        """Two neighbours along x, weighed."""
        a = tl.load(image + first, mask=mask, other=0).to(tl.float32)
        b = tl.load(image + next_x + first, mask=mask, other=0).to(tl.float32)
        return tl.fma(upper, b, lower * a)

    @triton.jit
    def _warp(image, label, maps, field, out, label_out, C, L, D, H, W, d, h, w, boxes_y, boxes_x,
              HAS_LABEL: tl.constexpr, HAS_DISPLACEMENT: tl.constexpr, WHOLE_ROWS: tl.constexpr, BORDER: tl.constexpr,
              VECTOR: tl.constexpr, BOX_Z: tl.constexpr, BOX_Y: tl.constexpr, BOX_X: tl.constexpr):
        """One box of one sample. Grid (boxes, N). `maps` (N, 13): [A|t] and the sample's kind."""
        box, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
        z0 = box // (boxes_y * boxes_x) * BOX_Z
        y0 = box // boxes_x % boxes_y * BOX_Y
        x0 = box % boxes_x * BOX_X
        z = tl.arange(0, BOX_Z)[:, None, None]
        y = tl.arange(0, BOX_Y)[None, :, None]
        x = tl.arange(0, BOX_X)[None, None, :]
        width = W // VECTOR * VECTOR  # that of W, which the compiler knows to be a multiple of VECTOR, as is where rows start
        within = (z0 + z < D) & (y0 + y < H) & ((x0 + x) // VECTOR * VECTOR < W)
        at = ((z0 + z) * H + (y0 + y)) * width + x0 + x
        voxels = tl.full([], 1, tl.int64) * D * H * width
        image += n * C * voxels
        out += n * C * voxels
        if HAS_LABEL:
            label += n * L * voxels
            label_out += n * L * voxels
        m = maps + n * 13
        kind = tl.load(m + 12)
        if kind == 0.0:
            for _ in range(C):
                tl.store(out + at, tl.load(image + at, mask=within), mask=within)
                image += voxels
                out += voxels
            if HAS_LABEL:
                for _ in range(L):
                    tl.store(label_out + at, tl.load(label + at, mask=within), mask=within)
                    label += voxels
                    label_out += voxels
        else:
            fz, fy, fx = z.to(tl.float32), y.to(tl.float32), x.to(tl.float32)
            whole_z, sz = _source(m, z0, y0, x0, fz, fy, fx)
            whole_y, sy = _source(m + 4, z0, y0, x0, fz, fy, fx)
            whole_x, sx = _source(m + 8, z0, y0, x0, fz, fy, fx)
            if HAS_DISPLACEMENT:  # noqa: SIM102, a constant: without a displacement the rest is not compiled
                if kind == 2.0:
                    low_z, high_z, weight_z = _tap(tl.minimum(z0 + z, D - 1), D, d)
                    low_y, high_y, weight_y = _tap(tl.minimum(y0 + y, H - 1), H, h)
                    if WHOLE_ROWS:
                        low_x, high_x, weight_x = x0 + x, x0 + x, fx
                        columns = width
                    else:
                        low_x, high_x, weight_x = _tap(tl.minimum(x0 + x, W - 1), W, w)
                        columns = w
                    coarse = tl.full([], 1, tl.int64) * d * h * columns
                    u = field + n * 3 * coarse
                    for i in range(3):  # a component at a time: again fewer registers
                        component = _mix(u, low_z, high_z, weight_z, low_y, high_y, weight_y, low_x, high_x, weight_x,
                                         h, columns, within, WHOLE_ROWS)
                        sz = tl.fma(tl.load(m + i), component, sz)
                        sy = tl.fma(tl.load(m + 4 + i), component, sy)
                        sx = tl.fma(tl.load(m + 8 + i), component, sx)
                        u += coarse
            low_z, lower_z, upper_z, near_z, inside_z = _axis(whole_z, sz, D, BORDER)
            low_y, lower_y, upper_y, near_y, inside_y = _axis(whole_y, sy, H, BORDER)
            low_x, lower_x, upper_x, near_x, inside_x = _axis(whole_x, sx, W, BORDER)
            reads = within & (lower_z + upper_z > 0) & (lower_y + upper_y > 0) & (lower_x + upper_x > 0)
            first = (low_z * H + low_y) * W + low_x
            next_z = tl.minimum(D - 1, 1) * (H * W)
            next_y = tl.minimum(H - 1, 1) * W
            next_x = tl.minimum(W - 1, 1)
            for _ in range(C):
                above = image + next_z  # neighbours' addresses differ by numbers, not by tensors: fewer registers
                value = lower_z * (lower_y * _row(image, next_x, first, lower_x, upper_x, reads)
                                   + upper_y * _row(image + next_y, next_x, first, lower_x, upper_x, reads))
                value += upper_z * (lower_y * _row(above, next_x, first, lower_x, upper_x, reads)
                                    + upper_y * _row(above + next_y, next_x, first, lower_x, upper_x, reads))
                tl.store(out + at, value.to(out.dtype.element_ty), mask=within)
                image += voxels
                out += voxels
            if HAS_LABEL:
                inside = within & inside_z & inside_y & inside_x
                nearest = (near_z * H + near_y) * W + near_x
                for _ in range(L):
                    tl.store(label_out + at, tl.load(label + nearest, mask=inside, other=0), mask=within)
                    label += voxels
                    label_out += voxels
