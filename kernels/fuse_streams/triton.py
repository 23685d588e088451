"""`fuse_streams` as Triton kernels.

Shapes: N batch, Ci image channels, Cf feature channels, C = Ci + Cf rounded up, D H W voxels, d h w coarse voxels.

Forward: partial statistics of chunks, their combination, and one pass over the output. Backward: the
transpose of the interpolation in gather form (every coarse voxel sums the output voxels that it reached; no atomics,
deterministic), then the normalization's sums and its gradient. All arithmetic is float32.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the other backends do without
    triton = None

BLOCK = 1024  # voxels of a program of the NCDHW and statistics kernels
TILE_VOXELS = 64  # voxels of a program of the channels-last kernel; it takes all their channels
CHUNKS = 64  # programs that share the statistics of one channel
IMAGE_NORMS = {"minmax": 0, "none": 1, "window": 2, "zscore": 3}
FEATURE_NORMS = {"instance": 0, "unit": 1, "standard": 2, "none": 3}
LONGEST_AXIS = 32_000  # (2 i + 1) · coarse stays below 2³¹
SMALLEST = 1.1754943508222875e-38  # FLT_MIN: a smaller span has no reciprocal


MISSING = "" if triton is not None else "Triton is not installed"
"""Why this backend cannot be had here, or ""."""
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
"""Whether the kernels below are defined for Triton's interpreter, which runs on the CPU (TRITON_INTERPRET=1)."""


def refuses(tensors: list[Tensor]) -> str:
    """Why this backend cannot take these tensors, or ""."""
    for tensor in tensors:
        if not tensor.is_cuda and not INTERPRETED:
            return f"it runs on a GPU (or with TRITON_INTERPRET=1), and a tensor is on {tensor.device}"
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.uint8):
            return f"it has no kernel for {tensor.dtype}"
        if tensor.dim() == 5 and (math.prod(tensor.shape[2:]) >= 2**31 - BLOCK or max(tensor.shape[2:]) > LONGEST_AXIS):
            return f"it counts the voxels of a channel in 32 bits, and a tensor has {tuple(tensor.shape[2:])}"
    return ""


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device; make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def forward(
    image: Tensor, features: Tensor | None, scale: Tensor, out: Tensor, image_stats: Tensor, feature_stats: Tensor, *,
    image_norm: tuple[str, float, float], feature_norm: str, eps: float, zeroed: bool = False,
) -> None:
    """Write `out` (N, C, D, H, W) and both statistics; see `fuse_streams`. `zeroed`: `out` reads as zeros already."""
    with _device_of(out):
        _forward(image, features, scale, out, image_stats, feature_stats, image_norm, feature_norm, eps)


def _forward(
    image: Tensor, features: Tensor | None, scale: Tensor, out: Tensor, image_stats: Tensor, feature_stats: Tensor,
    image_norm: tuple[str, float, float], feature_norm: str, eps: float,
) -> None:
    kind, norm_a, norm_b = image_norm
    _statistics(image, features, scale, image_stats, feature_stats, image_norm, feature_norm, eps)
    n, image_channels, *size = image.shape
    f, feature_channels, grid = _features_of(features, image)
    channels_last = out.shape[1] > 1 and out.stride(1) == 1
    voxels = size[0] * size[1] * size[2]
    block_c = triton.next_power_of_2(out.shape[1]) if channels_last else 1
    block_v = TILE_VOXELS if channels_last else BLOCK
    programs = (triton.cdiv(voxels, block_v), 1 if channels_last else out.shape[1], n)
    _fuse[programs](
        image, f, scale, image_stats, feature_stats, out, image_channels, feature_channels, out.shape[1],
        *size, *grid, *image.stride(), *f.stride(), *out.stride(), norm_a, norm_b,
        IMAGE_NORM=IMAGE_NORMS[kind], FEATURE_NORM=FEATURE_NORMS[feature_norm], HAS_FEATURES=features is not None,
        SAME=tuple(grid) == tuple(size), BLOCK_C=block_c, BLOCK_V=block_v)


def backward(
    grad: Tensor, image: Tensor | None, features: Tensor | None, scale: Tensor, image_stats: Tensor, feature_stats: Tensor,
    grad_image: Tensor | None, grad_features: Tensor | None, *,
    image_channels: int, image_norm: tuple[str, float, float], feature_norm: str, eps: float,
    image_zeroed: bool = False, features_zeroed: bool = False,
) -> None:
    """Write the gradients that are given: `grad_image` in its dtype, `grad_features` in float32; `…_zeroed`: reads as zeros."""
    with _device_of(grad):
        _backward(grad, image, features, scale, image_stats, feature_stats, grad_image, grad_features,
                  image_channels, image_norm, feature_norm, eps)


def _backward(
    grad: Tensor, image: Tensor | None, features: Tensor | None, scale: Tensor, image_stats: Tensor, feature_stats: Tensor,
    grad_image: Tensor | None, grad_features: Tensor | None, image_channels: int, image_norm: tuple[str, float, float],
    feature_norm: str, eps: float,
) -> None:
    kind, norm_a, norm_b = image_norm
    n, _, *size = grad.shape
    streams = scale.shape[1]
    if grad_image is not None:
        x = image if image is not None else grad_image  # read for a window only
        voxels = size[0] * size[1] * size[2]
        _image_backward[(triton.cdiv(voxels, BLOCK), image_channels, n)](
            grad, x, scale, image_stats, grad_image, image_channels, streams, *size, *grad.stride(), *x.stride(),
            *grad_image.stride(), norm_a, norm_b, WINDOW=kind == "window", BLOCK=BLOCK)
    if grad_features is None or features is None:
        return
    channels, grid = features.shape[1], features.shape[2:]
    coarse = grid[0] * grid[1] * grid[2]
    # How many output voxels a coarse voxel can reach along each axis.
    reach = [1 if big == small else triton.cdiv(2 * big, small) for big, small in zip(size, grid, strict=True)]
    _transpose_interpolation[(triton.cdiv(coarse, BLOCK), channels, n)](
        grad, scale, grad_features, image_channels, streams, channels, *size, *grid, *reach, *grad.stride(), BLOCK=BLOCK)
    if feature_norm == "instance":
        sums = torch.empty((n, channels, 2), dtype=torch.float32, device=grad.device)
        _instance_norm_sums[(channels, n)](
            grad_features, features, scale, feature_stats, sums, image_channels, streams, channels, *grid,
            *features.stride(), BLOCK=BLOCK)
        _instance_norm_backward[(triton.cdiv(coarse, BLOCK), channels, n)](
            grad_features, features, scale, feature_stats, sums, image_channels, streams, channels, *grid,
            *features.stride(), BLOCK=BLOCK)
    elif feature_norm != "none":
        _voxel_norm_backward[(triton.cdiv(coarse, BLOCK), n)](
            grad_features, features, feature_stats, channels, *grid, *features.stride(), eps,
            STANDARD=feature_norm == "standard", BLOCK=BLOCK)


def _features_of(features: Tensor | None, image: Tensor) -> tuple[Tensor, int, list[int]]:
    """(tensor to pass, Cf, grid); the image stands in for absent features, and is not read as such."""
    if features is None:
        return image, 0, list(image.shape[2:])
    return features, features.shape[1], list(features.shape[2:])


def _statistics(
    image: Tensor, features: Tensor | None, scale: Tensor, image_stats: Tensor, feature_stats: Tensor,
    image_norm: tuple[str, float, float], feature_norm: str, eps: float,
) -> None:
    kind, norm_a, norm_b = image_norm
    n, image_channels, *size = image.shape
    f, feature_channels, grid = _features_of(features, image)
    if kind == "minmax":
        partial = torch.empty((n, CHUNKS, 2), dtype=torch.float32, device=image.device)
        _image_chunks[(CHUNKS, n)](image, scale, partial, image_channels, scale.shape[1], *size, *image.stride(),
                                   CHUNKS=CHUNKS, BLOCK=BLOCK)
        lo, hi = partial[..., 0].amin(1), partial[..., 1].amax(1)
        span = hi - lo
        varies = span >= SMALLEST
        image_stats[:, 0] = torch.where(varies, lo, 0)
        image_stats[:, 1] = torch.where(varies, 1 / torch.where(varies, span, 1), 0)
    else:
        image_stats[:, 0] = 0.0 if kind == "none" else norm_a
        image_stats[:, 1] = 1.0 if kind == "none" else 1 / (norm_b - norm_a if kind == "window" else norm_b)
    if features is None or feature_norm == "none":
        return
    if feature_norm == "instance":
        partial = torch.empty((n, feature_channels, 3, CHUNKS), dtype=torch.float32, device=image.device)
        _channel_chunks[(CHUNKS, feature_channels, n)](
            f, scale, partial, image_channels, scale.shape[1], feature_channels, *grid, *f.stride(),
            CHUNKS=CHUNKS, BLOCK=BLOCK)
        _combine[(feature_channels, n)](partial, feature_stats, feature_channels, eps, CHUNKS=CHUNKS)
    else:
        voxels = grid[0] * grid[1] * grid[2]
        _voxel_statistics[(triton.cdiv(voxels, BLOCK), n)](
            f, feature_stats, feature_channels, *grid, *f.stride(), eps, STANDARD=feature_norm == "standard", BLOCK=BLOCK)


if triton is not None:
    # A legend for the signatures: s<axis><tensor> is a stride in elements, in the order n, c, z, y, x.

    @triton.jit
    def _finite(x):
        return tl.abs(x) <= 3.4028234663852886e38

    @triton.jit
    def _unravel(v, H, W):
        """Coordinates of a flat voxel index."""
        return v // (H * W), v // W % H, v % W

    @triton.jit
    def _tap(i, size, coarse):
        """(lower voxel, upper voxel, weight of the upper): half-pixel centres, clamped edges, exact in integers."""
        numerator = tl.maximum((2 * i + 1) * coarse - size, 0)
        lo = numerator // (2 * size)
        rest = numerator - lo * 2 * size
        hi = tl.where(rest > 0, tl.minimum(lo + 1, coarse - 1), lo)
        return lo, hi, rest.to(tl.float32) / (2.0 * size)

    @triton.jit
    def _add_moments(count, mean, squares, count_b, mean_b, squares_b):
        """Moments of the union of two sets (Chan, Golub & LeVeque 1979); squares: Σ (x - mean)²."""
        total = count + count_b
        share = tl.where(total > 0, count_b / tl.maximum(total, 1.0), 0.0)
        delta = mean_b - mean
        return total, mean + delta * share, squares + squares_b + delta * delta * count * share

    @triton.jit
    def _image_chunks(image, scale, partial, Ci, streams, D, H, W, sn, sc, sz, sy, sx,
                      CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
        """partial (N, CHUNKS, 2): least and greatest finite voxel of a chunk of each sample. Grid (CHUNKS, N)."""
        chunk, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
        voxels = D * H * W
        lo = tl.full([BLOCK], float("inf"), tl.float32)
        hi = tl.full([BLOCK], float("-inf"), tl.float32)
        kept = False
        for c in range(Ci):
            kept = kept | (tl.load(scale + n * streams + c) != 0)
        if kept:
            channel = image + n * sn  # moved on by a stride per channel: a product could pass 2³¹
            for _ in range(Ci):
                for start in range(chunk * BLOCK, voxels, CHUNKS * BLOCK):
                    v = start + tl.arange(0, BLOCK)
                    z, y, x = _unravel(v, H, W)
                    at = channel + z.to(tl.int64) * sz + y.to(tl.int64) * sy + x.to(tl.int64) * sx
                    value = tl.load(at, mask=v < voxels, other=0).to(tl.float32)
                    known = (v < voxels) & _finite(value)
                    lo = tl.where(known & (value < lo), value, lo)
                    hi = tl.where(known & (value > hi), value, hi)
                channel += sc
        tl.store(partial + (n * CHUNKS + chunk) * 2, tl.min(lo, 0))
        tl.store(partial + (n * CHUNKS + chunk) * 2 + 1, tl.max(hi, 0))

    @triton.jit
    def _channel_chunks(features, scale, partial, Ci, streams, Cf, d, h, w, sn, sc, sz, sy, sx,
                        CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
        """partial (N, Cf, 3, CHUNKS): count, mean, squares of a chunk of each channel. Grid (CHUNKS, Cf, N)."""
        chunk, c, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        voxels = d * h * w
        count, mean, squares = 0.0, 0.0, 0.0
        if tl.load(scale + n * streams + Ci + c) != 0:
            for start in range(chunk * BLOCK, voxels, CHUNKS * BLOCK):
                v = start + tl.arange(0, BLOCK)
                z, y, x = _unravel(v, h, w)
                at = features + n * sn + c * sc + z.to(tl.int64) * sz + y.to(tl.int64) * sy + x.to(tl.int64) * sx
                value = tl.load(at, mask=v < voxels, other=0).to(tl.float32)
                known = (v < voxels) & _finite(value)
                n_block = tl.sum(known.to(tl.float32), 0)
                centre = tl.sum(tl.where(known, value, 0.0), 0) / tl.maximum(n_block, 1.0)
                deviation = tl.where(known, value - centre, 0.0)
                # The second sum takes back the rounding of the first.
                slip = tl.sum(deviation, 0) / tl.maximum(n_block, 1.0)
                count, mean, squares = _add_moments(count, mean, squares, n_block, centre + slip,
                                                    tl.sum(deviation * deviation, 0) - slip * slip * n_block)
        at = partial + (n * Cf + c) * 3 * CHUNKS + chunk
        tl.store(at, count)
        tl.store(at + CHUNKS, mean)
        tl.store(at + 2 * CHUNKS, squares)

    @triton.jit
    def _combine(partial, stats, Cf, eps, CHUNKS: tl.constexpr):
        """stats (N, Cf, 2): mean and 1 / sqrt(variance + eps). Grid (Cf, N)."""
        c, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        at = partial + (n * Cf + c) * 3 * CHUNKS + tl.arange(0, CHUNKS)
        counts, means, squares = tl.load(at), tl.load(at + CHUNKS), tl.load(at + 2 * CHUNKS)
        count = tl.maximum(tl.sum(counts, 0), 1.0)
        # Around the first chunk's mean, so that a large offset does not eat the digits.
        anchor = tl.sum(tl.where(tl.arange(0, CHUNKS) == 0, means, 0.0), 0)
        mean = anchor + tl.sum(counts * (means - anchor), 0) / count
        total = tl.sum(squares + counts * (means - mean) * (means - mean), 0)
        tl.store(stats + (n * Cf + c) * 2, mean)
        tl.store(stats + (n * Cf + c) * 2 + 1, 1.0 / tl.sqrt(tl.maximum(total / count, 0.0) + eps))

    @triton.jit
    def _voxel_statistics(features, stats, Cf, d, h, w, sn, sc, sz, sy, sx, eps,
                          STANDARD: tl.constexpr, BLOCK: tl.constexpr):
        """stats (N, 2, d, h, w): shift and gain of each voxel over its channels. Grid (voxels / BLOCK, N)."""
        n = tl.program_id(1).to(tl.int64)
        voxels = d * h * w
        v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        z, y, x = _unravel(v, h, w)
        at = features + n * sn + z.to(tl.int64) * sz + y.to(tl.int64) * sy + x.to(tl.int64) * sx
        shift = tl.zeros([BLOCK], tl.float32)
        if STANDARD:
            of_channel = at
            for _ in range(Cf):
                shift += tl.load(of_channel, mask=v < voxels, other=0).to(tl.float32)
                of_channel += sc
            shift = shift / Cf
        squares = tl.zeros([BLOCK], tl.float32)
        for _ in range(Cf):
            deviation = tl.load(at, mask=v < voxels, other=0).to(tl.float32) - shift
            squares += deviation * deviation
            at += sc
        if STANDARD:
            gain = 1.0 / tl.sqrt(squares / Cf + eps)
        else:
            norm = tl.sqrt(squares)
            gain = 1.0 / tl.where(norm < eps, eps, norm)  # compared, not clamped: a NaN stays one
        tl.store(stats + n * 2 * voxels + v, shift, mask=v < voxels)
        tl.store(stats + (n * 2 + 1) * voxels + v, gain, mask=v < voxels)

    @triton.jit
    def _corner(at, z, y, x, sz, sy, sx, mask, stats, h, w, coarse, VOXEL_NORM: tl.constexpr):
        """One coarse voxel of each output voxel, normalized where the norm is a voxel's own."""
        value = tl.load(at + z.to(tl.int64) * sz + y.to(tl.int64) * sy + x.to(tl.int64) * sx, mask=mask, other=0).to(tl.float32)
        if VOXEL_NORM:
            v = (z.to(tl.int64) * h + y) * w + x
            shift = tl.load(stats + v, mask=mask, other=0)
            value = (value - shift) * tl.load(stats + coarse + v, mask=mask, other=0)
        return value

    @triton.jit
    def _fuse(image, features, scale, image_stats, feature_stats, out, Ci, Cf, Cout, D, H, W, d, h, w,
              isn, isc, isz, isy, isx, fsn, fsc, fsz, fsy, fsx, osn, osc, osz, osy, osx, norm_a, norm_b,
              IMAGE_NORM: tl.constexpr, FEATURE_NORM: tl.constexpr, HAS_FEATURES: tl.constexpr, SAME: tl.constexpr,
              BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr):
        """The pass over the output. Grid (voxels / BLOCK_V, channels / BLOCK_C, N).

        A program makes a tile of BLOCK_C channels × BLOCK_V voxels: one channel for NCDHW, all of them for
        channels-last, so that its stores are contiguous either way. Channels that the draw dropped are masked loads.
        """
        n = tl.program_id(2).to(tl.int64)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
        v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
        inside = (v < D * H * W) & (c < Cout)
        z, y, x = _unravel(v, H, W)
        s = tl.load(scale + n * (Ci + Cf) + c, mask=c < Ci + Cf, other=0.0)
        kept = inside & (s != 0)

        wanted = kept & (c < Ci)
        spatial = z.to(tl.int64) * isz + y.to(tl.int64) * isy + x.to(tl.int64) * isx
        value = tl.load(image + n * isn + c.to(tl.int64) * isc + spatial, mask=wanted, other=0).to(tl.float32)
        if IMAGE_NORM == 2:
            # Compared, not clamped: a NaN stays one.
            value = tl.where(value < norm_a, norm_a, tl.where(value > norm_b, norm_b, value))
        shift = tl.load(image_stats + n * 2)
        gain = tl.load(image_stats + n * 2 + 1)
        result = tl.where(wanted, (value - shift) * gain * s, 0.0)

        if HAS_FEATURES:
            cf = c - Ci
            wanted = kept & (cf >= 0)
            at = features + n * fsn + cf.to(tl.int64) * fsc
            VOXEL_NORM: tl.constexpr = (FEATURE_NORM == 1) or (FEATURE_NORM == 2)
            coarse = d * h * w
            stats = feature_stats + n * 2 * coarse if VOXEL_NORM else feature_stats
            if SAME:
                f = _corner(at, z, y, x, fsz, fsy, fsx, wanted, stats, h, w, coarse, VOXEL_NORM)
            else:
                z0, z1, wz = _tap(z, D, d)
                y0, y1, wy = _tap(y, H, h)
                x0, x1, wx = _tap(x, W, w)
                f000 = _corner(at, z0, y0, x0, fsz, fsy, fsx, wanted, stats, h, w, coarse, VOXEL_NORM)
                f001 = _corner(at, z0, y0, x1, fsz, fsy, fsx, wanted, stats, h, w, coarse, VOXEL_NORM)
                f010 = _corner(at, z0, y1, x0, fsz, fsy, fsx, wanted, stats, h, w, coarse, VOXEL_NORM)
                f011 = _corner(at, z0, y1, x1, fsz, fsy, fsx, wanted, stats, h, w, coarse, VOXEL_NORM)
                f100 = _corner(at, z1, y0, x0, fsz, fsy, fsx, wanted, stats, h, w, coarse, VOXEL_NORM)
                f101 = _corner(at, z1, y0, x1, fsz, fsy, fsx, wanted, stats, h, w, coarse, VOXEL_NORM)
                f110 = _corner(at, z1, y1, x0, fsz, fsy, fsx, wanted, stats, h, w, coarse, VOXEL_NORM)
                f111 = _corner(at, z1, y1, x1, fsz, fsy, fsx, wanted, stats, h, w, coarse, VOXEL_NORM)
                # Blended along z, then x, then y: the order of the CPU backend.
                f00 = f000 + wz * (f100 - f000)
                f01 = f001 + wz * (f101 - f001)
                f10 = f010 + wz * (f110 - f010)
                f11 = f011 + wz * (f111 - f011)
                f0 = f00 + wx * (f01 - f00)
                f1 = f10 + wx * (f11 - f10)
                f = f0 + wy * (f1 - f0)
            if FEATURE_NORM == 0:
                at = feature_stats + (n * Cf + cf) * 2
                shift = tl.load(at, mask=kept & (cf >= 0), other=0)
                gain = tl.load(at + 1, mask=kept & (cf >= 0), other=0)
                f = (f - shift) * gain
            result = tl.where(wanted, f * s, result)

        at = out + n * osn + c.to(tl.int64) * osc + z.to(tl.int64) * osz + y.to(tl.int64) * osy + x.to(tl.int64) * osx
        tl.store(at, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _image_backward(grad, image, scale, image_stats, grad_image, Ci, streams, D, H, W, gsn, gsc, gsz, gsy, gsx,
                        isn, isc, isz, isy, isx, osn, osc, osz, osy, osx, norm_a, norm_b,
                        WINDOW: tl.constexpr, BLOCK: tl.constexpr):
        """grad_image = scale · gain · grad, zero where a window clipped. Grid (voxels / BLOCK, Ci, N)."""
        c, n = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = v < D * H * W
        z, y, x = _unravel(v, H, W)
        z, y, x = z.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
        s = tl.load(scale + n * streams + c)
        result = tl.zeros([BLOCK], tl.float32)
        if s != 0:
            g = tl.load(grad + n * gsn + c * gsc + z * gsz + y * gsy + x * gsx, mask=inside, other=0).to(tl.float32)
            result = g * (s * tl.load(image_stats + n * 2 + 1))
            if WINDOW:
                value = tl.load(image + n * isn + c * isc + z * isz + y * isy + x * isx, mask=inside, other=0).to(tl.float32)
                result = tl.where((value < norm_a) | (value > norm_b), 0.0, result)
        tl.store(grad_image + n * osn + c * osc + z * osz + y * osy + x * osx,
                 result.to(grad_image.dtype.element_ty), mask=inside)

    @triton.jit
    def _reached(i, k, size, coarse):
        """(k-th output voxel that coarse voxel i may reach along an axis, the weight with which it does)."""
        # The first with source(o) > i - 1; clamped before the division, which rounds toward zero on a GPU.
        o = tl.maximum((2 * i - 1) * size + coarse, 0) // (2 * coarse) + k
        numerator = tl.maximum((2 * o + 1) * coarse - size, 0)
        numerator = tl.minimum(numerator, (coarse - 1) * 2 * size)
        distance = tl.abs(numerator - i * 2 * size)
        weight = tl.maximum(2 * size - distance, 0).to(tl.float32) / (2.0 * size)
        return o, tl.where(o < size, weight, 0.0)

    @triton.jit
    def _transpose_interpolation(grad, scale, out, Ci, streams, Cf, D, H, W, d, h, w, reach_z, reach_y, reach_x,
                                 gsn, gsc, gsz, gsy, gsx, BLOCK: tl.constexpr):
        """out (N, Cf, d, h, w) = scale · Σ weight · grad over the voxels each one reached. Grid (coarse / BLOCK, Cf, N)."""
        c, n = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        coarse = d * h * w
        v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = v < coarse
        z, y, x = _unravel(v, h, w)
        s = tl.load(scale + n * streams + Ci + c)
        total = tl.zeros([BLOCK], tl.float32)
        if s != 0:
            at = grad + n * gsn + (Ci + c) * gsc
            for kz in range(reach_z):
                oz, wz = _reached(z, kz, D, d)
                for ky in range(reach_y):
                    oy, wy = _reached(y, ky, H, h)
                    for kx in range(reach_x):
                        ox, wx = _reached(x, kx, W, w)
                        weight = wz * wy * wx
                        g = tl.load(at + oz.to(tl.int64) * gsz + oy.to(tl.int64) * gsy + ox.to(tl.int64) * gsx,
                                    mask=inside & (weight > 0), other=0).to(tl.float32)
                        total += weight * g
        tl.store(out + (n * Cf + c) * coarse + v, s * total, mask=inside)

    @triton.jit
    def _normalized(features, stats, n, c, v, inside, Cf, h, w, sn, sc, sz, sy, sx):
        """(features - mean) · gain of one channel's voxels v, and the gain."""
        z, y, x = _unravel(v, h, w)
        at = features + n * sn + c * sc + z.to(tl.int64) * sz + y.to(tl.int64) * sy + x.to(tl.int64) * sx
        shift = tl.load(stats + (n * Cf + c) * 2)
        gain = tl.load(stats + (n * Cf + c) * 2 + 1)
        return (tl.load(at, mask=inside, other=0).to(tl.float32) - shift) * gain, gain

    @triton.jit
    def _instance_norm_sums(grad, features, scale, stats, sums, Ci, streams, Cf, d, h, w, sn, sc, sz, sy, sx,
                            BLOCK: tl.constexpr):
        """sums (N, Cf, 2): mean(g) and mean(g · f̂) over each channel's voxels. Grid (Cf, N)."""
        c, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        coarse = d * h * w
        total = tl.zeros([BLOCK], tl.float32)
        product = tl.zeros([BLOCK], tl.float32)
        if tl.load(scale + n * streams + Ci + c) != 0:
            for start in range(0, coarse, BLOCK):
                v = start + tl.arange(0, BLOCK)
                g = tl.load(grad + (n * Cf + c) * coarse + v, mask=v < coarse, other=0)
                f, _ = _normalized(features, stats, n, c, v, v < coarse, Cf, h, w, sn, sc, sz, sy, sx)
                total += g
                product += tl.where(v < coarse, g * f, 0.0)
        tl.store(sums + (n * Cf + c) * 2, tl.sum(total, 0) / coarse)
        tl.store(sums + (n * Cf + c) * 2 + 1, tl.sum(product, 0) / coarse)

    @triton.jit
    def _instance_norm_backward(grad, features, scale, stats, sums, Ci, streams, Cf, d, h, w, sn, sc, sz, sy, sx,
                                BLOCK: tl.constexpr):
        """grad ← gain · (grad - mean(grad) - f̂ · mean(grad · f̂)), in place. Grid (coarse / BLOCK, Cf, N)."""
        c, n = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        if tl.load(scale + n * streams + Ci + c) != 0:
            coarse = d * h * w
            v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            at = grad + (n * Cf + c) * coarse + v
            f, gain = _normalized(features, stats, n, c, v, v < coarse, Cf, h, w, sn, sc, sz, sy, sx)
            mean = tl.load(sums + (n * Cf + c) * 2)
            product = tl.load(sums + (n * Cf + c) * 2 + 1)
            g = tl.load(at, mask=v < coarse, other=0)
            tl.store(at, gain * (g - mean - f * product), mask=v < coarse)

    @triton.jit
    def _voxel_norm_backward(grad, features, stats, Cf, d, h, w, sn, sc, sz, sy, sx, eps,
                             STANDARD: tl.constexpr, BLOCK: tl.constexpr):
        """grad ← its gradient through "unit" or "standard", in place. Grid (coarse / BLOCK, N)."""
        n = tl.program_id(1).to(tl.int64)
        coarse = d * h * w
        v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = v < coarse
        z, y, x = _unravel(v, h, w)
        at = features + n * sn + z.to(tl.int64) * sz + y.to(tl.int64) * sy + x.to(tl.int64) * sx
        shift = tl.load(stats + n * 2 * coarse + v, mask=inside, other=0)
        gain = tl.load(stats + (n * 2 + 1) * coarse + v, mask=inside, other=0)
        mean = tl.zeros([BLOCK], tl.float32)
        product = tl.zeros([BLOCK], tl.float32)
        of_channel = at
        for c in range(Cf):
            g = tl.load(grad + (n * Cf + c) * coarse + v, mask=inside, other=0)
            mean += g
            product += g * (tl.load(of_channel, mask=inside, other=0).to(tl.float32) - shift) * gain
            of_channel += sc
        if STANDARD:
            mean, product = mean / Cf, product / Cf
        else:
            mean = tl.zeros([BLOCK], tl.float32)
            product = tl.where(gain >= 1.0 / eps, 0.0, product)  # the norm was held at eps
        for c in range(Cf):
            f = (tl.load(at, mask=inside, other=0).to(tl.float32) - shift) * gain
            g = tl.load(grad + (n * Cf + c) * coarse + v, mask=inside, other=0)
            tl.store(grad + (n * Cf + c) * coarse + v, gain * (g - mean - f * product), mask=inside)
            at += sc
