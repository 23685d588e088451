"""Tiny cohorts of NIfTI files for the tests: smooth images with blobs as labels, in an nnU-Net style folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import scipy.ndimage
from nibabel import orientations

FOLDERS = {"train": ("imagesTr", "labelsTr"), "val": ("imagesVal", "labelsVal"), "test": ("imagesTs", "labelsTs")}


def rotation(angles_rad: Sequence[float]) -> npt.NDArray[np.float64]:
    """A rotation matrix (3, 3) from Euler angles."""
    matrix: npt.NDArray[np.float64] = nib.eulerangles.euler2mat(*angles_rad)
    return matrix


def make_affine(spacing_mm: Sequence[float] = (1, 1, 1), angles_rad: Sequence[float] = (0, 0, 0),
                origin_mm: Sequence[float] = (-20, -25, -30)) -> npt.NDArray[np.float64]:
    """An affine of RAS axes, turned by `angles_rad`."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles_rad) @ np.diag(spacing_mm)
    affine[:3, 3] = origin_mm
    return affine


def blobs(shape: Sequence[int], classes: int = 3, seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """An image (intensities about 0 to 1000) and its label map: nested level sets of a smooth random field."""
    rng = np.random.default_rng(seed)
    field = scipy.ndimage.gaussian_filter(rng.standard_normal(shape), 2.5, mode="wrap")
    ranks = field.ravel().argsort().argsort().reshape(field.shape) / field.size
    label = np.clip((ranks - 0.5) * 2 * classes, 0, classes - 1).astype(np.uint8)
    image = 1000 * ranks + 20 * rng.standard_normal(shape)
    return image.astype(np.float32), label


def write_nifti(path: Path, array: npt.NDArray[Any], affine: npt.NDArray[np.float64], axcodes: str = "RAS") -> Path:
    """Write an array given in RAS order as a file that is stored in the order of `axcodes`."""
    ornt = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(axcodes))
    stored = orientations.apply_orientation(array, ornt)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(stored, affine @ orientations.inv_ornt_aff(ornt, array.shape)), path)
    return path


def write_cohort(folder: Path, cases: Mapping[str, int] | None = None, *, shape: Sequence[int] = (24, 20, 22), classes: int = 3,
                 channels: int = 1, spacing_mm: Sequence[float] = (1, 1, 1), axcodes: str = "RAS",
                 angles_rad: Sequence[float] = (0, 0, 0), dataset_json: bool = True) -> Path:
    """Write `cases` per split (default: 3 train, 1 val, 1 test), named train_0, …; every case is another random anatomy."""
    seed = 0
    for split, count in (cases or {"train": 3, "val": 1, "test": 1}).items():
        images, labels = FOLDERS[split]
        for i in range(count):
            image, label = blobs(shape, classes, seed := seed + 1)
            affine = make_affine(spacing_mm, angles_rad)
            for c in range(channels):
                channel = image if c == 0 else 1000 - image * (c / channels)
                write_nifti(folder / images / f"{split}_{i}_{c:04d}.nii.gz", channel, affine, axcodes)
            write_nifti(folder / labels / f"{split}_{i}.nii.gz", label, affine, axcodes)
    if dataset_json:
        (folder / "dataset.json").write_text(json.dumps({
            "labels": {"background": 0, **{f"tissue {k}": k for k in range(1, classes)}},
            "channel_names": {str(c): f"channel {c}" for c in range(channels)}, "file_ending": ".nii.gz"}))
    return folder
