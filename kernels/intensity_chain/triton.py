"""`intensity_chain` as Triton kernels.

Shapes: N batch, C image channels, D H W voxels, V = D · H · W. All arithmetic is float32, but for what a channel's sums and
extremes are turned into, which is float64. Offsets inside a channel have 32 bits, all others 64.

Launches:

    nothing needs statistics         1   all stages
    gamma, contrast or rescale       3   statistics of chunks; what a channel's last stages are; these stages
    contrast after gamma             5   and the mean after gamma, and what the last stages are with it, in between

The host knows from the parameters which a batch needs. Within a launch every sample branches on its own flags: a stage that is
off costs nothing. Where a sample has noise and needs statistics, the first pass writes what it computed and the last goes on
from there: drawing again would cost more than the memory's traffic. A bias field is computed again.

A tile is G groups of the four voxels that share a counter of the noise, and a 128-bit vector. No atomics, sums in a fixed
order: results are the same from call to call. Nothing waits for the device; the parameters are one tensor, copied once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..gpu import INTERPRETED, on_device_of, sent
from ..gpu import MISSING as MISSING  # part of what a backend says of itself
from .parameters import BIAS_TERMS, IntensityParameters

try:
    import triton
    import triton.language as tl
except ImportError:  # the other backends do without
    triton = None

# Not tuned: chosen from register counts and bytes in flight, not from timings on a GPU.
GROUPS = 256  # of a tile; half as many where vectors cannot be whole, which takes more registers a voxel
WARPS = 4
CHUNKS = 512  # programs that share the sums of one channel, at most
MOST_PROGRAMS = 2**15  # of samples or channels; the second and third axis of a grid hold twice as many
MOST_VOXELS = 2**31 - 2**17  # of a channel, so that the index of the last tile's last voxel has 32 bits

NOISE, RICIAN, BIAS, GAMMA, CONTRAST, RESCALE = (1 << bit for bit in range(6))
MEASURED = GAMMA | CONTRAST | RESCALE  # what needs statistics
UNCHANGED = 1 << 6  # nothing is to be done: every stage is off, and the result lies where the image does
# Columns of the parameters of a sample; brightness and contrast of each channel come after them.
SEED, FLAGS, NOISE_STD, RICIAN_STD, GAMMA_OF, BIAS_OF = 0, 2, 3, 4, 5, 6
BRIGHTNESS_OF = BIAS_OF + len(BIAS_TERMS)
FINISH = 7  # numbers of a channel's last stages: shift, inverse, gamma, gain, offset, low, high


def refuses(tensor: Tensor) -> str:
    """Why this backend cannot take this tensor, an image or (N, voxels) of noise, or ""."""
    if not tensor.is_cuda and not INTERPRETED:
        return f"it runs on a GPU (or with TRITON_INTERPRET=1), and a tensor is on {tensor.device}"
    if max(tensor.shape[:2]) > MOST_PROGRAMS:
        return f"it takes {MOST_PROGRAMS} samples and as many channels, and a tensor has {tuple(tensor.shape[:2])}"
    if tensor.dim() == 5 and math.prod(tensor.shape[2:]) > MOST_VOXELS:
        return f"it counts the voxels of a channel in 32 bits, and a tensor has {tuple(tensor.shape[2:])}"
    return ""


@dataclass(frozen=True)
class Packed:
    """The parameters as the kernels read them."""

    table: Tensor
    """(N, BRIGHTNESS_OF + 2 C) int32: bits of float32, but for the seed's halves and the flags."""
    measured: bool
    """Whether a sample needs statistics."""
    powers: bool
    """Whether a sample needs means after gamma."""


def pack(parameters: IntensityParameters, *, in_place: bool) -> Packed:
    """Parameters in one tensor on the CPU."""
    p = {name: getattr(parameters, name).numpy() for name in IntensityParameters.__dataclass_fields__}
    flags = (NOISE * (p["noise_std"] != 0) + RICIAN * (p["rician_std"] != 0) + BIAS * p["bias"].any(1)
             + GAMMA * (p["gamma"] != 1) + CONTRAST * (p["contrast"] != 1).any(1) + RESCALE * p["rescale"])
    if in_place:
        flags += UNCHANGED * ((flags == 0) & (p["brightness"] == 1).all(1))
    rows = np.empty((parameters.samples, BRIGHTNESS_OF + 2 * parameters.channels), np.float32)
    words = rows.view(np.int32)
    words[:, SEED] = (p["seed"] & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    words[:, SEED + 1] = p["seed"] >> 32
    words[:, FLAGS] = flags
    rows[:, NOISE_STD], rows[:, RICIAN_STD], rows[:, GAMMA_OF] = p["noise_std"], p["rician_std"], p["gamma"]
    rows[:, BIAS_OF:BRIGHTNESS_OF] = p["bias"]
    rows[:, BRIGHTNESS_OF:] = np.concatenate((p["brightness"], p["contrast"]), 1)
    both = GAMMA | CONTRAST
    return Packed(torch.from_numpy(words), bool((flags & MEASURED).any()), bool(((flags & both) == both).any()))


def intensity_chain(image: Tensor, parameters: IntensityParameters, out: Tensor) -> None:
    """Write `out` (N, C, D, H, W); both contiguous; see `dropgen_fast.kernels.intensity_chain`."""
    n, channels, *size = image.shape
    voxels = math.prod(size)
    packed = pack(parameters, in_place=image.data_ptr() == out.data_ptr())
    aligned = voxels % 4 == 0
    groups = GROUPS if aligned else GROUPS // 2
    tiles = triton.cdiv(voxels if aligned else voxels + 3, 4 * groups)
    chunks = min(CHUNKS, triton.next_power_of_2(tiles))
    options: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": True}
    layout = {"ROWS": size[2] % 4 == 0, "ALIGNED": aligned, "GROUPS": groups}
    steps = [2 / (length - 1) if length > 1 else 0.0 for length in size]
    with on_device_of(image):
        table = sent(packed.table, image.device)
        volume = (channels, voxels, *size[1:], *steps)
        finishes = table  # not read where nothing is measured
        if packed.measured:
            finishes = torch.empty((n, channels, FINISH), dtype=torch.float32, device=image.device)
            extremes = torch.empty((n, channels, 2, chunks), dtype=torch.float32, device=image.device)
            sums = torch.empty((n, channels, chunks), dtype=torch.float64, device=image.device)
            _statistics[(chunks, channels, n)](image, out, table, extremes, sums, *volume, CHUNKS=chunks, **layout, **options)
            _fold[(n,)](table, extremes, sums, finishes, channels, voxels, POWERS=False, CHUNKS=chunks, **options)
            if packed.powers:
                _power_sums[(chunks, channels, n)](image, out, table, finishes, sums, *volume, CHUNKS=chunks, **layout,
                                                   **options)
                _fold[(n,)](table, extremes, sums, finishes, channels, voxels, POWERS=True, CHUNKS=chunks, **options)
        _write[(tiles, channels, n)](image, out, table, finishes, *volume, **layout, **options)


def standard_normal(seed: Tensor, stream: int, out: Tensor) -> None:
    """Write `out` (N, …), contiguous."""
    size = out[0].numel()
    with on_device_of(out):
        _standard_normal[(triton.cdiv(size, 4 * GROUPS), len(seed))](
            sent(seed, out.device), out, size, stream, ALIGNED=size % 4 == 0, GROUPS=GROUPS, num_warps=WARPS,
            enable_fp_fusion=True)


if triton is not None:
    # What is said above, as kernels can read it.
    _NOISE, _RICIAN, _BIAS, _GAMMA, _RESCALE = (tl.constexpr(flag) for flag in (NOISE, RICIAN, BIAS, GAMMA, RESCALE))
    _DRAWN, _POWERS = tl.constexpr(NOISE | RICIAN), tl.constexpr(GAMMA | CONTRAST)
    _MEASURED, _UNCHANGED = tl.constexpr(MEASURED), tl.constexpr(UNCHANGED)
    _SEED, _FLAGS, _NOISE_STD, _RICIAN_STD, _GAMMA_OF, _BIAS_OF, _BRIGHTNESS_OF, _FINISH = (
        tl.constexpr(column) for column in (SEED, FLAGS, NOISE_STD, RICIAN_STD, GAMMA_OF, BIAS_OF, BRIGHTNESS_OF, FINISH))

    @triton.jit
    def _log(x):
        """Natural logarithm of normal numbers, to float32's rounding also near 1; native.h has the same polynomial."""
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) >> 23
        f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
        p = 0.087004364 * f - 0.14267488
        p = p * f + 0.14914767
        p = p * f - 0.16577585
        p = p * f + 0.19963063
        p = p * f - 0.25001338
        p = p * f + 0.3333391
        return exponent.to(tl.float32) * 0.69314718 + (f + f * f * (p * f - 0.5))

    @triton.jit
    def _power(t, gamma):
        """t^gamma for t of [0, 1]; 0 below 2^-126, where `_log` means nothing, but is finite.

        A t that was rounded to above 1 is 1: a large gamma would make it any size.
        """
        t = tl.minimum(t, 1.0)
        return tl.where(t >= 1.1754943508222875e-38, tl.exp2(_log(t) * gamma * 1.44269504), 0.0)

    @triton.jit
    def _box_muller(first, second):
        """Two normals of two words, uint32."""
        u = (first >> 1).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
        radius = tl.sqrt(-2.0 * _log(u))
        quarter = (second + 0x20000000) >> 30
        r = (second << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
        t = r * r
        sine = r * (((-0.0046021771 * t + 0.079680227) * t - 0.64596349) * t + 1.57079637)
        cosine = (((0.00090402167 * t - 0.020860288) * t + 0.25366923) * t - 1.23370051) * t + 1.0
        odd = (quarter & 1) != 0
        along = radius * tl.where(odd, sine, cosine)
        across = radius * tl.where(odd, cosine, sine)
        return tl.where(((quarter + 1) & 2) != 0, -along, along), tl.where((quarter & 2) != 0, -across, across)

    @triton.jit
    def _noise(seed, stream, counter, GROUPS: tl.constexpr):
        """(GROUPS, 4) normals of the counters from `counter` on; reference.py says which function this is."""
        counters = counter + tl.arange(0, GROUPS)
        low = counters.to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, low, (counters >> 32).to(tl.uint32), low * 0 + stream, low * 0)
        z0, z1 = _box_muller(w0, w1)
        z2, z3 = _box_muller(w2, w3)
        return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [GROUPS, 4])

    @triton.jit
    def _float(words, column):
        """A column of a sample's parameters that is a float32."""
        return tl.load(words + column).to(tl.float32, bitcast=True)

    @triton.jit
    def _seed_of(words):
        return (tl.load(words + _SEED + 1).to(tl.int64) << 32) | (tl.load(words + _SEED).to(tl.int64) & 0xFFFFFFFF)

    @triton.jit
    def _second(t):
        return 1.5 * t * t - 0.5

    @triton.jit
    def _third(t):
        return (2.5 * t * t - 1.5) * t

    @triton.jit
    def _log_bias_field(words, row, x, H, step_z, step_y, step_x):
        """Σ c_ijk P_i P_j P_k: a cubic along x whose coefficients `row`, counted along a channel, determines."""
        c = words + _BIAS_OF
        z1 = (row // H).to(tl.float32) * step_z - 1.0
        y1 = (row % H).to(tl.float32) * step_y - 1.0
        y2 = _second(y1)
        y3 = _third(y1)
        z2 = _second(z1)
        a0 = (_float(c, 0) + _float(c, 4) * y1 + _float(c, 7) * y2 + _float(c, 9) * y3
              + z1 * (_float(c, 10) + _float(c, 13) * y1 + _float(c, 15) * y2)
              + z2 * (_float(c, 16) + _float(c, 18) * y1) + _third(z1) * _float(c, 19))
        a1 = (_float(c, 1) + _float(c, 5) * y1 + _float(c, 8) * y2 + z1 * (_float(c, 11) + _float(c, 14) * y1)
              + z2 * _float(c, 17))
        a2 = _float(c, 2) + _float(c, 6) * y1 + z1 * _float(c, 12)
        a3 = _float(c, 3)
        t = x.to(tl.float32) * step_x - 1.0
        return ((2.5 * a3 * t + 1.5 * a2) * t + (a1 - 1.5 * a3)) * t + (a0 - 0.5 * a2)

    @triton.jit
    def _tile(tile, c, V, ROWS: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):
        """Of a tile of a channel: its first counter; a voxel of the row that each voxel is in; its voxels (GROUPS, 4), counted
        along the channel; which of them the channel has.

        Groups begin where those of the noise do, at a multiple of four voxels of the sample. With ROWS the four are in a row.
        """
        group = tile * GROUPS + tl.arange(0, GROUPS)[:, None]
        lane = tl.arange(0, 4)[None, :]
        if ALIGNED:
            counter = c * (V // 4) + tile * GROUPS
            voxel = group * 4 + lane
            inside = (group < V // 4) & (lane < 4)
        else:
            shift = (c * V) % 4
            counter = (c * V) // 4 + tile * GROUPS
            voxel = group * 4 + lane - shift.to(tl.int32)
            inside = (voxel >= 0) & (voxel < V)
        if ROWS:
            start = group * 4
        else:
            start = voxel
        return counter, start, voxel, inside

    @triton.jit
    def _channel(n, c, C, V, ALIGNED: tl.constexpr):
        """Where a channel begins."""
        if ALIGNED:
            at = (n * C + c) * (V // 4) * 4
        else:
            at = (n * C + c) * V
        return at

    @triton.jit
    def _values(at, inside):
        """Voxels as float32; int16 is value / 32767."""
        x = tl.load(at, mask=inside, other=0)
        if at.dtype.element_ty == tl.int16:
            value = x.to(tl.float32) * 3.051850947599719e-05
        else:
            value = x.to(tl.float32)
        return value

    @triton.jit
    def _changed(x, words, flags, counter, start, voxel, H, W, step_z, step_y, step_x, GROUPS: tl.constexpr):
        """Noise, Rician noise and bias field of a tile."""
        seed = _seed_of(words)
        if flags & _NOISE != 0:
            x += _float(words, _NOISE_STD) * _noise(seed, 0, counter, GROUPS)
        if flags & _RICIAN != 0:
            std = _float(words, _RICIAN_STD)
            real = x + std * _noise(seed, 1, counter, GROUPS)
            imaginary = std * _noise(seed, 2, counter, GROUPS)
            x = tl.sqrt(real * real + imaginary * imaginary)
        return _biased(x, words, flags, start, voxel, H, W, step_z, step_y, step_x)

    @triton.jit
    def _biased(x, words, flags, start, voxel, H, W, step_z, step_y, step_x):
        if flags & _BIAS != 0:
            row = start // W
            x *= tl.exp(_log_bias_field(words, row, voxel - row * W, H, step_z, step_y, step_x))
        return x

    @triton.jit
    def _measured_values(image, out, words, flags, at, start, voxel, inside, H, W, step_z, step_y, step_x):
        """What the statistics were taken of: written where there was noise, else computed again."""
        if flags & _DRAWN != 0:
            x = tl.load(out + at + voxel, mask=inside, other=0)
        else:
            x = _biased(_values(image + at + voxel, inside), words, flags, start, voxel, H, W, step_z, step_y, step_x)
        return x

    @triton.jit
    def _add(total, lost, x):
        """Compensated summation (Kahan 1965): the rounding error of each addition is made good in the next."""
        corrected = x - lost
        grown = total + corrected
        return grown, (grown - total) - corrected

    @triton.jit
    def _sum(total, lost):
        return tl.sum(tl.sum(total.to(tl.float64) - lost.to(tl.float64), 1), 0)

    @triton.jit
    def _statistics(image, out, table, extremes, sums, C, V, H, W, step_z, step_y, step_x, CHUNKS: tl.constexpr,
                    ROWS: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):
        """extremes (N, C, 2, CHUNKS), sums (N, C, CHUNKS) of the voxels after the bias field. Grid (CHUNKS, C, N).

        With noise, these voxels are written into `out`, too.
        """
        chunk, c, n = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        words = table + n * (_BRIGHTNESS_OF + 2 * C)
        flags = tl.load(words + _FLAGS)
        if flags & _MEASURED != 0:
            at = _channel(n, c, C, V, ALIGNED)
            low = tl.full([GROUPS, 4], float("inf"), tl.float32)
            high = tl.full([GROUPS, 4], float("-inf"), tl.float32)
            total = tl.zeros([GROUPS, 4], tl.float32)
            lost = tl.zeros([GROUPS, 4], tl.float32)
            tiles = tl.cdiv(V if ALIGNED else V + 3, 4 * GROUPS)
            for tile in range(chunk, tiles, CHUNKS):
                counter, start, voxel, inside = _tile(tile, c, V, ROWS, ALIGNED, GROUPS)
                x = _values(image + at + voxel, inside)
                x = _changed(x, words, flags, counter, start, voxel, H, W, step_z, step_y, step_x, GROUPS)
                if flags & _DRAWN != 0:
                    tl.store(out + at + voxel, x, mask=inside)
                low = tl.where(inside, tl.minimum(low, x), low)
                high = tl.where(inside, tl.maximum(high, x), high)
                total, lost = _add(total, lost, tl.where(inside, x, 0.0))
            partial = extremes + (n * C + c) * 2 * CHUNKS + chunk
            tl.store(partial, tl.min(tl.min(low, 1), 0))
            tl.store(partial + CHUNKS, tl.max(tl.max(high, 1), 0))
            tl.store(sums + (n * C + c) * CHUNKS + chunk, _sum(total, lost))

    @triton.jit
    def _power_sums(image, out, table, finishes, sums, C, V, H, W, step_z, step_y, step_x, CHUNKS: tl.constexpr,
                    ROWS: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):
        """sums (N, C, CHUNKS) of t^gamma, for samples with gamma and contrast. Grid (CHUNKS, C, N)."""
        chunk, c, n = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        words = table + n * (_BRIGHTNESS_OF + 2 * C)
        flags = tl.load(words + _FLAGS)
        if flags & _POWERS == _POWERS:
            at = _channel(n, c, C, V, ALIGNED)
            finish = finishes + (n * C + c) * _FINISH
            shift, inverse, gamma = tl.load(finish), tl.load(finish + 1), tl.load(finish + 2)
            total = tl.zeros([GROUPS, 4], tl.float32)
            lost = tl.zeros([GROUPS, 4], tl.float32)
            tiles = tl.cdiv(V if ALIGNED else V + 3, 4 * GROUPS)
            for tile in range(chunk, tiles, CHUNKS):
                _, start, voxel, inside = _tile(tile, c, V, ROWS, ALIGNED, GROUPS)
                x = _measured_values(image, out, words, flags, at, start, voxel, inside, H, W, step_z, step_y, step_x)
                total, lost = _add(total, lost, tl.where(inside, _power((x - shift) * inverse, gamma), 0.0))
            tl.store(sums + (n * C + c) * CHUNKS + chunk, _sum(total, lost))

    @triton.jit
    def _extremes_of(extremes, CHUNKS: tl.constexpr):
        chunk = tl.arange(0, CHUNKS)
        return tl.min(tl.load(extremes + chunk), 0), tl.max(tl.load(extremes + CHUNKS + chunk), 0)

    @triton.jit
    def _inverse_span(lowest, highest):
        """What gamma multiplies by to come to [0, 1]."""
        return (1.0 / (highest.to(tl.float64) - lowest.to(tl.float64) + 1e-7)).to(tl.float32)

    @triton.jit
    def _after_gamma(words, extremes, sums, lowest, highest, flags, c, V, POWERS: tl.constexpr, CHUNKS: tl.constexpr):
        """A channel's minimum, maximum and mean, float64: of the statistics, through gamma; the mean with POWERS only."""
        low32, high32 = _extremes_of(extremes + c * 2 * CHUNKS, CHUNKS)
        low = low32.to(tl.float64)
        high = high32.to(tl.float64)
        mean = tl.sum(tl.load(sums + c * CHUNKS + tl.arange(0, CHUNKS)), 0) / V
        if flags & _GAMMA != 0:
            gamma = _float(words, _GAMMA_OF)
            inverse = _inverse_span(lowest, highest)
            base = lowest.to(tl.float64)
            span = highest.to(tl.float64) - base
            low = base + span * _power((low32 - lowest) * inverse, gamma).to(tl.float64)
            high = base + span * _power((high32 - lowest) * inverse, gamma).to(tl.float64)
            if POWERS:
                mean = base + span * mean
        return low, high, mean

    @triton.jit
    def _after_contrast(low, high, mean, bright, factor):
        """Extremes of a channel through brightness and contrast, which clips to those that it finds."""
        low *= bright
        high *= bright
        mean *= bright
        stretched_low = tl.minimum(tl.maximum(factor * (low - mean) + mean, low), high)
        stretched_high = tl.minimum(tl.maximum(factor * (high - mean) + mean, low), high)
        return tl.where(factor != 1.0, stretched_low, low), tl.where(factor != 1.0, stretched_high, high)

    @triton.jit
    def _last_stages(low, high, mean, bright, factor, lowest, highest, flags):
        """A channel's last stages but for rescale: (shift, gain, offset, lower, upper); all but shift float64.

        What follows gamma is affine and clipped, and becomes one step.
        """
        gain = bright * factor
        if flags & _GAMMA != 0:
            shift = lowest
            gain *= highest.to(tl.float64) - lowest.to(tl.float64)
        else:
            shift = tl.where(factor != 1.0, mean.to(tl.float32), tl.where(flags & _RESCALE != 0, lowest, 0.0))
        middle = bright * shift.to(tl.float64)  # what t = 0 stands for
        mean *= bright
        offset = tl.where(factor != 1.0, factor * (middle - mean) + mean, middle)
        lower = tl.where(factor != 1.0, low * bright, float("-inf"))
        upper = tl.where(factor != 1.0, high * bright, float("inf"))
        return shift, gain, offset, lower, upper

    @triton.jit
    def _fold(table, extremes, sums, finishes, C, V, POWERS: tl.constexpr, CHUNKS: tl.constexpr):
        """finishes (N, C, 7), of the statistics; with POWERS sums are those of t^gamma. Grid (N,).

        Gamma, brightness and contrast are monotone, so minimum and maximum go through them.
        """
        n = tl.program_id(0).to(tl.int64)
        words = table + n * (_BRIGHTNESS_OF + 2 * C)
        extremes += n * C * 2 * CHUNKS
        sums += n * C * CHUNKS
        finishes += n * C * _FINISH
        flags = tl.load(words + _FLAGS)
        wanted = flags & _MEASURED != 0
        if POWERS:
            wanted = flags & _POWERS == _POWERS
        if wanted:
            lowest = tl.full([], float("inf"), tl.float32)
            highest = tl.full([], float("-inf"), tl.float32)
            for c in range(C):
                low32, high32 = _extremes_of(extremes + c * 2 * CHUNKS, CHUNKS)
                lowest = tl.minimum(lowest, low32)
                highest = tl.maximum(highest, high32)
            bottom = tl.full([], float("inf"), tl.float64)
            top = tl.full([], float("-inf"), tl.float64)
            for c in range(C):
                low, high, mean = _after_gamma(words, extremes, sums, lowest, highest, flags, c, V, POWERS, CHUNKS)
                bright = _float(words, _BRIGHTNESS_OF + c).to(tl.float64)
                factor = _float(words, _BRIGHTNESS_OF + C + c).to(tl.float64)
                low, high = _after_contrast(low, high, mean, bright, factor)
                bottom = tl.minimum(bottom, low)
                top = tl.maximum(top, high)
            varies = (top - bottom).to(tl.float32) >= 1.1754943508222875e-38
            by = tl.where(varies, 1.0 / tl.where(varies, top - bottom, 1.0), 0.0)
            for c in range(C):
                low, high, mean = _after_gamma(words, extremes, sums, lowest, highest, flags, c, V, POWERS, CHUNKS)
                bright = _float(words, _BRIGHTNESS_OF + c).to(tl.float64)
                factor = _float(words, _BRIGHTNESS_OF + C + c).to(tl.float64)
                shift, gain, offset, lower, upper = _last_stages(low, high, mean, bright, factor, lowest, highest, flags)
                if flags & _RESCALE != 0:
                    gain *= by
                    offset = (offset - bottom) * by
                    lower = tl.where(varies, (tl.maximum(lower, bottom) - bottom) * by, 0.0)
                    upper = tl.where(varies, (tl.minimum(upper, top) - bottom) * by, 0.0)
                finish = finishes + c * _FINISH
                tl.store(finish, shift)
                tl.store(finish + 1, _inverse_span(lowest, highest))
                tl.store(finish + 2, _float(words, _GAMMA_OF))
                tl.store(finish + 3, gain.to(tl.float32))
                tl.store(finish + 4, offset.to(tl.float32))
                tl.store(finish + 5, lower.to(tl.float32))
                tl.store(finish + 6, upper.to(tl.float32))

    @triton.jit
    def _write(image, out, table, finishes, C, V, H, W, step_z, step_y, step_x, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
               GROUPS: tl.constexpr):
        """out (N, C, D, H, W). Grid (tiles, C, N).

            clamp(gain · t + offset, low, high)    t = x - shift, under gamma ((x - shift) · inverse)^gamma

        for samples with statistics; brightness · x for others.
        """
        tile, c, n = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        words = table + n * (_BRIGHTNESS_OF + 2 * C)
        flags = tl.load(words + _FLAGS)
        at = _channel(n, c, C, V, ALIGNED)
        counter, start, voxel, inside = _tile(tile, c, V, ROWS, ALIGNED, GROUPS)
        if flags & _MEASURED != 0:
            x = _measured_values(image, out, words, flags, at, start, voxel, inside, H, W, step_z, step_y, step_x)
            finish = finishes + (n * C + c) * _FINISH
            t = x - tl.load(finish)
            if flags & _GAMMA != 0:
                t = _power(t * tl.load(finish + 1), tl.load(finish + 2))
            y = tl.load(finish + 3) * t + tl.load(finish + 4)
            y = tl.minimum(tl.maximum(y, tl.load(finish + 5)), tl.load(finish + 6))
            tl.store(out + at + voxel, y, mask=inside)
        elif flags & _UNCHANGED == 0:
            x = _values(image + at + voxel, inside)
            x = _changed(x, words, flags, counter, start, voxel, H, W, step_z, step_y, step_x, GROUPS)
            tl.store(out + at + voxel, x * _float(words, _BRIGHTNESS_OF + c), mask=inside)

    @triton.jit
    def _standard_normal(seeds, out, size, stream, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):
        """out (N, size). Grid (tiles, N)."""
        tile, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        group = tile * GROUPS + tl.arange(0, GROUPS)[:, None]
        lane = tl.arange(0, 4)[None, :]
        if ALIGNED:
            at = n * (size // 4) * 4
            inside = (group < size // 4) & (lane < 4)
        else:
            at = n * size
            inside = group * 4 + lane < size
        z = _noise(tl.load(seeds + n), stream, tile * GROUPS, GROUPS)
        tl.store(out + at + group * 4 + lane, z, mask=inside)
