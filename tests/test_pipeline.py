"""Training batches: which crops, every augmentation against MONAI's, order, resume, memory, errors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from nifti_factory import blobs, make_affine, write_nifti

from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.data.pipeline import Batch, TrainingPipeline
from dropgen_fast.data.prepare import minmax
from dropgen_fast.data.store import Store
from dropgen_fast.errors import InputError
from dropgen_fast.features.volume import pad
from dropgen_fast.prepare import main

SHAPE = (20, 16, 12)
OFF = dataclasses.replace(AugmentationConfig.none(), mirror=True)


def make_store(folder: Path, volumes: dict[str, tuple[list[np.ndarray], np.ndarray]], dtype: str = "float32",
               brick: Sequence[int] = (16, 16, 8)) -> Store:
    """A store of the given training cases: id → (channels, label), at 1 mm."""
    for case_id, (channels, label) in volumes.items():
        for c, channel in enumerate(channels):
            write_nifti(folder / "cohort/imagesTr" / f"{case_id}_{c:04d}.nii.gz", channel.astype(np.float32), make_affine())
        write_nifti(folder / "cohort/labelsTr" / f"{case_id}.nii.gz", label.astype(np.uint8), make_affine())
    assert main(["--source", str(folder / "cohort"), "--store", str(folder / "store"), "--workers", "1", "--dtype", dtype,
                 "--brick", *map(str, brick), "--spacing-mm", "1", "1", "1"]) == 0
    return Store.open(folder / "store")


def two_channels(shape: tuple[int, int, int], seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    image, label = blobs(shape, seed=seed)
    return [image, blobs(shape, seed=seed + 100)[0] ** 2], label


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Five cases of two channels, all of them of the size SHAPE."""
    return make_store(tmp_path_factory.mktemp("store"), {f"case_{i}": two_channels(SHAPE, i) for i in range(5)})


def pipeline(store: Store, augmentation: AugmentationConfig = OFF, **options: Any) -> TrainingPipeline:
    settings: dict[str, Any] = {"patch": SHAPE, "batch_size": 3, "seed": 0, "num_threads": 1, "foreground_fraction": 0.0}
    return TrainingPipeline(store, augmentation=augmentation, **{**settings, **options})


def only(**settings: Any) -> AugmentationConfig:
    return dataclasses.replace(OFF, **settings)


def stored(store: Store, case_id: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (C, D, H, W) and label (1, D, H, W) of a training case."""
    image, label = store.load(next(c for c in store.cases("train") if c.id == case_id))
    assert label is not None
    return torch.from_numpy(image).permute(3, 0, 1, 2), torch.from_numpy(label).permute(3, 0, 1, 2)


def check(store: Store, batch: Batch, expected: Callable[[torch.Tensor], Any], atol: float = 1e-6,
          expected_label: Callable[[torch.Tensor], Any] | None = None) -> None:
    """Compare a batch with what `expected` makes of each stored case, rescaled to [0, 1] at the end."""
    assert len(batch.cases) == batch.image.shape[0] == 3
    for i, case_id in enumerate(batch.cases):
        image, label = stored(store, case_id)
        want = minmax(np.asarray(expected(image)))
        np.testing.assert_allclose(batch.image[i].numpy(), want, rtol=0, atol=atol, err_msg=case_id)
        np.testing.assert_array_equal(batch.label[i].numpy(), np.asarray((expected_label or (lambda a: a))(label)))


# --- each augmentation is MONAI's, voxel by voxel -----------------------------------------------------------------------


def test_no_augmentation_is_the_volume(store: Store) -> None:
    batch = next(pipeline(store))
    assert (batch.image.dtype, batch.label.dtype) == (torch.float32, torch.uint8)
    assert batch.image.shape == (3, 2, *SHAPE)
    assert batch.label.shape == (3, 1, *SHAPE)
    assert batch.image.is_contiguous()
    check(store, batch, lambda a: a)
    check(store, next(pipeline(store, AugmentationConfig.none())), lambda a: a)


@pytest.mark.parametrize("foreground_fraction", [0.0, 1.0])
@pytest.mark.parametrize(("patch", "align"), [
    ((8, 8, 8), (1, 1, 1)), ((21, 8, 15), (1, 1, 1)), ((8, 8, 6), (2, 4, 3)), ((24, 9, 16), (8, 3, 4)),
])
def test_where_a_crop_begins(store: Store, patch: tuple[int, int, int], align: tuple[int, int, int], foreground_fraction: float
                             ) -> None:
    """`starts` tells it; on the volume padded to a multiple of `align` it is each such multiple, equally often."""
    size = tuple(-(-max(n, m) // a) * a for n, m, a in zip(SHAPE, patch, align, strict=True))
    data = pipeline(store, AugmentationConfig.none(), patch=patch, align=align, foreground_fraction=foreground_fraction)
    found = Counter[tuple[int, ...]]()
    for batch in itertools.islice(data, 40):
        for i, (case_id, start) in enumerate(zip(batch.cases, batch.starts, strict=True)):
            (image, where), (label, _) = (pad(t[None], size) for t in stored(store, case_id))
            begin = tuple(s + w.start for s, w in zip(start, where, strict=True))
            assert not any(b % a for b, a in zip(begin, align, strict=True))
            region = (0, slice(None), *(slice(b, b + n) for b, n in zip(begin, patch, strict=True)))
            np.testing.assert_array_equal(batch.label[i].numpy(), label[region].numpy())
            np.testing.assert_allclose(batch.image[i].numpy(), minmax(image[region].numpy()), rtol=0, atol=1e-6)
            found[begin] += 1
    for axis in range(3):
        places = range(0, size[axis] - patch[axis] + 1, align[axis])
        counts = [sum(count for begin, count in found.items() if begin[axis] == place) for place in places]
        assert sum(counts) == 120
        if foreground_fraction == 0:  # five standard deviations of a binomial about its mean
            share = 1 / len(places)
            assert counts == pytest.approx([120 * share] * len(places), abs=5 * (120 * share * (1 - share)) ** 0.5)


@pytest.mark.parametrize("voxel", [(0, 0, 0), (17, 15, 10), (16, 1, 9), (9, 8, 5)])
def test_an_aligned_crop_holds_its_foreground(tmp_path: Path, voxel: tuple[int, int, int]) -> None:
    """At every place of a volume whose sides are no multiples."""
    label = np.zeros((18, 16, 11), np.uint8)
    label[voxel] = 1
    one = make_store(tmp_path, {"case": ([blobs(label.shape)[0]], label)})
    data = pipeline(one, AugmentationConfig.none(), patch=(8, 8, 8), align=(4, 2, 8), foreground_fraction=1.0)
    starts = set()
    for batch in itertools.islice(data, 20):
        assert batch.label.flatten(1).any(1).all()
        starts |= set(batch.starts)
    assert len(starts) > 1 or voxel != (9, 8, 5)  # the others lie in corners


def test_an_alignment_that_cannot_be(store: Store) -> None:
    with pytest.raises(InputError, match=r"align must divide the patch \(8, 8, 8\), got \(1, 3, 1\)"):
        pipeline(store, patch=(8, 8, 8), align=(1, 3, 1))
    with pytest.raises(InputError, match=r"align is for patches that are not turned; rotate90_probability is 0\.5"):
        pipeline(store, only(rotate90_probability=0.5), patch=(8, 8, 8), align=(2, 2, 2))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flips(store: Store, axis: int) -> None:
    first = mt.Flip(0)
    other = mt.Flip(axis)
    batch = next(pipeline(store, only(flip_random_axis_probability=1, flip_axes=(axis,))))
    check(store, batch, other, expected_label=other)
    batch = next(pipeline(store, only(flip_probability=1)))
    check(store, batch, first, expected_label=first)
    batch = next(pipeline(store, only(flip_probability=1, flip_random_axis_probability=1, flip_axes=(axis,))))
    check(store, batch, lambda a: other(first(a)), expected_label=lambda a: other(first(a)))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_of_a_patch_that_is_not_square(store: Store, turns: int) -> None:
    """The region read is the one that fits the patch once turned: nothing is cut off, nothing padded."""
    rotate = mt.Rotate90(turns, (0, 1))
    patch = SHAPE if turns == 2 else (SHAPE[1], SHAPE[0], SHAPE[2])
    batch = next(pipeline(store, only(rotate90_probability=1, rotate90_turns=(turns,)), patch=patch))
    check(store, batch, rotate, expected_label=rotate)


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flips_then_turn(store: Store, turns: int, axis: int) -> None:
    together = mt.Compose([mt.Flip(0), mt.Flip(axis), mt.Rotate90(turns, (0, 1))])
    batch = next(pipeline(store, only(flip_probability=1, flip_random_axis_probability=1, flip_axes=(axis,),
                                      rotate90_probability=1, rotate90_turns=(turns,)),
                          patch=SHAPE if turns == 2 else (SHAPE[1], SHAPE[0], SHAPE[2])))
    check(store, batch, together, expected_label=together)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.5])
def test_gamma(store: Store, gamma: float) -> None:
    batch = next(pipeline(store, only(gamma_probability=1, gamma=(gamma, gamma))))
    check(store, batch, mt.AdjustContrast(gamma), atol=1e-5)


def test_bias_field(store: Store) -> None:
    batch = next(pipeline(store, only(bias_field_probability=1, bias_field_coefficient=(0.1, 0.1))))
    check(store, batch, mt.RandBiasField(prob=1, coeff_range=(0.1, 0.1)), atol=1e-5)


def test_bias_field_coefficients_are_drawn_one_by_one(store: Store) -> None:
    """Stored images reach 0, so the last rescaling is a factor: the quotient's logarithm is the polynomial and a constant."""
    batch = next(pipeline(store, only(bias_field_probability=1)))
    axes = [np.linspace(-1, 1, n) for n in SHAPE]
    powers = [(i, j, k) for i in range(4) for j in range(4 - i) for k in range(4 - i - j)]
    basis = np.stack([np.polynomial.legendre.leggrid3d(*axes, c) for c in
                      (np.eye(64)[np.ravel_multi_index(p, (4, 4, 4))].reshape(4, 4, 4) for p in powers)], -1).reshape(-1, 20)
    drawn = []
    for i, case_id in enumerate(batch.cases):
        before, after = stored(store, case_id)[0][0].double().numpy().ravel(), batch.image[i, 0].double().numpy().ravel()
        valid = before > 0.05
        coefficients, residual, *_ = np.linalg.lstsq(basis[valid], np.log(after[valid] / before[valid]), rcond=None)
        assert residual[0] / valid.sum() < 1e-9  # float32 arithmetic; a missing term would leave about 1e-4
        drawn.append(coefficients[1:])
    assert np.min(drawn) > -1e-3
    assert np.max(drawn) < 0.1 + 1e-3
    assert np.std(drawn) == pytest.approx(0.1 / np.sqrt(12), rel=0.3)
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01


def affine_matrix(rotation: float, shear: float, scale: float) -> np.ndarray:
    """Output to input voxel, about the centre: Rx · Ry · Rz · shear · scale, axes 0, 1, 2 being x, y, z."""
    c, s = np.cos(rotation), np.sin(rotation)
    rx = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    ry = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    rz = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = rx @ ry @ rz @ (np.eye(3) + shear * (1 - np.eye(3))) @ (np.eye(3) * scale)
    return matrix


@pytest.mark.parametrize(("rotation", "shear", "scale"), [
    (0.5, 0, 1), (0, 0.1537, 1), (0, 0, 1.1713), (0, 0, 0.8291), (-0.4, 0.1, 0.9)])
def test_affine(store: Store, rotation: float, shear: float, scale: float) -> None:
    batch = next(pipeline(store, only(affine_probability=1, rotation_rad=(rotation, rotation), shear=(shear, shear),
                                      scale=(scale, scale))))
    matrix = affine_matrix(rotation, shear, scale)
    oracle = mt.Affine(affine=torch.from_numpy(matrix), mode="bilinear", padding_mode="zeros", image_only=True)
    # Coordinates are float32: an error of about 1e-5 voxel times a step of at most 1 between neighbours.
    for i, case_id in enumerate(batch.cases):
        image, label = stored(store, case_id)
        np.testing.assert_allclose(batch.image[i].numpy(), minmax(oracle(image).numpy()), rtol=0, atol=1e-4)
        expected, certain = nearest(label[0].numpy(), matrix)
        assert certain.mean() > 0.95
        np.testing.assert_array_equal(batch.label[i, 0].numpy()[certain], expected[certain])


def test_bias_then_gamma_then_affine(store: Store) -> None:
    batch = next(pipeline(store, only(
        bias_field_probability=1, bias_field_coefficient=(0.1, 0.1), gamma_probability=1, gamma=(2.2, 2.2), affine_probability=1,
        rotation_rad=(0.2, 0.2), shear=(0.05, 0.05), scale=(1.1, 1.1))))
    together = mt.Compose([
        mt.RandBiasField(prob=1, coeff_range=(0.1, 0.1)), mt.AdjustContrast(2.2),
        mt.Affine(affine=torch.from_numpy(affine_matrix(0.2, 0.05, 1.1)), padding_mode="zeros", image_only=True)])
    for i, case_id in enumerate(batch.cases):
        want = minmax(np.asarray(together(stored(store, case_id)[0])))
        np.testing.assert_allclose(batch.image[i].numpy(), want, rtol=0, atol=1e-4)


def nearest(label: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest voxel's label after an affine in double precision, zero outside, and where it is not a near tie."""
    center = (np.array(label.shape) - 1) / 2
    voxels = np.stack(np.meshgrid(*map(np.arange, label.shape), indexing="ij"), -1)
    source = (voxels - center) @ matrix[:3, :3].T + center
    index = np.floor(source + 0.5).astype(int)
    inside = ((index >= 0) & (index < label.shape)).all(-1)
    clipped = np.clip(index, 0, np.array(label.shape) - 1)
    certain = (np.abs(source + 0.5 - np.rint(source + 0.5)) > 1e-3).all(-1)
    return np.where(inside, label[tuple(np.moveaxis(clipped, -1, 0))], 0), certain


def test_noise(store: Store) -> None:
    batch = next(pipeline(store, only(noise_probability=1, noise_std=(0.05, 0.05))))
    for i, case_id in enumerate(batch.cases):
        before, after = stored(store, case_id)[0].double().numpy(), batch.image[i].double().numpy()
        slope, offset = np.polyfit(before.ravel(), after.ravel(), 1)  # undoes the last rescaling
        noise = (after - offset) / slope - before
        n = noise.size
        assert noise.std() == pytest.approx(0.05, rel=5 / np.sqrt(2 * n) + 0.005)
        assert abs((noise**4).mean() / noise.var() ** 2 - 3) < 5 * np.sqrt(24 / n)  # Gaussian
        assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 5 / np.sqrt(n / 2)  # channels apart
        np.testing.assert_array_equal(batch.label[i], stored(store, case_id)[1])


def test_affine_comes_after_noise(store: Store) -> None:
    """Outside the volume the affine gives one value; noise that came later would show there."""
    batch = next(pipeline(store, only(noise_probability=1, noise_std=(0.1, 0.1), affine_probability=1, rotation_rad=(0, 0),
                                      shear=(0, 0), scale=(1.6, 1.6))))
    corner = batch.image[:, :, :3, :2, :1]
    assert torch.equal(corner, corner[:, :1, :1, :1, :1].expand_as(corner))


def test_draws_vary_between_samples_and_have_their_probability(store: Store) -> None:
    augmentation = only(flip_probability=0.33, flip_random_axis_probability=0.33)
    stream = pipeline(store, augmentation, batch_size=60)
    unchanged = total = 0
    for _ in range(6):
        batch = next(stream)
        labels = {case_id: stored(store, case_id)[1] for case_id in set(batch.cases)}
        unchanged += sum(torch.equal(batch.label[i], labels[c]) for i, c in enumerate(batch.cases))
        total += len(batch.cases)
    probability = 0.67 * 0.67 + 0.33 * 0.33 / 3
    assert abs(unchanged / total - probability) < 4 * np.sqrt(probability * (1 - probability) / total)


# --- crops --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One case whose label is the voxel's own number, so that a crop says where it comes from."""
    label = np.arange(216).reshape(6, 6, 6)
    return make_store(tmp_path_factory.mktemp("coded"), {"a": ([np.random.default_rng(0).random((6, 6, 6))], label)})


def test_crops_are_regions_and_reach_every_position_alike(coded: Store) -> None:
    patch = (3, 2, 4)
    stream = pipeline(coded, patch=patch, batch_size=60)
    image, label = stored(coded, "a")
    starts: Counter[tuple[int, ...]] = Counter()
    for _ in range(20):
        batch = next(stream)
        for i in range(60):
            start = np.unravel_index(int(batch.label[i, 0, 0, 0, 0]), (6, 6, 6))
            region = tuple(slice(s, s + n) for s, n in zip(start, patch, strict=True))
            np.testing.assert_array_equal(batch.label[i, 0], label[0][region])
            np.testing.assert_allclose(batch.image[i, 0], minmax(image[0][region].numpy()), atol=1e-6)
            starts[tuple(map(int, start))] += 1
    assert len(starts) == 4 * 5 * 3
    chi_square = sum((n - 20) ** 2 / 20 for n in starts.values())
    assert chi_square < 59 + 5 * np.sqrt(2 * 59)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int16"])
@pytest.mark.parametrize("brick", [(4, 4, 4), (7, 4, 5)])
def test_crops_reach_across_bricks_and_beyond_the_volume(tmp_path: Path, dtype: str, brick: tuple[int, int, int]) -> None:
    shape, patch = (18, 13, 11), (11, 9, 14)
    channels, _ = two_channels(shape, 0)
    label = np.arange(18 * 13).reshape(18, 13, 1).repeat(11, 2) % 251  # a line along the last axis has one number
    store = make_store(tmp_path, {"a": (channels, label)}, dtype, brick)
    image, stored_label = stored(store, "a")
    padded, padded_label = (np.pad(a.numpy(), ((0, 0), (0, 0), (0, 0), (2, 1))) for a in (image, stored_label))
    windows = np.lib.stride_tricks.sliding_window_view(padded_label[0], patch)
    seen = set()
    batch = next(pipeline(store, patch=patch, batch_size=40))
    for i in range(40):
        z, y, x = np.argwhere((windows == batch.label[i, 0].numpy()).all((3, 4, 5)))[0]
        region = (slice(None), slice(z, z + 11), slice(y, y + 9), slice(x, x + 14))
        np.testing.assert_allclose(batch.image[i], minmax(padded[region]), atol=1e-6)
        seen.add((int(z), int(y)))
    assert len(seen) > 20


def test_mirroring(store: Store) -> None:
    batch = next(pipeline(store, only(mirror_probability=1, mirror_axes=(0, 2))))
    both = mt.Compose([mt.Flip(0), mt.Flip(2)])
    check(store, batch, both, expected_label=both)
    batch = next(pipeline(store, only(mirror_probability=0.5, mirror_axes=(1,)), batch_size=60))
    flip, flipped = mt.Flip(1), 0
    for i, case_id in enumerate(batch.cases):
        label = stored(store, case_id)[1]
        flipped += not torch.equal(batch.label[i], label)
        assert torch.equal(batch.label[i], label) or torch.equal(batch.label[i], torch.as_tensor(flip(label)))
    assert abs(flipped / 60 - 0.5) < 4 * 0.5 / np.sqrt(60)


def test_a_turned_crop_is_a_turned_region(coded: Store) -> None:
    batch = next(pipeline(coded, only(rotate90_probability=0.5), patch=(3, 5, 2), batch_size=60))
    label = stored(coded, "a")[1][0].numpy()
    seen = set()
    for i in range(60):
        found = batch.label[i, 0].numpy()
        for turns in range(4):
            region = np.rot90(found, -turns)
            start = np.unravel_index(int(region[0, 0, 0]), (6, 6, 6))
            if np.array_equal(region, label[tuple(slice(s, s + n) for s, n in zip(start, region.shape, strict=True))]):
                seen.add(turns)
                break
        else:
            pytest.fail(f"not a region of the volume, turned: {found}")
    assert seen == {0, 1, 2, 3}


def test_small_volumes_are_padded_on_both_sides(store: Store) -> None:
    batch = next(pipeline(store, patch=(24, 17, 12)))
    padding = ((0, 0), (2, 2), (1, 0), (0, 0))
    check(store, batch, lambda a: np.pad(a.numpy(), padding), expected_label=lambda a: np.pad(a.numpy(), padding))


@pytest.mark.parametrize("patch", [(8, 8, 8), (40, 3, 5)])
def test_foreground_crops_hold_every_class_alike(tmp_path: Path, patch: tuple[int, int, int]) -> None:
    label = np.zeros((30, 30, 30))
    label[2, 28, 15] = 1  # one voxel, near the border
    label[10:20, 5:15, 10:20] = 3
    empty = np.zeros((30, 30, 30))
    rng = np.random.default_rng(0)
    store = make_store(tmp_path, {"a": ([rng.random(label.shape)], label), "empty": ([rng.random(label.shape)], empty)})
    stream = pipeline(store, patch=patch, batch_size=100, foreground_fraction=1.0, case_ids=["a"])
    labels = torch.cat([next(stream).label for _ in range(4)])
    assert labels.flatten(1).any(1).all()
    share = (labels == 1).flatten(1).any(1).float().mean()
    assert 0.5 - 4 * 0.5 / 20 < share < 0.5 + 4 * 0.5 / 20 + (0.1 if patch[0] == 40 else 0)
    without = torch.cat([next(pipeline(store, patch=patch, batch_size=400, case_ids=["a"])).label])
    assert (without == 1).flatten(1).any(1).float().mean() < 0.25
    assert set(next(pipeline(store, patch=patch, batch_size=8, foreground_fraction=1.0)).cases) == {"a", "empty"}


def test_constant_crop_is_zero(tmp_path: Path) -> None:
    image = np.zeros((12, 12, 12))
    image[0, 0, 0] = 5
    store = make_store(tmp_path, {"a": ([image], image > 0)})
    noisy = only(gamma_probability=0.5, bias_field_probability=0.5, affine_probability=0.5)
    batch = next(pipeline(store, noisy, patch=(4, 4, 4), batch_size=50))
    assert torch.isfinite(batch.image).all()
    assert (batch.image.flatten(1).amax(1) == 0).any()
    assert set(batch.image.flatten(1).amax(1).round(decimals=6).tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("dtype", ["float32", "float16", "int16"])
def test_everything_at_once_is_in_range(tmp_path: Path, dtype: str) -> None:
    cases = {"large": two_channels((40, 30, 35), 0), "small": two_channels((10, 11, 12), 1)}
    store = make_store(tmp_path, cases, dtype)
    everything = AugmentationConfig(mirror_probability=0.5, rician_probability=0.33, brightness_probability=0.33,
                                    contrast_probability=0.33, elastic_probability=0.33)
    stream = pipeline(store, everything, patch=(24, 16, 20), batch_size=16, foreground_fraction=0.5)
    for _ in range(3):
        batch = next(stream)
        assert torch.isfinite(batch.image).all()
        lowest, highest = batch.image.flatten(1).aminmax(dim=1)
        assert 0 <= lowest.min() <= lowest.max() < 1e-6
        assert 1 - 1e-6 < highest.min() <= highest.max() <= 1
        assert set(batch.label.unique().tolist()) == {0, 1, 2}


# --- order, seeds, resume, memory ---------------------------------------------------------------------------------------


def take(stream: TrainingPipeline, count: int) -> list[Batch]:
    return [next(stream) for _ in range(count)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.image, y.image) and torch.equal(x.label, y.label) and x.cases == y.cases
                                    for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("buffer", [2, 1024])
def test_every_epoch_has_every_case_once_in_another_order(store: Store, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dropgen_fast.data.graph.MAX_SHUFFLE_BUFFER", buffer)
    stream = pipeline(store, batch_size=3)
    assert stream.cases_per_epoch == 5
    order = [c for batch in take(stream, 15) for c in batch.cases]
    epochs = [tuple(order[i: i + 5]) for i in range(0, 45, 5)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert len(set(epochs)) > 5
    other = [c for batch in take(pipeline(store, seed=1), 15) for c in batch.cases]
    assert other != order


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_epoch(store: Store, world_size: int) -> None:
    """In each epoch a rank reads the next shard after the one before: together every case once, nobody one twice."""
    sizes = [5 * (shard + 1) // world_size - 5 * shard // world_size for shard in range(world_size)]
    orders = []
    for rank in range(world_size):
        stream = pipeline(store, rank=rank, world_size=world_size, batch_size=1)
        orders.append([[next(stream).cases[0] for _ in range(sizes[(rank + epoch) % world_size])] for epoch in range(6)])
    epochs = [[case for order in orders for case in order[epoch]] for epoch in range(6)]
    assert all(sorted(epoch) == [f"case_{i}" for i in range(5)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 2


def test_more_ranks_than_cases(store: Store) -> None:
    """Few-shot on many GPUs: each rank reads every case, in an order of its own."""
    few = ["case_0", "case_1", "case_2"]
    orders = []
    for rank in range(4):
        stream = pipeline(store, rank=rank, world_size=4, case_ids=few, batch_size=1)
        order = [next(stream).cases[0] for _ in range(9)]
        assert all(sorted(order[i:i + 3]) == few for i in range(0, 9, 3))
        orders.append(tuple(order))
    assert len(set(orders)) > 1


def test_ranks_draw_apart(store: Store) -> None:
    images = [next(pipeline(store, only(noise_probability=1), rank=r, world_size=2, case_ids=["case_0", "case_1"], batch_size=4))
              for r in range(2)]
    noise = [b.image[[c == "case_0" for c in b.cases]][0] for b in images if "case_0" in b.cases]
    assert len(noise) == 2
    assert not torch.equal(noise[0], noise[1])


def test_seed_decides_and_threads_do_not(store: Store) -> None:
    one = take(pipeline(store, AugmentationConfig(), num_threads=1), 5)
    assert same(one, take(pipeline(store, AugmentationConfig(), num_threads=4), 5))
    assert not same(one, take(pipeline(store, AugmentationConfig(), seed=1), 5))


def test_resume_is_exact_across_an_epoch(store: Store) -> None:
    """5 cases in batches of 3: batch 2 spans the epochs already, and so do later ones."""
    stream = pipeline(store, AugmentationConfig(), foreground_fraction=0.5)
    start = stream.state()
    batches, states = [], []
    for _ in range(7):
        batches.append(next(stream))
        states.append(stream.state())
    for done in (1, 3, 5):
        resumed = pipeline(store, AugmentationConfig(), foreground_fraction=0.5, restore=states[done - 1], num_threads=2)
        assert same(take(resumed, 7 - done), batches[done:])
    assert same(take(pipeline(store, AugmentationConfig(), foreground_fraction=0.5, restore=start), 2), batches[:2])
    first = pipeline(store, AugmentationConfig(), foreground_fraction=0.5, restore=states[1])
    next(first)
    again = pipeline(store, AugmentationConfig(), foreground_fraction=0.5, restore=first.state())
    assert same(take(again, 4), batches[3:])


def test_a_state_fits_only_its_own_pipeline(store: Store) -> None:
    state = pipeline(store).state()
    for change, message in (({"batch_size": 2}, "batch_size was 3, now it is 2"), ({"seed": 1}, "seed"),
                            ({"case_ids": ["case_0"]}, "cases"), ({"augmentation": AugmentationConfig()}, "augmentation")):
        with pytest.raises(InputError, match=message):
            pipeline(store, restore=state, **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not one of a TrainingPipeline"):
        pipeline(store, restore=b"something else")


def test_batches_keep_their_memory(store: Store) -> None:
    stream = pipeline(store, AugmentationConfig())
    held = []
    for _ in range(12):
        batch = next(stream)
        held.append((batch, batch.image.clone(), batch.label.clone()))
    del stream
    assert all(torch.equal(b.image, image) and torch.equal(b.label, label) for b, image, label in held)
    assert len({b.image.data_ptr() for b, _, _ in held}) == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_does_what_the_cpu_does(store: Store) -> None:
    """All draws are made on the CPU, but for the noise itself."""
    augmentation = AugmentationConfig(noise_probability=0)
    streams = [pipeline(store, augmentation, foreground_fraction=0.5, device=device) for device in (None, 0)]
    for _ in range(5):
        cpu, gpu = (next(stream) for stream in streams)
        assert gpu.image.is_cuda
        assert cpu.cases == gpu.cases
        np.testing.assert_allclose(gpu.image.cpu().numpy(), cpu.image.numpy(), rtol=0, atol=1e-3)
        assert (gpu.label.cpu() != cpu.label).float().mean() < 1e-3  # ties of the nearest neighbour


def test_the_gpu_graph_is_a_graph(store: Store) -> None:
    """As far as it goes without a GPU: what DALI checks while a graph is defined, such as arguments that must be on the CPU."""
    from dropgen_fast.data.graph import training_graph

    cases = store.cases("train")
    graph = training_graph(
        volumes=[str(c.volume) for c in cases], foregrounds=[str(c.foreground) for c in cases], rank=0, world_size=1, gpu=True,
        layout=dataclasses.replace(cases[0].layout, dtype="float16"), patch=SHAPE, uniforms=9,
        augmentation=AugmentationConfig(mirror_probability=0.5, elastic_probability=0.5), foreground_fraction=0.5,
        align=(2, 1, 2), reader_seed=0, batch_size=2, num_threads=1, device_id=None, seed=0)
    assert b"Transpose" in graph.serialize()


# --- what can be wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_file_that_breaks_while_in_use_is_named(tmp_path: Path, damage: str) -> None:
    store = make_store(tmp_path, {f"case_{i}": two_channels((8, 8, 8), i) for i in range(3)})
    path = store.cases("train")[1].volume
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"case_1-\w+/volume\.npy cannot be read") as caught:
        take(pipeline(store, patch=(8, 8, 8)), 3)
    assert "\n" not in str(caught.value)


def test_without_dali(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dropgen_fast.data.graph")
    for name in [n for n in sys.modules if n.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(InputError, match=r"NVIDIA DALI is not installed.*pip install"):
        pipeline(store)


@pytest.mark.parametrize(("options", "message"), [
    ({"patch": (8, 8)}, "three positive"), ({"patch": (8, 0, 8)}, "three positive"), ({"batch_size": 0}, "at least 1"),
    ({"num_threads": 0}, "at least 1"), ({"foreground_fraction": 1.5}, "between 0 and 1"), ({"rank": 2, "world_size": 2}, "rank"),
    ({"split": "val"}, "has no val cases"), ({"split": "x"}, "train, val, test"),
    ({"case_ids": ["nobody"]}, "no train case 'nobody'"), ({"chain": "both"}, "chain must be fused or dali")])
def test_bad_settings(store: Store, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline(store, **options)


def test_mirror_off_turns_off_flips_and_turns(store: Store) -> None:
    never = only(mirror=False, flip_probability=1, flip_random_axis_probability=1, mirror_probability=1, rotate90_probability=1)
    check(store, next(pipeline(store, never)), lambda a: a)


def test_unlabelled_cases_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path, {"case_0": two_channels((6, 6, 6), 0)})
    write_nifti(tmp_path / "cohort/imagesTs/t_0000.nii.gz", blobs((6, 6, 6))[0], make_affine())
    write_nifti(tmp_path / "cohort/imagesTs/t_0001.nii.gz", blobs((6, 6, 6))[0], make_affine())
    assert main(["--source", str(tmp_path / "cohort"), "--store", str(tmp_path / "store"), "--workers", "1"]) == 0
    with pytest.raises(InputError, match=r"test case 't'.*has no label"):
        pipeline(Store.open(tmp_path / "store"), split="test")


def test_state_names_what_it_belongs_to(store: Store) -> None:
    header = json.loads(pipeline(store).state().split(b"\n")[0])
    assert header["store"] == store.identity()
