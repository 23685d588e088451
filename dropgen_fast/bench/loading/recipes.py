"""What each library calls our augmentations, with the probabilities and ranges of an `AugmentationConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import monai.transforms as mt

from dropgen_fast.data.augmentation import AugmentationConfig

IMAGE, BOTH = ["image"], ["image", "label"]
SUFFIX = "_probability"
OPERATORS = tuple(field.name.removesuffix(SUFFIX) for field in dataclasses.fields(AugmentationConfig)
                  if field.name.endswith(SUFFIX))
"""Our augmentations, in their order."""
PAPER = tuple(name for name in OPERATORS if getattr(AugmentationConfig(), name + SUFFIX) > 0)
MONAI_ELASTIC: dict[str, Any] = {"sigma_range": (5, 8), "magnitude_range": (50, 150)}
"""MONAI smooths dense noise where ours interpolates control points: the same purpose, another formula."""


def only(name: str) -> AugmentationConfig:
    """One augmentation, always."""
    return dataclasses.replace(AugmentationConfig.none(), mirror=True, **{name + SUFFIX: 1.0})  # type: ignore[arg-type]


def monai_transforms(config: AugmentationConfig, patch: tuple[int, int, int], names: tuple[str, ...],
                     probability: float | None = None) -> list[Any]:
    """MONAI's dictionary transforms of these names, in our order; `probability` instead of the configuration's."""
    made: list[Any] = []
    for name in names:
        chance = getattr(config, name + SUFFIX) if probability is None else probability
        made += _MONAI[name](config, patch, chance)
    return made


def batchaug_transforms(library: Any, config: AugmentationConfig, names: tuple[str, ...]) -> list[Any]:
    """Batchaug's dictionary transforms of these names, in our order; `library` is the imported module."""
    return [transform for name in names for transform in _BATCHAUG[name](library, config, getattr(config, name + SUFFIX))]


def _shifted(low_high: tuple[float, float]) -> tuple[float, float]:
    """The range of a factor as MONAI and batchaug want it: what is added to 1."""
    return low_high[0] - 1, low_high[1] - 1


def _axes(letters: str, stem: str, low_high: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return {f"{stem}_{letter}": low_high for letter in letters}


def _sharpen(config: AugmentationConfig) -> dict[str, Any]:
    return {**_axes("xyz", "sigma1", config.sharpen_sigma1_voxels), **_axes("xyz", "sigma2", config.sharpen_sigma2_voxels),
            "alpha": config.sharpen_alpha}


_Monai = Callable[[AugmentationConfig, tuple[int, int, int], float], list[Any]]
_MONAI: dict[str, _Monai] = {
    "flip": lambda c, patch, p: [mt.RandFlipd(BOTH, prob=p, spatial_axis=0)],
    "flip_random_axis": lambda c, patch, p: [mt.RandAxisFlipd(BOTH, prob=p)],
    "mirror": lambda c, patch, p: [mt.RandFlipd(BOTH, prob=p, spatial_axis=axis) for axis in c.mirror_axes],
    "rotate90": lambda c, patch, p: [mt.RandRotate90d(BOTH, prob=p, max_k=3, spatial_axes=(0, 1))],
    "low_resolution": lambda c, patch, p: [mt.RandSimulateLowResolutiond(IMAGE, prob=p, zoom_range=c.low_resolution_zoom)],
    "noise": lambda c, patch, p: [mt.RandGaussianNoised(IMAGE, prob=p, std=c.noise_std[1])],
    "rician": lambda c, patch, p: [mt.RandRicianNoised(IMAGE, prob=p, std=c.rician_std[1])],
    "bias_field": lambda c, patch, p: [mt.RandBiasFieldd(IMAGE, prob=p, coeff_range=c.bias_field_coefficient)],
    "gibbs": lambda c, patch, p: [mt.RandGibbsNoised(IMAGE, prob=p, alpha=c.gibbs_alpha)],
    "gamma": lambda c, patch, p: [mt.RandAdjustContrastd(IMAGE, prob=p, gamma=c.gamma)],
    "brightness": lambda c, patch, p: [mt.RandScaleIntensityd(IMAGE, _shifted(c.brightness), prob=p)],
    "contrast": lambda c, patch, p: [mt.RandScaleIntensityFixedMeand(IMAGE, _shifted(c.contrast), preserve_range=True, prob=p)],
    "smooth": lambda c, patch, p: [mt.RandGaussianSmoothd(IMAGE, prob=p, **_axes("xyz", "sigma", c.smooth_sigma_voxels))],
    "sharpen": lambda c, patch, p: [mt.RandGaussianSharpend(IMAGE, prob=p, **_sharpen(c))],
    "affine": lambda c, patch, p: [mt.RandAffined(
        BOTH, spatial_size=patch, prob=p, rotate_range=[c.rotation_rad] * 3, shear_range=[c.shear] * 6,
        scale_range=[_shifted(c.scale)] * 3, mode=("bilinear", "nearest"), padding_mode="zeros")],
    "elastic": lambda c, patch, p: [mt.Rand3DElasticd(
        BOTH, spatial_size=patch, prob=p, mode=("bilinear", "nearest"), padding_mode="zeros", **MONAI_ELASTIC)],
}

_Batchaug = Callable[[Any, AugmentationConfig, float], list[Any]]
_BATCHAUG: dict[str, _Batchaug] = {
    "flip": lambda b, c, p: [b.RandFlipd(BOTH, prob=p, spatial_axis=0)],
    "flip_random_axis": lambda b, c, p: [b.RandAxisFlipd(BOTH, prob=p)],
    "rotate90": lambda b, c, p: [b.RandRotate90d(BOTH, prob=p, max_k=3, spatial_axes=(0, 1))],
    "low_resolution": lambda b, c, p: [b.RandSimulateLowResolutiond(IMAGE, prob=p, zoom_range=c.low_resolution_zoom)],
    "noise": lambda b, c, p: [b.RandGaussianNoised(IMAGE, prob=p, std=c.noise_std)],
    "bias_field": lambda b, c, p: [b.RandBiasFieldd(IMAGE, prob=p, coeff_range=c.bias_field_coefficient)],
    "gibbs": lambda b, c, p: [b.RandGibbsNoised(IMAGE, prob=p, alpha=c.gibbs_alpha)],
    "gamma": lambda b, c, p: [b.RandAdjustContrastd(IMAGE, prob=p, gamma=c.gamma)],
    "smooth": lambda b, c, p: [b.RandGaussianSmoothd(IMAGE, prob=p, **_axes("xyz", "sigma", c.smooth_sigma_voxels))],
    "sharpen": lambda b, c, p: [b.RandGaussianSharpend(IMAGE, prob=p, **_sharpen(c))],
    "affine": lambda b, c, p: [b.RandAffined(
        BOTH, prob=p, rotate_range=[c.rotation_rad] * 3, shear_range=[c.shear] * 6, scale_range=[_shifted(c.scale)] * 3,
        mode={"image": "bilinear", "label": "nearest"})],
}
