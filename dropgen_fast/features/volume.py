"""Features of whole volumes, computed at once, for windows and patches to be cut out of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dropgen_fast.device import free_bytes
from dropgen_fast.errors import InputError
from dropgen_fast.features.cache import FeatureCache
from dropgen_fast.features.frozen import FrozenExtractor

Shape = tuple[int, int, int]

WORKING_COPIES = 8
"""Features that an extractor holds at its worst, in multiples of what it gives. The U-Net of anatomix gives 16 channels; its
last level holds the concatenation of 48, that padded, and a result of 16: 7 times as much."""
EXTRACTOR_MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
"""An extractor that does not take a volume's size is tried on the next multiples of so many coarse voxels."""
RESIDENT_SHARE = 0.25
"""Of the free memory of a GPU, what the features of all training volumes may take to lie there."""


@dataclass(frozen=True)
class FeaturePlan:
    """How a volume's features are computed at once, so that windows can be cut out of them."""

    ratio: Shape
    """Voxels per coarse voxel along each axis; windows begin at multiples of it."""
    size: Shape
    """The volume, padded to a multiple of `ratio`."""
    extractor_size: Shape
    """That, padded to what the extractor takes."""
    channels: int
    """Of the features."""

    @property
    def features(self) -> int:
        """How many numbers they are."""
        return self.channels * int(np.prod(self.size)) // int(np.prod(self.ratio))


class VolumeFeatures:
    """The features of volumes at once, rather than window by window.

    Args:
        extractor: on `device`.
        patch: (D, H, W) of the windows that will be cut out.
        device: where features are computed.
        dtype: of the fusion's result: under bfloat16 the extractor runs under autocast, as within the model.
        cache: where features are kept and looked for.
    """

    def __init__(self, extractor: FrozenExtractor, *, patch: Shape, device: torch.device, dtype: torch.dtype | None,
                 cache: FeatureCache | None = None) -> None:
        self.patch = patch
        self._extractor, self._device, self._dtype, self._cache = extractor, device, dtype, cache

    def plan(self, channels: int, size: Sequence[int]) -> FeaturePlan | str:
        """How to compute the features of a volume (1, channels, *size) at once, or why that cannot be done. Computes none."""
        shape = self._shape((channels, *self.patch))
        if shape is None:
            return "the extractor's output cannot be known without running it"
        if any(n % m for n, m in zip(self.patch, shape[1:], strict=True)):
            return f"the extractor's grid of {shape[1:]} does not divide the patch {self.patch}"
        ratio = _triple(n // m for n, m in zip(self.patch, shape[1:], strict=True))
        padded = _multiple(at_least(size, self.patch), ratio)
        for times in EXTRACTOR_MULTIPLES:
            larger = _multiple(padded, _triple(times * r for r in ratio))
            wanted = (shape[0], *(n // r for n, r in zip(larger, ratio, strict=True)))
            if self._shape((channels, *larger)) == wanted:
                break
        else:
            return f"the extractor does not take a volume of {padded}"
        needed = WORKING_COPIES * 4 * int(np.prod(wanted))
        free = free_bytes(self._device)
        if needed > free:
            return f"the extractor would need about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return FeaturePlan(ratio, padded, larger, shape[0])

    def __call__(self, volume: Tensor, plan: FeaturePlan) -> Tensor | None:
        """Features (1, Cf, d, h, w) of a volume (1, Ci, *plan.size), where the volume is; None: not enough memory on the GPU."""
        if self._cache is None:
            return self._compute(volume, plan)
        # What kind of device computed them decides rounding.
        about = {"extractor": self._extractor.identity(), "arithmetic": str(self._dtype), "device": self._device.type,
                 "size": plan.extractor_size}
        features = self._cache.features(volume, about, lambda: self._compute(volume, plan))
        return features.to(volume.device) if features is not None else None

    def _compute(self, volume: Tensor, plan: FeaturePlan) -> Tensor | None:
        """The extractor's padding repeats the volume's faces, so that it sees no edge where the volume ends."""
        padding = [(0, more - n) for n, more in zip(plan.size, plan.extractor_size, strict=True)]
        try:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
                seen = F.pad(volume.to(self._device), [v for pair in reversed(padding) for v in pair], mode="replicate")
                features: Tensor = self._extractor.forward(seen)  # past the compiler: each volume has a size of its own
            inside = coarse([slice(0, n) for n in plan.size], plan.ratio)
            return features[(slice(None), slice(None), *inside)].to(volume.device)
        except torch.OutOfMemoryError:
            return None

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """(Cf, d, h, w) of an image (Ci, D, H, W), without arithmetic; None where the extractor refuses it."""
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                return tuple(self._extractor.forward(torch.empty((1, *shape), device=self._device)).shape[1:])
        except Exception:  # whatever a foreign module raises for a size that it cannot take
            return None


class CropFeatures:
    """Features of training patches, cut out of those of their volumes: an extractor that runs once a volume, not once a step.

    All features are made, or found in the cache, at once. They lie on the GPU where they take little of its memory; else
    where the cache has them, mapped from its files.

    Args:
        source: gives the volumes' features.
        volumes: of each case its size (D, H, W) and what loads it, (1, Ci, D, H, W) in [0, 1]; one at least.
        channels: of the volumes.
        device: where patches' features are wanted.

    Raises:
        InputError: features of a volume cannot be computed at once, with the reason.
    """

    def __init__(self, source: VolumeFeatures, volumes: Mapping[str, tuple[Shape, Callable[[], Tensor]]], *, channels: int,
                 device: torch.device) -> None:
        plans: dict[str, FeaturePlan] = {}
        for case, (size, _) in volumes.items():
            plan = source.plan(channels, size)
            if isinstance(plan, str):
                raise InputError(f"the features of training case {case} cannot be computed at once: {plan}")
            plans[case] = plan
        self._device, self._patch = device, source.patch
        self.ratio = next(iter(plans.values())).ratio  # the patch decides it
        self._before: dict[str, Shape] = {}
        self._features: dict[str, Tensor] = {}
        total = 4 * sum(plan.features for plan in plans.values())
        resident = device.type == "cuda" and total <= RESIDENT_SHARE * free_bytes(device)
        for case, plan in plans.items():
            padded, inside = pad(volumes[case][1](), plan.size)
            features = source(padded, plan)
            if features is None:
                raise InputError(f"the features of training case {case} cannot be computed at once: too little memory on the GPU")
            self._features[case] = features[0].to(device) if resident else features[0]
            self._before[case] = _triple(where.start for where in inside)

    def __call__(self, cases: Sequence[str], starts: Sequence[Sequence[int]]) -> Tensor:
        """Features (N, Cf, d, h, w) of patches of these cases.

        Args:
            cases: of the N patches.
            starts: their first voxels in the volumes; with what the volume is padded by they are multiples of `ratio`.
        """
        found = []
        for case, start in zip(cases, starts, strict=True):
            place = [slice(s + b, s + b + n) for s, b, n in zip(start, self._before[case], self._patch, strict=True)]
            found.append(self._features[case][(slice(None), *coarse(place, self.ratio))])
        return torch.stack(found).to(self._device, non_blocking=True)


# ---- sizes --------------------------------------------------------------------------------------------------------------


def at_least(size: Sequence[int], patch: Shape) -> Shape:
    """The larger along each axis."""
    return _triple(max(n, p) for n, p in zip(size, patch, strict=True))


def coarse(place: Sequence[slice], ratio: Shape) -> tuple[slice, ...]:
    """Where voxels that begin and end at multiples of `ratio` lie on the features' grid."""
    return tuple(slice(s.start // r, s.stop // r) for s, r in zip(place, ratio, strict=True))


def pad(volume: Tensor, size: Shape) -> tuple[Tensor, tuple[slice, ...]]:
    """A volume (1, C, D, H, W) with zeros on both sides, to `size`, and where in it the volume lies.

    Of an odd number of planes the larger half lies before, as in training patches.
    """
    before = [-(-(more - n) // 2) for n, more in zip(volume.shape[2:], size, strict=True)]
    after = [more - n - b for n, more, b in zip(volume.shape[2:], size, before, strict=True)]
    inside = tuple(slice(b, b + n) for b, n in zip(before, volume.shape[2:], strict=True))
    if not any(before + after):
        return volume, inside
    return F.pad(volume, [v for pair in zip(reversed(before), reversed(after), strict=True) for v in pair]), inside


def _triple(values: Iterable[int]) -> Shape:
    d, h, w = values
    return d, h, w


def _multiple(size: Shape, of: Shape) -> Shape:
    """The next larger multiples."""
    return _triple(-(-n // m) * m for n, m in zip(size, of, strict=True))
