"""Which augmentations, how often and how strong."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dropgen_fast.errors import InputError

ANISOTROPIC = 3.0
"""nnU-Net's rule: a patch with a longest edge of more than this many times its shortest is turned in the plane only."""


@dataclass(frozen=True)
class AugmentationConfig:
    """The DropGen paper's augmentations, in the order in which they are applied; a probability of 0 switches one off.

    Ranges are (low, high) and drawn from uniformly. Intensities are in units of the image's range. docs/augmentation.md has
    the formula of each; MONAI's transforms of the same names define those of the paper. The paper's recipe is the default,
    `nnunet` has nnU-Net's.
    """

    mirror: bool = True
    """Whether flips, quarter turns and mirroring are allowed at all: not where left and right are different labels."""
    flip_probability: float = 0.33
    """Flip of axis 0."""
    flip_random_axis_probability: float = 0.33
    """Flip of one random axis of `flip_axes`."""
    flip_axes: tuple[int, ...] = (0, 1, 2)
    """Axes that the random flip chooses from."""
    mirror_probability: float = 0.0
    """Flip of each axis of `mirror_axes`, each on its own (nnU-Net's mirroring)."""
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    """Axes that are mirrored."""
    rotate90_probability: float = 0.33
    """Rotation by a multiple of 90° in the plane of axes 0 and 1."""
    rotate90_turns: tuple[int, ...] = (1, 2, 3)
    """Quarter turns that the rotation chooses from."""
    low_resolution_probability: float = 0.33
    """Simulation of low resolution: nearest down, trilinear up."""
    low_resolution_zoom: tuple[float, float] = (0.25, 1.0)
    """Factor on the number of voxels along each axis."""
    noise_probability: float = 0.33
    """Gaussian noise."""
    noise_std: tuple[float, float] = (0.0, 0.1)
    """Standard deviation of the noise."""
    rician_probability: float = 0.0
    """Rician noise: the magnitude of a complex signal with Gaussian noise in both parts."""
    rician_std: tuple[float, float] = (0.0, 0.1)
    """Standard deviation of either part."""
    bias_field_probability: float = 0.33
    """Multiplication by the exponential of a polynomial of degree 3."""
    bias_field_coefficient: tuple[float, float] = (0.0, 0.1)
    """Coefficients of the polynomial's 20 Legendre terms."""
    gibbs_probability: float = 0.33
    """Gibbs ringing: high spatial frequencies cut off."""
    gibbs_alpha: tuple[float, float] = (0.0, 0.33)
    """Share of the radius in k-space that is cut off."""
    gamma_probability: float = 0.33
    """Gamma correction."""
    gamma: tuple[float, float] = (0.5, 4.5)
    """Exponent of the gamma correction."""
    brightness_probability: float = 0.0
    """Multiplication of each channel by a factor of its own."""
    brightness: tuple[float, float] = (0.75, 1.25)
    """The factor; of a single channel the final rescaling to [0, 1] undoes it."""
    contrast_probability: float = 0.0
    """Stretching of each channel about its mean, clipped to the range that it had."""
    contrast: tuple[float, float] = (0.75, 1.25)
    """The factor; below 1 and on a single channel the final rescaling to [0, 1] undoes it."""
    smooth_probability: float = 0.33
    """Gaussian smoothing."""
    smooth_sigma_voxels: tuple[float, float] = (0.0, 0.1)
    """Standard deviation along each axis."""
    sharpen_probability: float = 0.33
    """Gaussian sharpening: b + α (b - G₂ b) of the smoothed image b = G₁ x."""
    sharpen_sigma1_voxels: tuple[float, float] = (0.5, 1.0)
    """Standard deviation of G₁ along each axis."""
    sharpen_sigma2_voxels: tuple[float, float] = (0.5, 1.0)
    """Standard deviation of G₂ along each axis, at most that of G₁ there."""
    sharpen_alpha: tuple[float, float] = (10.0, 30.0)
    """The weight α."""
    affine_probability: float = 0.33
    """Affine transformation about the centre of the patch, zeros outside; trilinear, the label nearest."""
    rotation_rad: tuple[float, float] = (-math.pi / 4, math.pi / 4)
    """Angle about each axis of `rotation_axes`."""
    rotation_axes: tuple[int, ...] = (0, 1, 2)
    """Axes that are turned about: for anisotropic patches the one across the plane, alone."""
    shear: tuple[float, float] = (-0.2, 0.2)
    """Each of the six shear coefficients."""
    scale: tuple[float, float] = (0.8, 1.2)
    """Factor along each axis; above 1 shows more of the volume, smaller."""
    isotropic_scale: bool = False
    """One factor for the three axes instead of one for each."""
    elastic_probability: float = 0.0
    """Elastic deformation: control points are moved, cubic B-splines between them; in one gather with the affine."""
    elastic_control_points: int = 8
    """Control points along each axis."""
    elastic_std_voxels: tuple[float, float] = (2.0, 6.0)
    """Standard deviation of a control point's displacement along each axis; the spline, which smooths, has a third of it."""
    like_monai: bool = False
    """Low resolution and Gibbs ringing as MONAI has them: off the grid by up to half a coarse voxel, and by half a bin."""

    def __post_init__(self) -> None:
        """Check the values; raises `InputError`."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_probability") and not (_is_number(value) and 0 <= value <= 1):
                raise InputError(f"{field.name} must be between 0 and 1, got {value}")
            if field.type == "bool" and not isinstance(value, bool):
                raise InputError(f"{field.name} must be true or false, got {value}")
            if field.type == "tuple[float, float]":
                self._check_range(field.name, value)
            if field.name.endswith("_axes") and not (_are_whole(value) and value and set(value) <= {0, 1, 2}):
                raise InputError(f"{field.name} must be some of 0, 1, 2, got {value}")
        if not (_are_whole(self.rotate90_turns) and self.rotate90_turns and set(self.rotate90_turns) <= {1, 2, 3}):
            raise InputError(f"rotate90_turns must be some of 1, 2, 3, got {self.rotate90_turns}")
        if not (_are_whole((self.elastic_control_points,)) and 4 <= self.elastic_control_points <= 64):
            raise InputError(f"elastic_control_points must be a whole number from 4 to 64, got {self.elastic_control_points}")

    @staticmethod
    def _check_range(name: str, low_high: Any) -> None:
        if not (isinstance(low_high, tuple) and len(low_high) == 2 and all(map(_is_number, low_high))
                and low_high[0] <= low_high[1]):
            raise InputError(f"{name} must be two numbers, low <= high, got {low_high}")
        lowest, highest, included = _LIMITS.get(name, (-math.inf, math.inf, True))
        if low_high[0] < lowest or low_high[1] > highest or (low_high[0] == lowest and not included):
            limits = f"{'at least' if included else 'above'} {lowest:g}" + (f" and at most {highest:g}" if highest < 1e9 else "")
            raise InputError(f"{name} must be {limits}, got {low_high}")

    @classmethod
    def named(cls, recipe: str, patch: Sequence[int] | None = None) -> AugmentationConfig:
        """A recipe by its name, one of `RECIPES`; raises `InputError`."""
        if recipe == "dropgen":
            return cls()
        if recipe == "nnunet":
            return cls.nnunet(patch)
        if recipe == "off":
            return cls.none()
        raise InputError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")

    @classmethod
    def none(cls) -> AugmentationConfig:
        """No augmentation at all: crop and min-max only."""
        off = {f.name: 0.0 for f in dataclasses.fields(cls) if f.name.endswith("_probability")}
        return cls(**off)  # type: ignore[arg-type]

    @classmethod
    def nnunet(cls, patch: Sequence[int] | None = None) -> AugmentationConfig:
        """The augmentations of nnU-Net's default trainer (2.8), with its probabilities and ranges, in the order of this class.

        A `patch` (D, H, W) that is anisotropic is turned about the axis of its shortest edge only, by any angle.
        docs/augmentation.md lists what is not nnU-Net's, beginning with the order.
        """
        flat = patch is not None and max(patch) > ANISOTROPIC * min(patch)
        angle = math.pi if flat else math.pi / 6
        axes = (min(range(3), key=lambda a: patch[a]),) if flat and patch is not None else (0, 1, 2)
        return dataclasses.replace(
            cls.none(), mirror_probability=0.5, affine_probability=0.36, rotation_rad=(-angle, angle),
            rotation_axes=axes, shear=(0.0, 0.0), scale=(0.7, 1.4), isotropic_scale=True, noise_probability=0.1,
            smooth_probability=0.2, smooth_sigma_voxels=(0.5, 1.0), brightness_probability=0.15, contrast_probability=0.15,
            low_resolution_probability=0.25, low_resolution_zoom=(0.5, 1.0), gamma_probability=0.3, gamma=(0.7, 1.5))

    def changed(self, changes: Mapping[str, Any], where: str) -> AugmentationConfig:
        """The same with other values, as a preset's file gives them; raises `InputError` that begins with `where`."""
        known = {f.name for f in dataclasses.fields(self)}
        if unknown := sorted(set(map(str, changes)) - known):
            raise InputError(f"{where} has unknown settings {unknown}; there are {sorted(known)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        try:
            return dataclasses.replace(self, **values)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the probabilities of all that can occur."""
        geometric = () if self.mirror else ("flip_probability", "flip_random_axis_probability", "mirror_probability",
                                            "rotate90_probability")
        names = (field.name for field in dataclasses.fields(self) if field.name.endswith("_probability"))
        return tuple(name for name in names if getattr(self, name) > 0 and name not in geometric)

    @property
    def flipping(self) -> bool:
        """Whether any flip can occur."""
        return self.mirror and max(self.flip_probability, self.flip_random_axis_probability, self.mirror_probability) > 0

    @property
    def turning(self) -> bool:
        """Whether any quarter turn can occur."""
        return self.mirror and self.rotate90_probability > 0


def sided_classes(classes: Iterable[str]) -> list[str]:
    """The classes whose name says left or right: a flip of the first axis turns one into the other."""
    return [name for name in classes if re.search(r"(?<![a-z])(left|right)(?![a-z])", name, re.IGNORECASE)]


RECIPES = ("dropgen", "nnunet", "off")
"""The paper's augmentations, nnU-Net's, and none."""

_LIMITS = {
    "low_resolution_zoom": (0.0, 1.0, False), "noise_std": (0.0, math.inf, True), "rician_std": (0.0, math.inf, True),
    "bias_field_coefficient": (-4.0, 4.0, True),
    "gibbs_alpha": (0.0, 1.0, True), "gamma": (0.01, 100.0, True), "brightness": (0.0, math.inf, False),
    "contrast": (0.0, math.inf, True), "smooth_sigma_voxels": (0.0, math.inf, True),
    "sharpen_sigma1_voxels": (0.0, math.inf, True), "sharpen_sigma2_voxels": (0.0, math.inf, True),
    "sharpen_alpha": (0.0, math.inf, True), "scale": (0.0, math.inf, False), "elastic_std_voxels": (0.0, math.inf, True),
}
"""Lowest and highest value of a range, and whether the lowest itself is allowed."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_whole(values: object) -> bool:
    return isinstance(values, tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
