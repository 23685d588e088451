"""Volumes to load: a cohort of smooth noise, prepared as any other, and what the other loaders need of it."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from dropgen_fast.data.store import Store
from dropgen_fast.errors import InputError
from dropgen_fast.prepare import PrepareConfig, prepare

EDGES = (192, 256)
"""Of the smallest volume, and what the largest stay below, in voxels, unless the patch needs more."""
CLASSES = ("background", "one", "two")


def make_store(folder: Path, patch: tuple[int, int, int], *, cases: int, seed: int, workers: int,
               edges: tuple[int, int] = EDGES) -> Path:
    """Write a cohort of `cases` training cases and one for validation into `folder` and prepare it; the store's path.

    The training cases' edges rise from the first of `edges`, in voxels, to below the second, and are at least 1.25 times the
    patch's.
    """
    generator = torch.Generator().manual_seed(seed)
    for number in range(cases + 1):
        split = "Tr" if number < cases else "Val"
        edge = edges[0] + (edges[1] - edges[0]) * (number % cases) // cases
        shape = tuple(max(edge, -(-5 * side // 4)) for side in patch)
        image = smooth_noise(shape, generator) + 0.05 * torch.randn(shape, generator=generator).numpy()
        levels = smooth_noise(shape, generator)
        label = np.digitize(levels, np.quantile(levels[::4, ::4, ::4], (0.8, 0.93))).astype(np.uint8)
        _save(folder / f"images{split}" / f"case{number}_0000.nii", (1000 * image).astype(np.float32))
        _save(folder / f"labels{split}" / f"case{number}.nii", label)
    (folder / "dataset.json").write_text(json.dumps({
        "labels": {name: value for value, name in enumerate(CLASSES)}, "channel_names": {"0": "noise"}, "file_ending": ".nii"}))
    store = folder / "store"
    report = prepare(PrepareConfig(source=folder, store=store, spacing_mm=(1.0, 1.0, 1.0), workers=workers))
    if report.left_out:
        raise InputError(f"case {report.left_out[0].id} could not be prepared: {report.left_out[0].reason}")
    return store


def describe(store: Path) -> str:
    """How many training volumes of which sizes and type a store has; raises `InputError` where it is none, or has none."""
    opened = Store.open(store)
    cases = opened.cases("train")
    if not cases:
        raise InputError(f"{store} has no training cases")
    sizes = sorted({"×".join(map(str, case.shape)) for case in cases})
    return f"{len(cases)} volumes of {sizes[0] if len(sizes) == 1 else f'{sizes[0]} to {sizes[-1]}'}, {opened.index.dtype}"


def smooth_noise(shape: tuple[int, ...], generator: torch.Generator) -> npt.NDArray[np.float32]:
    """Random numbers of two scales, interpolated."""
    result = torch.zeros(shape)
    for points, weight in ((6, 1.0), (24, 0.3)):
        coarse = torch.randn(1, 1, *(min(points, side) for side in shape), generator=generator)
        result += weight * F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0, 0]
    values: npt.NDArray[np.float32] = result.numpy()
    return values


def _save(path: Path, volume: npt.NDArray[np.float32] | npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume, np.eye(4))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def load_volumes(store: Path) -> list[dict[str, torch.Tensor]]:
    """Image (C, D, H, W) float32 in [0, 1] and label (1, D, H, W) uint8 of each training case."""
    opened = Store.open(store)
    volumes = []
    for case in opened.cases("train"):
        image, label = opened.load(case)
        if label is None:
            raise InputError(f"training case {case.id} of {store} has no label")
        volumes.append({"image": torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0))),
                        "label": torch.from_numpy(np.ascontiguousarray(np.moveaxis(label, -1, 0)))})
    return volumes


def ready_batch(store: Path, patch: tuple[int, int, int], batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops from the middle of the training cases: image (N, C, D, H, W) float32 in [0, 1], label (N, 1, D, H, W) uint8."""
    crops = [{key: _middle(volume, patch) for key, volume in case.items()} for case in load_volumes(store)]
    chosen = [crops[i % len(crops)] for i in range(batch_size)]
    image, label = (torch.stack([case[key] for case in chosen]).contiguous() for key in ("image", "label"))
    return image, label


def _middle(volume: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """The middle of a volume (C, D, H, W), padded with zeros where it is smaller than the patch."""
    short = [max(0, side - size) for side, size in zip(patch, volume.shape[1:], strict=True)]
    padded = F.pad(volume, [n for missing in reversed(short) for n in (missing // 2, missing - missing // 2)])
    starts = [(size - side) // 2 for side, size in zip(patch, padded.shape[1:], strict=True)]
    d, h, w = (slice(start, start + side) for start, side in zip(starts, patch, strict=True))
    return padded[:, d, h, w]
