"""What `intensity_chain` is fed with: one draw of every stage's parameters, for each sample."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

BIAS_DEGREE = 3
BIAS_TERMS = tuple((i, j, k) for i in range(BIAS_DEGREE + 1) for j in range(BIAS_DEGREE + 1 - i)
                   for k in range(BIAS_DEGREE + 1 - i - j))
"""Degrees of the Legendre polynomials along (D, H, W) that each coefficient of the bias field belongs to."""
LARGEST_LOG_FIELD = 80.0
"""Bound of Σ |c|, and so of the bias field's logarithm: float32 holds exp of it and of its negative."""


@dataclass(frozen=True, eq=False)
class IntensityParameters:
    """Parameters of the chain's stages, in their order, for N samples of C channels: tensors on the CPU.

    A neutral value switches a stage off for its sample (brightness and contrast: for its channel), which then costs nothing.
    Values are checked when the object is made, and must not be changed afterwards.

    Raises:
        ValueError: a tensor of another shape, dtype or device than said below, or a value that a stage cannot take.
    """

    seed: Tensor
    """(N,) int64: of the noise; any value."""
    noise_std: Tensor
    """(N,) float32 ≥ 0, in units of the image; 0 = off. x + std · z1"""
    rician_std: Tensor
    """(N,) float32 ≥ 0, in units of the image; 0 = off. sqrt((x + std · z2)² + (std · z3)²), as MONAI's RandRicianNoise"""
    bias: Tensor
    """(N, 20) float32, in the order of `BIAS_TERMS`; all 0 = off. x · exp(Σ c_ijk P_i(z) P_j(y) P_k(x)) with Legendre polynomials
    over linspace(-1, 1, size) of each axis, the same for every channel, as MONAI's RandBiasField"""
    gamma: Tensor
    """(N,) float32 > 0; 1 = off. ((x - min) / (range + 1e-7))^gamma · range + min, as MONAI's AdjustContrast; min and range over
    the channels of a sample together"""
    brightness: Tensor
    """(N, C) float32 ≥ 0; 1 = off. x · f, as batchgeneratorsv2's MultiplicativeBrightnessTransform"""
    contrast: Tensor
    """(N, C) float32 ≥ 0; 1 = off. clip((x - mean) · f + mean, min, max) with the channel's mean, min and max, as
    batchgeneratorsv2's ContrastTransform(preserve_range=True)"""
    rescale: Tensor
    """(N,) bool: (x - min) / (max - min) over the channels of a sample together, constant → 0, as MONAI's ScaleIntensity"""

    def __post_init__(self) -> None:
        samples, channels = self._sizes()
        shapes = {"bias": (samples, len(BIAS_TERMS)), "brightness": (samples, channels), "contrast": (samples, channels)}
        dtypes = {"seed": torch.int64, "rescale": torch.bool}
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            shape, dtype = shapes.get(name, (samples,)), dtypes.get(name, torch.float32)
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor {shape} {dtype}, got {type(value).__name__}")
            if tuple(value.shape) != shape or value.dtype != dtype or value.device.type != "cpu":
                raise ValueError(f"{name} must be {shape} {dtype} on cpu, "
                                 f"got {tuple(value.shape)} {value.dtype} on {value.device}")
            if dtype == torch.float32 and not bool(value.isfinite().all()):
                raise ValueError(f"{name} must be finite, got {value.tolist()}")
        for name in ("noise_std", "rician_std", "brightness", "contrast"):
            if bool((getattr(self, name) < 0).any()):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name).tolist()}")
        if bool((self.gamma <= 0).any()):
            raise ValueError(f"gamma must be above 0, got {self.gamma.tolist()}")
        if bool(((total := self.bias.abs().sum(1)) > LARGEST_LOG_FIELD).any()):
            raise ValueError(f"bias must have coefficients whose sizes sum to at most {LARGEST_LOG_FIELD:g}, "
                             f"got {total.tolist()}")

    def _sizes(self) -> tuple[int, int]:
        """N and C, of the one tensor that has both."""
        if not isinstance(self.brightness, Tensor):
            raise ValueError(f"brightness must be a tensor (N, C) torch.float32, got {type(self.brightness).__name__}")
        if self.brightness.dim() != 2 or 0 in self.brightness.shape:
            raise ValueError(f"brightness must be (N, C) with no empty axis, got shape {tuple(self.brightness.shape)}")
        samples, channels = self.brightness.shape
        return samples, channels

    @property
    def samples(self) -> int:
        """N."""
        return self.brightness.shape[0]

    @property
    def channels(self) -> int:
        """C."""
        return self.brightness.shape[1]

    @classmethod
    def neutral(cls, samples: int, channels: int) -> IntensityParameters:
        """Every stage off."""
        return cls(
            seed=_full(0, torch.int64, samples), noise_std=_full(0, torch.float32, samples),
            rician_std=_full(0, torch.float32, samples), bias=_full(0, torch.float32, samples, len(BIAS_TERMS)),
            gamma=_full(1, torch.float32, samples), brightness=_full(1, torch.float32, samples, channels),
            contrast=_full(1, torch.float32, samples, channels), rescale=_full(0, torch.bool, samples))


def _full(value: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """On the CPU, whatever torch's default device and dtype are."""
    return torch.full(shape, value, dtype=dtype, device="cpu")
