"""`fuse_streams` as Triton kernels.

Shapes: N batch, Ci image channels, Cf feature channels, C = Ci + Cf rounded up, D H W voxels, d h w coarse voxels.
All arithmetic is float32. Offsets inside a channel are 32 bits wide where its voxels lie one after the other, all others 64.

Launches of the forward:

    image "minmax" or features "instance"   2   partial statistics of chunks; the pass over the output
    features "unit" or "standard"           2   statistics of each voxel; the pass (3 with an image that is "minmax")
    neither needs statistics                1   the pass

Channels-last features are read once for the statistics of all their channels; others channel by channel, kept ones only.
Every program of the pass combines the partial statistics of its channel itself, at its start: no launch in between. It
cannot be one launch: the pass needs statistics of voxels that other programs read. A cooperative launch with a barrier over
the grid (Triton ≥ 3.4 has `launch_cooperative_grid`) would need all programs to be resident at once and take away the
freedom of the output's grid; whether it wins has not been measured, so it is not built.

Launches of the backward, for the features (the image's gradient is one more):

    "instance"             2   transpose of the interpolation with partial sums of the norm; the norm (coarse features)
                               or partial sums; the norm (features of the image's size)
    "unit", "standard"     2   transpose; the norm (1 for features of the image's size)
    "none"                 1

Everything is a gather: no atomics, sums in a fixed order, so results are the same from call to call. No launch waits for
the host, and the buffers depend on shapes only: a CUDA graph can capture a call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gpu import INTERPRETED, on_device_of
from ..gpu import MISSING as MISSING  # part of what a backend says of itself

try:
    import triton
    import triton.language as tl
except ImportError:  # the other backends do without
    triton = None


@dataclass(frozen=True)
class Tile:
    """What a program works on at a time."""

    vectors: int
    """128-bit vectors of each thread, counted in the widest type that the program writes (or, writing none, reads)."""
    warps: int
    registers: int | None = None
    """Most registers of a thread, where ptxas left to itself spills some to make room for one more program."""

    def options(self) -> dict[str, Any]:
        """What the compiler is told; contraction to fused multiply-adds by name, as Triton's default for it changes."""
        return {"num_warps": self.warps, "enable_fp_fusion": True} | ({"maxnreg": self.registers} if self.registers else {})

    def elements(self, itemsize: int) -> int:
        """Elements of `itemsize` bytes in the tile."""
        return 32 * self.warps * self.vectors * 16 // itemsize


# The configuration, by kernel. Not tuned: chosen from register counts and bytes in flight, not from timings on a GPU.
TILES = {
    "statistics": Tile(vectors=8, warps=4),  # also sums of the backward: every lane keeps sums of `vectors` rows
    "flat": Tile(vectors=4, warps=4),  # voxels in the order in which they lie: image, equal grids, zeros, gradients
    "cells": Tile(vectors=1, warps=4),  # interpolation, NCDHW
    "channels_last": Tile(vectors=2, warps=4),  # equal grids
    "channels_last_cells": Tile(vectors=1, warps=4),  # interpolation
    "voxel_norm": Tile(vectors=2, warps=4),
    "transpose": Tile(vectors=1, warps=4, registers=128),
}
CHUNKS = 128  # programs that share the sums of one channel, at most
PROGRAMS_LAST = 2048  # programs of the channels-last pass, each of which combines once
PLANES = 2  # output planes that share their coarse rows in a program of the interpolation
ROWS_IN_FLIGHT = 4  # of the transposed interpolation, where a row is read in vectors
PICK = 4  # output columns that its coarse voxels gather at a time
LONGEST_ROW = 256  # columns of a tile of rows, at most

DENSE, EVEN, ANY = 0, 1, 2  # voxels of a channel: one after the other; at one stride; any three strides
FEATURE_NORMS = {"instance": 0, "unit": 1, "standard": 2, "none": 3}
LONGEST_AXIS = 32_000  # (2 i + 1) · coarse stays below 2³¹
LARGEST_RATIO = 8  # whole ratios up to here are constants of the kernel
MOST_PROGRAMS = 2**15  # of samples or channels; the second and third axis of a grid hold twice as many
MOST_VOXELS = 2**31 - 2**17  # of a channel, so that the index of the last tile's last voxel has 32 bits



def refuses(tensors: list[Tensor]) -> str:
    """Why this backend cannot take these tensors, or ""."""
    for tensor in tensors:
        if not tensor.is_cuda and not INTERPRETED:
            return f"it runs on a GPU (or with TRITON_INTERPRET=1), and a tensor is on {tensor.device}"
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.uint8):
            return f"it has no kernel for {tensor.dtype}"
        if max(tensor.shape[:2]) > MOST_PROGRAMS:
            return f"it takes {MOST_PROGRAMS} samples and as many channels, and a tensor has {tuple(tensor.shape[:2])}"
        if tensor.dim() == 5 and (math.prod(tensor.shape[2:]) > MOST_VOXELS or max(tensor.shape[2:]) > LONGEST_AXIS):
            return f"it counts the voxels of a channel in 32 bits, and a tensor has {tuple(tensor.shape[2:])}"
    return ""


class Layout(NamedTuple):
    """How the voxels of a channel lie, and their strides in elements."""

    kind: int
    strides: tuple[int, ...]


def _layout(tensor: Tensor) -> Layout:
    """The layout of (…, …, D, H, W) for kernels that count voxels along the whole channel."""
    step, run = 0, 1
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size == 1:
            continue
        if run == 1:
            step = stride
        elif stride != step * run:
            return Layout(ANY, tensor.stride()[2:])
        run *= size
    return Layout(DENSE if step == 1 or run == 1 else EVEN, (0, 0, step))


def _row_layout(tensor: Tensor) -> Layout:
    """The layout of (…, …, D, H, W) for kernels that take it row by row."""
    return Layout(DENSE if tensor.stride(4) == 1 else ANY, tensor.stride()[2:])


def _rows(tile: Tile, *layouts: Layout) -> int:
    """Rows of a tile of sums; few where each voxel's place takes 64-bit arithmetic, which would spill."""
    return tile.vectors if all(layout.kind == DENSE for layout in layouts) else max(1, tile.vectors // 4)


def _aligned(itemsize: int, *numbers: int) -> int:
    """The most elements, a power of two, that fill at most 128 bits and divide all these numbers of elements."""
    return math.gcd(16 // itemsize, *numbers)


def _ratios(size: list[int], grid: list[int]) -> list[int]:
    """Of each axis: how many times finer the output is, where that is a small whole number, else 0."""
    return [big // small if big % small == 0 and big // small <= LARGEST_RATIO else 0
            for big, small in zip(size, grid, strict=True)]


def _columns(length: int, most: int) -> int:
    """The power of two, 32 to `most`, whose multiple covers a row with the fewest columns too many."""
    widths = [width for width in (256, 128, 64, 32) if width <= most]
    return min(widths, key=lambda width: (triton.cdiv(length, width) * width, -width))


def _chunks(voxels: int, block: int, most: int) -> int:
    """A power of two of chunks, no more than have a block to do."""
    return min(most, triton.next_power_of_2(triton.cdiv(voxels, block)))


def forward(
    image: Tensor, features: Tensor | None, scale: Tensor, out: Tensor, image_stats: Tensor, feature_stats: Tensor, *,
    image_norm: tuple[str, float, float], feature_norm: str, eps: float,
) -> None:
    """Write `out` (N, C, D, H, W), dense, NCDHW or channels-last, and both statistics; see `fuse_streams`."""
    with on_device_of(out):
        partial, chunks = _launch_statistics(image, features, scale, feature_stats, image_norm[0], feature_norm, eps)
        _launch_pass(image, features, scale, out, partial, chunks, image_stats, feature_stats, image_norm, feature_norm, eps)


def _features_of(features: Tensor | None, image: Tensor) -> tuple[Tensor, int, list[int]]:
    """(tensor to pass, Cf, grid); the image stands in for absent features, and is not read as such."""
    if features is None:
        return image, 0, list(image.shape[2:])
    return features, features.shape[1], list(features.shape[2:])


def _launch_statistics(
    image: Tensor, features: Tensor | None, scale: Tensor, feature_stats: Tensor, image_norm: str, feature_norm: str,
    eps: float,
) -> tuple[Tensor, int]:
    """(partial statistics (N, 1 + Cf, 3, chunks), chunks); those of voxels are written where they belong."""
    n, image_channels, *size = image.shape
    f, feature_channels, grid = _features_of(features, image)
    flat, flat_f = _layout(image), _layout(f)
    voxels, coarse = math.prod(size), math.prod(grid)
    tile = TILES["statistics"]
    lanes = [Tile(1, tile.warps).elements(t.element_size()) for t in (image, f)]
    rows = [_rows(tile, flat), tile.vectors]
    block_f = triton.next_power_of_2(max(1, feature_channels))
    together = flat_f.kind == EVEN and f.stride(1) == 1 and block_f <= lanes[1]  # channels-last: one stream of all channels
    if not together:
        block_f, rows[1] = 1, _rows(tile, flat_f)
    minmax, instance = image_norm == "minmax", features is not None and feature_norm == "instance"
    if features is not None and feature_norm in ("unit", "standard"):
        voxel_tile = TILES["voxel_norm"]
        block = voxel_tile.elements(4)
        _voxel_statistics[(triton.cdiv(coarse, block), n)](
            f, feature_stats, feature_channels, coarse, *grid[1:], f.stride(0), f.stride(1), *flat_f.strides, eps,
            STANDARD=feature_norm == "standard", LAYOUT=flat_f.kind, BLOCK=block, **voxel_tile.options())
    if not minmax and not instance:
        return feature_stats, 1
    chunks = max(_chunks(voxels, lanes[0] * rows[0], CHUNKS) if minmax else 1,
                 _chunks(coarse * block_f, lanes[1] * rows[1], CHUNKS) if instance else 1)
    partial = torch.empty((n, 1 + feature_channels, 3, chunks), dtype=torch.float32, device=image.device)
    streams = minmax + instance * (1 if together else feature_channels)
    _statistics[(chunks, streams, n)](
        image, f, scale, partial, image_channels, feature_channels, voxels, *size[1:], coarse, *grid[1:],
        image.stride(0), image.stride(1), *flat.strides, f.stride(0), f.stride(1), *flat_f.strides,
        MINMAX=minmax, IMAGE_LAYOUT=flat.kind, FEATURE_LAYOUT=flat_f.kind, TOGETHER=together, CHUNKS=chunks,
        IMAGE_ROWS=rows[0], FEATURE_ROWS=rows[1], IMAGE_LANES=lanes[0], FEATURE_LANES=lanes[1], BLOCK_F=block_f,
        **tile.options())
    return partial, chunks


def _launch_pass(
    image: Tensor, features: Tensor | None, scale: Tensor, out: Tensor, partial: Tensor, chunks: int, image_stats: Tensor,
    feature_stats: Tensor, image_norm: tuple[str, float, float], feature_norm: str, eps: float,
) -> None:
    kind, a, b = image_norm
    shift, gain = 0.0, 1.0  # "none"; "minmax" finds its own
    if kind == "window":
        shift, gain = a, 1 / (b - a)
    elif kind == "zscore":
        shift, gain = a, 1 / b
    n, image_channels, *size = image.shape
    f, feature_channels, grid = _features_of(features, image)
    same = grid == size
    flat, rows = _layout(image), _layout(f) if same else _row_layout(f)
    voxels = math.prod(size)
    ratios = _ratios(size, grid)
    reach = [triton.cdiv(big, small) for big, small in zip(size, grid, strict=True)]  # output voxels of a cell
    cells = [small if ratio == 1 else small + 1 for small, ratio in zip(grid, ratios, strict=True)]
    groups = triton.cdiv(reach[0], PLANES)
    arguments = (
        image, f, scale, partial, image_stats, feature_stats, out, image_channels, feature_channels, out.shape[1],
        voxels, math.prod(grid), *size, *grid, image.stride(0), image.stride(1), *flat.strides,
        f.stride(0), f.stride(1), *rows.strides, a, b, shift, gain, eps, groups, reach[1])
    constants = {
        "MINMAX": kind == "minmax", "WINDOW": kind == "window", "HAS_FEATURES": features is not None,
        "FEATURE_NORM": FEATURE_NORMS[feature_norm], "IMAGE_LAYOUT": flat.kind, "FEATURE_LAYOUT": rows.kind, "SAME": same,
        "RATIO_Z": ratios[0], "RATIO_Y": ratios[1], "RATIO_X": ratios[2], "PLANES": PLANES, "CHUNKS": chunks}
    itemsize = out.element_size()
    if out.is_contiguous():  # NCDHW
        block = TILES["flat"].elements(itemsize)
        tile = TILES["flat" if same else "cells"]
        tile_x = _columns(size[2], LONGEST_ROW // 2)
        tile_y = max(1, TILES["cells"].elements(itemsize) // tile_x)
        programs = triton.cdiv(voxels, block)
        if not same:
            programs = triton.cdiv(size[2], tile_x) * triton.cdiv(cells[1], tile_y) * cells[0] * groups
        _fuse[(programs, out.shape[1], n)](
            *arguments, **constants, BLOCK=block, TILE_Y=tile_y, TILE_X=tile_x, VECTOR=_aligned(itemsize, size[2]),
            **tile.options())
        return
    tile = TILES["channels_last" if same else "channels_last_cells"]
    block_c = triton.next_power_of_2(out.shape[1])
    block_v = max(1, tile.elements(itemsize) // block_c)
    tiles = triton.cdiv(voxels, block_v)
    if not same:
        block_v = min(block_v, triton.next_power_of_2(size[2]))
        tiles = triton.cdiv(size[2], block_v) * cells[1] * cells[0] * groups
    _fuse_channels_last[(min(tiles, triton.cdiv(PROGRAMS_LAST, n)), n)](
        *arguments, **constants, FEATURES_LAST=f.stride(1) == 1, BLOCK_C=block_c,
        BLOCK_F=triton.next_power_of_2(max(1, feature_channels)), BLOCK_V=block_v, VECTOR=_aligned(itemsize, out.shape[1]),
        **tile.options())


def backward(
    grad: Tensor, image: Tensor | None, features: Tensor | None, scale: Tensor, image_stats: Tensor, feature_stats: Tensor,
    grad_image: Tensor | None, grad_features: Tensor | None, *,
    image_channels: int, image_norm: tuple[str, float, float], feature_norm: str, eps: float,
) -> None:
    """Write the gradients that are given, which are contiguous: `grad_image` in its dtype, `grad_features` in float32."""
    with on_device_of(grad):
        if grad_image is not None:
            _launch_image_backward(grad, image, scale, image_stats, grad_image, image_norm)
        if grad_features is not None and features is not None:
            _launch_feature_backward(grad, features, scale, feature_stats, grad_features, image_channels, feature_norm, eps)


def _launch_image_backward(
    grad: Tensor, image: Tensor | None, scale: Tensor, image_stats: Tensor, grad_image: Tensor,
    image_norm: tuple[str, float, float],
) -> None:
    kind, lo, hi = image_norm
    x = image if image is not None else grad_image  # read for a window only
    n, channels, *size = grad_image.shape
    voxels = math.prod(size)
    flat, flat_x = _layout(grad), _layout(x)
    tile = TILES["flat"]
    block = tile.elements(grad_image.element_size())
    _image_backward[(triton.cdiv(voxels, block), channels, n)](
        grad, x, scale, image_stats, grad_image, channels, scale.shape[1], voxels, *size[1:],
        grad.stride(0), grad.stride(1), *flat.strides, x.stride(0), x.stride(1), *flat_x.strides, lo, hi,
        WINDOW=kind == "window", GRAD_LAYOUT=flat.kind, IMAGE_LAYOUT=flat_x.kind, BLOCK=block, **tile.options())


def _launch_feature_backward(
    grad: Tensor, features: Tensor, scale: Tensor, feature_stats: Tensor, grad_features: Tensor, image_channels: int,
    feature_norm: str, eps: float,
) -> None:
    n, channels, *grid = features.shape
    same = grid == list(grad.shape[2:])
    instance = feature_norm == "instance"
    coarse = math.prod(grid)
    flat, flat_f = _layout(grad if same else grad_features), _layout(features)
    # What the norm's gradient starts from: the gradient itself, or its transposed interpolation, in place.
    source = grad.narrow(1, image_channels, channels) if same else grad_features
    common = (scale, feature_stats)
    shape = (image_channels, scale.shape[1], channels, coarse, *grid[1:])
    strides = (source.stride(0), source.stride(1), *flat.strides, features.stride(0), features.stride(1), *flat_f.strides)
    layouts = {"GRAD_LAYOUT": flat.kind, "FEATURE_LAYOUT": flat_f.kind, "SAME": same}
    sums, chunks = feature_stats, 1
    if not same:
        sums, chunks = _launch_transpose(grad, features, scale, feature_stats, grad_features, image_channels, instance)
        if feature_norm == "none":
            return
    elif instance:
        tile = TILES["statistics"]
        lanes = Tile(1, tile.warps).elements(max(source.element_size(), features.element_size()))
        chunks = _chunks(coarse, lanes * tile.vectors, CHUNKS)
        sums = torch.empty((n, channels, 2, chunks), dtype=torch.float32, device=grad.device)
        _gradient_sums[(chunks, channels, n)](source, features, *common, sums, *shape, *strides, **layouts, CHUNKS=chunks,
                                              ROWS=_rows(tile, flat, flat_f), LANES=lanes, **tile.options())
    if feature_norm in ("unit", "standard"):
        tile = TILES["voxel_norm"]
        block = tile.elements(4)
        _voxel_norm_backward[(triton.cdiv(coarse, block), n)](
            source, features, *common, grad_features, *shape, *strides, eps, **layouts, STANDARD=feature_norm == "standard",
            BLOCK=block, **tile.options())
        return
    tile = TILES["flat"]
    block = tile.elements(4)
    _channel_norm_backward[(triton.cdiv(coarse, block), channels, n)](
        source, features, *common, sums, grad_features, *shape, *strides, **layouts, INSTANCE=instance, CHUNKS=chunks,
        BLOCK=block, **tile.options())


def _launch_transpose(
    grad: Tensor, features: Tensor, scale: Tensor, feature_stats: Tensor, grad_features: Tensor, image_channels: int, sums: bool,
) -> tuple[Tensor, int]:
    """(partial sums (N, Cf, 2, chunks) where they are asked for, chunks)."""
    n, channels, *grid = features.shape
    size = list(grad.shape[2:])
    rows, rows_f = _row_layout(grad), _row_layout(features)
    itemsize = grad.element_size()
    # How many output voxels a coarse voxel can reach along each axis.
    reach = [1 if big == small else triton.cdiv(2 * big, small) for big, small in zip(size, grid, strict=True)]
    vector = _aligned(itemsize, *grad.stride()[:4], size[2]) if rows.kind == DENSE else 1
    tile_x = max(64, min(LONGEST_ROW, triton.next_power_of_2(size[2])))
    columns = grid[2]  # coarse columns of a tile, whose reach is one tile of the output where that is possible
    if tile_x < size[2]:
        columns = max(1, (tile_x - vector - reach[2]) * grid[2] // size[2])
    tile = TILES["transpose"]
    tile_y = max(1, tile.elements(itemsize) // tile_x)
    tiles = triton.cdiv(grid[2], columns) * triton.cdiv(grid[1], tile_y) * grid[0]
    chunks = min(2 * CHUNKS, triton.next_power_of_2(tiles)) if sums else tiles
    partial = torch.empty((n, channels, 2, chunks), dtype=torch.float32, device=grad.device) if sums else feature_stats
    _transpose_interpolation[(chunks, channels, n)](
        grad, features, scale, feature_stats, partial, grad_features, image_channels, scale.shape[1], channels,
        *size, *grid, *reach, columns, grad.stride(0), grad.stride(1), *rows.strides,
        features.stride(0), features.stride(1), *rows_f.strides,
        SUMS=sums, GRAD_LAYOUT=rows.kind, FEATURE_LAYOUT=rows_f.kind, VECTOR=vector, TILE_Y=tile_y, TILE_X=tile_x,
        COARSE_X=triton.next_power_of_2(columns), PICK=min(PICK, triton.next_power_of_2(reach[2])),
        FLIGHT=ROWS_IN_FLIGHT if rows.kind == DENSE and vector > 1 else 1, **tile.options())
    return partial, chunks


if triton is not None:
    # A legend for the signatures: s<axis><tensor> is a stride in elements, in the order n, c, z, y, x; `voxels` is D·H·W and
    # `coarse` d·h·w. A number that is 1 reaches a kernel as a constant of the compiler, which has no `.to`.

    @triton.jit
    def _finite(x):
        return tl.abs(x) <= 3.4028234663852886e38

    @triton.jit
    def _at(v, H, W, sz, sy, sx, LAYOUT: tl.constexpr):
        """Where flat voxel v of a channel lies, in elements from the first."""
        if LAYOUT == 0:
            offset = v
        elif LAYOUT == 1:
            offset = v.to(tl.int64) * sx
        else:
            offset = (v // (H * W)).to(tl.int64) * sz + (v // W % H).to(tl.int64) * sy + (v % W).to(tl.int64) * sx
        return offset

    @triton.jit
    def _along(x, sx, LAYOUT: tl.constexpr):
        """Where column x of a row lies, in elements from the first."""
        if LAYOUT == 0:
            offset = x
        else:
            offset = x.to(tl.int64) * sx
        return offset

    @triton.jit
    def _tap(i, size, coarse, RATIO: tl.constexpr):
        """(lower voxel, upper voxel, weight of the upper): half-pixel centres, clamped edges, exact in integers."""
        if RATIO > 0:
            numerator = tl.maximum(2 * i + 1 - RATIO, 0)
            lo = numerator // (2 * RATIO)
            weight = (numerator - lo * (2 * RATIO)) * (0.5 / RATIO)
        else:
            numerator = tl.maximum((2 * i + 1) * coarse - size, 0)
            lo = numerator // (2 * size)
            weight = (numerator - lo * 2 * size).to(tl.float32) / (2.0 * size)
        return lo, tl.minimum(lo + 1, coarse - 1), weight

    @triton.jit
    def _cell_voxel(j, k, size, coarse, RATIO: tl.constexpr):
        """(k-th output voxel whose source is in [j, j + 1), whether there is one, the weight of j + 1); j from -1."""
        if RATIO > 0:
            o = j * RATIO + RATIO // 2 + k
            weight = (2 * (RATIO // 2 + k) + 1 - RATIO) * (0.5 / RATIO)
            valid = (o >= 0) & (o < size)
        else:
            # Cell -1 holds what is clamped to the first voxel; division rounds toward zero on a GPU, so keep it from j < 0.
            first = (2 * size * tl.maximum(j, 0) + size + coarse - 1) // (2 * coarse)
            o = tl.where(j < 0, 0, first) + k
            beyond = (2 * o + 1) * coarse - size - j * 2 * size
            weight = beyond.to(tl.float32) / (2.0 * size)
            valid = (o < size) & (beyond < 2 * size)
        return o, valid, weight

    @triton.jit
    def _add_moments(count, mean, squares, count_b, mean_b, squares_b):
        """Moments of the union of two sets (Chan, Golub & LeVeque 1979); squares: Σ (x - mean)²."""
        total = count + count_b
        share = count_b / tl.maximum(total, 1.0)
        delta = mean_b - mean
        return total, mean + delta * share, squares + squares_b + delta * delta * count * share

    @triton.jit
    def _union(count, mean, squares, AXIS: tl.constexpr):
        """Moments of the union of the sets along an axis (the same source)."""
        total = tl.sum(count, AXIS)
        middle = tl.sum(count * mean, AXIS) / tl.maximum(total, 1.0)
        delta = mean - tl.expand_dims(middle, AXIS)
        return total, middle, tl.sum(squares + count * delta * delta, AXIS)

    @triton.jit
    def _pivot(channel, mask):
        """A channel's first voxel, from which its statistics count, so that a large offset costs no digits."""
        value = tl.load(channel, mask=mask, other=0).to(tl.float32)
        return tl.where(_finite(value), value, 0.0)

    # ---- forward -----------------------------------------------------------------------------------------------------

    @triton.jit
    def _image_chunk(image, scale, at, Ci, voxels, H, W, sc, sz, sy, sx, chunk,
                     LAYOUT: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
        """Least and greatest finite voxel of a chunk of one sample, over its channels."""
        lo = tl.full([LANES], float("inf"), tl.float32)
        hi = tl.full([LANES], float("-inf"), tl.float32)
        kept = False
        for c in range(Ci):
            kept = kept | (tl.load(scale + c) != 0)
        if kept:
            inner = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
            channel = image  # moved on by a stride per channel: a product could pass 2³¹
            for _ in range(Ci):
                for block in range(chunk, tl.cdiv(voxels, ROWS * LANES), CHUNKS):
                    v = block * (ROWS * LANES) + inner
                    value = tl.load(channel + _at(v, H, W, sz, sy, sx, LAYOUT), mask=v < voxels, other=0).to(tl.float32)
                    known = (v < voxels) & _finite(value)
                    lo = tl.minimum(lo, tl.min(tl.where(known, value, float("inf")), 0))
                    hi = tl.maximum(hi, tl.max(tl.where(known, value, float("-inf")), 0))
                channel += sc
        tl.store(at + chunk, tl.min(lo, 0))
        tl.store(at + CHUNKS + chunk, tl.max(hi, 0))

    @triton.jit
    def _add_rows(count, mean, squares, value, known, pivot):
        """Lanes' moments, joined by those of a tile of rows × lanes; exact moments of each lane's rows first."""
        value = tl.where(known, value - pivot, 0.0)
        count_b = tl.sum(known.to(tl.float32), 0)
        mean_b = tl.sum(value, 0) / tl.maximum(count_b, 1.0)
        deviation = tl.where(known, value - mean_b[None, :], 0.0)
        return _add_moments(count, mean, squares, count_b, mean_b, tl.sum(deviation * deviation, 0))

    @triton.jit
    def _feature_chunk(channel, at, coarse, h, w, sz, sy, sx, chunk,
                       LAYOUT: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
        """Count, mean (from the pivot) and squares of the finite voxels of a chunk of one channel; lanes meet at the end."""
        pivot = _pivot(channel, True)
        inner = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        count = tl.zeros([LANES], tl.float32)
        mean = tl.zeros([LANES], tl.float32)
        squares = tl.zeros([LANES], tl.float32)
        for block in range(chunk, tl.cdiv(coarse, ROWS * LANES), CHUNKS):
            v = block * (ROWS * LANES) + inner
            value = tl.load(channel + _at(v, h, w, sz, sy, sx, LAYOUT), mask=v < coarse, other=0).to(tl.float32)
            count, mean, squares = _add_rows(count, mean, squares, value, (v < coarse) & _finite(value), pivot)
        total, middle, around = _union(count, mean, squares, 0)
        tl.store(at + chunk, total)
        tl.store(at + CHUNKS + chunk, middle)
        tl.store(at + 2 * CHUNKS + chunk, around)

    @triton.jit
    def _features_chunk(features, at, Cf, coarse, sx, chunk, CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
                        BLOCK_F: tl.constexpr):
        """The same of all channels at once, where they lie side by side: each of BLOCK_F neighbouring lanes has its own."""
        lane = tl.arange(0, LANES)
        c = lane % BLOCK_F
        pivot = _pivot(features + c, c < Cf)[None, :]
        voxels: tl.constexpr = LANES // BLOCK_F  # of a row of lanes
        inner = tl.arange(0, ROWS)[:, None] * voxels + (lane // BLOCK_F)[None, :]
        count = tl.zeros([LANES], tl.float32)
        mean = tl.zeros([LANES], tl.float32)
        squares = tl.zeros([LANES], tl.float32)
        for block in range(chunk, tl.cdiv(coarse, ROWS * voxels), CHUNKS):
            v = block * (ROWS * voxels) + inner
            inside = (v < coarse) & (c < Cf)[None, :]
            value = tl.load(features + v.to(tl.int64) * sx + c[None, :], mask=inside, other=0).to(tl.float32)
            count, mean, squares = _add_rows(count, mean, squares, value, inside & _finite(value), pivot)
        total, middle, around = _union(tl.reshape(count, [voxels, BLOCK_F]), tl.reshape(mean, [voxels, BLOCK_F]),
                                       tl.reshape(squares, [voxels, BLOCK_F]), 0)
        c = tl.arange(0, BLOCK_F)
        tl.store(at + c * 3 * CHUNKS + chunk, total, mask=c < Cf)
        tl.store(at + c * 3 * CHUNKS + CHUNKS + chunk, middle, mask=c < Cf)
        tl.store(at + c * 3 * CHUNKS + 2 * CHUNKS + chunk, around, mask=c < Cf)

    @triton.jit
    def _statistics(image, features, scale, partial, Ci, Cf, voxels, H, W, coarse, h, w,
                    isn, isc, isz, isy, isx, fsn, fsc, fsz, fsy, fsx,
                    MINMAX: tl.constexpr, IMAGE_LAYOUT: tl.constexpr, FEATURE_LAYOUT: tl.constexpr, TOGETHER: tl.constexpr,
                    CHUNKS: tl.constexpr, IMAGE_ROWS: tl.constexpr, FEATURE_ROWS: tl.constexpr, IMAGE_LANES: tl.constexpr,
                    FEATURE_LANES: tl.constexpr, BLOCK_F: tl.constexpr):
        """partial (N, 1 + Cf, 3, CHUNKS): least, greatest of the image; count, mean, squares of each kept feature channel.

        Grid (CHUNKS, streams, N): the image if it is "minmax", then the features' channels, each on its own or TOGETHER.
        """
        chunk, n = tl.program_id(0), tl.program_id(2).to(tl.int64)
        stream = tl.program_id(1)
        if not MINMAX:
            stream += 1
        at = partial + (n * (1 + Cf) + stream) * 3 * CHUNKS
        if stream == 0:
            _image_chunk(image + n * isn, scale + n * (Ci + Cf), at, Ci, voxels, H, W, isc, isz, isy, isx, chunk,
                         IMAGE_LAYOUT, CHUNKS, IMAGE_ROWS, IMAGE_LANES)
        elif TOGETHER:
            _features_chunk(features + n * fsn, at, Cf, coarse, fsx, chunk, CHUNKS, FEATURE_ROWS, FEATURE_LANES, BLOCK_F)
        elif tl.load(scale + n * (Ci + Cf) + Ci + stream - 1) != 0:  # the pass asks for those of kept channels only
            _feature_chunk(features + n * fsn + (stream - 1).to(tl.int64) * fsc, at, coarse, h, w, fsz, fsy, fsx, chunk,
                           FEATURE_LAYOUT, CHUNKS, FEATURE_ROWS, FEATURE_LANES)

    @triton.jit
    def _voxel_statistics(features, stats, Cf, coarse, h, w, sn, sc, sz, sy, sx, eps,
                          STANDARD: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
        """stats (N, 2, d, h, w): shift and gain of each voxel over its channels. Grid (coarse / BLOCK, N)."""
        n = tl.program_id(1).to(tl.int64)
        v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at = features + n * sn + _at(v, h, w, sz, sy, sx, LAYOUT)
        shift = tl.zeros([BLOCK], tl.float32)
        if STANDARD:
            of_channel = at
            for _ in range(Cf):
                shift += tl.load(of_channel, mask=v < coarse, other=0).to(tl.float32)
                of_channel += sc
            shift = shift / Cf
        squares = tl.zeros([BLOCK], tl.float32)
        for _ in range(Cf):
            deviation = tl.load(at, mask=v < coarse, other=0).to(tl.float32) - shift
            squares += deviation * deviation
            at += sc
        if STANDARD:
            gain = 1.0 / tl.sqrt(squares / Cf + eps)
        else:
            norm = tl.sqrt(squares)
            gain = 1.0 / tl.where(norm < eps, eps, norm)  # compared, not clamped: a NaN stays one
        tl.store(stats + n * 2 * coarse + v, shift, mask=v < coarse)
        tl.store(stats + (n * 2 + 1) * coarse + v, gain, mask=v < coarse)

    @triton.jit
    def _image_norm(partial, shift, gain, n, Cf, MINMAX: tl.constexpr, CHUNKS: tl.constexpr):
        """(shift, gain) of one sample's image: those given, or from its partial statistics."""
        if MINMAX:
            at = partial + n * (1 + Cf) * 3 * CHUNKS + tl.arange(0, CHUNKS)
            lo = tl.min(tl.load(at), 0)
            span = tl.max(tl.load(at + CHUNKS), 0) - lo
            varies = span >= 1.1754943508222875e-38  # FLT_MIN: a smaller span has no reciprocal
            shift = tl.where(varies, lo, 0.0)
            gain = tl.where(varies, tl.div_rn(1.0, tl.where(varies, span, 1.0)), 0.0)
        return shift, gain

    @triton.jit
    def _gain_of(total, squares, eps):
        """1 / sqrt(variance + eps), biased variance."""
        return 1.0 / tl.sqrt(squares / tl.maximum(total, 1.0) + eps)

    @triton.jit
    def _clip(value, lo, hi, WINDOW: tl.constexpr):
        if WINDOW:
            value = tl.where(value < lo, lo, tl.where(value > hi, hi, value))  # compared, not clamped: a NaN stays one
        return value

    @triton.jit
    def _normalized_voxel(value, stats, v, coarse, mask, shift, VOXEL_NORM: tl.constexpr):
        """A voxel less its shift, which is its channel's or, with its gain, its own."""
        if VOXEL_NORM:
            value = (value - tl.load(stats + v, mask=mask, other=0)) * tl.load(stats + coarse + v, mask=mask, other=0)
        else:
            value = value - shift
        return value

    @triton.jit
    def _coarse_row(source, stats, z, y, x0, x1, wx, mask, shift, gain, h, w, coarse, sz, sy, sx,
                    RATIO_X: tl.constexpr, LAYOUT: tl.constexpr, VOXEL_NORM: tl.constexpr):
        """Coarse row (z, y), normalized, brought to the output's columns."""
        row = source + z.to(tl.int64) * sz + y.to(tl.int64) * sy
        first = (z * h + y) * w
        left = tl.load(row + _along(x0, sx, LAYOUT), mask=mask, other=0).to(tl.float32)
        left = _normalized_voxel(left, stats, first + x0, coarse, mask, shift, VOXEL_NORM)
        if RATIO_X != 1:
            right = tl.load(row + _along(x1, sx, LAYOUT), mask=mask, other=0).to(tl.float32)
            right = _normalized_voxel(right, stats, first + x1, coarse, mask, shift, VOXEL_NORM)
            left = left + wx * (right - left)
        return left * gain

    @triton.jit
    def _cell(source, stats, jz, jy, x0, x1, wx, mask, shift, gain, d, h, w, coarse, sz, sy, sx,
              RATIO_Z: tl.constexpr, RATIO_Y: tl.constexpr, RATIO_X: tl.constexpr, LAYOUT: tl.constexpr,
              VOXEL_NORM: tl.constexpr):
        """The four coarse rows (zy: 00, 01, 10, 11) between which cell (jz, jy) of the output lies; those needed are read."""
        z0, y0 = tl.maximum(jz, 0), tl.maximum(jy, 0)
        z1, y1 = tl.minimum(jz + 1, d - 1), tl.minimum(jy + 1, h - 1)
        f00 = _coarse_row(source, stats, z0, y0, x0, x1, wx, mask, shift, gain, h, w, coarse, sz, sy, sx,
                          RATIO_X, LAYOUT, VOXEL_NORM)
        f01, f10, f11 = f00, f00, f00
        if RATIO_Y != 1:
            f01 = _coarse_row(source, stats, z0, y1, x0, x1, wx, mask, shift, gain, h, w, coarse, sz, sy, sx,
                              RATIO_X, LAYOUT, VOXEL_NORM)
        if RATIO_Z != 1:
            f10 = _coarse_row(source, stats, z1, y0, x0, x1, wx, mask, shift, gain, h, w, coarse, sz, sy, sx,
                              RATIO_X, LAYOUT, VOXEL_NORM)
            if RATIO_Y != 1:
                f11 = _coarse_row(source, stats, z1, y1, x0, x1, wx, mask, shift, gain, h, w, coarse, sz, sy, sx,
                                  RATIO_X, LAYOUT, VOXEL_NORM)
            else:
                f11 = f10
        else:
            f11 = f01
        return f00, f01, f10, f11

    @triton.jit
    def _between(low, high, weight, RATIO: tl.constexpr):
        if RATIO != 1:
            low = low + weight * (high - low)
        return low

    @triton.jit
    def _zeros(out, t, programs, voxels, BLOCK: tl.constexpr):
        """A program's share of a channel, zero."""
        for block in range(t, tl.cdiv(voxels, BLOCK), programs):
            v = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(out + v, tl.zeros([BLOCK], out.dtype.element_ty), mask=v < voxels)

    @triton.jit
    def _image_voxels(image, out, t, programs, voxels, H, W, sz, sy, sx, lo, hi, shift, gain, s,
                      WINDOW: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
        """A program's share of an image channel."""
        for block in range(t, tl.cdiv(voxels, BLOCK), programs):
            v = block * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(image + _at(v, H, W, sz, sy, sx, LAYOUT), mask=v < voxels, other=0).to(tl.float32)
            value = (_clip(value, lo, hi, WINDOW) - shift) * gain * s
            tl.store(out + v, value.to(out.dtype.element_ty), mask=v < voxels)

    @triton.jit
    def _feature_voxels(source, stats, out, t, programs, voxels, H, W, sz, sy, sx, shift, gain,
                        LAYOUT: tl.constexpr, VOXEL_NORM: tl.constexpr, BLOCK: tl.constexpr):
        """A program's share of a feature channel whose grid is the image's."""
        for block in range(t, tl.cdiv(voxels, BLOCK), programs):
            v = block * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(source + _at(v, H, W, sz, sy, sx, LAYOUT), mask=v < voxels, other=0).to(tl.float32)
            value = _normalized_voxel(value, stats, v, voxels, v < voxels, shift, VOXEL_NORM) * gain
            tl.store(out + v, value.to(out.dtype.element_ty), mask=v < voxels)

    @triton.jit
    def _plane_rows(out, f0, f1, z, jy, k, x, columns, H, h, W, RATIO_Y: tl.constexpr, VECTOR: tl.constexpr):
        """Write the k-th output row of each cell jy, in plane z."""
        y, inside, wy = _cell_voxel(jy, k, H, h, RATIO_Y)
        result = _between(f0, f1, wy, RATIO_Y)
        tl.store(out + (z * H + y) * (W // VECTOR) * VECTOR + x, result.to(out.dtype.element_ty), mask=inside & columns)

    @triton.jit
    def _interpolated(source, stats, out, t, shift, gain, D, H, W, d, h, w, coarse, sz, sy, sx, groups, reach_y,
                      RATIO_Z: tl.constexpr, RATIO_Y: tl.constexpr, RATIO_X: tl.constexpr, LAYOUT: tl.constexpr,
                      VOXEL_NORM: tl.constexpr, PLANES: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
                      VECTOR: tl.constexpr):
        """One tile of one channel: TILE_Y cells × TILE_X columns, PLANES output planes of one cell along z.

        A cell is what lies between two neighbours of the coarse grid along an axis: all its output rows are blended from
        the same coarse rows, which are read and brought to the output's columns once.
        """
        tiles_x = tl.cdiv(W, TILE_X)
        tiles_y = tl.cdiv(h if RATIO_Y == 1 else h + 1, TILE_Y)
        plane = t // (tiles_x * tiles_y)
        x = t % tiles_x * TILE_X + tl.arange(0, TILE_X)[None, :]
        jy = t // tiles_x % tiles_y * TILE_Y + tl.arange(0, TILE_Y)[:, None]
        jz = plane // groups
        k = plane % groups * PLANES
        if RATIO_Y != 1:
            jy -= 1
        if RATIO_Z != 1:
            jz -= 1
        _, some, _ = _cell_voxel(jz, k, D, d, RATIO_Z)
        _, last, _ = _cell_voxel(jz, k + PLANES - 1, D, d, RATIO_Z)
        if some | last:
            x0, x1, wx = _tap(x, W, w, RATIO_X)
            columns = x // VECTOR * VECTOR < W  # the same as x < W, in words that keep vectors whole
            f00, f01, f10, f11 = _cell(source, stats, jz, jy, x0, x1, wx, columns & (jy < h), shift, gain, d, h, w, coarse,
                                       sz, sy, sx, RATIO_Z, RATIO_Y, RATIO_X, LAYOUT, VOXEL_NORM)
            for kz in tl.static_range(PLANES):
                z, inside, wz = _cell_voxel(jz, k + kz, D, d, RATIO_Z)
                if inside & (k + kz < (RATIO_Z if RATIO_Z > 0 else D)):
                    f0 = _between(f00, f10, wz, RATIO_Z)
                    f1 = _between(f01, f11, wz, RATIO_Z)
                    if RATIO_Y > 0:
                        for ky in tl.static_range(RATIO_Y):
                            _plane_rows(out, f0, f1, z, jy, ky, x, columns, H, h, W, RATIO_Y, VECTOR)
                    else:
                        for ky in range(reach_y):
                            _plane_rows(out, f0, f1, z, jy, ky, x, columns, H, h, W, RATIO_Y, VECTOR)

    @triton.jit
    def _fuse(image, features, scale, partial, image_stats, feature_stats, out, Ci, Cf, Cout, voxels, coarse, D, H, W, d, h, w,
              isn, isc, isz, isy, isx, fsn, fsc, fsz, fsy, fsx, lo, hi, image_shift, image_gain, eps, groups, reach_y,
              MINMAX: tl.constexpr, WINDOW: tl.constexpr, HAS_FEATURES: tl.constexpr, FEATURE_NORM: tl.constexpr,
              IMAGE_LAYOUT: tl.constexpr, FEATURE_LAYOUT: tl.constexpr, SAME: tl.constexpr, RATIO_Z: tl.constexpr,
              RATIO_Y: tl.constexpr, RATIO_X: tl.constexpr, PLANES: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
              TILE_Y: tl.constexpr, TILE_X: tl.constexpr, VECTOR: tl.constexpr):
        """The pass over an NCDHW output. Grid (programs of a channel, C, N).

        A channel's programs share it: blocks of BLOCK voxels in the order in which they lie, or one tile of interpolation
        each. The first of them also stores the channel's combined statistics for the backward.
        """
        t, c, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        programs = tl.num_programs(0)
        cf = (c - Ci).to(tl.int64)
        instance: tl.constexpr = HAS_FEATURES and FEATURE_NORM == 0
        voxel_norm: tl.constexpr = FEATURE_NORM == 1 or FEATURE_NORM == 2
        s = tl.load(scale + n * (Ci + Cf) + c, mask=c < Ci + Cf, other=0.0)
        channel = out + (n * Cout + c) * voxels
        if (c == 0) & (t == 0):
            shift, gain = _image_norm(partial, image_shift, image_gain, n, Cf, MINMAX, CHUNKS)
            tl.store(image_stats + n * 2, shift)
            tl.store(image_stats + n * 2 + 1, gain)
        if s == 0:
            _zeros(channel, t, programs, voxels, BLOCK)
            if instance:
                # Nothing asks for them, but a result must not hold chance.
                tl.store(feature_stats + (n * Cf + cf) * 2, 0.0, mask=(t == 0) & (cf >= 0) & (cf < Cf))
                tl.store(feature_stats + (n * Cf + cf) * 2 + 1, 0.0, mask=(t == 0) & (cf >= 0) & (cf < Cf))
        elif c < Ci:
            shift, gain = _image_norm(partial, image_shift, image_gain, n, Cf, MINMAX, CHUNKS)
            _image_voxels(image + n * isn + c.to(tl.int64) * isc, channel, t, programs, voxels, H, W, isz, isy, isx, lo, hi,
                          shift, gain, s, WINDOW, IMAGE_LAYOUT, BLOCK)
        elif HAS_FEATURES:
            source = features + n * fsn + cf * fsc
            stats = feature_stats + n * 2 * coarse if voxel_norm else feature_stats
            shift = 0.0
            gain = s
            if instance:
                at = partial + (n * (1 + Cf) + 1 + cf) * 3 * CHUNKS + tl.arange(0, CHUNKS)
                total, mean, squares = _union(tl.load(at), tl.load(at + CHUNKS), tl.load(at + 2 * CHUNKS), 0)
                shift = _pivot(source, True) + mean
                gain = _gain_of(total, squares, eps)
                if t == 0:
                    tl.store(feature_stats + (n * Cf + cf) * 2, shift)
                    tl.store(feature_stats + (n * Cf + cf) * 2 + 1, gain)
                gain = gain * s
            if SAME:
                _feature_voxels(source, stats, channel, t, programs, voxels, H, W, fsz, fsy, fsx, shift, gain,
                                FEATURE_LAYOUT, voxel_norm, BLOCK)
            else:
                _interpolated(source, stats, channel, t, shift, gain, D, H, W, d, h, w, coarse, fsz, fsy, fsx, groups, reach_y,
                              RATIO_Z, RATIO_Y, RATIO_X, FEATURE_LAYOUT, voxel_norm, PLANES, TILE_Y, TILE_X, VECTOR)

    @triton.jit
    def _over_voxels(x, FEATURES_LAST: tl.constexpr):
        """A vector over voxels, as an axis of the tile in which features are read."""
        if FEATURES_LAST:
            x = x[:, None]
        else:
            x = x[None, :]
        return x

    @triton.jit
    def _over_channels(x, FEATURES_LAST: tl.constexpr):
        if FEATURES_LAST:
            x = x[None, :]
        else:
            x = x[:, None]
        return x

    @triton.jit
    def _voxels_out(result, image, scale, out, v, inside, c, Ci, Cout, H, W, isc, isz, isy, isx, lo, hi, shift, gain,
                    WINDOW: tl.constexpr, LAYOUT: tl.constexpr, HAS_FEATURES: tl.constexpr, FEATURES_LAST: tl.constexpr,
                    BLOCK_F: tl.constexpr, VECTOR: tl.constexpr):
        """Write voxels v with all their channels: the features', moved up by the image's, and the image's, read here."""
        result = result.to(out.dtype.element_ty)
        if HAS_FEATURES:
            if not FEATURES_LAST:
                result = tl.trans(result)
            of_features = (c >= Ci) & (c < Ci + BLOCK_F)
            pick = tl.where(of_features, c - Ci, 0)[None, :] + tl.zeros([v.shape[0], c.shape[0]], tl.int32)
            result = tl.where(of_features[None, :], tl.gather(result, pick, 1), 0.0)
        channel = image
        for ci in range(Ci):
            s = tl.load(scale + ci)
            if s != 0:  # else it is zero already
                value = tl.load(channel + _at(v, H, W, isz, isy, isx, LAYOUT), mask=inside, other=0).to(tl.float32)
                value = (_clip(value, lo, hi, WINDOW) - shift) * gain * s
                result = tl.where((c == ci)[None, :], value.to(out.dtype.element_ty)[:, None], result)
            channel += isc
        at = out + v.to(tl.int64)[:, None] * (Cout // VECTOR) * VECTOR + c[None, :]
        tl.store(at, result, mask=inside[:, None] & (c // VECTOR * VECTOR < Cout)[None, :])

    @triton.jit
    def _fuse_channels_last(
            image, features, scale, partial, image_stats, feature_stats, out, Ci, Cf, Cout, voxels, coarse, D, H, W, d, h, w,
            isn, isc, isz, isy, isx, fsn, fsc, fsz, fsy, fsx, lo, hi, image_shift, image_gain, eps, groups, reach_y,
            MINMAX: tl.constexpr, WINDOW: tl.constexpr, HAS_FEATURES: tl.constexpr, FEATURE_NORM: tl.constexpr,
            IMAGE_LAYOUT: tl.constexpr, FEATURE_LAYOUT: tl.constexpr, SAME: tl.constexpr, RATIO_Z: tl.constexpr,
            RATIO_Y: tl.constexpr, RATIO_X: tl.constexpr, PLANES: tl.constexpr, CHUNKS: tl.constexpr,
            FEATURES_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
            VECTOR: tl.constexpr):
        """The pass over a channels-last output. Grid (programs of a sample, N).

        A tile is BLOCK_V voxels with all their channels; a program takes every so-manieth, having combined all the
        channels' statistics once. With interpolation a tile is BLOCK_V columns of one cell (see `_interpolated`). Features
        are worked on as their own channels lie, whole vectors of them, and moved up by Ci channels just before they are
        written.
        """
        program, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
        instance: tl.constexpr = HAS_FEATURES and FEATURE_NORM == 0
        voxel_norm: tl.constexpr = FEATURE_NORM == 1 or FEATURE_NORM == 2
        c = tl.arange(0, BLOCK_C)
        cf = tl.arange(0, BLOCK_F).to(tl.int64)
        of_sample = scale + n * (Ci + Cf)
        s = tl.load(of_sample + Ci + cf, mask=cf < Cf, other=0.0)
        kept = s != 0
        image_shift, image_gain = _image_norm(partial, image_shift, image_gain, n, Cf, MINMAX, CHUNKS)
        if program == 0:
            tl.store(image_stats + n * 2, image_shift)
            tl.store(image_stats + n * 2 + 1, image_gain)
        shift = tl.zeros([BLOCK_F], tl.float32)
        gain = s
        source = features + n * fsn + cf * fsc
        if instance:
            at = partial + (n * (1 + Cf) + 1 + cf[:, None]) * 3 * CHUNKS + tl.arange(0, CHUNKS)[None, :]
            total, mean, squares = _union(tl.load(at, mask=kept[:, None], other=0),
                                          tl.load(at + CHUNKS, mask=kept[:, None], other=0),
                                          tl.load(at + 2 * CHUNKS, mask=kept[:, None], other=0), 1)
            shift = _pivot(source, kept) + mean
            gain = tl.where(kept, _gain_of(total, squares, eps), 0.0)
            if program == 0:
                of_channel = feature_stats + (n * Cf + cf) * 2
                tl.store(of_channel, shift, mask=cf < Cf)
                tl.store(of_channel + 1, gain, mask=cf < Cf)
            gain = gain * s
        stats = feature_stats + n * 2 * coarse if voxel_norm else feature_stats
        source = _over_channels(source, FEATURES_LAST)
        shift = _over_channels(shift, FEATURES_LAST)
        gain = _over_channels(gain, FEATURES_LAST)
        # Where channels lie side by side, a dropped one is in the vectors of its neighbours: masking it would only split them.
        read = _over_channels(cf < Cf if FEATURES_LAST else kept, FEATURES_LAST)
        kept = _over_channels(kept, FEATURES_LAST)
        image += n * isn
        out += n * voxels * (Cout // VECTOR) * VECTOR
        if SAME:
            for tile in range(program, tl.cdiv(voxels, BLOCK_V), tl.num_programs(0)):
                v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
                if HAS_FEATURES:
                    mask = read & _over_voxels(v < voxels, FEATURES_LAST)
                    place = _over_voxels(_at(v, H, W, fsz, fsy, fsx, FEATURE_LAYOUT), FEATURES_LAST)
                    value = tl.load(source + place, mask=mask, other=0).to(tl.float32)
                    value = _normalized_voxel(value, stats, _over_voxels(v, FEATURES_LAST), coarse, mask, shift, voxel_norm)
                    result = tl.where(kept, value * gain, 0.0)
                else:
                    result = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
                _voxels_out(result, image, of_sample, out, v, v < voxels, c, Ci, Cout, H, W, isc, isz, isy, isx, lo, hi,
                            image_shift, image_gain, WINDOW, IMAGE_LAYOUT, HAS_FEATURES, FEATURES_LAST, BLOCK_F, VECTOR)
        else:
            tiles_x = tl.cdiv(W, BLOCK_V)
            cells_y = h if RATIO_Y == 1 else h + 1
            cells_z = d if RATIO_Z == 1 else d + 1
            for tile in range(program, tiles_x * cells_y * cells_z * groups, tl.num_programs(0)):
                x = tile % tiles_x * BLOCK_V + tl.arange(0, BLOCK_V)
                jy = tile // tiles_x % cells_y
                plane = tile // (tiles_x * cells_y)
                jz = plane // groups
                k = plane % groups * PLANES
                if RATIO_Y != 1:
                    jy -= 1
                if RATIO_Z != 1:
                    jz -= 1
                x0, x1, wx = _tap(x, W, w, RATIO_X)
                f00, f01, f10, f11 = _cell(
                    source, stats, jz, jy, _over_voxels(x0, FEATURES_LAST), _over_voxels(x1, FEATURES_LAST),
                    _over_voxels(wx, FEATURES_LAST), read & _over_voxels(x < W, FEATURES_LAST), shift, gain, d, h, w, coarse,
                    fsz, fsy, fsx, RATIO_Z, RATIO_Y, RATIO_X, FEATURE_LAYOUT, voxel_norm)
                for kz in range(PLANES):
                    z, in_z, wz = _cell_voxel(jz, k + kz, D, d, RATIO_Z)
                    if in_z & (k + kz < (RATIO_Z if RATIO_Z > 0 else D)):
                        f0 = _between(f00, f10, wz, RATIO_Z)
                        f1 = _between(f01, f11, wz, RATIO_Z)
                        for ky in range(reach_y):
                            y, in_y, wy = _cell_voxel(jy, ky, H, h, RATIO_Y)
                            if in_y:
                                result = tl.where(kept, _between(f0, f1, wy, RATIO_Y), 0.0)
                                _voxels_out(result, image, of_sample, out, (z * H + y) * W + x, x < W, c, Ci, Cout, H, W,
                                            isc, isz, isy, isx, lo, hi, image_shift, image_gain,
                                            WINDOW, IMAGE_LAYOUT, HAS_FEATURES, FEATURES_LAST, BLOCK_F, VECTOR)

    # ---- backward ----------------------------------------------------------------------------------------------------

    @triton.jit
    def _image_backward(grad, image, scale, image_stats, grad_image, Ci, streams, voxels, H, W, gsn, gsc, gsz, gsy, gsx,
                        isn, isc, isz, isy, isx, lo, hi, WINDOW: tl.constexpr, GRAD_LAYOUT: tl.constexpr,
                        IMAGE_LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
        """grad_image = scale · gain · grad, zero where a window clipped. Grid (voxels / BLOCK, Ci, N)."""
        t, c, n = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        s = tl.load(scale + n * streams + c)
        channel = grad_image + (n * Ci + c) * voxels
        if s == 0:
            _zeros(channel, t, tl.num_programs(0), voxels, BLOCK)
        else:
            v = t * BLOCK + tl.arange(0, BLOCK)
            at = grad + n * gsn + c * gsc + _at(v, H, W, gsz, gsy, gsx, GRAD_LAYOUT)
            result = tl.load(at, mask=v < voxels, other=0).to(tl.float32) * (s * tl.load(image_stats + n * 2 + 1))
            if WINDOW:
                at = image + n * isn + c * isc + _at(v, H, W, isz, isy, isx, IMAGE_LAYOUT)
                value = tl.load(at, mask=v < voxels, other=0).to(tl.float32)
                result = tl.where((value < lo) | (value > hi), 0.0, result)
            tl.store(channel + v, result.to(grad_image.dtype.element_ty), mask=v < voxels)

    @triton.jit
    def _first_reached(i, size, coarse):
        """The first output voxel o with source(o) > i - 1; clamped before the division, which rounds toward zero on a GPU."""
        return tl.maximum((2 * i - 1) * size + coarse, 0) // (2 * coarse)

    @triton.jit
    def _reached(o, i, size, coarse):
        """The weight with which coarse voxel i reaches output voxel o along an axis."""
        numerator = tl.minimum(tl.maximum((2 * o + 1) * coarse - size, 0), (coarse - 1) * 2 * size)
        weight = tl.maximum(2 * size - tl.abs(numerator - i * 2 * size), 0).to(tl.float32) / (2.0 * size)
        return tl.where(o < size, weight, 0.0)

    @triton.jit
    def _rows_reached(grad, z, iz, iy, x, columns, D, H, d, h, reach_z, reach_y, sz, sy, sx, LAYOUT: tl.constexpr,
                      VECTOR: tl.constexpr, FLIGHT: tl.constexpr):
        """Σ over z and y of weight · grad for the coarse rows (iz, iy): whole rows of the output, not yet gathered along x."""
        total = tl.zeros(columns.shape, tl.float32) + tl.zeros(iy.shape, tl.float32)
        y = _first_reached(iy, H, h)
        for kz in range(reach_z):
            wz = _reached(z + kz, iz, D, d)
            if wz > 0:
                plane = grad + (z + kz).to(tl.int64) * (sz // VECTOR) * VECTOR
                for ky in range(0, reach_y, FLIGHT):
                    for k in tl.static_range(FLIGHT):  # rows in flight; those out of reach weigh nothing and are not read
                        wy = _reached(y + ky + k, iy, H, h)
                        at = plane + (y + ky + k).to(tl.int64) * (sy // VECTOR) * VECTOR + _along(x, sx, LAYOUT)
                        total += wz * wy * tl.load(at, mask=columns & (wy > 0), other=0).to(tl.float32)
        return total

    @triton.jit
    def _transpose_interpolation(
            grad, features, scale, stats, sums, out, Ci, streams, Cf, D, H, W, d, h, w, reach_z, reach_y, reach_x, columns,
            gsn, gsc, gsz, gsy, gsx, fsn, fsc, fsz, fsy, fsx, SUMS: tl.constexpr, GRAD_LAYOUT: tl.constexpr,
            FEATURE_LAYOUT: tl.constexpr, VECTOR: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
            COARSE_X: tl.constexpr, PICK: tl.constexpr, FLIGHT: tl.constexpr):
        """out (N, Cf, d, h, w) = scale · Σ weight · grad over the voxels that each coarse one reached. Grid (chunks, Cf, N).

        SUMS: also sums (N, Cf, 2, chunks), Σ out and Σ out · f̂ of each chunk of the kept channels; dropped ones are then not
        written. A tile is TILE_Y × `columns` coarse voxels: rows of the output are summed over z and y first, in whole
        vectors, and each coarse voxel then picks its columns from the sum.
        """
        chunk, c, n = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        chunks = tl.num_programs(0)
        s = tl.load(scale + n * streams + Ci + c)
        channel = out + (n * Cf + c) * d * h * w
        if s != 0:
            source = grad + n * (gsn // VECTOR) * VECTOR + (Ci + c) * (gsc // VECTOR) * VECTOR
            feature = features + n * fsn + c * fsc
            total = tl.zeros([TILE_Y, COARSE_X], tl.float32)
            product = tl.zeros([TILE_Y, COARSE_X], tl.float32)
            tiles_x = tl.cdiv(w, columns)
            tiles_y = tl.cdiv(h, TILE_Y)
            for tile in range(chunk, tiles_x * tiles_y * d, chunks):
                iz = tile // (tiles_x * tiles_y)
                iy = tile // tiles_x % tiles_y * TILE_Y + tl.arange(0, TILE_Y)[:, None]
                left = tile % tiles_x * columns
                right = tl.minimum(left + columns, w)
                ix = left + tl.arange(0, COARSE_X)[None, :]
                # Pairs of a coarse column and one of the output columns that it reaches, in one row.
                pair = tl.arange(0, COARSE_X * PICK)[None, :]
                pair_i = left + pair // PICK
                pair_first = _first_reached(pair_i, W, w) + pair % PICK
                g = tl.zeros([TILE_Y, COARSE_X], tl.float32)
                first = _first_reached(left, W, w) // VECTOR * VECTOR
                beyond = tl.minimum(_first_reached(right - 1, W, w) + reach_x, W)
                for start in range(0, tl.cdiv(beyond - first, TILE_X)):
                    x0 = first + start * TILE_X
                    x = x0 + tl.arange(0, TILE_X)[None, :]
                    rows = _rows_reached(source, _first_reached(iz, D, d), iz, iy, x, x // VECTOR * VECTOR < W, D, H, d, h,
                                         reach_z, reach_y, gsz, gsy, gsx, GRAD_LAYOUT, VECTOR, FLIGHT)
                    for k in range(0, reach_x, PICK):
                        pair_x = pair_first + k
                        inside = (pair_x >= x0) & (pair_x < x0 + TILE_X)
                        pick = tl.where(inside, pair_x - x0, 0) + tl.zeros([TILE_Y, COARSE_X * PICK], tl.int32)
                        picked = tl.gather(rows, pick, 1) * tl.where(inside, _reached(pair_x, pair_i, W, w), 0.0)
                        g += tl.sum(tl.reshape(picked, [TILE_Y, COARSE_X, PICK]), 2)
                g = tl.where((iy < h) & (ix < right), g * s, 0.0)
                mask = (iy < h) & (ix < right)
                tl.store(channel + (iz * h + iy) * w + ix, g, mask=mask)
                if SUMS:
                    at = feature + iz.to(tl.int64) * fsz + iy.to(tl.int64) * fsy + _along(ix, fsx, FEATURE_LAYOUT)
                    shift = tl.load(stats + (n * Cf + c) * 2)
                    gain = tl.load(stats + (n * Cf + c) * 2 + 1)
                    total += g
                    product += tl.where(mask, g * ((tl.load(at, mask=mask, other=0).to(tl.float32) - shift) * gain), 0.0)
            if SUMS:
                at = sums + (n * Cf + c) * 2 * chunks + chunk
                tl.store(at, tl.sum(tl.sum(total, 1), 0))
                tl.store(at + chunks, tl.sum(tl.sum(product, 1), 0))
        elif not SUMS:
            _zeros(channel, chunk, chunks, d * h * w, TILE_Y * TILE_X)

    @triton.jit
    def _gradient_sums(grad, features, scale, stats, sums, Ci, streams, Cf, coarse, h, w, gsn, gsc, gsz, gsy, gsx,
                       fsn, fsc, fsz, fsy, fsx, GRAD_LAYOUT: tl.constexpr, FEATURE_LAYOUT: tl.constexpr, SAME: tl.constexpr,
                       CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
        """sums (N, Cf, 2, CHUNKS): Σ g and Σ g · f̂ of each chunk of the kept channels, g = scale · grad. Grid (CHUNKS, Cf, N)."""
        chunk, c, n = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        s = tl.load(scale + n * streams + Ci + c)
        if s != 0:
            shift = tl.load(stats + (n * Cf + c) * 2)
            gain = tl.load(stats + (n * Cf + c) * 2 + 1)
            inner = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
            total = tl.zeros([LANES], tl.float32)
            product = tl.zeros([LANES], tl.float32)
            for block in range(chunk, tl.cdiv(coarse, ROWS * LANES), CHUNKS):
                v = block * (ROWS * LANES) + inner
                at = grad + n * gsn + c * gsc + _at(v, h, w, gsz, gsy, gsx, GRAD_LAYOUT)
                g = tl.load(at, mask=v < coarse, other=0).to(tl.float32)
                at = features + n * fsn + c * fsc + _at(v, h, w, fsz, fsy, fsx, FEATURE_LAYOUT)
                f = (tl.load(at, mask=v < coarse, other=0).to(tl.float32) - shift) * gain
                total += tl.sum(g, 0)
                product += tl.sum(g * f, 0)  # beyond the channel g is zero
            at = sums + (n * Cf + c) * 2 * CHUNKS + chunk
            tl.store(at, tl.sum(total, 0) * s)
            tl.store(at + CHUNKS, tl.sum(product, 0) * s)

    @triton.jit
    def _channel_norm_backward(
            grad, features, scale, stats, sums, out, Ci, streams, Cf, coarse, h, w, gsn, gsc, gsz, gsy, gsx,
            fsn, fsc, fsz, fsy, fsx, GRAD_LAYOUT: tl.constexpr, FEATURE_LAYOUT: tl.constexpr, SAME: tl.constexpr,
            INSTANCE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
        """out (N, Cf, d, h, w) = gain · (g - mean(g) - f̂ · mean(g · f̂)), or g. Grid (coarse / BLOCK, Cf, N).

        g is scale · grad where grids are the same (SAME), else grad, which is `out` itself.
        """
        t, c, n = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        s = tl.load(scale + n * streams + Ci + c)
        channel = out + (n * Cf + c) * coarse
        if s == 0:
            _zeros(channel, t, tl.num_programs(0), coarse, BLOCK)
        else:
            v = t * BLOCK + tl.arange(0, BLOCK)
            at = grad + n * gsn + c * gsc + _at(v, h, w, gsz, gsy, gsx, GRAD_LAYOUT)
            g = tl.load(at, mask=v < coarse, other=0).to(tl.float32)
            if SAME:
                g = g * s
            if INSTANCE:
                of_chunk = sums + (n * Cf + c) * 2 * CHUNKS + tl.arange(0, CHUNKS)
                mean = tl.sum(tl.load(of_chunk), 0) / coarse
                product = tl.sum(tl.load(of_chunk + CHUNKS), 0) / coarse
                shift = tl.load(stats + (n * Cf + c) * 2)
                gain = tl.load(stats + (n * Cf + c) * 2 + 1)
                at = features + n * fsn + c * fsc + _at(v, h, w, fsz, fsy, fsx, FEATURE_LAYOUT)
                f = (tl.load(at, mask=v < coarse, other=0).to(tl.float32) - shift) * gain
                g = gain * (g - mean - f * product)
            tl.store(channel + v, g, mask=v < coarse)

    @triton.jit
    def _voxel_gradient(grad, scale, c, mask, SAME: tl.constexpr):
        """g of one channel: see `_channel_norm_backward`."""
        if SAME:
            s = tl.load(scale + c)
            g = tl.zeros(mask.shape, tl.float32)
            if s != 0:
                g = tl.load(grad, mask=mask, other=0).to(tl.float32) * s
        else:
            g = tl.load(grad, mask=mask, other=0)
        return g

    @triton.jit
    def _voxel_norm_backward(
            grad, features, scale, stats, out, Ci, streams, Cf, coarse, h, w, gsn, gsc, gsz, gsy, gsx,
            fsn, fsc, fsz, fsy, fsx, eps, GRAD_LAYOUT: tl.constexpr, FEATURE_LAYOUT: tl.constexpr, SAME: tl.constexpr,
            STANDARD: tl.constexpr, BLOCK: tl.constexpr):
        """out (N, Cf, d, h, w) = g's gradient through "unit" or "standard"; g as in `_channel_norm_backward`.

        Grid (coarse / BLOCK, N).
        """
        n = tl.program_id(1).to(tl.int64)
        v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = v < coarse
        at = features + n * fsn + _at(v, h, w, fsz, fsy, fsx, FEATURE_LAYOUT)
        at_g = grad + n * gsn + _at(v, h, w, gsz, gsy, gsx, GRAD_LAYOUT)
        of_sample = scale + n * streams + Ci
        shift = tl.load(stats + n * 2 * coarse + v, mask=inside, other=0)
        gain = tl.load(stats + (n * 2 + 1) * coarse + v, mask=inside, other=0)
        mean = tl.zeros([BLOCK], tl.float32)
        product = tl.zeros([BLOCK], tl.float32)
        of_channel, of_channel_g = at, at_g
        for c in range(Cf):
            g = _voxel_gradient(of_channel_g, of_sample, c, inside, SAME)
            mean += g
            product += g * (tl.load(of_channel, mask=inside, other=0).to(tl.float32) - shift) * gain
            of_channel += fsc
            of_channel_g += gsc
        if STANDARD:
            mean, product = mean / Cf, product / Cf
        else:
            mean = tl.zeros([BLOCK], tl.float32)
            product = tl.where(gain >= 1.0 / eps, 0.0, product)  # the norm was held at eps
        channel = out + n * Cf * coarse
        for c in range(Cf):
            f = (tl.load(at, mask=inside, other=0).to(tl.float32) - shift) * gain
            g = _voxel_gradient(at_g, of_sample, c, inside, SAME)
            tl.store(channel + v, gain * (g - mean - f * product), mask=inside)
            at += fsc
            at_g += gsc
            channel += coarse
