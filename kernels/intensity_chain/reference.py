"""`intensity_chain` and its noise in plain torch: the definition that every backend is held against.

Shapes: N batch, C image channels, D H W voxels.

The noise is a function of (seed, stream, voxel) alone. Voxel v of a sample, counted in C order over its axes (for an image
C, D, H, W), is element v mod 4 of counter v div 4, which Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as
1, 2, 3, SC 2011) turns into four words of 32 bits:

    w0 w1 w2 w3 = philox(counter = (low half of v div 4, its high half, stream, 0), key = (low half of the seed, its high half))

Each pair of words makes two normals (Box and Muller 1958), z[0], z[1] from (w0, w1), z[2], z[3] from (w2, w3):

    u = fl(fl(w >> 1) · 2^-31 + 2^-32)       in [2^-32, 1], so that |z| ≤ 6.67
    θ = π/2 · (q + r)                        w' = q · 2^30 + s with -2^29 ≤ s < 2^29, r = fl(s) · 2^-30
    z = sqrt(-2 ln u) · (cos θ, sin θ)

fl rounds to float32. u, q and r are the same numbers on every backend, whatever it evaluates the functions with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .parameters import BIAS_DEGREE, BIAS_TERMS, IntensityParameters

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW_32 = 0xFFFFFFFF

GAMMA_EPSILON = 1e-7
"""Added to the range before dividing by it: MONAI's."""
INT16_ONE = 32767
"""The int16 that stands for 1.0."""
SMALLEST_SPAN = torch.finfo(torch.float32).tiny
"""Of a sample that is not constant: the reciprocal of less may not be a float32."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of words that int64 tensors hold, [0, 2^32) each; they broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # A product wraps modulo 2^64, which leaves its 64 bits right.
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (second >> 32 & LOW_32) ^ c1 ^ k0, second & LOW_32, (first >> 32 & LOW_32) ^ c3 ^ k1, first & LOW_32
        k0, k1 = k0 + KEY_STEPS[0] & LOW_32, k1 + KEY_STEPS[1] & LOW_32
    return c0, c1, c2, c3


def box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals, float64, of two words that int64 tensors hold."""
    u = ((first >> 1).to(torch.float32) * 2.0**-31 + 2.0**-32).to(torch.float64)
    quarter = second + 2**29 >> 30
    rest = (second - (quarter << 30)).to(torch.float32).to(torch.float64) * 2.0**-30
    angle = (quarter + rest) * (math.pi / 2)
    radius = (-2 * u.log()).sqrt()
    return radius * angle.cos(), radius * angle.sin()


def standard_normal(
    seed: Tensor, shape: tuple[int, ...], stream: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(N, *shape) in `dtype`, rounded from float64: the noise of the seeds (N,) int64."""
    size = math.prod(shape)
    counter = torch.arange((size + 3) // 4, dtype=torch.int64, device=device)
    result = torch.empty((len(seed), size), dtype=dtype, device=device)
    for n, value in enumerate(seed.tolist()):
        result[n] = normals(value, stream, counter).flatten()[:size]
    return result.view(len(seed), *shape)


def normals(seed: int, stream: int, counter: Tensor) -> Tensor:
    """(M, 4) float64: the normals of counters (M,) int64, on their device."""
    zero = torch.zeros_like(counter[:1])
    key = (zero + (seed & LOW_32), zero + (seed >> 32 & LOW_32))
    w0, w1, w2, w3 = philox((counter & LOW_32, counter >> 32, zero + stream, zero), key)
    return torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), 1)


def legendre(size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """(4, size): P_0 to P_3 at linspace(-1, 1, size), which is -1 alone where `size` is 1."""
    t = torch.linspace(-1, 1, size, dtype=dtype, device=device)
    return torch.stack((torch.ones_like(t), t, (3 * t * t - 1) / 2, (5 * t * t - 3) * t / 2))


def log_bias_field(bias: Tensor, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """(N, D, H, W): Σ c_ijk P_i P_j P_k of coefficients (N, 20)."""
    table = torch.zeros((len(bias), *3 * (BIAS_DEGREE + 1,)), dtype=dtype, device="cpu")
    for term, (i, j, k) in enumerate(BIAS_TERMS):
        table[:, i, j, k] = bias[:, term]
    z, y, x = (legendre(size, dtype, device) for size in shape)
    return torch.einsum("nijk,iz,jy,kx->nzyx", table.to(device), z, y, x)


def to_values(image: Tensor, dtype: torch.dtype) -> Tensor:
    """The image in `dtype`; int16 is value / 32767, by the nearest float32 of the reciprocal, which gives 1.0 for 32767."""
    if image.dtype != torch.int16:
        return image.to(dtype)
    return image.to(dtype) * float(torch.tensor(1 / INT16_ONE, dtype=torch.float32, device="cpu"))


def intensity_chain(image: Tensor, parameters: IntensityParameters, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, C, D, H, W) in `dtype`, contiguous, in which it is computed; see `dropgen_fast.kernels.intensity_chain`."""
    result = torch.empty(image.shape, dtype=dtype, device=image.device)
    for n, sample in enumerate(image):
        result[n] = _chain(to_values(sample, dtype), parameters, n)
    return result


def _chain(x: Tensor, p: IntensityParameters, n: int) -> Tensor:
    """One sample (C, D, H, W), stage by stage."""
    def noise(stream: int) -> Tensor:
        return standard_normal(p.seed[n:n + 1], tuple(x.shape), stream, x.device, x.dtype)[0]

    if std := float(p.noise_std[n]):
        x = x + std * noise(0)
    if std := float(p.rician_std[n]):
        x = ((x + std * noise(1)).square() + (std * noise(2)).square()).sqrt()
    if bool(p.bias[n].any()):
        x = x * log_bias_field(p.bias[n:n + 1], x.shape[1:], x.dtype, x.device)[0].exp()  # type: ignore[arg-type]
    if (gamma := float(p.gamma[n])) != 1:
        low, span = x.amin(), x.amax() - x.amin()
        x = ((x - low) / (span + GAMMA_EPSILON)) ** gamma * span + low
    x = x * p.brightness[n].to(x)[:, None, None, None]
    contrast = p.contrast[n].to(x)[:, None, None, None]
    axes = (1, 2, 3)
    low, high, mean = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True), x.mean(axes, keepdim=True)
    x = torch.where(contrast != 1, ((x - mean) * contrast + mean).clamp(low, high), x)
    if bool(p.rescale[n]):
        low, span = x.amin(), x.amax() - x.amin()
        x = torch.where(span >= SMALLEST_SPAN, (x - low) / span.clamp(min=SMALLEST_SPAN), 0)
    return x
