"""`intensity_chain` against the transforms of MONAI and batchgeneratorsv2, voxel by voxel, fed the same parameters.

They run in float64; ours may be as far from them as float32 makes it (intensity_chain_cases.py).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from intensity_chain_cases import STAGES, check, draw, draw_image, expected, only
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from monai.transforms import AdjustContrast, RandBiasField, RandGaussianNoise, RandRicianNoise, ScaleIntensity

from dropgen_fast.kernels.intensity_chain import IntensityParameters, intensity_chain, reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
SAMPLES, CHANNELS, SIZE = 2, 2, (6, 7, 9)


def noise(p: IntensityParameters, n: int, stream: int) -> Tensor:
    return reference.standard_normal(p.seed[n:n + 1], (CHANNELS, *SIZE), stream, dtype=torch.float64)[0]


def gaussian_noise(x: Tensor, p: IntensityParameters, n: int) -> Tensor:
    transform = RandGaussianNoise(prob=1, dtype=np.float64)
    transform._do_transform = True
    transform.noise = (p.noise_std[n].double() * noise(p, n, 0)).numpy()
    return transform(x, randomize=False)


class Given:
    """Stands in for NumPy's generator: hands out fields that were drawn before."""

    def __init__(self, *fields: Tensor) -> None:
        self.fields = list(fields)

    def normal(self, mean: float, std: float, size: tuple[int, ...]) -> Any:
        field = self.fields.pop(0)
        assert tuple(field.shape) == tuple(size)
        return mean + std * field.numpy()


def rician_noise(x: Tensor, p: IntensityParameters, n: int) -> Tensor:
    transform = RandRicianNoise(prob=1, std=float(p.rician_std[n]), sample_std=False, dtype=np.float64)
    transform._do_transform = True
    transform.R = Given(noise(p, n, 1), noise(p, n, 2))
    return transform(x, randomize=False)


def bias_field(x: Tensor, p: IntensityParameters, n: int) -> Tensor:
    transform = RandBiasField(degree=3, prob=1, dtype=np.float64)
    transform._do_transform = True
    transform._coeff = p.bias[n].tolist()
    return transform(x, randomize=False)


def adjust_contrast(x: Tensor, p: IntensityParameters, n: int) -> Tensor:
    return AdjustContrast(gamma=float(p.gamma[n]))(x)


def brightness(x: Tensor, p: IntensityParameters, n: int) -> Tensor:
    transform = MultiplicativeBrightnessTransform((0.5, 2.0), False)
    return transform._apply_to_image(x.clone(), apply_to_channel=torch.arange(CHANNELS), multipliers=p.brightness[n])


def contrast(x: Tensor, p: IntensityParameters, n: int) -> Tensor:
    transform = ContrastTransform((0.5, 2.0), preserve_range=True, synchronize_channels=False)
    return transform._apply_to_image(x.clone(), apply_to_channel=torch.arange(CHANNELS), multipliers=p.contrast[n].double())


def scale_intensity(x: Tensor, p: IntensityParameters, n: int) -> Tensor:
    return ScaleIntensity(0.0, 1.0, dtype=np.float64)(x)


THEIRS = {"noise_std": gaussian_noise, "rician_std": rician_noise, "bias": bias_field, "gamma": adjust_contrast,
          "brightness": brightness, "contrast": contrast, "rescale": scale_intensity}


def theirs(image: Tensor, p: IntensityParameters, *stages: str) -> Tensor:
    """Their transforms one after the other, sample by sample."""
    samples = list(image.double())
    for stage in stages:
        samples = [torch.as_tensor(THEIRS[stage](x, p, n)) for n, x in enumerate(samples)]
    return torch.stack(samples)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [SIZE, (1, 5, 6)])
def test_each(backend: str, stage: str, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """An axis of one voxel too, whose coordinate NumPy's linspace puts at -1."""
    monkeypatch.setattr(f"{__name__}.SIZE", size)
    image, p = draw_image(SAMPLES, CHANNELS, size) - 0.2, only(draw(SAMPLES, CHANNELS), stage)
    _, bound = expected(image, p)
    check(intensity_chain(image, p, backend=backend), theirs(image, p, stage), bound)


def test_gamma_of_a_small_range(backend: str) -> None:
    """Where the number that AdjustContrast adds to the range counts."""
    image, p = draw_image(SAMPLES, CHANNELS, SIZE) * 1e-6, only(draw(SAMPLES, CHANNELS), "gamma")
    _, bound = expected(image, p)
    check(intensity_chain(image, p, backend=backend), theirs(image, p, "gamma"), bound)


def test_all_in_order(backend: str) -> None:
    image, p = draw_image(SAMPLES, CHANNELS, SIZE), draw(SAMPLES, CHANNELS)
    _, bound = expected(image, p)
    check(intensity_chain(image, p, backend=backend), theirs(image, p, *STAGES), bound)
