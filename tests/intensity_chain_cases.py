"""What the tests of `intensity_chain` share: parameters, and how far float32 arithmetic may be from the definition in float64."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropgen_fast.kernels.intensity_chain import IntensityParameters, reference
from dropgen_fast.kernels.intensity_chain.triton import _noise as triton_noise

STAGES = ("noise_std", "rician_std", "bias", "gamma", "brightness", "contrast", "rescale")
U = 2.0**-24
"""Unit roundoff of float32."""
NORMAL = 8 * U * 6.67
"""Error of a normal. Of its radius, at most 6.67: the logarithm's 3 roundings, halved by the square root, which adds up to 2;
of sine and cosine 2; of their product 1. Rounded up to 8."""


@triton.jit
def _normals_from(seed, counter, out, stream, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    z = triton_noise(tl.load(seed), stream, tl.load(counter), GROUPS)
    tl.store(out + tl.arange(0, GROUPS)[:, None] * 4 + tl.arange(0, 4)[None, :], z)


def normals_of_triton(seed: int, stream: int, counter: int, groups: int, device: str = "cpu") -> Tensor:
    """(groups, 4) float32: the normals that Triton's kernels make of the counters from `counter` on."""
    out = torch.empty((groups, 4), dtype=torch.float32, device=device)
    _normals_from[(1,)](torch.tensor([seed], device=device), torch.tensor([counter], device=device), out, stream, GROUPS=groups)
    return out


def draw(samples: int, channels: int, *, seed: int = 0) -> IntensityParameters:
    """Every stage on, within the ranges that augmentation draws from (gamma on both sides of 1)."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=g) * (high - low) + low

    return IntensityParameters(
        seed=torch.randint(-2**63, 2**63 - 1, (samples,), generator=g), noise_std=uniform(0.01, 0.1, samples),
        rician_std=uniform(0.01, 0.1, samples), bias=uniform(0, 0.1, samples, 20), gamma=uniform(0.5, 4.5, samples),
        brightness=uniform(0.7, 1.3, samples, channels), contrast=uniform(0.6, 1.5, samples, channels),
        rescale=torch.ones(samples, dtype=torch.bool))


def only(parameters: IntensityParameters, *stages: str) -> IntensityParameters:
    """All stages off but these."""
    neutral = IntensityParameters.neutral(parameters.samples, parameters.channels)
    return dataclasses.replace(neutral, **{name: getattr(parameters, name) for name in ("seed", *stages)})


def draw_image(
    samples: int, channels: int, size: tuple[int, ...], dtype: torch.dtype = torch.float32, *, seed: int = 1,
) -> Tensor:
    """Values of [0, 1], at int16 of [0, 32767]."""
    image = torch.rand((samples, channels, *size), generator=torch.Generator().manual_seed(seed))
    return (image * 32767).round().to(dtype) if dtype == torch.int16 else image.to(dtype)


def per_sample(x: Tensor) -> Tensor:
    """(N, …) reduced to (N, 1, 1, 1, 1) by the maximum."""
    return x.flatten(1).amax(1)[:, None, None, None, None]


def per_channel(x: Tensor) -> Tensor:
    """(N, C, …) reduced to (N, C, 1, 1, 1) by the maximum."""
    return x.amax((2, 3, 4), keepdim=True)


def expected(image: Tensor, parameters: IntensityParameters) -> tuple[Tensor, Tensor]:
    """The definition in float64, stage by stage, and a bound of what float32 may make of each voxel (running error analysis)."""
    x = reference.to_values(image, torch.float64)
    error = U * x.abs() if image.dtype == torch.int16 else torch.zeros_like(x)
    for stage in STAGES:
        y = reference.intensity_chain(x, only(parameters, stage), dtype=torch.float64)
        error = STEPS[stage](x, y, error, _column(getattr(parameters, stage)), parameters)
        x = y
    return x, error


def _column(values: Tensor) -> Tensor:
    """Of (N,) or (N, C), for broadcasting against (N, C, D, H, W); of anything else itself."""
    values = values.to(torch.float64)
    return values.reshape(*values.shape, *(5 - values.dim()) * (1,))


def _noise(x: Tensor, y: Tensor, error: Tensor, std: Tensor, _: IntensityParameters) -> Tensor:
    return torch.where(std != 0, error + std * NORMAL + U * y.abs(), error)


def _rician(x: Tensor, y: Tensor, error: Tensor, std: Tensor, _: IntensityParameters) -> Tensor:
    """The length of a vector moves by no more than the vector; squares, sum and root round by less than 4."""
    return torch.where(std != 0, error + 2 * std * NORMAL + 4 * U * y.abs(), error)


def _bias(x: Tensor, y: Tensor, error: Tensor, _: Tensor, p: IntensityParameters) -> Tensor:
    """Polynomials of degree 3 and the sum of 20 terms round by less than 24 of Σ |c|; exp and products by less than 8."""
    field = reference.log_bias_field(p.bias, tuple(x.shape[2:]), torch.float64).exp()[:, None]  # type: ignore[arg-type]
    size = _column(p.bias.abs().sum(1))
    return torch.where(size != 0, error * field + y.abs() * U * (8 + 24 * size), error)


def _gamma(x: Tensor, y: Tensor, error: Tensor, gamma: Tensor, _: IntensityParameters) -> Tensor:
    """t = (x - min) / range, known to ±d; t^gamma at the ends of that; logarithm, product and exponential add less than 8."""
    low, worst = -per_sample(-x), per_sample(error)
    span = per_sample(x) - low
    safe = span + reference.GAMMA_EPSILON
    t = (x - low) / safe
    d = (error + worst) / safe + t * (2 * worst / safe + 4 * U)
    power = t**gamma
    spread = torch.maximum((t + d) ** gamma - power, power - (t - d).clamp(min=0) ** gamma) + 8 * U
    moved = span * spread + 2 * worst * power + worst + 2 * U * (y.abs() + span * power + low.abs())
    return torch.where(gamma != 1, moved, error)


def _brightness(x: Tensor, y: Tensor, error: Tensor, factor: Tensor, _: IntensityParameters) -> Tensor:
    return torch.where(factor != 1, error * factor + 2 * U * y.abs(), error)


def _contrast(x: Tensor, y: Tensor, error: Tensor, factor: Tensor, _: IntensityParameters) -> Tensor:
    """The mean and the clip move by no more than the worst voxel."""
    worst, mean = per_channel(error), x.mean((2, 3, 4), keepdim=True)
    span = per_channel(x) + per_channel(-x)
    moved = factor * error + (1 - factor).abs() * (worst + 4 * U * (span + mean.abs()))
    moved = moved + 4 * U * (factor * span + mean.abs() + y.abs())
    return torch.where(factor != 1, torch.maximum(moved, worst), error)


def _rescale(x: Tensor, y: Tensor, error: Tensor, on: Tensor, _: IntensityParameters) -> Tensor:
    worst, span = per_sample(error), per_sample(x) + per_sample(-x)
    return torch.where(on != 0, (error + worst + 2 * y * worst) / span.clamp(min=reference.SMALLEST_SPAN) + 8 * U, error)


STEPS = {"noise_std": _noise, "rician_std": _rician, "bias": _bias, "gamma": _gamma, "brightness": _brightness,
         "contrast": _contrast, "rescale": _rescale}


def check(result: Tensor, wanted: Tensor, bound: Tensor) -> None:
    """Every voxel within its bound."""
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    excess = ((result.to("cpu", torch.float64) - wanted).abs() - bound).max()
    assert excess <= 0, f"{float(excess):.3g} beyond a bound of up to {float(bound.max()):.3g}"
