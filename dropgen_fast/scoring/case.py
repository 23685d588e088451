"""The scores of one case: a predicted label map against the true one, class by class.

What is a score, for one class of one case:

=====================  ==================  =====================  =====================================================
in the label           in the prediction   Dice, surface Dice     HD95; volume error in ml; relative volume error
=====================  ==================  =====================  =====================================================
yes                    yes                 both                   all
yes                    no                  0                      HD95 has no value (`hd95_undefined`); both errors
no                     yes                 0                      HD95 has no value (`hd95_undefined`); ml only
no                     no                  neither                none: empty cells, in no mean
=====================  ==================  =====================  =====================================================

With P the voxels of the class in the prediction, T those in the label, v the volume of a voxel in ml:

    Dice                    2 |P ∩ T| / (|P| + |T|)
    volume error            (|P| - |T|) v, in ml: positive where too much was predicted
    relative volume error   (|P| - |T|) / |T|: a fraction, of the same sign

HD95 and surface Dice are defined in `surfaces`. Distances are in mm of the file's own spacing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dropgen_fast.data.geometry import Grid, largest_offset_mm, load_volume
from dropgen_fast.data.prepare import MAX_OFFSET_VOXELS, WHOLE
from dropgen_fast.errors import InputError
from dropgen_fast.scoring.surfaces import hd95_mm, surface_dice, surfaces

LARGEST_VALUE = 65535

LabelMap = npt.NDArray[Any]
"""Classes of voxels (I, J, K), uint8 or uint16."""


@dataclass(frozen=True)
class Score:
    """One class of one case; None where there is no score."""

    case: str
    value: int
    """The class's value in the label maps."""
    class_name: str
    dice: float | None
    hd95_mm: float | None
    label_voxels: int
    predicted_voxels: int
    surface_dice: float | None = None
    tolerance_mm: float | None = None
    """Of the surface Dice; None where there is none."""
    volume_error_ml: float | None = None

    @property
    def hd95_undefined(self) -> bool:
        """In one of label and prediction and not in the other: there is no surface to measure from."""
        return self.dice is not None and self.hd95_mm is None

    @property
    def relative_volume_error(self) -> float | None:
        """Volume error as a fraction of the label's volume; None where the label has none of the class."""
        return (self.predicted_voxels - self.label_voxels) / self.label_voxels if self.label_voxels else None


def nameless(value: int) -> str:
    """What a class is called that nothing names."""
    return f"class_{value}"


def score_case(case: str, prediction_file: Path, label_file: Path, classes: Mapping[int, str] | None,
               tolerance_mm: float | Mapping[int, float]) -> dict[int, Score]:
    """Scores of the classes that are in the label or the prediction, by value.

    Args:
        case: its name.
        prediction_file: NIfTI label map.
        label_file: NIfTI label map on the same grid.
        classes: foreground classes, value to name; None takes the values found.
        tolerance_mm: of the surface Dice, for all classes or by value.

    Raises:
        InputError: the files cannot be read or compared, or hold a value that is no class.
    """
    prediction, prediction_grid = _load_label_map(prediction_file)
    label, grid = _load_label_map(label_file)
    _check_same_grid(prediction_grid, grid, (prediction_file, label_file))
    box = _foreground(prediction, label)
    maps = prediction[box], label[box]
    counts = _count(*maps)
    if classes is not None:
        for path, count in zip((prediction_file, label_file), counts, strict=False):
            if unknown := sorted(set(map(int, np.flatnonzero(count))) - {0, *classes}):
                raise InputError(f"{path} holds values {unknown} that are no class; "
                                 f"the classes are {', '.join(f'{v} {n}' for v, n in classes.items())}")
    found = [surfaces(voxels, grid.spacing_mm) for voxels in maps]
    voxel_ml = abs(float(np.linalg.det(grid.affine[:3, :3]))) / 1000
    scores = {}
    for value in sorted({*found[0], *found[1]}):
        predicted, true, shared = (int(count[value]) for count in counts)
        tolerance = tolerance_mm[value] if isinstance(tolerance_mm, Mapping) else tolerance_mm
        both = (found[0][value], found[1][value]) if predicted and true else None
        scores[value] = Score(
            case, value, nameless(value) if classes is None else classes[value], 2 * shared / (predicted + true),
            hd95_mm(*both) if both else None, true, predicted, surface_dice(*both, tolerance) if both else 0.0, tolerance,
            (predicted - true) * voxel_ml)
    return scores


def _load_label_map(path: Path) -> tuple[LabelMap, Grid]:
    """Voxels (I, J, K) of a label map, in the fewest bytes, and the grid they are on."""
    volume = load_volume(path)
    array = volume.array
    low, high = array.min(), array.max()  # either is NaN where a voxel is
    if not 0 <= low <= high <= LARGEST_VALUE:
        raise InputError(f"{path} must hold classes from 0 to {LARGEST_VALUE}, got values from {low:g} to {high:g}")
    if array.dtype.kind == "f":
        whole = np.rint(array)
        if np.abs(array - whole).max() > WHOLE:
            raise InputError(f"{path} must hold whole numbers, one per class; it holds fractions")
        array = whole
    i, j, k = array.shape
    return array.astype(np.uint8 if high <= 255 else np.uint16, copy=False), Grid((i, j, k), volume.affine)


def _check_same_grid(prediction: Grid, label: Grid, files: tuple[Path, Path]) -> None:
    """As strict as between an image and its label in `prepare`."""
    if prediction.shape != label.shape:
        raise InputError(f"{files[0]} has shape {prediction.shape} and {files[1]} has {label.shape}; "
                         "a prediction must be on the grid of its label")
    apart_mm = largest_offset_mm(prediction, label)
    if apart_mm > MAX_OFFSET_VOXELS * min(label.spacing_mm):
        raise InputError(f"{files[0]} and {files[1]} have different affines, their corners lie up to {apart_mm:.3g} mm "
                         "apart; a prediction must be on the grid of its label")


def _foreground(one: LabelMap, other: LabelMap) -> tuple[slice, ...]:
    """The smallest box that holds every voxel of a class in either map; empty where there is none."""
    box = []
    for axis in range(3):
        rest = tuple(a for a in range(3) if a != axis)
        held = np.flatnonzero(one.any(axis=rest) | other.any(axis=rest))
        box.append(slice(held[0], held[-1] + 1) if held.size else slice(0))
    return tuple(box)


def _count(prediction: LabelMap, label: LabelMap) -> npt.NDArray[np.int64]:
    """Voxels of each value in the prediction, in the label, and in both at the same place, (3, values)."""
    values = 1 + max((int(v.max()) for v in (prediction, label) if v.size), default=0)
    counts = np.zeros((3, values), np.int64)
    for k in range(label.shape[2]):  # slice by slice: bincount makes 8 bytes of every voxel
        p, t = prediction[..., k].ravel(order="F"), label[..., k].ravel(order="F")
        for count, voxels in zip(counts, (p, t, p[p == t]), strict=True):
            count += np.bincount(voxels, minlength=values)
    return counts
