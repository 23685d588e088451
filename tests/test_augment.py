"""From drawn numbers to augmented batches: what the numbers stand for, the order, MONAI's transforms one after the other."""

from __future__ import annotations

import dataclasses
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from dropgen_fast.data.augment import (
    Augmenter,
    Draws,
    affine_matrix,
    draws,
    smooth_displacement,
    uniforms_per_sample,
)
from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.errors import InputError
from dropgen_fast.kernels.intensity_chain import IntensityParameters, standard_normal

PATCH = (20, 16, 12)
ALWAYS = {f.name: 1.0 for f in dataclasses.fields(AugmentationConfig) if f.name.endswith("_probability")}


def uniforms(samples: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(samples, uniforms_per_sample(channels), generator=torch.Generator().manual_seed(seed))


def neutral(samples: int, channels: int = 1) -> Draws:
    """Draws that change nothing."""
    zero = torch.zeros(samples)
    return Draws(torch.ones(samples), IntensityParameters.neutral(samples, channels), zero, zero[:, None].expand(-1, 3),
                 zero[:, None].expand(-1, 3), zero[:, None].expand(-1, 3), zero, torch.eye(3, 4).repeat(samples, 1, 1), None)


def images(samples: int, channels: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images in [0, 1] and labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(samples, channels, 6, 5, 4, generator=generator)
    image = torch.nn.functional.interpolate(image, PATCH, mode="trilinear")
    return image, (image[:, :1] * 3).to(torch.uint8)


def minmax(image: torch.Tensor) -> torch.Tensor:
    low, high = image.amin((1, 2, 3, 4), keepdim=True), image.amax((1, 2, 3, 4), keepdim=True)
    return (image - low) / (high - low)


# --- what the numbers stand for -----------------------------------------------------------------------------------------


def values(drawn: Draws) -> dict[str, torch.Tensor]:
    """Each drawn parameter under the name of its setting, (N, …)."""
    chain = drawn.intensity
    return {"low_resolution_zoom": drawn.zoom, "noise_std": chain.noise_std, "rician_std": chain.rician_std,
            "bias_field_coefficient": chain.bias, "gibbs_alpha": drawn.gibbs_alpha, "gamma": chain.gamma,
            "brightness": chain.brightness, "contrast": chain.contrast, "smooth_sigma_voxels": drawn.smooth_sigma,
            "sharpen_alpha": drawn.sharpen_alpha}


@pytest.mark.parametrize(("recipe", "channels"), [(AugmentationConfig(), 1), (AugmentationConfig.nnunet(), 3)])
def test_probabilities_and_ranges(recipe: AugmentationConfig, channels: int) -> None:
    count = 4000
    drawn = draws(uniforms(count, channels), None, recipe, PATCH, channels)
    off = values(neutral(1, channels))
    for name, value in values(drawn).items():
        probability = getattr(recipe, {"low_resolution_zoom": "low_resolution_probability", "gamma": "gamma_probability"}.get(
            name, name.replace("_coefficient", "").replace("_sigma_voxels", "").replace("_std", "").replace("_alpha", "")
            + "_probability"))
        on = (value != off[name][:1]).reshape(count, -1).any(1)
        assert abs(on.float().mean() - probability) <= 4 * np.sqrt(probability * (1 - probability) / count), name
        if on.any():
            low, high = getattr(recipe, name)
            chosen = value[on].flatten()
            assert low <= chosen.min() < low + 0.05 * (high - low) + 1e-9, name
            assert high - 0.05 * (high - low) - 1e-9 < chosen.max() <= high, name
            assert abs(chosen.mean() - (low + high) / 2) <= 4 * (high - low) / np.sqrt(12 * len(chosen)) + 1e-6, name
    moved = (drawn.matrix != torch.eye(3, 4)).flatten(1).any(1)
    assert abs(moved.float().mean() - recipe.affine_probability) <= 4 * np.sqrt(0.25 / count)
    assert drawn.displacement is None
    assert len(set(drawn.intensity.seed.tolist())) == count
    assert bool((drawn.intensity.seed >= 0).all())


def test_parameters_are_drawn_apart() -> None:
    """No two of them hang together, as they would if they shared a number."""
    drawn = draws(uniforms(2000, 2), None, AugmentationConfig(**ALWAYS), PATCH, 2)
    table = torch.cat([v.reshape(2000, -1).double() for v in values(drawn).values()]
                      + [drawn.sharpen_sigma1.double(), drawn.intensity.seed[:, None].double()], dim=1)
    correlation = torch.corrcoef(table.T) - torch.eye(table.shape[1])
    assert correlation.abs().max() < 0.12  # 5 / sqrt(2000)


def test_control_points_move_only_the_chosen() -> None:
    config = dataclasses.replace(AugmentationConfig.none(), elastic_probability=0.5, elastic_std_voxels=(3.0, 3.0))
    normals = torch.randn(64, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = draws(uniforms(64), normals, config, PATCH, 1)
    assert drawn.displacement is not None
    assert drawn.displacement.shape == (64, 3, 5, 4, 3)
    deformed = drawn.displacement.flatten(1).any(1)
    assert 10 < deformed.sum() < 54
    # The spline of 3 voxels' standard deviation: weights 1, 4, 1 over 6 or 1, 23, 23, 1 over 48 along each axis.
    spread = drawn.displacement[deformed].std()
    assert 3 * np.sqrt(0.46**3) * 0.8 < spread < 3 * np.sqrt(0.75**3)
    assert draws(uniforms(64), normals, dataclasses.replace(config, elastic_probability=0), PATCH, 1).displacement is None


def test_splines_are_splines() -> None:
    """Against SciPy's uniform cubic B-spline with the end points repeated."""
    control = torch.randn(1, 3, 6, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patch = (40, 24, 17)
    found = smooth_displacement(control, patch)[0].numpy()
    want = control[0].numpy()
    for axis, size in enumerate(patch):
        points = -(-size // 4)
        padded = np.concatenate([want.take([0], axis + 1), want, want.take([-1], axis + 1)], axis + 1)
        spline = BSpline(np.arange(-3.0, 9.0), np.moveaxis(padded, axis + 1, 0), 3)
        want = np.moveaxis(spline((np.arange(points) + 0.5) / points * 5), 0, axis + 1)
    np.testing.assert_allclose(found, want, atol=1e-12)
    constant = smooth_displacement(torch.full((1, 3, 5, 5, 5), 2.5), patch)
    torch.testing.assert_close(constant, torch.full_like(constant, 2.5))


@pytest.mark.parametrize(("patch", "axes", "angle"), [
    ((128, 128, 128), (0, 1, 2), np.pi / 6), ((40, 192, 160), (0,), np.pi), ((256, 256, 64), (2,), np.pi),
    (None, (0, 1, 2), np.pi / 6)])
def test_anisotropic_patches_turn_in_the_plane(patch: Any, axes: tuple[int, ...], angle: float) -> None:
    recipe = AugmentationConfig.nnunet(patch)
    assert (recipe.rotation_axes, recipe.rotation_rad) == (axes, (-angle, angle))
    drawn = draws(uniforms(200), None, dataclasses.replace(recipe, affine_probability=1), patch or PATCH, 1)
    linear = drawn.matrix[:, :, :3].double()
    scale = linear.norm(dim=1)
    torch.testing.assert_close(scale, scale[:, :1].expand(-1, 3), atol=1e-5, rtol=0)  # one factor
    if len(axes) == 1:
        along = torch.eye(3, dtype=torch.float64)[axes[0]]
        torch.testing.assert_close(linear[:, axes[0]] / scale[:, :1], along.expand(200, 3), atol=1e-6, rtol=0)


def test_affine_matrix_is_monais() -> None:
    rotation, scale = torch.tensor([[0.3, -0.2, 0.5]]).double(), torch.tensor([[1.1, 0.9, 1.2]]).double()
    matrix = affine_matrix(rotation, torch.zeros(1, 6).double(), scale, PATCH)[0]
    grid = mt.AffineGrid(rotate_params=rotation[0].tolist(), scale_params=scale[0].tolist())
    want = grid(spatial_size=PATCH)[1].double()  # about the centre
    torch.testing.assert_close(matrix[:, :3], want[:3, :3], atol=1e-6, rtol=0)
    center = (torch.tensor(PATCH).double() - 1) / 2
    torch.testing.assert_close(matrix[:, :3] @ center + matrix[:, 3], center)
    sheared = affine_matrix(torch.zeros(1, 3).double(), torch.arange(1.0, 7.0)[None].double(), torch.ones(1, 3).double(), PATCH)
    assert sheared[0, :, :3].tolist() == [[1, 1, 2], [3, 1, 4], [5, 6, 1]]


# --- what is done -------------------------------------------------------------------------------------------------------


def everything(samples: int, channels: int = 1) -> Draws:
    """Every step of the paper on, in every sample, different in each."""
    spread = torch.arange(samples) / max(1, samples - 1)
    intensity = dataclasses.replace(
        IntensityParameters.neutral(samples, channels), seed=torch.arange(samples) + 7, noise_std=0.03 + 0.02 * spread,
        rician_std=0.02 + 0.01 * spread, bias=0.1 * torch.rand(samples, 20, generator=torch.Generator().manual_seed(1)),
        gamma=0.8 + spread)
    angles = torch.stack([0.1 + 0.2 * spread, -0.2 * spread, 0.3 - spread * 0.1], 1)
    matrix = affine_matrix(angles, torch.full((samples, 6), 0.05), torch.full((samples, 3), 1.1), PATCH).float()
    return Draws(0.5 + 0.3 * spread, intensity, 0.1 + 0.2 * spread, (0.5 + 0.2 * spread)[:, None].expand(-1, 3),
                 (0.6 + 0.2 * spread)[:, None].expand(-1, 3), torch.full((samples, 3), 0.5), 10 + 10 * spread, matrix, None)


def monai_in_order(image: torch.Tensor, drawn: Draws, i: int) -> torch.Tensor:
    """One sample (C, D, H, W) through MONAI's transforms, in the paper's order, with the parameters drawn for it."""
    chain = drawn.intensity
    zoom = mt.RandSimulateLowResolution(prob=1, zoom_range=(0, 1))
    zoom.zoom_factor, zoom._do_transform = float(drawn.zoom[i]), True
    image = zoom(image, randomize=False)
    fields = [standard_normal(chain.seed[i: i + 1], tuple(image.shape), stream)[0] for stream in range(3)]
    image = image + chain.noise_std[i] * fields[0]
    image = torch.sqrt((image + chain.rician_std[i] * fields[1]) ** 2 + (chain.rician_std[i] * fields[2]) ** 2)
    bias = mt.RandBiasField(prob=1)
    bias._coeff, bias._do_transform = chain.bias[i].tolist(), True
    image = bias(image, randomize=False)
    sigmas = [s[i].tolist() for s in (drawn.smooth_sigma, drawn.sharpen_sigma1, drawn.sharpen_sigma2)]
    steps = [mt.GibbsNoise(float(drawn.gibbs_alpha[i])), mt.AdjustContrast(float(chain.gamma[i])),
             mt.GaussianSmooth(sigmas[0]), mt.GaussianSharpen(sigmas[1], sigmas[2], float(drawn.sharpen_alpha[i]))]
    for step in steps:
        image = torch.as_tensor(step(image))
    centered = torch.eye(4, dtype=torch.float64)
    centered[:3, :3] = drawn.matrix[i, :, :3]
    image = mt.Affine(affine=centered, mode="bilinear", padding_mode="zeros", image_only=True)(image)
    return torch.as_tensor(mt.ScaleIntensity(0.0, 1.0)(image))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("chain", ["fused", "dali"])
def test_all_of_it_is_monais_transforms_in_the_papers_order(channels: int, chain: Any) -> None:
    image, label = images(3, channels)
    config = AugmentationConfig(like_monai=True)
    drawn = everything(3, channels)
    found, warped = Augmenter(config, PATCH, channels, 3, chain).apply(image.clone(), label, drawn)
    for i in range(3):
        want = monai_in_order(image[i], drawn, i)
        # float32 all along; sharpening by 20 makes 20 times of each rounding, and the affine's coordinates are off by 1e-6
        # voxel between neighbours that differ by up to 1.
        np.testing.assert_allclose(found[i].numpy(), want.numpy(), rtol=0, atol=2e-4, err_msg=str(i))
    assert warped.shape == label.shape
    assert not torch.equal(warped, label)


def test_what_is_off_changes_nothing() -> None:
    image, label = images(2, 2)
    found, same = Augmenter(AugmentationConfig(), PATCH, 2, 2).apply(image.clone(), label, neutral(2, 2))
    torch.testing.assert_close(found, minmax(image), atol=1e-6, rtol=0)
    assert torch.equal(same, label)


def one(drawn: Draws, i: int) -> Draws:
    """The draws of one sample."""
    def part(value: Any) -> Any:
        if isinstance(value, IntensityParameters):
            return IntensityParameters(**{f.name: getattr(value, f.name)[i: i + 1] for f in dataclasses.fields(value)})
        return None if value is None else value[i: i + 1]
    return Draws(**{f.name: part(getattr(drawn, f.name)) for f in dataclasses.fields(drawn)})


@pytest.mark.parametrize("recipe", [AugmentationConfig(elastic_probability=0.5), AugmentationConfig.nnunet()])
def test_a_sample_does_not_depend_on_the_others(recipe: AugmentationConfig) -> None:
    image, label = images(8, 2)
    normals = torch.randn(8, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = draws(uniforms(8, 2), normals, recipe, PATCH, 2)
    augmenter = Augmenter(recipe, PATCH, 2, 8)
    found, labels = augmenter.apply(image.clone(), label, drawn)
    lowest, highest = found.flatten(1).aminmax(dim=1)
    assert 0 <= lowest.min() <= lowest.max() < 1e-6
    assert 1 - 1e-6 < highest.min() <= highest.max() <= 1
    for i in range(8):
        alone, alone_label = augmenter.apply(image[i: i + 1].clone(), label[i: i + 1], one(drawn, i))
        torch.testing.assert_close(alone[0], found[i], atol=1e-5, rtol=0)
        assert torch.equal(alone_label[0], labels[i])


@pytest.mark.parametrize("gibbs", [False, True])
def test_threads_decide_nothing_but_rounding_of_the_fft(gibbs: bool) -> None:
    """MKL's FFT, which Gibbs ringing calls, adds in another order with other threads on some processors.

    An FFT over n values is off by some log2(n) roundings of its largest value, here of 13 bits in all there and back; what comes
    after it, gamma and sharpening above all, makes that 30 times as much at most.
    """
    image, label = images(4, 2)
    drawn = everything(4, 2)
    if not gibbs:
        drawn = dataclasses.replace(drawn, gibbs_alpha=torch.zeros(4))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(Augmenter(AugmentationConfig(), PATCH, 2, 4).apply(image.clone(), label, drawn))
    finally:
        torch.set_num_threads(before)
    if gibbs:
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=30 * 2 * 13 * 2**-24)
    else:
        assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.int16])
@pytest.mark.parametrize("plain", [True, False])
def test_stored_numbers_are_read(dtype: torch.dtype, plain: bool) -> None:
    image, label = images(2)
    stored = (image * 32767).round().short() if dtype == torch.int16 else image.half()
    value = stored.float() / 32767 if dtype == torch.int16 else stored.float()
    drawn = neutral(2) if plain else everything(2)
    augmenter = Augmenter(AugmentationConfig(), PATCH, 1, 2)
    found, want = augmenter.apply(stored, label, drawn)[0], augmenter.apply(value, label, drawn)[0]
    torch.testing.assert_close(found, want, atol=2e-6 if plain else 1e-4, rtol=0)


# --- recipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"noise_probability": 1.1}, "noise_probability"), ({"gamma": (0, 1)}, "at least 0.01 and at most 100"),
    ({"scale": (1.2, 0.8)}, "low <= high"), ({"flip_axes": (3,)}, "flip_axes"), ({"rotate90_turns": ()}, "rotate90_turns"),
    ({"shear": (0.1,)}, "two numbers"), ({"low_resolution_zoom": (0.5, 1.5)}, "at most 1"),
    ({"gibbs_alpha": (-0.1, 0.3)}, "at least 0"), ({"contrast": (-1, 1)}, "at least 0"),
    ({"elastic_control_points": 3}, "from 4 to 64"), ({"rotation_axes": ()}, "rotation_axes"),
    ({"mirror": "no"}, "true or false"), ({"gamma": "high"}, "two numbers"), ({"mirror_axes": (0.5,)}, "mirror_axes")])
def test_bad_augmentation(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AugmentationConfig(**settings)


def test_recipes_by_name() -> None:
    assert AugmentationConfig.named("dropgen") == AugmentationConfig()
    assert AugmentationConfig.named("off").flipping is False
    assert AugmentationConfig.named("nnunet", (40, 192, 160)).rotation_axes == (0,)
    with pytest.raises(InputError, match="recipe must be one of dropgen, nnunet, off, got 'nn'"):
        AugmentationConfig.named("nn")
    assert AugmentationConfig().changed({"gamma": [0.7, 1.5]}, "here").gamma == (0.7, 1.5)
    with pytest.raises(InputError, match=r"here has unknown settings \['gama'\]"):
        AugmentationConfig().changed({"gama": [0.7, 1.5]}, "here")
    with pytest.raises(InputError, match="here: gamma must be two numbers"):
        AugmentationConfig().changed({"gamma": 2}, "here")
