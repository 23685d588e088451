"""Which augmentations, how often and how strong."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from dropgen_fast.errors import InputError


@dataclass(frozen=True)
class AugmentationConfig:
    """The DropGen paper's augmentations, in the order in which they are applied; a probability of 0 switches one off.

    Ranges are (low, high) and drawn from uniformly. Intensities are in units of the image's range. MONAI's transforms of the
    same names define what each one does.
    """

    mirror: bool = True
    """Whether flips and quarter turns are allowed at all: not where left and right are different labels."""
    flip_probability: float = 0.33
    """Flip of axis 0."""
    flip_random_axis_probability: float = 0.33
    """Flip of one random axis of `flip_axes`."""
    flip_axes: tuple[int, ...] = (0, 1, 2)
    """Axes that the random flip chooses from."""
    rotate90_probability: float = 0.33
    """Rotation by a multiple of 90° in the plane of axes 0 and 1."""
    rotate90_turns: tuple[int, ...] = (1, 2, 3)
    """Quarter turns that the rotation chooses from."""
    noise_probability: float = 0.33
    """Gaussian noise."""
    noise_std: tuple[float, float] = (0.0, 0.1)
    """Standard deviation of the noise."""
    bias_field_probability: float = 0.33
    """Multiplication by the exponential of a polynomial of degree 3."""
    bias_field_coefficient: tuple[float, float] = (0.0, 0.1)
    """Coefficients of the polynomial's 20 Legendre terms."""
    gamma_probability: float = 0.33
    """Gamma correction."""
    gamma: tuple[float, float] = (0.5, 4.5)
    """Exponent of the gamma correction."""
    affine_probability: float = 0.33
    """Affine transformation about the centre of the patch, zeros outside; trilinear, the label nearest."""
    rotation_rad: tuple[float, float] = (-math.pi / 4, math.pi / 4)
    """Angle about each axis."""
    shear: tuple[float, float] = (-0.2, 0.2)
    """Each of the six shear coefficients."""
    scale: tuple[float, float] = (0.8, 1.2)
    """Factor along each axis; above 1 shows more of the volume, smaller."""

    def __post_init__(self) -> None:
        """Check the values; raises `InputError`."""
        for name in (f.name for f in dataclasses.fields(self)):
            value = getattr(self, name)
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise InputError(f"{name} must be between 0 and 1, got {value}")
        for name in ("noise_std", "bias_field_coefficient", "gamma", "rotation_rad", "shear", "scale"):
            low_high = getattr(self, name)
            if len(low_high) != 2 or not all(map(math.isfinite, low_high)) or low_high[0] > low_high[1]:
                raise InputError(f"{name} must be two numbers, low <= high, got {low_high}")
        if self.noise_std[0] < 0 or self.gamma[0] <= 0 or self.scale[0] <= 0:
            raise InputError("noise_std must not be negative, and gamma and scale must be above 0; got "
                             f"{self.noise_std}, {self.gamma} and {self.scale}")
        if not self.flip_axes or not set(self.flip_axes) <= {0, 1, 2}:
            raise InputError(f"flip_axes must be some of 0, 1, 2, got {self.flip_axes}")
        if not self.rotate90_turns or not set(self.rotate90_turns) <= {1, 2, 3}:
            raise InputError(f"rotate90_turns must be some of 1, 2, 3, got {self.rotate90_turns}")

    @classmethod
    def none(cls) -> AugmentationConfig:
        """No augmentation at all: crop and min-max only."""
        return cls(mirror=False, noise_probability=0, bias_field_probability=0, gamma_probability=0, affine_probability=0)

    @property
    def flipping(self) -> bool:
        """Whether any flip can occur."""
        return self.mirror and (self.flip_probability > 0 or self.flip_random_axis_probability > 0)

    @property
    def turning(self) -> bool:
        """Whether any quarter turn can occur."""
        return self.mirror and self.rotate90_probability > 0
