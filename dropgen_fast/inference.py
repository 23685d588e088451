"""Segmenting a whole volume: sliding window with half-overlapping patches, Gaussian weights.

The window is MONAI's `sliding_window_inference`. What is decided here is where a volume's tensors live (`Offload`), where its
features come from (`FeatureSource`), and which flips are averaged.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dropgen_fast.data.prepare import minmax
from dropgen_fast.errors import InputError
from dropgen_fast.features import FrozenExtractor
from dropgen_fast.features.cache import FeatureCache
from dropgen_fast.model import DropGen

Shape = tuple[int, int, int]
FeatureSource = Literal["window", "volume"]
"""The extractor runs on each window, as it did on each patch in training; or once on the volume, whose features are cropped."""
Offload = Literal["auto", "always", "never"]
"""Whether a volume's tensors stay in the CPU's memory while its windows go through the GPU; auto: where they would not fit."""

SHARE_OF_FREE = 0.5
"""Of the free memory of a GPU, what one volume may take: the windows' way through the network needs the rest."""
WORKING_COPIES = 8
"""Features that an extractor holds at its worst, in multiples of what it gives. The U-Net of anatomix gives 16 channels; its
last level holds the concatenation of 48, that padded, and a result of 16: 7 times as much."""
EXTRACTOR_MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
"""An extractor that does not take a volume's size is tried on the next multiples of so many coarse voxels."""

log = logging.getLogger(__name__)
_classes_of: WeakKeyDictionary[DropGen, int] = WeakKeyDictionary()


def choose_device(name: str) -> torch.device:
    """"auto" is the GPU where there is one, else the CPU; any other name is torch's.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu, cuda or cuda:<n>, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:<n>, got {name!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"device {name!r} cannot be had: torch sees {count or 'no'} GPU{'s' if count > 1 else ''} here")
    return device


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
    volume = torch.from_numpy(np.ascontiguousarray(minmax(image).transpose(3, 0, 1, 2)))[None]
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


def _slide(
    model: DropGen, volume: Tensor, *, patch: Shape, overlap: float, windows_per_batch: int, mirror: Sequence[int],
    features: FeatureSource, cache: FeatureCache | None,
) -> Tensor:
    """Probabilities (classes, D, H, W) of a volume (1, Ci, D, H, W), on the device where the volume is."""
    flips = all_flips(mirror)
    device = next(model.parameters()).device
    blend = functools.partial(_blend, patch=patch, windows_per_batch=windows_per_batch, device=device)
    if features == "volume" and model.extractor is not None:
        plan = _plan(model.extractor, volume, patch, device)
        if isinstance(plan, FeaturePlan):
            total = None
            padded, inside = _pad(volume, plan.size)
            for axes in flips:  # the features of a flipped volume are not the flipped features
                seen = _flip(padded, axes)
                maps = _kept_features(model, seen, plan, device, cache)
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
    padded, inside = _pad(volume, _at_least(volume.shape[2:], patch))
    return blend(functools.partial(_predict, model, flips=flips), padded, overlap=[overlap] * 3)[0][(slice(None), *inside)]


def _blend(
    predict: Callable[[Tensor, Any], Tensor], volume: Tensor, *, patch: Shape, overlap: Sequence[float], windows_per_batch: int,
    device: torch.device,
) -> Tensor:
    """MONAI's sliding window over a volume (1, Ci, D, H, W) that is no smaller than the patch: (1, classes, D, H, W).

    Windows are computed on `device` and added up where the volume is. Where that is another device, a slab of windows is added
    up before it is moved.
    """
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
        coarse = [[slice(s.start // r, s.stop // r) for s, r in zip(place[2:], ratio, strict=True)] for place in places]
        features = torch.cat([maps[(slice(None), slice(None), *where)] for where in coarse]).to(windows.device)
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


# ---- features of the whole volume -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeaturePlan:
    """How a volume's features are computed at once, so that windows can be cut out of them."""

    ratio: Shape
    """Voxels per coarse voxel along each axis; windows begin at multiples of it."""
    size: Shape
    """The volume, padded to a multiple of `ratio`."""
    extractor_size: Shape
    """That, padded to what the extractor takes."""


def _plan(extractor: FrozenExtractor, volume: Tensor, patch: Shape, device: torch.device) -> FeaturePlan | str:
    """How to compute the features of a volume (1, Ci, D, H, W) at once, or why that cannot be done. Computes no features."""
    channels = volume.shape[1]
    shape = _features_shape(extractor, (channels, *patch), device)
    if shape is None:
        return "the extractor's output cannot be known without running it"
    if any(n % m for n, m in zip(patch, shape[1:], strict=True)):
        return f"the extractor's grid of {shape[1:]} does not divide the patch {patch}"
    ratio = _triple(n // m for n, m in zip(patch, shape[1:], strict=True))
    size = _multiple(_at_least(volume.shape[2:], patch), ratio)
    for times in EXTRACTOR_MULTIPLES:
        larger = _multiple(size, _triple(times * r for r in ratio))
        wanted = (shape[0], *(n // r for n, r in zip(larger, ratio, strict=True)))
        if _features_shape(extractor, (channels, *larger), device) == wanted:
            break
    else:
        return f"the extractor does not take a volume of {size}"
    needed = WORKING_COPIES * 4 * int(np.prod(wanted))
    free = free_bytes(device)
    if needed > free:
        return f"the extractor would need about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return FeaturePlan(ratio, size, larger)


def _features_shape(extractor: FrozenExtractor, shape: tuple[int, ...], device: torch.device) -> tuple[int, ...] | None:
    """(Cf, d, h, w) of an image (Ci, D, H, W), without arithmetic; None where the extractor refuses it."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return tuple(extractor(torch.empty((1, *shape), device=device)).shape[1:])
    except Exception:  # whatever a foreign module raises for a size that it cannot take
        return None


def _kept_features(model: DropGen, volume: Tensor, plan: FeaturePlan, device: torch.device, cache: FeatureCache | None
                   ) -> Tensor | None:
    """As `_volume_features`, where the volume is; from the cache where they are in it."""
    def compute() -> Tensor | None:
        return _volume_features(model, volume, plan, device)

    if cache is None or model.extractor is None:
        return compute()
    # What kind of device computed them decides rounding.
    about = {"extractor": model.extractor.identity(), "arithmetic": str(model.fusion.dtype), "device": device.type,
             "size": plan.extractor_size}
    features = cache.features(volume, about, compute)
    return features.to(volume.device) if features is not None else None


def _volume_features(model: DropGen, volume: Tensor, plan: FeaturePlan, device: torch.device) -> Tensor | None:
    """Features (1, Cf, d, h, w) of a volume (1, Ci, *plan.size), where the volume is; None: not enough memory on the GPU.

    The extractor's padding repeats the volume's faces, so that it sees no edge where the volume ends.
    """
    assert model.extractor is not None
    # float32 or bfloat16 as within the model's own call.
    half = torch.autocast(device.type, torch.bfloat16, enabled=model.fusion.dtype == torch.bfloat16)
    padding = [(0, more - n) for n, more in zip(plan.size, plan.extractor_size, strict=True)]
    try:
        with half:
            seen = F.pad(volume.to(device), [v for pair in reversed(padding) for v in pair], mode="replicate")
            features: Tensor = model.extractor(seen)
        inside = [slice(n // r) for n, r in zip(plan.size, plan.ratio, strict=True)]
        return features[(slice(None), slice(None), *inside)].to(volume.device)
    except torch.OutOfMemoryError:
        return None


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


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: what the GPU's driver and torch's cache have left, or what the system says of its own."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


def fits(needed: int, free: int) -> bool:
    """Whether a volume of so many bytes leaves a GPU with so many free ones enough for the windows."""
    return needed <= SHARE_OF_FREE * free


def _fits_on_gpu(model: DropGen, volume: Tensor, patch: Shape, features: FeatureSource, mirrored: bool) -> bool:
    device = next(model.parameters()).device
    channels = volume.shape[1]
    if model not in _classes_of:  # the network alone knows how many classes it has
        _classes_of[model] = model(torch.zeros((1, channels, *patch), device=device)).shape[1]
    kept = channels * model.extractor.channels if features == "volume" and model.extractor is not None else 0
    voxels = int(np.prod(_at_least(volume.shape[2:], patch)))
    return fits(volume_bytes(voxels, classes=_classes_of[model], image_channels=channels, feature_channels=kept,
                             mirrored=mirrored and kept > 0), free_bytes(device))


def _triple(values: Iterable[int]) -> Shape:
    d, h, w = values
    return d, h, w


def _at_least(size: Sequence[int], patch: Shape) -> Shape:
    return _triple(max(n, p) for n, p in zip(size, patch, strict=True))


def _multiple(size: Shape, of: Shape) -> Shape:
    """The next larger multiples."""
    return _triple(-(-n // m) * m for n, m in zip(size, of, strict=True))


def _pad(volume: Tensor, size: Shape) -> tuple[Tensor, tuple[slice, ...]]:
    """A volume (1, C, D, H, W) with zeros on both sides, to `size`, and where in it the volume lies."""
    before = [(more - n) // 2 for n, more in zip(volume.shape[2:], size, strict=True)]
    after = [more - n - b for n, more, b in zip(volume.shape[2:], size, before, strict=True)]
    inside = tuple(slice(b, b + n) for b, n in zip(before, volume.shape[2:], strict=True))
    if not any(before + after):
        return volume, inside
    return F.pad(volume, [v for pair in zip(reversed(before), reversed(after), strict=True) for v in pair]), inside


def dice_per_class(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Dice (classes,) of two label maps of one shape, 2 |A ∩ B| / (|A| + |B|); NaN for a class that is in neither."""
    prediction, label = prediction.flatten().long(), label.flatten().long()
    both = torch.bincount(label[prediction == label], minlength=classes)
    sizes = torch.bincount(prediction, minlength=classes) + torch.bincount(label, minlength=classes)
    return 2 * both / sizes  # 0 / 0 is NaN
