"""The preset of a data set that has none: derived from its prepared store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dropgen_fast.data.augmentation import sided_classes
from dropgen_fast.presets import Preset

PATCH_VOXELS = 128**3
"""At most; the smallest of the paper's patches (arXiv 2604.02564)."""
PATCH_MULTIPLE = 32
"""Of every axis: what the paper's U-Net, and anatomix at stride 2, ask for."""
PATCH_LEAST = 64
"""Of every axis: what the paper's U-Net asks for. Smaller volumes are padded."""


def generic_preset(classes: Sequence[str], spacing_mm: tuple[float, float, float], shapes: Sequence[Sequence[int]]) -> Preset:
    """The preset that fits the volumes of a store.

    The patch is the median volume, made smaller along whichever axis is the longest in mm until it has `PATCH_VOXELS`: as near to
    a cube of tissue as the volumes allow (after nnU-Net, Isensee et al. 2021, doi 10.1038/s41592-020-01008-z). Mirroring is off
    where a class is a side.

    Args:
        classes: names, background first.
        spacing_mm: of the voxels.
        shapes: (D, H, W) of the training volumes, one at least.
    """
    median = np.median(np.asarray(shapes), 0)
    patch = [max(PATCH_LEAST, int(np.ceil(n / PATCH_MULTIPLE)) * PATCH_MULTIPLE) for n in median]
    while np.prod(patch) > PATCH_VOXELS:
        longest = max((k for k in range(3) if patch[k] > PATCH_LEAST), key=lambda k: patch[k] * spacing_mm[k])
        patch[longest] -= PATCH_MULTIPLE
    return Preset(patch=(patch[0], patch[1], patch[2]), augmentation={"mirror": False} if sided_classes(classes) else {})
