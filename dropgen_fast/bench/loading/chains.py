"""Augmentation alone, on a batch that lies ready on the device: four ways to the same voxels from the same parameters.

"intensity" is Gaussian noise, Rician noise, bias field, gamma, brightness, contrast and min-max, all of them on every sample;
"affine" is one rotation and scaling of image and label. Parameters are the same numbers everywhere: ranges of no width. Before a
way is timed its voxels are held against the definition (`backend="reference"`), noise off, which every library draws in its own
way; a way that computes something else is left out and named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import monai.transforms as mt
import torch
from monai.data import set_track_meta
from torch import Tensor

from dropgen_fast.bench.loading.processes import Place, Source, Unavailable
from dropgen_fast.bench.loading.recipes import BOTH, IMAGE
from dropgen_fast.bench.loading.volumes import ready_batch
from dropgen_fast.bench.loading.ways import import_batchaug
from dropgen_fast.data.augment import affine_matrix
from dropgen_fast.kernels.intensity_chain import IntensityParameters, intensity_chain
from dropgen_fast.kernels.warp import warp

NOISE_STD, RICIAN_STD, BIAS, GAMMA, BRIGHTNESS, CONTRAST = 0.05, 0.04, 0.05, 1.5, 1.1, 0.8
"""A contrast below 1 never leaves the range, so libraries that do not clip compute the same."""
ROTATION_RAD, SCALE = 0.3, 1.1
TOLERANCE = 1e-4
"""Of voxels in [0, 1]. Rounding to float32 (6e-8) of intensities, and of coordinates up to a few hundred voxels, a few times
over, stays below it; another formula does not."""

Batch = dict[str, Tensor]
Chain = Callable[[Batch], Batch]


def _intensity_parameters(place: Place, channels: int, *, noise: bool) -> IntensityParameters:
    neutral = IntensityParameters.neutral(place.batch_size, channels)
    return dataclasses.replace(
        neutral, seed=torch.arange(place.batch_size) + place.seed, bias=torch.full_like(neutral.bias, BIAS),
        noise_std=torch.full_like(neutral.noise_std, NOISE_STD * noise),
        rician_std=torch.full_like(neutral.rician_std, RICIAN_STD * noise), gamma=torch.full_like(neutral.gamma, GAMMA),
        brightness=torch.full_like(neutral.brightness, BRIGHTNESS), contrast=torch.full_like(neutral.contrast, CONTRAST),
        rescale=torch.ones_like(neutral.rescale))


def intensity(place: Place, *, way: str) -> Source:
    """The intensity chain of "ours", "dali", "monai" or "batchaug"."""
    batch = _batch(place)
    channels = batch["image"].shape[1]
    wanted = intensity_chain(batch["image"], _intensity_parameters(place, channels, noise=False), backend="reference")
    chains = [_INTENSITY[way](place, channels, noise) for noise in (False, True)]
    _check_same(chains[0](batch)["image"], wanted)
    _check_noise(chains[1], batch, wanted)
    return Source(lambda: chains[1](batch), place.batch_size)


def affine(place: Place, *, way: str) -> Source:
    """The rotation and scaling of "ours", "monai" or "batchaug"."""
    batch = _batch(place)
    matrix = _matrix(place)
    wanted, _ = warp(batch["image"], batch["label"], matrix, backend="reference")
    chain = _AFFINE[way](place, matrix)
    done = chain(batch)
    _check_same(done["image"], wanted)
    if done["label"].shape != batch["label"].shape or torch.equal(done["label"].float(), batch["label"].float()):
        raise Unavailable("did not move the label")
    return Source(lambda: chain(batch), place.batch_size)


def _batch(place: Place) -> Batch:
    set_track_meta(False)
    image, label = ready_batch(place.store, place.patch, place.batch_size)
    return {"image": image.to(place.device), "label": label.to(place.device)}


def _check_same(came: Tensor, wanted: Tensor) -> None:
    if came.shape != wanted.shape:
        raise Unavailable(f"gave {tuple(came.shape)}, wanted {tuple(wanted.shape)}")
    difference = float((came.float() - wanted).abs().max())
    if not difference <= TOLERANCE:
        raise Unavailable(f"computes something else: voxels differ by up to {difference:.2g}, {TOLERANCE:g} is rounding")


def _check_noise(chain: Chain, batch: Batch, without: Tensor) -> None:
    done = chain(batch)["image"]
    if not bool(done.isfinite().all()) or float((done - without).std()) < NOISE_STD / 10:
        raise Unavailable("added no noise")


# ---- intensity ------------------------------------------------------------------------------------------------------


def _ours_intensity(place: Place, channels: int, noise: bool) -> Chain:
    parameters = _intensity_parameters(place, channels, noise=noise)
    return lambda batch: {"image": intensity_chain(batch["image"], parameters)}


def _dali_intensity(place: Place, channels: int, noise: bool) -> Chain:
    from dropgen_fast.data.dali_chain import DaliIntensityChain

    chain = DaliIntensityChain(place.batch_size, channels, place.patch, place.device, num_threads=place.threads)
    parameters = _intensity_parameters(place, channels, noise=noise)
    return lambda batch: {"image": chain(batch["image"], parameters)}


def _monai_intensity(place: Place, channels: int, noise: bool) -> Chain:
    noises = [mt.RandGaussianNoised(IMAGE, prob=1.0, std=NOISE_STD, sample_std=False),
              mt.RandRicianNoised(IMAGE, prob=1.0, std=RICIAN_STD, sample_std=False)]
    transform = mt.Compose([
        *(noises if noise else []), mt.RandBiasFieldd(IMAGE, prob=1.0, coeff_range=(BIAS, BIAS)),
        mt.RandAdjustContrastd(IMAGE, prob=1.0, gamma=(GAMMA, GAMMA)),
        mt.RandScaleIntensityd(IMAGE, factors=(BRIGHTNESS - 1, BRIGHTNESS - 1), prob=1.0),
        mt.RandScaleIntensityFixedMeand(IMAGE, factors=(CONTRAST - 1, CONTRAST - 1), preserve_range=True, prob=1.0),
        mt.ScaleIntensityd(IMAGE)])
    return _per_sample(transform, place, IMAGE)


def _batchaug_intensity(place: Place, channels: int, noise: bool) -> Chain:
    library = import_batchaug(place)
    noises = [library.RandGaussianNoised(IMAGE, prob=1.0, std=NOISE_STD),
              library.RandRicianNoised(IMAGE, prob=1.0, std=RICIAN_STD, sample_std=False)]
    chain: Chain = library.Compose([
        *(noises if noise else []), library.RandBiasFieldd(IMAGE, prob=1.0, coeff_range=(BIAS, BIAS)),
        library.RandAdjustContrastd(IMAGE, prob=1.0, gamma=(GAMMA, GAMMA)),
        library.RandScaleIntensityd(IMAGE, prob=1.0, factors=(BRIGHTNESS - 1, BRIGHTNESS - 1)),
        library.RandScaleIntensityFixedMeand(IMAGE, prob=1.0, factors=(CONTRAST - 1, CONTRAST - 1)),
        library.ScaleIntensityd(IMAGE, channel_wise=False)])
    return chain


_INTENSITY: dict[str, Callable[[Place, int, bool], Chain]] = {
    "ours": _ours_intensity, "dali": _dali_intensity, "monai": _monai_intensity, "batchaug": _batchaug_intensity}


# ---- affine ---------------------------------------------------------------------------------------------------------


def _matrix(place: Place) -> Tensor:
    count = place.batch_size
    angles = torch.full((count, 3), ROTATION_RAD, dtype=torch.float64)
    return affine_matrix(angles, torch.zeros(count, 6, dtype=torch.float64), torch.full((count, 3), SCALE, dtype=torch.float64),
                         place.patch).float()


def _ours_affine(place: Place, matrix: Tensor) -> Chain:
    def chain(batch: Batch) -> Batch:
        image, label = warp(batch["image"], batch["label"], matrix)
        assert label is not None, "there is one"
        return {"image": image, "label": label}

    return chain


def _monai_affine(place: Place, matrix: Tensor) -> Chain:
    transform = mt.Compose([mt.RandAffined(
        BOTH, spatial_size=place.patch, prob=1.0, rotate_range=[(ROTATION_RAD, ROTATION_RAD)] * 3,
        scale_range=[(SCALE - 1, SCALE - 1)] * 3, mode=("bilinear", "nearest"), padding_mode="zeros")])
    return _per_sample(transform, place, BOTH)


def _batchaug_affine(place: Place, matrix: Tensor) -> Chain:
    chain: Chain = import_batchaug(place).RandAffined(
        BOTH, prob=1.0, rotate_range=[(ROTATION_RAD, ROTATION_RAD)] * 3, scale_range=[(SCALE - 1, SCALE - 1)] * 3,
        mode={"image": "bilinear", "label": "nearest"})
    return chain


_AFFINE: dict[str, Callable[[Place, Tensor], Chain]] = {
    "ours": _ours_affine, "monai": _monai_affine, "batchaug": _batchaug_affine}


def _per_sample(transform: Any, place: Place, keys: list[str]) -> Chain:
    """MONAI's transforms take a sample at a time."""
    transform.set_random_state(place.seed)

    def chain(batch: Batch) -> Batch:
        done = [transform({key: batch[key][n] for key in keys}) for n in range(place.batch_size)]
        return {key: torch.stack([sample[key] for sample in done]) for key in keys}

    return chain
