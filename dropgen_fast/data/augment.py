"""What is done to a batch once it is read, flipped and turned: from the numbers that DALI drew to augmented images and labels.

In the order of the DropGen paper: low resolution, noise (Gaussian, Rician), bias field, Gibbs ringing, gamma, brightness,
contrast, smoothing, sharpening, affine with elastic deformation, and rescaling to [0, 1]. Nothing is drawn here: the same
numbers give the same voxels. Only the samples that were chosen for a step are touched by it, and what was drawn is known on the
host, so that on a GPU nothing waits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.data.transforms import gaussian_sharpen, gaussian_smooth, gibbs_ringing, is_smoothed, low_resolution
from dropgen_fast.errors import InputError
from dropgen_fast.kernels.intensity_chain import BIAS_TERMS, IntensityParameters, intensity_chain
from dropgen_fast.kernels.warp import warp

Chain = Callable[[Tensor, IntensityParameters], Tensor]
ChainName = Literal["fused", "dali"]


@dataclass(frozen=True)
class Draws:
    """The parameters of one batch, on the CPU; the neutral value of each leaves a sample as it is."""

    zoom: Tensor
    """(N,) factor on the number of voxels of the low resolution; neutral 1."""
    intensity: IntensityParameters
    """Noise, bias field, gamma, brightness and contrast; nothing is rescaled yet."""
    gibbs_alpha: Tensor
    """(N,) share of the radius in k-space; neutral 0."""
    smooth_sigma: Tensor
    """(N, 3) voxels; neutral 0."""
    sharpen_sigma1: Tensor
    """(N, 3) voxels."""
    sharpen_sigma2: Tensor
    """(N, 3) voxels."""
    sharpen_alpha: Tensor
    """(N,); neutral 0."""
    matrix: Tensor
    """(N, 3, 4) float32 from output to input voxels; neutral the identity."""
    displacement: Tensor | None
    """(N, 3, d, h, w) voxels; None where no sample is deformed."""


def uniforms_per_sample(channels: int) -> int:
    """How many uniform numbers `draws` takes for each sample of so many channels."""
    cursor = _Uniforms(torch.zeros(1, 1), counting=True)
    _draw(cursor, None, AugmentationConfig(), (1, 1, 1), channels)
    return cursor.used


def draws(uniforms: Tensor, normals: Tensor | None, config: AugmentationConfig, patch: Sequence[int], channels: int) -> Draws:
    """The parameters that uniform numbers in [0, 1) stand for.

    Args:
        uniforms: (N, `uniforms_per_sample(channels)`) float32 on the CPU.
        normals: (N, 3, g, g, g) standard normal numbers on the CPU, for elastic deformation; None where that is off.
        config: probabilities and ranges.
        patch: voxels (D, H, W).
        channels: image channels.
    """
    return _draw(_Uniforms(uniforms), normals, config, patch, channels)


class _Uniforms:
    """Hands out columns of the uniform numbers, from left to right."""

    def __init__(self, numbers: Tensor, *, counting: bool = False) -> None:
        self._numbers, self._counting, self.used = numbers.double(), counting, 0

    def take(self, count: int) -> Tensor:
        """The next columns, (N, count) float64."""
        start, self.used = self.used, self.used + count
        return self._numbers.new_zeros(1, count) if self._counting else self._numbers[:, start:self.used]

    def chosen(self, probability: float) -> Tensor:
        """(N, 1) bool."""
        return self.take(1) < probability

    def between(self, low_high: tuple[float, float], count: int) -> Tensor:
        """(N, count) uniform between two numbers."""
        low, high = low_high
        return self.take(count) * (high - low) + low

    def maybe(self, probability: float, low_high: tuple[float, float], count: int, neutral: float) -> Tensor:
        """(N, count) float32: uniform between two numbers for the samples that a coin chooses, else the neutral value."""
        chosen = self.chosen(probability)
        return torch.where(chosen, self.between(low_high, count), neutral).float()


def _draw(uniform: _Uniforms, normals: Tensor | None, config: AugmentationConfig, patch: Sequence[int], channels: int) -> Draws:
    zoom = uniform.maybe(config.low_resolution_probability, config.low_resolution_zoom, 1, 1.0)[:, 0]
    seed = (uniform.take(2) * 2**24).long()
    intensity = IntensityParameters(
        seed=seed[:, 0] << 24 | seed[:, 1],
        noise_std=uniform.maybe(config.noise_probability, config.noise_std, 1, 0.0)[:, 0],
        rician_std=uniform.maybe(config.rician_probability, config.rician_std, 1, 0.0)[:, 0],
        bias=uniform.maybe(config.bias_field_probability, config.bias_field_coefficient, len(BIAS_TERMS), 0.0),
        gamma=uniform.maybe(config.gamma_probability, config.gamma, 1, 1.0)[:, 0],
        brightness=uniform.maybe(config.brightness_probability, config.brightness, channels, 1.0),
        contrast=uniform.maybe(config.contrast_probability, config.contrast, channels, 1.0),
        rescale=torch.zeros(len(zoom), dtype=torch.bool))
    gibbs_alpha = uniform.maybe(config.gibbs_probability, config.gibbs_alpha, 1, 0.0)[:, 0]
    smooth_sigma = uniform.maybe(config.smooth_probability, config.smooth_sigma_voxels, 3, 0.0)
    sharpen_sigma1 = uniform.between(config.sharpen_sigma1_voxels, 3).float()
    low, high = (sharpen_sigma1.clamp(max=sigma) for sigma in config.sharpen_sigma2_voxels)
    sharpen_sigma2 = low + uniform.take(3).float() * (high - low)
    sharpen_alpha = uniform.maybe(config.sharpen_probability, config.sharpen_alpha, 1, 0.0)[:, 0]
    matrix = _draw_matrix(uniform, config, patch)
    deformed = uniform.chosen(config.elastic_probability)
    std = torch.where(deformed, uniform.between(config.elastic_std_voxels, 1), 0.0)
    displacement = None
    if normals is not None and bool(deformed.any()):
        displacement = smooth_displacement(normals * std[:, :, None, None, None].float(), patch)
    return Draws(zoom, intensity, gibbs_alpha, smooth_sigma, sharpen_sigma1, sharpen_sigma2, sharpen_alpha, matrix, displacement)


def _draw_matrix(uniform: _Uniforms, config: AugmentationConfig, patch: Sequence[int]) -> Tensor:
    chosen = uniform.chosen(config.affine_probability)
    angles = uniform.between(config.rotation_rad, 3)
    for axis in {0, 1, 2} - set(config.rotation_axes):
        angles[:, axis] = 0
    shear, scale = uniform.between(config.shear, 6), uniform.between(config.scale, 3)
    if config.isotropic_scale:
        scale = scale[:, :1].expand(-1, 3)
    matrix = affine_matrix(angles, shear, scale, patch)
    identity = torch.eye(3, 4, dtype=matrix.dtype)
    return torch.where(chosen[:, :, None], matrix, identity).float()


def affine_matrix(rotation_rad: Tensor, shear: Tensor, scale: Tensor, patch: Sequence[int]) -> Tensor:
    """Matrices (N, 3, 4) from output to input voxels about the centre, as MONAI's `RandAffine`: Rx · Ry · Rz · shear · scale.

    The shear is one matrix with six entries off the diagonal, row by row, as in the MONAI release that the paper's code pins
    (1.5); later ones multiply six elementary shears.

    Args:
        rotation_rad: (N, 3) angles about axes 0, 1, 2.
        shear: (N, 6).
        scale: (N, 3) factors along axes 0, 1, 2; above 1 shows more of the volume.
        patch: voxels (D, H, W).
    """
    count = len(rotation_rad)
    sine, cosine = rotation_rad.sin(), rotation_rad.cos()
    linear = torch.eye(3, dtype=rotation_rad.dtype).expand(count, 3, 3)
    for axis in range(3):
        turn = torch.eye(3, dtype=rotation_rad.dtype).repeat(count, 1, 1)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[:, i, i] = turn[:, j, j] = cosine[:, axis]
        turn[:, i, j], turn[:, j, i] = -sine[:, axis], sine[:, axis]
        linear = linear @ turn
    sheared = torch.eye(3, dtype=shear.dtype).repeat(count, 1, 1)
    sheared[:, ~torch.eye(3, dtype=torch.bool)] = shear
    linear = linear @ sheared * scale[:, None, :]
    center = (torch.tensor(list(patch), dtype=linear.dtype) - 1) / 2
    return torch.cat([linear, (center - linear @ center)[:, :, None]], dim=2)


SPLINE_STEP = 4
"""Voxels between the points at which the spline is evaluated; in between the gather interpolates linearly."""


def smooth_displacement(control: Tensor, patch: Sequence[int]) -> Tensor:
    """Displacements (N, 3, d, h, w), every few voxels of a patch, of a cubic B-spline with `control` points (N, 3, g, g, g).

    The first and the last control point lie on the patch's outer faces and are repeated beyond them. A B-spline stays within
    its control points and is twice differentiable, so that a moderate displacement folds nothing (Rueckert et al. 1999,
    doi 10.1109/42.796284).
    """
    field = control
    for axis, size in enumerate(patch):
        points = -(-size // SPLINE_STEP)
        weights = _spline_weights(points, control.shape[2 + axis]).to(control)
        field = torch.tensordot(field, weights, dims=([2], [1]))  # the axis that is done goes to the end, three times round
    return field


def _spline_weights(points: int, controls: int) -> Tensor:
    """(points, controls): weights of the control points at the centres of `points` equal parts of the patch's edge."""
    position = (torch.arange(points, dtype=torch.float64) + 0.5) / points * (controls - 1)
    left = position.floor().clamp(max=controls - 2)
    t = position - left
    basis = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], dim=1) / 6
    index = (left.long()[:, None] + torch.arange(-1, 3)).clamp(0, controls - 1)
    return torch.zeros(points, controls, dtype=torch.float64).scatter_add_(1, index, basis)


class Augmenter:
    """Augments batches of one shape: `augmenter(image, label, uniforms, normals)`.

    Args:
        config: probabilities and ranges.
        patch: voxels (D, H, W).
        channels: image channels.
        batch_size: the most samples of a batch.
        chain: what does noise, bias field, gamma, brightness, contrast and the rescaling: "fused", the op `intensity_chain`, or
            "dali", one DALI operator after the other. They give the same voxels.
        device: index of the GPU that holds the batches; None: the CPU.
        num_threads: CPU threads of DALI's chain.

    Raises:
        InputError: there is no such chain.
    """

    def __init__(self, config: AugmentationConfig, patch: tuple[int, int, int], channels: int, batch_size: int,
                 chain: ChainName = "fused", device: int | None = None, num_threads: int = 2) -> None:
        self._config, self._patch, self._channels = config, patch, channels
        if chain not in get_args(ChainName):
            raise InputError(f"chain must be {' or '.join(get_args(ChainName))}, got {chain!r}")
        self._chain: Chain = intensity_chain
        if chain == "dali":
            from dropgen_fast.data.dali_chain import DaliIntensityChain

            where = "cpu" if device is None else f"cuda:{device}"
            dali = DaliIntensityChain(batch_size, channels, patch, where, num_threads=num_threads)
            self._chain = lambda image, parameters: dali(as_float(image), parameters)

    @torch.no_grad()
    def __call__(self, image: Tensor, label: Tensor, uniforms: Tensor, normals: Tensor | None) -> tuple[Tensor, Tensor]:
        """Augmented image (N, C, D, H, W) float32 in [0, 1] and label (N, 1, D, H, W), on the device of `image`.

        Args:
            image: (N, C, D, H, W), a number type of the store.
            label: (N, 1, D, H, W) uint8.
            uniforms: (N, `uniforms_per_sample(C)`) in [0, 1), float32 on the CPU.
            normals: (N, 3, g, g, g) standard normal on the CPU; None where elastic deformation is off.
        """
        return self.apply(image, label, draws(uniforms, normals, self._config, self._patch, self._channels))

    def apply(self, image: Tensor, label: Tensor, drawn: Draws) -> tuple[Tensor, Tensor]:
        """The same from drawn parameters."""
        like_monai = self._config.like_monai
        if bool((drawn.zoom != 1).any()):
            image = low_resolution(as_float(image), drawn.zoom, like_monai=like_monai)
        intensity = drawn.intensity
        ringing = drawn.gibbs_alpha > 0
        if bool(ringing.any()):
            before, intensity = self._cut_in_two(intensity, ringing)
            image = gibbs_ringing(self._chain(image, before), drawn.gibbs_alpha, like_monai=like_monai)
        moved = (drawn.matrix != torch.eye(3, 4, dtype=torch.float32, device="cpu")).flatten(1).any(1)
        if drawn.displacement is not None:
            moved |= drawn.displacement.flatten(1).any(1)
        later = moved | is_smoothed(drawn.smooth_sigma) | (drawn.sharpen_alpha > 0)
        image = self._chain(image, dataclasses.replace(intensity, rescale=~later))
        if bool(later.any()):
            image = gaussian_smooth(image, drawn.smooth_sigma)
            image = gaussian_sharpen(image, drawn.sharpen_sigma1, drawn.sharpen_sigma2, drawn.sharpen_alpha)
            if bool(moved.any()):
                image, warped = warp(image, label, drawn.matrix, drawn.displacement)
                assert warped is not None, "there is a label"
                label = warped
            neutral = IntensityParameters.neutral(len(image), self._channels)
            image = self._chain(image, dataclasses.replace(neutral, rescale=later))
        return image, label

    def _cut_in_two(self, intensity: IntensityParameters, ringing: Tensor) -> tuple[IntensityParameters, IntensityParameters]:
        """What the intensity chain does before Gibbs ringing, to the samples (N,) that ring, and what is left for after it."""
        neutral = IntensityParameters.neutral(len(ringing), self._channels)
        before, after = {}, {}
        for name in ("noise_std", "rician_std", "bias"):
            value, off = getattr(intensity, name), getattr(neutral, name)
            chosen = ringing.view(-1, *[1] * (value.dim() - 1))
            before[name], after[name] = torch.where(chosen, value, off), torch.where(chosen, off, value)
        return dataclasses.replace(neutral, seed=intensity.seed, **before), dataclasses.replace(intensity, **after)


def as_float(image: Tensor) -> Tensor:
    """Stored numbers as float32: float16 as it is, int16 in units of 1 / 32767."""
    if image.dtype == torch.float32:
        return image
    return intensity_chain(image, IntensityParameters.neutral(image.shape[0], image.shape[1]))
