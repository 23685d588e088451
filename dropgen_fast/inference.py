"""Segmenting a whole volume: sliding window with half-overlapping patches, Gaussian weights.

The window is MONAI's `sliding_window_inference`. What is decided here is where a volume's tensors live (`Offload`), where its
features come from (`FeatureSource`), and which flips are averaged.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dropgen_fast.data.prepare import minmax
from dropgen_fast.device import free_bytes
from dropgen_fast.features.cache import FeatureCache
from dropgen_fast.features.volume import FeaturePlan, Shape, VolumeFeatures, at_least, coarse, pad
from dropgen_fast.model import DropGen

FeatureSource = Literal["window", "volume"]
"""The extractor runs on each window, as it did on each patch in training; or once on the volume, whose features are cropped."""
Offload = Literal["auto", "always", "never"]
"""Whether a volume's tensors stay in the CPU's memory while its windows go through the GPU; auto: where they would not fit."""

SHARE_OF_FREE = 0.5
"""Of the free memory of a GPU, what one volume may take: the windows' way through the network needs the rest."""

log = logging.getLogger(__name__)
_classes_of: WeakKeyDictionary[DropGen, int] = WeakKeyDictionary()


@torch.inference_mode()
def class_probabilities(
    model: DropGen, image: npt.NDArray[np.float32], patch: Shape, *, overlap: float = 0.5, windows_per_batch: int = 1,
    mirror: Sequence[int] = (), features: FeatureSource = "window", offload: Offload = "auto", cache: FeatureCache | None = None,
) -> Tensor:
    """Class probabilities (classes, D, H, W), float32, of a prepared volume (D, H, W, C).

    The whole volume is rescaled to [0, 1]; a volume smaller than the patch is padded with zeros. The model is left in the mode
    in which it came.

    Args:
        model: on the device that computes.
        image: in RAS order, as `prepare_image` gives it.
        patch: (D, H, W) of a window.
        overlap: share of a window that overlaps the next, in [0, 1).
        windows_per_batch: windows that go through the network at once.
        mirror: axes of (0, 1, 2) to flip along: the probabilities of all 2^k flips are averaged.
        features: see `FeatureSource`. "volume" falls back to "window" where it cannot be had, and logs a line that says why.
        offload: see `Offload`. Unless "never", a volume for which the GPU's memory does not suffice is tried once more,
            offloaded and window by window. Nothing changes for a model on the CPU.
        cache: where features of volumes are kept and looked for.

    Returns:
        On the model's device, or on the CPU where the volume was offloaded.

    Raises:
        ValueError: `features` or `offload` is none of its choices.
    """
    for name, value, choices in (("features", features, get_args(FeatureSource)), ("offload", offload, get_args(Offload))):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    device = next(model.parameters()).device
    volume = rescaled(image)
    slide = functools.partial(_slide, model, patch=patch, overlap=overlap, mirror=mirror, features=features, cache=cache)
    training = model.training
    model.eval()
    try:
        offloaded = device.type == "cuda" and (offload == "always" or (
            offload == "auto" and not _fits_on_gpu(model, volume, patch, features, bool(mirror))))
        try:
            return slide(volume if offloaded else volume.to(device), windows_per_batch=windows_per_batch)
        except torch.OutOfMemoryError:
            if offload == "never" or (offloaded and windows_per_batch == 1):
                raise
        # Not in the handler: the exception's traceback holds the tensors of the first try.
        log.warning("the GPU's memory does not suffice for %s voxels; trying again from the CPU's, window by window",
                    " × ".join(map(str, image.shape[:3])))
        torch.cuda.empty_cache()
        return slide(volume, windows_per_batch=1)
    finally:
        model.train(training)


def rescaled(image: npt.NDArray[np.float32]) -> Tensor:
    """A prepared volume (D, H, W, C) as models take it, whole: (1, C, D, H, W) in [0, 1], on the CPU."""
    return torch.from_numpy(np.ascontiguousarray(minmax(image).transpose(3, 0, 1, 2)))[None]


def _slide(
    model: DropGen, volume: Tensor, *, patch: Shape, overlap: float, windows_per_batch: int, mirror: Sequence[int],
    features: FeatureSource, cache: FeatureCache | None,
) -> Tensor:
    """Probabilities (classes, D, H, W) of a volume (1, Ci, D, H, W), on the device where the volume is."""
    flips = all_flips(mirror)
    device = next(model.parameters()).device
    blend = functools.partial(_blend, patch=patch, windows_per_batch=windows_per_batch, device=device)
    if features == "volume" and model.extractor is not None:
        source = VolumeFeatures(model.extractor, patch=patch, device=device, dtype=model.fusion.dtype, cache=cache)
        plan = source.plan(volume.shape[1], volume.shape[2:])
        if isinstance(plan, FeaturePlan):
            total = None
            padded, inside = pad(volume, plan.size)
            for axes in flips:  # the features of a flipped volume are not the flipped features
                seen = _flip(padded, axes)
                maps = source(seen, plan)
                if maps is None:
                    break
                share = _flip(blend(functools.partial(_predict, model, maps=maps, ratio=plan.ratio), seen,
                                    overlap=_aligned_overlap(patch, overlap, plan.ratio)), axes)
                total = share if total is None else total.add_(share)
            else:
                assert total is not None
                return total.div_(len(flips))[0][(slice(None), *inside)]
            del total
            plan = "the extractor needs more GPU memory than is free"
        log.warning("features per window, not per volume: %s", plan)
    padded, inside = pad(volume, at_least(volume.shape[2:], patch))
    return blend(functools.partial(_predict, model, flips=flips), padded, overlap=[overlap] * 3)[0][(slice(None), *inside)]


def _blend(
    predict: Callable[[Tensor, Any], Tensor], volume: Tensor, *, patch: Shape, overlap: Sequence[float], windows_per_batch: int,
    device: torch.device,
) -> Tensor:
    """MONAI's sliding window over a volume (1, Ci, D, H, W) that is no smaller than the patch: (1, classes, D, H, W).

    Windows are computed on `device` and added up where the volume is. Where that is another device, a slab of windows is added
    up before it is moved.
    """
    from monai.inferers import sliding_window_inference  # not at the top: it takes as long as all else that a command imports

    apart = volume.device != device
    result = sliding_window_inference(volume, patch, windows_per_batch, predict, overlap=overlap, mode="gaussian",
                                      sw_device=device, device=volume.device, with_coord=True,
                                      buffer_steps=1 if apart else None, buffer_dim=0)
    assert isinstance(result, Tensor)
    return result


def _predict(
    model: DropGen, windows: Tensor, places: Sequence[Sequence[slice]], *, flips: Sequence[tuple[int, ...]] = ((),),
    maps: Tensor | None = None, ratio: Shape = (1, 1, 1),
) -> Tensor:
    """Probabilities (N, classes, D, H, W) of windows (N, Ci, D, H, W), averaged over flips of the windows.

    `maps` (1, Cf, d, h, w) are features of the volume that the windows were taken from at `places`.
    """
    features = None
    if maps is not None:
        features = torch.cat([maps[(slice(None), slice(None), *coarse(place[2:], ratio))] for place in places]).to(windows.device)
    total = None
    for axes in flips:
        share = _flip(model(_flip(windows, axes), features=features).float().softmax(1), axes)
        total = share if total is None else total.add_(share)
    assert total is not None
    return total.div_(len(flips)) if len(flips) > 1 else total


# ---- flips -----------------------------------------------------------------------------------------------------------


def all_flips(mirror: Iterable[int]) -> list[tuple[int, ...]]:
    """All 2^k subsets of k axes, the empty one first."""
    axes = sorted(set(mirror))
    return [subset for k in range(len(axes) + 1) for subset in itertools.combinations(axes, k)]


def _flip(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Flip (N, C, D, H, W) along spatial axes counted from 0."""
    return x.flip([axis + 2 for axis in axes]) if axes else x


def _aligned_overlap(patch: Shape, overlap: float, ratio: Shape) -> list[float]:
    """The overlap for which MONAI's step, int(patch · (1 - overlap)), is the next lower multiple of `ratio`, at least one."""
    steps = [max(r, int(n * (1 - overlap)) // r * r) for n, r in zip(patch, ratio, strict=True)]
    # The half voxel keeps the rounding of 1 - overlap out of it.
    return [max(0.0, 1 - (step + 0.5) / n) for n, step in zip(patch, steps, strict=True)]


# ---- sizes and memory -----------------------------------------------------------------------------------------------


def volume_bytes(voxels: int, *, classes: int, image_channels: int, feature_channels: int = 0, mirrored: bool = False) -> int:
    """Bytes that a volume holds on a device, all float32: the image, the probabilities, the sum of the windows' weights.

    Args:
        voxels: of the volume.
        classes: of the network.
        image_channels: of the volume.
        feature_channels: where features are computed once per volume; as if at full resolution.
        mirrored: the flips are summed volume by volume, so that there are probabilities twice.
    """
    return 4 * voxels * (image_channels + feature_channels + 1 + classes * (2 if mirrored else 1))


def fits(needed: int, free: int) -> bool:
    """Whether a volume of so many bytes leaves a GPU with so many free ones enough for the windows."""
    return needed <= SHARE_OF_FREE * free


def _fits_on_gpu(model: DropGen, volume: Tensor, patch: Shape, features: FeatureSource, mirrored: bool) -> bool:
    device = next(model.parameters()).device
    channels = volume.shape[1]
    if model not in _classes_of:  # the network alone knows how many classes it has
        _classes_of[model] = model(torch.zeros((1, channels, *patch), device=device)).shape[1]
    kept = channels * model.extractor.channels if features == "volume" and model.extractor is not None else 0
    voxels = int(np.prod(at_least(volume.shape[2:], patch)))
    return fits(volume_bytes(voxels, classes=_classes_of[model], image_channels=channels, feature_channels=kept,
                             mirrored=mirrored and kept > 0), free_bytes(device))


def dice_per_class(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Dice (classes,) of two label maps of one shape, 2 |A ∩ B| / (|A| + |B|); NaN for a class that is in neither."""
    prediction, label = prediction.flatten().long(), label.flatten().long()
    both = torch.bincount(label[prediction == label], minlength=classes)
    sizes = torch.bincount(prediction, minlength=classes) + torch.bincount(label, minlength=classes)
    return 2 * both / sizes  # 0 / 0 is NaN
