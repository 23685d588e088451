"""Presets: what a data set asks for.

A preset is data, one YAML file in this folder or anywhere else: a new data set needs a file and no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dropgen_fast.data.augmentation import RECIPES, AugmentationConfig
from dropgen_fast.errors import InputError


@dataclass(frozen=True)
class Preset:
    """What a data set asks for; the values of the DropGen paper for its own data sets (arXiv 2604.02564)."""

    classes: tuple[str, ...] | None = None
    """Class names in the order of their label values, background first; None: as the cohort says."""
    spacing_mm: tuple[float, float, float] | None = None
    """Voxel spacing to resample to, right-left, posterior-anterior, inferior-superior; None: the cohort's median."""
    patch: tuple[int, int, int] | None = None
    """Training patch in voxels; None: chosen from the prepared store."""
    intensity_window: tuple[float, float] | None = None
    """Intensities are clipped to (low, high) before the min-max rescaling (CT: Hounsfield units); None: no clipping."""
    recipe: str = "dropgen"
    """Where the augmentation's settings start from: dropgen (the paper's), nnunet, or off."""
    augmentation: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `AugmentationConfig` that differ from the recipe's: mirror: false where left and right are different labels."""

    def augmentation_config(self, patch: Sequence[int] | None = None, recipe: str | None = None) -> AugmentationConfig:
        """The augmentation that the data set asks for, for a patch (D, H, W); `recipe` takes the place of the preset's own."""
        return AugmentationConfig.named(recipe or self.recipe, patch).changed(self.augmentation, "augmentation")


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in resources.files("dropgen_fast.presets").iterdir()
                  if p.name.endswith(".yaml"))


def load_preset(name: str | None) -> Preset:
    """The preset of that name, or of that YAML file; None gives the defaults.

    Raises:
        InputError: no such preset or file, a key that a preset does not have, or a value of the wrong kind.
    """
    if name is None:
        return Preset()
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise InputError(f"preset file {name} does not exist")
        try:
            text = Path(name).read_text()
        except UnicodeDecodeError as error:
            raise InputError(f"preset file {name} is no text file") from error
    elif name in preset_names():
        text = (resources.files("dropgen_fast.presets") / f"{name}.yaml").read_text()
    else:
        raise InputError(f"no preset {name!r}; there are {', '.join(preset_names())}, or give a .yaml file")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"preset {name} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"preset {name} must be a mapping of settings, got {type(values).__name__}")
    known = {f.name for f in fields(Preset)}
    if unknown := sorted(set(map(str, values)) - known):
        raise InputError(f"preset {name} has unknown settings {unknown}; a preset has {sorted(known)}")
    if values.get("recipe") is False:
        values["recipe"] = "off"  # which YAML takes for false
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    preset = Preset(**settings)
    _check_preset(name, preset)
    return preset


def _check_preset(name: str, preset: Preset) -> None:
    def numbers(value: object, count: int, positive: bool) -> bool:
        return (isinstance(value, tuple) and len(value) == count
                and all(isinstance(v, (int, float)) and not isinstance(v, bool) and (v > 0 or not positive) for v in value))

    if preset.spacing_mm is not None and not numbers(preset.spacing_mm, 3, True):
        raise InputError(f"preset {name}: spacing_mm must be three positive numbers, got {preset.spacing_mm}")
    if preset.patch is not None and not (numbers(preset.patch, 3, True) and all(isinstance(v, int) for v in preset.patch)):
        raise InputError(f"preset {name}: patch must be three positive whole numbers, got {preset.patch}")
    if preset.intensity_window is not None and not (
            numbers(preset.intensity_window, 2, False) and preset.intensity_window[0] < preset.intensity_window[1]):
        raise InputError(f"preset {name}: intensity_window must be two numbers, low < high, got {preset.intensity_window}")
    if preset.classes is not None and not (isinstance(preset.classes, tuple) and len(preset.classes) >= 2
                                           and all(isinstance(c, str) for c in preset.classes)):
        raise InputError(f"preset {name}: classes must be at least two names, background first, got {preset.classes}")
    if preset.recipe not in RECIPES:
        raise InputError(f"preset {name}: recipe must be one of {', '.join(RECIPES)}, got {preset.recipe!r}")
    if not isinstance(preset.augmentation, dict):
        raise InputError(f"preset {name}: augmentation must be a mapping of settings, got {preset.augmentation!r}")
    AugmentationConfig.named(preset.recipe).changed(preset.augmentation, f"preset {name}: augmentation")
